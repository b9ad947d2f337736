"""Unpacking one layer into its own directory, in overlay's form, without ever leaving it.

Every system call is relative to a descriptor of the parent directory, which was opened with no symlink on its way;
last components are created exclusively and never followed. A deleted file (``.wh.NAME``) becomes a character device
0:0, an opaque directory (``.wh..wh..opq``) gets ``trusted.overlay.opaque``; both speak of lower layers only, wherever
they stand in the tar. The attributes of directories are set last.

A path through a symlink lands where the symlink leads inside the image, as it does for Docker and umoci, when this
layer or a lower one has that place. An entry without entries for its parents gets them with the attributes that
they have below.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import CorruptLayer, KernelError, LayerError, UnsafeEntry
from containerkit.image import layer
from containerkit.image.attributes import CREATE, Attributes, copy_file, read_attributes, set_xattrs
from containerkit.image.merged import OPAQUE, MergedView, is_whiteout
from containerkit.linux.paths import DIRECTORY, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, fd_path, openat2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from containerkit.image.layer import Entry, TarReader

WHITEOUT = b".wh."
WHITEOUT_META = b".wh..wh."
WHITEOUT_OPAQUE = b".wh..wh..opq"
STRICT = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
MOST_PARENTS = 64
REFUSED = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.ELOOP, errno.EINVAL, errno.EMLINK}


class LowersNeeded(Exception):
    """The layer refers to lower ones, which the caller has not given yet: start again with them."""


class _NoDirectory(CorruptLayer):
    """An entry below what is no directory."""


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
        self._parents: dict[bytes, tuple[int, bytes]] = {b"": (self._root, b"")}
        self._directories: dict[bytes, Attributes | Entry] = {}
        self._copied: set[bytes] = set()  # for the sake of hard links to them
        self._hides_all = False
        self._kinds = {
            layer.FILE: self._file,
            layer.LINK: self._link,
            layer.SYMLINK: self._symlink,
            layer.DIRECTORY: self._directory,
            layer.CHARACTER: self._node,
            layer.BLOCK_DEVICE: self._node,
            layer.FIFO: self._node,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget_parents()
        os.close(self._root)

    def unpack(self, reader: TarReader) -> None:
        """Unpack every entry. Raises :class:`CorruptLayer`, :class:`UnsafeEntry`, :class:`LowersNeeded`."""
        self._reader = reader
        while entry := reader.next():
            try:
                self._unpack(entry)
            except LayerError as error:
                error.entry = entry.display  # the message may speak of a directory on the way
                raise
            except OSError as error:
                if error is reader.failure:
                    raise  # the stream broke, not the unpacking
                raise _translated(error, entry) from error

    def finish(self, parent: str | None) -> None:
        """Set what directories have; a root without an entry takes after that of ``parent``, the layer below."""
        if b"" not in self._directories:
            root = os.fsencode(parent) if parent else None
            self._directories[b""] = read_attributes(root, os.lstat(root)) if root else Attributes()
        if self._hides_all:
            for name in {name for lower in self._lowers or () for name in os.listdir(os.fsencode(lower))}:
                self._whiteout(WHITEOUT + name, self._root, b"")
        for path in sorted(self._directories, reverse=True):
            fd = openat2(self._root, path or b".", OPEN_DIRECTORY, resolve=STRICT)
            try:
                self._dress_directory(fd, self._directories[path])
            finally:
                os.close(fd)

    def _unpack(self, entry: Entry) -> None:
        path = clean(entry.name)
        head, _, base = path.rpartition(b"/")
        try:
            parent = self._parents.get(head) or self._enter_next(head)
        except _NoDirectory as error:
            if base.startswith(WHITEOUT):
                return  # umoci deletes one by one what lay in a directory that is a file now
            raise CorruptLayer(error.message, entry=error.entry) from None
        if base.startswith(WHITEOUT):
            self._whiteout(base, *parent)
        elif not path:
            if entry.kind != layer.DIRECTORY:
                raise UnsafeEntry("the root of a layer must be a directory", entry=entry.display)
            self._directories[b""] = entry
        else:
            self._kinds[entry.kind](entry, base, *parent)

    def _file(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        mode = entry.mode & 0o777
        try:
            fd = os.open(base, CREATE, mode, dir_fd=dir_fd)
        except FileExistsError:
            self._clear(base, dir_fd, real)
            fd = os.open(base, CREATE, mode, dir_fd=dir_fd)
        try:
            if entry.sparse is None:
                for piece in self._reader.pieces():
                    write_all(fd, piece)
            else:
                self._write_sparse(fd, entry)
            self._dress(fd, entry, created=mode)
        finally:
            os.close(fd)

    def _write_sparse(self, fd: int, entry: Entry) -> None:
        assert entry.sparse is not None  # noqa: S101
        os.ftruncate(fd, entry.sparse.size)
        regions = iter(entry.sparse.regions)
        left = 0
        for piece in self._reader.pieces():
            view = memoryview(piece)
            while view:
                while not left:
                    offset, left = next(regions, (0, -1))
                    if left < 0:
                        return
                    os.lseek(fd, offset, os.SEEK_SET)
                write_all(fd, view[:left])
                taken = min(left, len(view))
                view, left = view[taken:], left - taken
        if left or any(length for _, length in regions):
            raise CorruptLayer(f"the sparse file {entry.display!r} is truncated", entry=entry.display)

    def _dress(self, fd: int, entry: Entry | Attributes, created: int) -> None:
        """Owner first, for chown clears set-ID bits and capabilities; times last."""
        changed = (entry.uid, entry.gid) != self._owner
        if changed:
            os.fchown(fd, entry.uid, entry.gid)
        if entry.mode != created:
            os.fchmod(fd, entry.mode)
        if entry.xattrs:
            set_xattrs(fd, entry.xattrs)
        os.utime(fd, ns=(entry.atime, entry.mtime))

    def _dress_directory(self, fd: int, attributes: Entry | Attributes) -> None:
        self._dress(fd, attributes, created=0o700)

    def _directory(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        self._make_directory(base, dir_fd, real)
        self._directories[join(real, base)] = entry

    def _make_directory(self, base: bytes, dir_fd: int, real: bytes) -> None:
        """Make it, or keep the one that is there. What it takes the place of makes it opaque."""
        try:
            os.mkdir(base, 0o700, dir_fd=dir_fd)
        except FileExistsError:
            status = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return
            self._clear(base, dir_fd, real)
            os.mkdir(base, 0o700, dir_fd=dir_fd)
            os.setxattr(fd_path(dir_fd, base), OPAQUE, b"y")

    def _symlink(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        try:
            os.symlink(entry.link, base, dir_fd=dir_fd)
        except FileExistsError:
            self._clear(base, dir_fd, real)
            os.symlink(entry.link, base, dir_fd=dir_fd)
        self._dress_name(entry, base, dir_fd)

    def _node(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        kind = {layer.CHARACTER: stat.S_IFCHR, layer.BLOCK_DEVICE: stat.S_IFBLK, layer.FIFO: stat.S_IFIFO}[entry.kind]
        try:
            os.mknod(base, kind | entry.mode & 0o777, entry.device, dir_fd=dir_fd)
        except FileExistsError:
            self._clear(base, dir_fd, real)
            os.mknod(base, kind | entry.mode & 0o777, entry.device, dir_fd=dir_fd)
        self._dress_name(entry, base, dir_fd)

    def _dress_name(self, entry: Entry, base: bytes, dir_fd: int) -> None:
        if (entry.uid, entry.gid) != self._owner:
            os.chown(base, entry.uid, entry.gid, dir_fd=dir_fd, follow_symlinks=False)
        if entry.mode & 0o7000 and entry.kind != layer.SYMLINK:
            os.chmod(fd_path(dir_fd, base), entry.mode)
        if entry.xattrs:
            set_xattrs(fd_path(dir_fd, base), entry.xattrs)
        os.utime(base, ns=(entry.atime, entry.mtime), dir_fd=dir_fd, follow_symlinks=False)

    def _link(self, entry: Entry, base: bytes, dir_fd: int, real: bytes) -> None:
        source_fd, source_real, source = self._link_source(entry)
        if (source_real, source) == (real, base):
            return
        for _ in range(2):
            try:
                os.link(source, base, src_dir_fd=source_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
            except FileExistsError:
                self._clear(base, dir_fd, real)
            else:
                return

    def _link_source(self, entry: Entry) -> tuple[int, bytes, bytes]:
        """Parent, its path, and name of a hard link's target; what only a lower layer has is copied up first."""
        try:
            path = clean(entry.link.lstrip(b"/"))
        except UnsafeEntry:
            path = b""
        head, _, base = path.rpartition(b"/")
        if not base:
            raise UnsafeEntry(f"{entry.display!r} is a hard link out of the root", entry=entry.display)
        parent = self._parents.get(head)
        if parent and _exists(base, parent[0]):
            return *parent, base
        view = self._view()
        real_head = view.resolve(head)
        found = view.locate(join(real_head, base))
        if found is None or stat.S_ISDIR(found.stat.st_mode):
            kind = UnsafeEntry if entry.link.startswith(b"/") else CorruptLayer
            target = os.fsdecode(entry.link)
            raise kind(f"{entry.display!r} is a hard link to {target!r}, no file of the image", entry=entry.display)
        dir_fd, real = self._parents.get(real_head) or self._enter(real_head)
        if not _exists(base, dir_fd):
            copy_file(found.path, found.stat, dir_fd, base)
            self._copied.add(join(real, base))
        return dir_fd, real, base

    def _whiteout(self, base: bytes, dir_fd: int, real: bytes) -> None:
        if base == WHITEOUT_OPAQUE:
            if real:
                os.setxattr(fd_path(dir_fd), OPAQUE, b"y")
            elif self._lowers is None:
                raise LowersNeeded
            else:
                self._hides_all = True  # overlay merges roots, whatever is on them
            return
        name = base[len(WHITEOUT) :]
        if base.startswith(WHITEOUT_META):  # aufs's own bookkeeping
            return
        if name in {b"", b".", b".."}:
            shown = os.fsdecode(join(real, base))
            raise UnsafeEntry(f"{shown!r} would delete a directory from inside", entry=shown)
        if join(real, name) in self._copied:
            self._copied.discard(join(real, name))
            os.unlink(name, dir_fd=dir_fd)
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=dir_fd)
        except FileExistsError:
            # This layer has it too, which a whiteout does not touch; a directory no longer merges with those below.
            if stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
                os.setxattr(fd_path(dir_fd, name), OPAQUE, b"y")

    def _enter_next(self, head: bytes) -> tuple[int, bytes]:
        """The parent of a new entry: here, where nobody holds one, their number is kept down."""
        if len(self._parents) >= MOST_PARENTS:
            self._forget_parents()
        return self._enter(head)

    def _enter(self, head: bytes) -> tuple[int, bytes]:
        """Descriptor and true path of the directory ``head``, made where it is not there."""
        real = head
        try:
            fd = openat2(self._root, head, DIRECTORY, resolve=STRICT)
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            real = self._materialize(head)
            fd = openat2(self._root, real or b".", DIRECTORY, resolve=STRICT)
        self._parents[head] = fd, real
        return fd, real

    def _materialize(self, head: bytes) -> bytes:
        """Make the directory that ``head`` means in the merged view, and give its true path."""
        view = self._view()
        real = view.resolve(head)
        parent = b""
        for part in real.split(b"/") if real else ():
            path = join(parent, part)
            found = view.locate(path)
            dir_fd = openat2(self._root, parent or b".", DIRECTORY, resolve=STRICT)
            try:
                status = _status(part, dir_fd)
                if status is None or self._in_the_way(path, status):
                    self._make_directory(part, dir_fd, parent)
                    inherits = found is not None and stat.S_ISDIR(found.stat.st_mode)
                    self._directories[path] = read_attributes(*found) if found and inherits else Attributes()
                elif not stat.S_ISDIR(status.st_mode):
                    name = os.fsdecode(head)
                    raise _NoDirectory(f"{os.fsdecode(path)!r} is no directory, and has entries below", entry=name)
            finally:
                os.close(dir_fd)
            parent = path
        return real

    def _in_the_way(self, _: bytes, status: os.stat_result) -> bool:
        """Whether a directory may take the place of what this layer's tree has there."""
        return is_whiteout(status)

    def _view(self) -> MergedView:
        if self._lowers is None:
            raise LowersNeeded
        return MergedView([self._path, *self._lowers])

    def _clear(self, base: bytes, dir_fd: int, real: bytes) -> None:
        """Remove what an earlier entry made."""
        status = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(base, dir_fd=dir_fd)
            self._copied.discard(join(real, base))
            return
        import shutil

        gone = join(real, base)
        shutil.rmtree(base, dir_fd=dir_fd)
        self._directories = {
            path: what for path, what in self._directories.items() if path != gone and not path.startswith(gone + b"/")
        }
        for head, (fd, path) in list(self._parents.items()):
            if path == gone or path.startswith(gone + b"/"):
                os.close(fd)
                del self._parents[head]

    def _forget_parents(self) -> None:
        for head, (fd, _) in self._parents.items():
            if head or fd != self._root:
                os.close(fd)
        self._parents = {b"": (self._root, b"")}


def clean(name: bytes) -> bytes:
    """A name as a relative path without ``.``, ``..`` and empty components; empty for the root itself.

    Raises :class:`UnsafeEntry` where it is absolute or climbs above the root.
    """
    name = name.removeprefix(b"./").removesuffix(b"/")
    if name and name[0] not in b"./" and b"/." not in name and b"//" not in name:
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise _escape(name, "climbs above the root")
            parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    if name.startswith(b"/"):
        raise _escape(name, "is an absolute path")
    return b"/".join(parts)


def join(head: bytes, base: bytes) -> bytes:
    """``head/base``, and ``base`` in the root."""
    return head + b"/" + base if head else base


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write all of it; a disk takes it at once, save at its end or where a signal comes."""
    written = os.write(fd, content)
    while written < len(content):
        content = memoryview(content)[written:]
        written = os.write(fd, content)


def _exists(name: bytes, dir_fd: int) -> bool:
    status = _status(name, dir_fd)
    return status is not None and not is_whiteout(status)


def _status(name: bytes, dir_fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _escape(name: bytes, what: str) -> UnsafeEntry:
    shown = os.fsdecode(name)
    return UnsafeEntry(f"the layer's entry {shown!r} {what}", entry=shown)


def _translated(error: OSError, entry: Entry) -> Exception:
    name = entry.display
    if error.errno in REFUSED:
        return CorruptLayer(f"cannot unpack {name!r}: {os.strerror(error.errno or 0)}", entry=name)
    return KernelError("unpack", error.errno or 0, name)
