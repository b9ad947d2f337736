"""Snapshots: unpacked layers by chain id, and how they are mounted one upon another."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

from containerkit.linux.paths import rename_noreplace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from containerkit.image.digest import Digest
    from containerkit.linux.fileview import Mount


class Snapshot(NamedTuple):
    """A view of files: its key, the chain id of what lies below (or nothing), and the mounts that show it."""

    key: str
    parent: str
    mounts: tuple[Mount, ...]


class Snapshotter(Protocol):
    """A way to lay layers upon each other; :mod:`.overlay` is one."""

    def prepare(self, lowers: Sequence[str], upper: str, work: str) -> Mount:
        """The mount of a writable view: ``lowers`` top first, changes in ``upper``."""

    def view(self, lowers: Sequence[str]) -> Mount:
        """The mount of a read-only view."""


class LayerStore:
    """Unpacked layers: ``ROOT/layers/HEX``, where HEX is the chain id's. What is there is whole."""

    def __init__(self, root: str) -> None:
        self._layers = os.path.join(root, "layers")

    def path(self, chain_id: Digest) -> str:
        """Where the layer is, or would be."""
        return os.path.join(self._layers, chain_id.hex)

    def has(self, chain_id: Digest) -> bool:
        """Whether the layer is there."""
        return os.path.isdir(self.path(chain_id))

    def commit(self, directory: str, chain_id: Digest) -> bool:
        """Make an unpacked directory the layer ``chain_id``; False where another process came first."""
        return rename_noreplace(directory, self.path(chain_id))

    def keys(self) -> Iterator[str]:
        """The hexadecimal chain ids of all layers."""
        return iter(os.listdir(self._layers))
