"""Copy: each layer a full tree, made from a copy of the one below.

Where the file system shares blocks between files (xfs, btrfs, bcachefs) a copy costs only its inodes; elsewhere it
costs all that the layers below hold. Needs neither mounts nor special files, so it works on any file system, an
overlay too, and needs no privileges: what an ordinary user gets is :mod:`containerkit.image.layers.rootless`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from containerkit.errors import KernelError
from containerkit.image.drivers.overlay import topmost
from containerkit.image.layers.apply import Applier
from containerkit.linux.clone import clone_tree
from containerkit.linux.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Sequence


class Copy:
    """Full copies."""

    name = "copy"
    whole = True

    def probe(self, directory: str) -> None:
        """Works everywhere."""

    def start(self, directory: str, below: str | None) -> None:
        """A copy of ``below``."""
        if below is None:
            os.mkdir(directory, 0o700)
        else:
            clone_tree(below, directory)

    def extractor(self, directory: str, below: Sequence[str] | None) -> Applier:
        """Deletions are done at once."""
        return Applier(directory, new=not below)

    def view(self, trees: Sequence[str]) -> int:
        """The topmost tree, which holds all others."""
        try:
            return topmost(trees)
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
            hint = "only root mounts; the tree itself can be read: Image.lowers[0]"
            raise KernelError(error.operation, errno.EPERM, error.path, hint=hint) from error

    def remove(self, directory: str) -> None:
        """The whole tree."""
        remove_tree(directory)
