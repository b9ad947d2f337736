"""The layer store: unpacked layers by chain id."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.image.store.leases import LAYER, bring, hold
from containerkit.linux.owned import rename_directory
from containerkit.linux.paths import rename_noreplace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.image.digest import Digest


class LayerStore:
    """Unpacked layers: ``ROOT/layers/HEX``, where HEX is the chain id's. What is there is whole."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._layers = os.path.join(root, "layers")

    def path(self, chain_id: Digest) -> str:
        """Where the layer is, or would be."""
        return os.path.join(self._layers, chain_id.hex)

    def has(self, chain_id: Digest) -> bool:
        """Whether the layer is there; it stays so under a lease (:mod:`.leases`)."""
        hold(self._root, LAYER, chain_id)
        return os.path.isdir(self.path(chain_id))

    def commit(self, directory: str, chain_id: Digest) -> bool:
        """Make an unpacked directory the layer ``chain_id``; False where another process came first."""
        bring(self._root, LAYER, chain_id)
        return rename_directory(lambda: rename_noreplace(directory, self.path(chain_id)), directory)

    def keys(self) -> Iterator[str]:
        """The hexadecimal chain ids of all layers."""
        return iter(os.listdir(self._layers))
