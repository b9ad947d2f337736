"""Overlay's marks in a layer's tree, and dropping those that hide nothing.

The kernel filters marks out of a directory only where several layers merge: in one that is a single layer's, or opaque,
a mark is listed as a name that cannot be opened.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import KernelError
from containerkit.image.layers.members import join
from containerkit.image.layers.merged import OPAQUE, is_opaque, is_whiteout, level
from containerkit.image.layers.pathmap import PathMap
from containerkit.linux.paths import DIRECTORY, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, fd_path, openat2

if TYPE_CHECKING:
    from collections.abc import Sequence


class Marks:
    """The marks that were made in one tree, whose root is open as ``root``; paths are relative to it."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._whiteouts = PathMap[None]()
        self._opaque = PathMap[None]()

    def whiteout(self, path: bytes, name: bytes, dir_fd: int) -> None:
        """Hide what lower layers have at ``path``, which is ``name`` below ``dir_fd``.

        Raises ``FileExistsError`` where the tree has something there.
        """
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=dir_fd)
        self._whiteouts[path] = None

    def opaque(self, path: bytes, name: bytes, dir_fd: int) -> None:
        """Hide what lower layers have in the directory ``path``, which is ``name`` (or nothing) below ``dir_fd``."""
        os.setxattr(fd_path(dir_fd, name), OPAQUE, b"y")
        self._opaque[path] = None

    def drop(self, directory: bytes) -> None:
        """A directory is gone with all in it."""
        self._whiteouts.drop(directory)
        self._opaque.drop(directory)

    def drop_useless(self, lowers: Sequence[str]) -> None:
        """Take away those that hide nothing of ``lowers``, top first. No directory without a mark is looked at."""
        merging: dict[bytes, list[bytes]] = {b"": [os.fsencode(lower) for lower in lowers]}
        directories: dict[bytes, list[bytes]] = {}
        for path in self._whiteouts:
            head, _, name = path.rpartition(b"/")
            directories.setdefault(head, []).append(name)
        for path in sorted({*directories, *self._opaque}):
            try:
                fd = openat2(self._root, path or b".", DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
            except KernelError:  # an entry took its place
                continue
            try:
                self._drop_in(fd, path, self._below(path, merging), directories.get(path, []))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:  # too deep to look: the marks stay
                    raise
            finally:
                os.close(fd)

    def _drop_in(self, fd: int, path: bytes, below: list[bytes], names: list[bytes]) -> None:
        if path in self._opaque:
            if not below and is_opaque(fd_path(fd) + b"/."):
                os.removexattr(fd_path(fd), OPAQUE)
            below = []
        for name in names:
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if is_whiteout(status) and level(below, name)[0] is None:
                os.unlink(name, dir_fd=fd)

    def _below(self, path: bytes, merging: dict[bytes, list[bytes]]) -> list[bytes]:
        """The lower layers' directories that would merge at ``path`` if that were not opaque itself."""
        parts = path.split(b"/") if path else []
        at = b""
        for part in parts:
            above, at = at, join(at, part)
            if at not in merging:
                merging[at] = [] if above in self._opaque else level(merging[above], part)[1]
        return merging[path]
