"""Applying a layer to a tree that holds all the layers below it already.

For drivers whose trees are whole. The same tar gives the same merged tree as :class:`Extractor` and overlay together;
deletions are done at once instead of being marked, so no special file and no privileged attribute is needed. A deletion
speaks of lower layers only, wherever it stands in the tar: what this layer has made itself stays.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import UnsafeEntry
from containerkit.image import layer
from containerkit.image.attributes import read_attributes, set_xattrs
from containerkit.image.extract import OPEN_DIRECTORY, STRICT, WHITEOUT, WHITEOUT_META, WHITEOUT_OPAQUE, Extractor, join
from containerkit.image.merged import MergedView
from containerkit.linux.paths import openat2

if TYPE_CHECKING:
    from containerkit.image.attributes import Attributes
    from containerkit.image.layer import Entry

_POSIX_ACL = "system.posix_acl"
_LABEL = b"security.selinux"  # the host's policy gives and keeps it


class Applier(Extractor):
    """Unpacks one layer over the directory ``path``, which holds those below it; a context manager.

    ``new`` says that there are none. The calling thread must have the umask 0.
    """

    def __init__(self, path: str, *, new: bool = False) -> None:
        root = os.fsencode(path)
        below = None if new else read_attributes(root, os.lstat(root))
        super().__init__(path)
        self._owner = (os.geteuid(), os.getegid())
        self._made: set[bytes] = set()  # what this layer has made, or has made something below
        self._entered: set[bytes] = set()  # directories that are plain now
        if below is not None:
            self._directories[b""] = below
        self._plain(self._root, b"")

    def _file(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        super()._file(entry, base, dir_fd, real)
        self._made.add(join(real, base))

    def _symlink(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        super()._symlink(entry, base, dir_fd, real)
        self._made.add(join(real, base))

    def _node(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        if entry.kind == layer.CHARACTER and entry.device == 0:  # for overlay, a mark: the same here
            self._delete(base, dir_fd, real)
            return
        super()._node(entry, base, dir_fd, real)
        self._made.add(join(real, base))

    def _link(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        super()._link(entry, base, dir_fd, real)
        self._made.add(join(real, base))

    def _make_directory(self, base: bytes, dir_fd: int, real: bytes) -> None:
        path = join(real, base)
        self._enter_directory(real)
        try:
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(base, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                self._enter_directory(path)
            else:
                self._clear(base, dir_fd, real)
                os.mkdir(base, 0o700, dir_fd=dir_fd)
        self._made.add(path)

    def _enter(self, head: bytes) -> tuple[int, bytes]:
        real = super()._enter(head)[1]
        while real not in self._entered:  # and with it all its parents
            self._enter_directory(real)
            self._made.add(real)
            real = real.rpartition(b"/")[0]
        return self._parents[head]

    def _enter_directory(self, path: bytes) -> None:
        """Before anything changes in a directory: note what it has, and let it hand nothing on to new files."""
        if path in self._entered:
            return
        fd = openat2(self._root, path, OPEN_DIRECTORY, resolve=STRICT)
        try:
            if path not in self._directories:
                self._directories[path] = read_attributes(b"/proc/self/fd/%d/." % fd, os.fstat(fd))
            self._plain(fd, path)
        finally:
            os.close(fd)

    def _plain(self, fd: int, path: bytes) -> None:
        os.fchmod(fd, 0o700)
        for name in os.listxattr(fd):
            if name.startswith(_POSIX_ACL):
                os.removexattr(fd, name)
        self._entered.add(path)

    def _in_the_way(self, path: bytes, status: os.stat_result) -> bool:
        return path not in self._made and not stat.S_ISDIR(status.st_mode)

    def _view(self) -> MergedView:
        return MergedView([self._path])

    def _whiteout(self, base: bytes, dir_fd: int, real: bytes) -> None:
        if base == WHITEOUT_OPAQUE:
            self._prune(dir_fd, real)
            return
        name = base[len(WHITEOUT) :]
        if base.startswith(WHITEOUT_META):
            return
        if name in {b"", b".", b".."}:
            shown = os.fsdecode(join(real, base))
            raise UnsafeEntry(f"{shown!r} would delete a directory from inside", entry=shown)
        self._delete(name, dir_fd, real)

    def _delete(self, name: bytes, dir_fd: int, real: bytes) -> None:
        """Delete what lower layers have there, and nothing else."""
        path = join(real, name)
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return
        if path not in self._made:
            self._clear(name, dir_fd, real)
        elif stat.S_ISDIR(status.st_mode):
            fd = openat2(self._root, path, OPEN_DIRECTORY, resolve=STRICT)
            try:
                self._prune(fd, path)
            finally:
                os.close(fd)

    def _prune(self, dir_fd: int, real: bytes) -> None:
        for name in os.listdir(b"/proc/self/fd/%d" % dir_fd):
            self._delete(name, dir_fd, real)

    def _clear(self, base: bytes, dir_fd: int, real: bytes) -> None:
        gone = join(real, base)
        is_directory = stat.S_ISDIR(os.stat(base, dir_fd=dir_fd, follow_symlinks=False).st_mode)
        super()._clear(base, dir_fd, real)
        self._made.discard(gone)
        if is_directory:
            self._made = _without(self._made, gone)
            self._entered = _without(self._entered, gone)

    def _dress_directory(self, fd: int, attributes: Entry | Attributes) -> None:
        """A directory of a lower layer takes all that this one says of it, and keeps nothing else."""
        wanted = {name for name, _ in attributes.xattrs}
        for name in map(os.fsencode, os.listxattr(fd)):
            if name not in wanted and name != _LABEL:
                os.removexattr(fd, name)
        os.fchown(fd, attributes.uid, attributes.gid)
        os.fchmod(fd, attributes.mode)
        set_xattrs(fd, attributes.xattrs)
        os.utime(fd, ns=(attributes.atime, attributes.mtime))


def _without(paths: set[bytes], gone: bytes) -> set[bytes]:
    """The paths that are not ``gone`` and not below it."""
    below = gone + b"/"
    return {path for path in paths if path != gone and not path.startswith(below)}
