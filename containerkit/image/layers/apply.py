"""Applying a layer to a tree that holds all the layers below it already.

For drivers whose trees are whole. The same tar gives the same merged tree as :class:`Extractor` and overlay together;
deletions are done at once instead of being marked, so no special file and no privileged attribute is needed. A deletion
speaks of lower layers only, wherever it stands in the tar: what this layer has made itself stays.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import KernelError
from containerkit.image.layers.attributes import Attributes, read_attributes, set_xattrs
from containerkit.image.layers.extract import NOT_THERE, OPEN_DIRECTORY, STRICT, Extractor
from containerkit.image.layers.members import join
from containerkit.image.layers.merged import MergedView
from containerkit.image.layers.pathmap import PathMap
from containerkit.image.layers.rootless import as_own, is_rootless
from containerkit.linux.paths import DIRECTORY, fd_path, openat2

if TYPE_CHECKING:
    from containerkit.image.layers.filewriters import FileWriters
    from containerkit.image.layers.layer import Entry

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
        self._is_rootless = is_rootless()
        if self._is_rootless:
            self._default = Attributes(uid=self._owner[0], gid=self._owner[1])
        self._made = PathMap[None]()  # what this layer has made, or has made something below
        self._made[b""] = None
        self._entered = PathMap[None]()  # directories that are plain now
        self._pruned = PathMap[None]()  # directories without anything of a lower layer
        if below is not None:
            self._directories[b""] = below
        self._plain(self._root, b"")

    def hand_files_to(self, writers: FileWriters) -> None:
        """Nothing is handed over: every file may take the place of one of a lower layer, of whatever kind."""

    def _unpack(self, entry: Entry) -> None:
        super()._unpack(as_own(entry, self._owner) if self._is_rootless else entry)

    def _own(self, path: bytes) -> None:
        while path not in self._made:
            self._made[path] = None
            path = path.rpartition(b"/")[0]

    def _make_directory(self, path: bytes, base: bytes, dir_fd: int) -> None:
        self._enter_directory(path.rpartition(b"/")[0])
        try:
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(base, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                self._enter_directory(path)
            else:
                self._clear(path, base, dir_fd)
                os.mkdir(base, 0o700, dir_fd=dir_fd)

    def _enter(self, head: bytes) -> tuple[int, bytes]:
        try:
            fd, real = super()._enter(head)
        except OSError as error:
            if error.errno != errno.EACCES:
                raise
            self._open_way(head)
            fd, real = super()._enter(head)
        self._enter_directory(real)
        return fd, real

    def _open_way(self, path: bytes) -> None:
        """Make plain all directories on the way that are there: what a mode forbids its owner, too."""
        way = b""
        for part in path.split(b"/"):
            way = join(way, part)
            try:
                self._enter_directory(way)
            except KernelError as error:
                if error.errno not in NOT_THERE:
                    raise
                return

    def _enter_directory(self, path: bytes) -> None:
        """Before anything changes in a directory: note what it has, and let it hand nothing on to new files."""
        if path in self._entered:
            return
        fd = openat2(self._root, path, DIRECTORY, resolve=STRICT)
        try:
            if path not in self._directories:
                status = os.fstat(fd)
                if self._is_rootless:
                    os.chmod(fd_path(fd), 0o700)
                attributes = read_attributes(fd_path(fd, b"."), status)
                self._reader.hold(attributes.xattrs)
                self._directories[path] = attributes
            self._plain(fd, path)
        finally:
            os.close(fd)

    def _plain(self, fd: int, path: bytes) -> None:
        place = fd_path(fd)
        os.chmod(place, 0o700)
        for name in os.listxattr(place):
            if name.startswith(_POSIX_ACL):
                os.removexattr(place, name)
        self._entered[path] = None

    def _in_the_way(self, path: bytes, status: os.stat_result) -> bool:
        return path not in self._made and not stat.S_ISDIR(status.st_mode)

    def _view(self) -> MergedView:
        if self._merged is None:
            self._merged = MergedView([self._path])
        return self._merged

    def _hide(self, path: bytes, name: bytes, dir_fd: int) -> None:
        try:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if path not in self._made:
            self._clear(path, name, dir_fd)
        elif stat.S_ISDIR(status.st_mode):
            self._prune(path)

    def _hide_below(self, path: bytes, name: bytes, dir_fd: int) -> None:  # noqa: ARG002 - overlay's mark needs them
        self._prune(path)

    def _hide_all(self) -> None:
        self._prune(b"")

    def _prune(self, directory: bytes) -> None:
        """Delete what lower layers have below a directory, and nothing else."""
        done = [directory]
        for path in done:
            if path in self._pruned:
                continue
            if self._is_rootless:
                self._enter_directory(path)
            fd = openat2(self._root, path or b".", OPEN_DIRECTORY, resolve=STRICT)
            try:
                for name in map(os.fsencode, os.listdir(fd)):
                    inner = join(path, name)
                    if inner not in self._made:
                        self._enter_directory(path)
                        self._clear(inner, name, fd)
                    elif stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                        done.append(inner)
            finally:
                os.close(fd)
        for path in done:
            self._pruned[path] = None

    def _clear(self, path: bytes, base: bytes, dir_fd: int) -> None:
        super()._clear(path, base, dir_fd)
        self._made.drop(path)
        self._entered.drop(path)
        self._pruned.drop(path)

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
