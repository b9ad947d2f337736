"""Unpacking one layer into its own directory, in overlay's form, without ever leaving it.

Every system call is relative to a descriptor of the parent directory, which was opened with no symlink on its way;
last components are created exclusively and never followed. A deleted file (``.wh.NAME``, or a character device 0:0)
becomes a character device 0:0, an opaque directory (``.wh..wh..opq``) gets ``trusted.overlay.opaque``; both speak of
lower layers only, wherever they stand in the tar, and are left out where those have nothing to hide. The attributes of
directories are set last.

A path through a symlink lands where the symlink leads inside the image, as it does for Docker and umoci, when this
layer or a lower one has that place. An entry without entries for its parents gets them with the attributes that
they have below.
"""

from __future__ import annotations

import errno
import os
import stat
from operator import itemgetter
from typing import TYPE_CHECKING

from containerkit.errors import CorruptLayer, KernelError, LayerError, UnsafeEntry
from containerkit.image.layers import layer
from containerkit.image.layers.attributes import Attributes, copy_file, read_attributes
from containerkit.image.layers.filewriters import LayerFiles, WriteFailed
from containerkit.image.layers.marks import Marks
from containerkit.image.layers.members import WHITEOUT, WHITEOUT_OPAQUE, clean, hidden_name, is_below, join, place
from containerkit.image.layers.merged import MergedView, is_whiteout, names_in, true_path
from containerkit.image.layers.nodes import dress, dress_node, make_node, unpacking_error, write_content
from containerkit.image.layers.parents import Parents
from containerkit.image.layers.pathmap import PathMap
from containerkit.linux.paths import CREATE, DIRECTORY, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2
from containerkit.linux.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from containerkit.image.layers.filewriters import FileWriters
    from containerkit.image.layers.layer import Entry, TarReader
    from containerkit.image.layers.merged import Found

STRICT = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


class LowersNeeded(Exception):
    """The layer refers to lower ones, which the caller has not given yet: start again with them."""


class Extractor:
    """Unpacks one layer into the new, empty directory ``path``; a context manager.

    ``lowers`` are the unpacked layers below, top first, or None where they are still being made. The calling thread
    must have the umask 0 (:func:`~containerkit.linux.paths.private_umask`).
    """

    def __init__(self, path: str, lowers: Sequence[str] | None = ()) -> None:
        self._path = path
        self._lowers = lowers
        self._root = os.open(path, OPEN_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(self._root)
        self._owner = (status.st_uid, status.st_gid)
        # A set-group-ID bit or a default ACL of the parent would go on to every file.
        os.fchmod(self._root, 0o700)
        self._parents = Parents(self._root)
        self._directories = PathMap["Attributes | Entry"]()
        self._default = Attributes()  # of directories without an entry that are nowhere below, either
        # What no entry of this layer has made, but only made necessary: directories without an entry, until something
        # of the layer comes into them, and what was copied from lower layers for hard links to it.
        self._borrowed = PathMap[None]()
        self._merged: MergedView | None = None
        self._emptied = False
        self._marks = Marks(self._root)
        self._files: LayerFiles | None = None
        self._kinds = {
            layer.FILE: self._file,
            layer.LINK: self._link,
            layer.SYMLINK: self._node,
            layer.DIRECTORY: self._directory,
            layer.CHARACTER: self._node,
            layer.BLOCK_DEVICE: self._node,
            layer.FIFO: self._node,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._files is not None:
            self._files.close()
        self._parents.forget()
        os.close(self._root)

    def hand_files_to(self, writers: FileWriters) -> None:
        """Have plain files written by other processes, before the first entry comes."""
        self._files = LayerFiles(writers, self._path)

    def unpack(self, reader: TarReader) -> None:
        """Unpack every entry. Raises :class:`CorruptLayer`, :class:`UnsafeEntry`, :class:`LowersNeeded`."""
        self._reader = reader
        try:
            while entry := reader.next():
                self._unpack_one(entry, reader)
            self._settle()
            self._parents.forget()  # the layers below may take a while
        except WriteFailed as failed:
            if failed.entry is None or not isinstance(failed.error, OSError):
                raise failed.error from None
            raise unpacking_error(failed.error, failed.entry) from failed.error

    def _unpack_one(self, entry: Entry, reader: TarReader) -> None:
        try:
            try:
                self._unpack(entry)
            except OSError as error:
                if error.errno != errno.EMFILE or error is reader.failure:
                    raise
                self._parents.forget()
                self._unpack(entry)  # what cannot be opened has changed nothing that is not done again
        except LayerError as error:
            error.entry = entry.display  # the message may speak of a directory on the way
            raise
        except OSError as error:
            if error is reader.failure:
                raise  # the stream broke, not the unpacking
            raise unpacking_error(error, entry) from error

    def _settle(self) -> None:
        """What other processes were given is there when this returns."""
        if self._files is not None and self._files.pending:
            self._files.settle()

    def _settle_path(self, path: bytes) -> None:
        if self._files is not None and path in self._files.pending:
            self._files.settle()

    def finish(self, lowers: Sequence[str]) -> None:
        """Set what directories have, and drop marks that hide nothing of ``lowers``, all that lies below, top first.

        A root without an entry takes after that of the topmost.
        """
        if b"" not in self._directories:
            root = os.fsencode(lowers[0]) if lowers else None
            self._directories[b""] = read_attributes(root, os.lstat(root)) if root else self._default
        self._marks.drop_useless(lowers)
        for path, attributes in sorted(self._directories.items(), key=itemgetter(0), reverse=True):
            try:
                fd = openat2(self._root, path or b".", OPEN_DIRECTORY, resolve=STRICT)
                try:
                    self._dress_directory(fd, attributes)
                finally:
                    os.close(fd)
            except OSError as error:
                raise unpacking_error(error, attributes, path) from error

    def _unpack(self, entry: Entry) -> None:
        head, base = place(entry)
        if base.startswith(WHITEOUT):
            self._whiteout_at(head, base)
            return
        dir_fd, real = self._parents.get(head) or self._enter_next(head)
        if not base:
            if entry.kind != layer.DIRECTORY:
                raise UnsafeEntry("the root of a layer must be a directory", entry=entry.display)
            self._directories[b""] = entry
        else:
            path = join(real, base)
            self._settle_path(path)
            self._kinds[entry.kind](entry, path, base, dir_fd)
            self._own(path)
            self._parents.changed(base)

    def _own(self, path: bytes) -> None:
        """An entry has made ``path``: the layer's own is that now, and with it each directory above it."""
        if self._borrowed:
            self._borrowed.discard(path)
            while (path := path.rpartition(b"/")[0]) in self._borrowed:
                self._borrowed.discard(path)

    def _file(self, entry: Entry, path: bytes, base: bytes, dir_fd: int) -> None:
        files = self._files
        if files and files.takes(entry) and path not in self._directories and path not in self._borrowed:
            files.add(entry, path, self._reader.pieces())
            return
        mode = entry.mode & 0o777
        try:
            fd = os.open(base, CREATE, mode, dir_fd=dir_fd)
        except FileExistsError:
            self._clear(path, base, dir_fd)
            fd = os.open(base, CREATE, mode, dir_fd=dir_fd)
        try:
            write_content(fd, entry, self._reader)
            dress(fd, entry, self._owner, mode)
        finally:
            os.close(fd)

    def _dress_directory(self, fd: int, attributes: Entry | Attributes) -> None:
        dress(fd, attributes, self._owner, 0o700)

    def _directory(self, entry: Entry, path: bytes, base: bytes, dir_fd: int) -> None:
        self._make_directory(path, base, dir_fd)
        self._directories[path] = entry

    def _make_directory(self, path: bytes, base: bytes, dir_fd: int) -> None:
        """Make it, or keep the one that is there. What it takes the place of makes it opaque."""
        try:
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            status = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return
            self._clear(path, base, dir_fd)
            os.mkdir(base, 0o700, dir_fd=dir_fd)
            self._marks.opaque(path, base, dir_fd)

    def _node(self, entry: Entry, path: bytes, base: bytes, dir_fd: int) -> None:
        try:
            make_node(entry, base, dir_fd)
        except FileExistsError:
            self._clear(path, base, dir_fd)
            make_node(entry, base, dir_fd)
        dress_node(entry, base, dir_fd, self._owner)

    def _link(self, entry: Entry, path: bytes, base: bytes, dir_fd: int) -> None:
        source_fd, source_path, source = self._link_source(entry)
        if source_path == path:
            return
        if is_below(source_path, path):
            raise CorruptLayer(f"{entry.display!r} is a hard link to what lies below itself", entry=entry.display)
        for _ in range(2):
            try:
                os.link(source, base, src_dir_fd=source_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
            except FileExistsError:
                self._clear(path, base, dir_fd)
            else:
                return

    def _link_source(self, entry: Entry) -> tuple[int, bytes, bytes]:
        """Parent, path and name of a hard link's target; what only a lower layer has is copied up first."""
        try:
            path = clean(entry.link)
        except UnsafeEntry:
            path = b""
        head, _, base = path.rpartition(b"/")
        if not base:
            raise UnsafeEntry(f"{entry.display!r} is a hard link out of the root", entry=entry.display)
        parent = self._parents.get(head)
        if parent:
            path = join(parent[1], base)
            self._settle_path(path)
            status = _status(base, parent[0])
            if status is not None and not is_whiteout(status):
                if stat.S_ISDIR(status.st_mode):
                    raise self._no_file(entry)
                return parent[0], path, base
        view = self._view()
        way = view.look(head)
        found = view.level(way, base)[0] if way is not None else None
        if way is None or found is None or stat.S_ISDIR(found.stat.st_mode):
            view.walk(head)  # for its errors
            raise self._no_file(entry)
        real_head = true_path(way)
        dir_fd, real = self._parents.get(real_head) or self._enter(real_head)
        path = join(real, base)
        if not _exists(base, dir_fd):
            self._copy_up(view, path, found, dir_fd)
        return dir_fd, path, base

    def _no_file(self, entry: Entry) -> LayerError:
        kind = UnsafeEntry if entry.link.startswith(b"/") else CorruptLayer
        target = os.fsdecode(entry.link)
        return kind(f"{entry.display!r} is a hard link to {target!r}, no file of the image", entry=entry.display)

    def _copy_up(self, view: MergedView, path: bytes, found: Found, dir_fd: int) -> None:
        """Copy a file of a lower layer, under all the names that the view shows it by; ``dir_fd`` is its directory."""
        names = view.names_of(path, found)
        base = path.rpartition(b"/")[2]
        for name in names[1:]:  # before anything is copied: there may be no room for one more descriptor
            os.close(self._materialize(name.rpartition(b"/")[0])[0])
        copy_file(found.path, found.stat, dir_fd, base)
        for name in names[1:]:
            os.link(base, name, src_dir_fd=dir_fd, dst_dir_fd=self._root, follow_symlinks=False)
        for name in names:
            self._borrowed[name] = None

    def _whiteout_at(self, head: bytes, base: bytes) -> None:
        """Carry out a whiteout where its directory is; where there is none it has nothing to do."""
        name = base if base == WHITEOUT_OPAQUE else hidden_name(head, base)
        parent = (self._parents.get(head) or self._enter_shown(head)) if name else None
        if parent is None:
            return  # umoci also deletes one by one what lay in a directory that is a file now
        if base != WHITEOUT_OPAQUE:
            self._hide(join(parent[1], name), name, parent[0])
            self._parents.changed(name)
            return
        if parent[1]:
            self._hide_below(parent[1], b"", parent[0])
        else:
            self._hide_all()
        self._parents.forget_links()

    def _enter_shown(self, head: bytes) -> tuple[int, bytes] | None:
        """The directory that the merged view has there, if any. A symlink out of the root is an error here, too."""
        try:
            os.close(openat2(self._root, head, DIRECTORY, resolve=STRICT))
        except KernelError as error:
            if error.errno not in NOT_THERE:
                raise
            view = self._view()
            view.walk(head)  # for its errors
            way = view.look(head)
            if way is None or (way and not way[-1].merging):
                return None
            head = true_path(way)
        return self._parents.get(head) or self._enter_next(head)

    def _hide(self, path: bytes, name: bytes, dir_fd: int) -> None:
        """Delete what lower layers have there. What this layer has made itself stays."""
        self._settle_path(path)
        if path in self._borrowed:
            self._clear(path, name, dir_fd)
        try:
            self._marks.whiteout(path, name, dir_fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                self._hide_below(path, name, dir_fd)

    def _hide_below(self, path: bytes, name: bytes, dir_fd: int) -> None:
        """The directory ``path``, which is ``name`` (or nothing) below ``dir_fd``, merges no longer with lower ones."""
        self._marks.opaque(path, name, dir_fd)
        for each in self._borrowed.below(path):
            if each in self._borrowed:  # and not gone with one above it
                head, _, base = each.rpartition(b"/")
                fd = openat2(self._root, head, DIRECTORY, resolve=STRICT)
                try:
                    self._clear(each, base, fd)
                finally:
                    os.close(fd)

    def _hide_all(self) -> None:
        """An opaque root: overlay merges roots, whatever is on them, so each name is hidden. Once is enough."""
        if self._lowers is None:
            raise LowersNeeded
        if self._emptied:
            return
        for name in names_in([os.fsencode(lower) for lower in self._lowers]):
            self._hide(name, name, self._root)
        self._emptied = True

    def _enter_next(self, head: bytes) -> tuple[int, bytes]:
        """The parent of a new entry: here, where nobody holds one, their number is kept down."""
        if self._parents.full:
            self._parents.forget()
        return self._enter(head)

    def _enter(self, head: bytes) -> tuple[int, bytes]:
        """Descriptor and true path of the directory ``head``, made where it is not there."""
        real = head
        passed = set[bytes]()
        try:
            fd = openat2(self._root, head, DIRECTORY, resolve=STRICT)
        except KernelError as error:
            if error.errno not in NOT_THERE:
                raise
            fd, real = self._materialize(head, passed)
        self._parents.hold(head, fd, real, passed)
        return fd, real

    def _materialize(self, head: bytes, passed: set[bytes] | None = None) -> tuple[int, bytes]:
        """Make the directory that ``head`` means in the merged view, and give its descriptor and true path.

        ``passed`` gets the last component of every path on the way there.
        """
        way = self._view().walk(head, passed)
        path = b""
        fd = os.dup(self._root)
        try:
            for name, found, _ in way:
                path = join(path, name)
                inner = self._open_made(path, name, fd, found)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
        return fd, path

    def _open_made(self, path: bytes, name: bytes, dir_fd: int, found: Found | None) -> int:
        """Open the directory ``path``, which is ``name`` below ``dir_fd``, made where it is not there."""
        status = _status(name, dir_fd)
        if status is None or self._in_the_way(path, status):
            self._reader.count()
            self._make_directory(path, name, dir_fd)
            inherits = found is not None and stat.S_ISDIR(found.stat.st_mode)
            self._directories[path] = read_attributes(*found) if found and inherits else self._default
            self._borrowed[path] = None
        elif not stat.S_ISDIR(status.st_mode):
            shown = os.fsdecode(path)
            raise CorruptLayer(f"{shown!r} is no directory, and has entries below", entry=shown)
        return os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)

    def _in_the_way(self, path: bytes, status: os.stat_result) -> bool:
        """Whether a directory may take the place of what this layer's tree has there."""
        return is_whiteout(status) or (path in self._borrowed and not stat.S_ISDIR(status.st_mode))

    def _view(self) -> MergedView:
        if self._lowers is None:
            raise LowersNeeded
        self._settle()
        if self._merged is None:
            self._merged = MergedView([self._path, *self._lowers])
        return self._merged

    def _clear(self, path: bytes, base: bytes, dir_fd: int) -> None:
        """Remove what an earlier entry made."""
        self._settle()
        if not stat.S_ISDIR(os.stat(base, dir_fd=dir_fd, follow_symlinks=False).st_mode):
            self._borrowed.discard(path)
            os.unlink(base, dir_fd=dir_fd)
            return
        remove_tree(os.fsdecode(base), dir_fd)
        for paths in (self._marks, self._borrowed, self._directories):
            paths.drop(path)
        self._parents.forget_tree(path)


def _exists(name: bytes, dir_fd: int) -> bool:
    status = _status(name, dir_fd)
    return status is not None and not is_whiteout(status)


def _status(name: bytes, dir_fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
