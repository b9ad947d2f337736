"""The directories that a layer's entries lie in, held open under the names that the entries give them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.image.layers.members import is_below

if TYPE_CHECKING:
    from collections.abc import Collection

MOST = 64
SHARE = 16  # eight layers at a time may hold half of what a process may open


class Parents:
    """Descriptors and true paths by name, of one tree, whose root is open as ``root`` and not closed here.

    A name that leads through a symlink is held until something changes that bears the name of what lies on its way.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._held: dict[bytes, tuple[int, bytes]] = {b"": (root, b"")}
        #: Descriptor and true path of what is held under a name, else None.
        self.get = self._held.get
        self._most = max(1, min(MOST, os.sysconf("SC_OPEN_MAX") // SHARE))
        self._through: list[bytes] = []  # the names that lead through a symlink
        self._on_the_way: set[bytes] = set()  # the last components of all paths that those lead through

    @property
    def full(self) -> bool:
        """Whether as many are held as may be."""
        return len(self._held) > self._most

    def hold(self, head: bytes, fd: int, real: bytes, on_the_way: Collection[bytes] = ()) -> None:
        """Keep a descriptor under the name ``head``, which leads through ``on_the_way`` to the true path ``real``."""
        self._held[head] = fd, real
        if head != real:
            self._through.append(head)
            self._on_the_way.update(on_the_way)

    def changed(self, base: bytes) -> None:
        """Something of this name was made, replaced or hidden."""
        if base in self._on_the_way:
            self.forget_links()

    def forget_links(self) -> None:
        """Let go of what was found through symlinks."""
        for head in self._through:
            self._forget(head)
        self._through.clear()
        self._on_the_way.clear()

    def forget_tree(self, path: bytes) -> None:
        """The directory at this true path is gone, with all below it."""
        for head, (_, real) in list(self._held.items()):
            if real == path or is_below(real, path):
                self._forget(head)

    def forget(self) -> None:
        """Let go of all but the root."""
        for head in list(self._held):
            if head:
                self._forget(head)
        self._through.clear()
        self._on_the_way.clear()

    def _forget(self, head: bytes) -> None:
        fd, _ = self._held.pop(head, (self._root, b""))
        if fd != self._root:
            os.close(fd)
