"""Making what one entry describes, in a directory that is there: content, links, devices, and what each of them has."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from containerkit.errors import CorruptLayer, KernelError
from containerkit.image.layers import layer
from containerkit.image.layers.attributes import XattrRefused, set_xattrs
from containerkit.linux.paths import fd_path, write_all

if TYPE_CHECKING:
    from containerkit.image.layers.attributes import Attributes
    from containerkit.image.layers.layer import Entry, TarReader

Owner = tuple[int, int]
_REFUSED = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.ELOOP, errno.EINVAL, errno.EMLINK}
_REFUSED_XATTR = {errno.E2BIG, errno.ERANGE, errno.EINVAL}
_DEVICES = {layer.CHARACTER: stat.S_IFCHR, layer.BLOCK_DEVICE: stat.S_IFBLK, layer.FIFO: stat.S_IFIFO}


def write_content(fd: int, entry: Entry, reader: TarReader) -> None:
    """Write the data of the entry that ``reader`` is at into a new file; holes stay holes."""
    if entry.sparse is not None:
        _write_sparse(fd, entry, reader)
        return
    for piece in reader.pieces():
        write_all(fd, piece)


def _write_sparse(fd: int, entry: Entry, reader: TarReader) -> None:
    assert entry.sparse is not None  # noqa: S101
    os.ftruncate(fd, entry.sparse.size)
    regions = iter(entry.sparse.regions)
    left = 0
    for piece in reader.pieces():
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


def dress(fd: int, entry: Entry | Attributes, owner: Owner, created: int) -> None:
    """Give an open file what the entry says; it has ``owner`` and the mode ``created``.

    Owner first, for chown clears set-ID bits and capabilities; times last.
    """
    if (entry.uid, entry.gid) != owner:
        os.fchown(fd, entry.uid, entry.gid)
    if entry.mode != created:
        os.fchmod(fd, entry.mode)
    if entry.xattrs:
        set_xattrs(fd, entry.xattrs)
    os.utime(fd, ns=(entry.atime, entry.mtime))


def make_node(entry: Entry, base: bytes, dir_fd: int) -> None:
    """A symlink, device or FIFO of that name. Raises ``FileExistsError``."""
    if entry.kind == layer.SYMLINK:
        os.symlink(entry.link, base, dir_fd=dir_fd)
    else:
        os.mknod(base, _DEVICES[entry.kind] | entry.mode & 0o777, entry.device, dir_fd=dir_fd)


def dress_node(entry: Entry, base: bytes, dir_fd: int, owner: Owner) -> None:
    """Give it what the entry says; by name, since it cannot be opened. It has ``owner``."""
    if (entry.uid, entry.gid) != owner:
        os.chown(base, entry.uid, entry.gid, dir_fd=dir_fd, follow_symlinks=False)
    if entry.mode & 0o7000 and entry.kind != layer.SYMLINK:
        os.chmod(fd_path(dir_fd, base), entry.mode)
    if entry.xattrs:
        set_xattrs(fd_path(dir_fd, base), entry.xattrs)
    os.utime(base, ns=(entry.atime, entry.mtime), dir_fd=dir_fd, follow_symlinks=False)


def unpacking_error(error: OSError, entry: Entry | Attributes, path: bytes = b"") -> Exception:
    """What a failed system call says of the entry: that the layer asks for what cannot be, or of the machine.

    Where there is no entry, ``path`` says of what the attributes are.
    """
    name, is_link = os.fsdecode(path or b"."), False
    if isinstance(entry, layer.Entry):
        name, is_link = entry.display, entry.kind == layer.LINK
    if isinstance(error, XattrRefused) and (error.is_too_large or error.errno in _REFUSED_XATTR):
        what = f"the file system does not take its attribute {os.fsdecode(error.name)!r} of {error.size} bytes"
        return CorruptLayer(f"cannot unpack {name!r}: {what}: {error.strerror}", entry=name)
    if error.errno == errno.EPERM and not is_link:  # a link to a directory is refused so, too
        hint = "this user may not make it: unpack=False keeps an image without unpacking it"
        return KernelError("unpack", errno.EPERM, name, hint=hint)
    if error.errno in _REFUSED:
        return CorruptLayer(f"cannot unpack {name!r}: {os.strerror(error.errno or 0)}", entry=name)
    return KernelError("unpack", error.errno or 0, name)
