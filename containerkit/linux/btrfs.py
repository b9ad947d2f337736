"""Subvolumes of btrfs: making, snapshotting and destroying them (linux/btrfs.h; btrfs-ioctl(2))."""

from __future__ import annotations

import fcntl
import os
import struct

from containerkit.errors.base import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BTRFS = 0x9123683E
_SUBVOLUME_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the root directory of every subvolume

_SUBVOL_CREATE = 0x5000940E
_SNAP_DESTROY = 0x5000940F
_SNAP_CREATE_V2 = 0x50009417
_ARGS = struct.Struct("=q4088s")  # struct btrfs_ioctl_vol_args
_ARGS_V2 = struct.Struct("=qQQ32x4040s")  # struct btrfs_ioctl_vol_args_v2
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def create_subvolume(path: str) -> None:
    """A new, empty subvolume at ``path``, owned by the caller. Raises :class:`KernelError`."""
    _in_parent(path, "BTRFS_IOC_SUBVOL_CREATE", _SUBVOL_CREATE, lambda name: _ARGS.pack(0, name))


def create_snapshot(source: str, path: str) -> None:
    """A writable snapshot of the subvolume ``source`` at ``path``, on the same file system."""
    fd = os.open(source, _OPEN)
    try:
        _in_parent(path, "BTRFS_IOC_SNAP_CREATE_V2", _SNAP_CREATE_V2, lambda name: _ARGS_V2.pack(fd, 0, 0, name))
    finally:
        os.close(fd)


def destroy_subvolume(path: str) -> None:
    """Destroy the subvolume at ``path`` with all that is in it, at once; its blocks are freed later.

    Raises :class:`KernelError`: ENOTEMPTY where another subvolume lies in it.
    """
    _in_parent(path, "BTRFS_IOC_SNAP_DESTROY", _SNAP_DESTROY, lambda name: _ARGS.pack(0, name))


def is_subvolume(path: str) -> bool:
    """Whether the directory ``path``, on btrfs, is the root of a subvolume."""
    return os.lstat(path).st_ino == _SUBVOLUME_INODE


def _in_parent(path: str, operation: str, request: int, pack: Callable[[bytes], bytes]) -> None:
    parent, name = os.path.split(path.rstrip("/"))
    fd = os.open(parent, _OPEN)
    try:
        fcntl.ioctl(fd, request, bytearray(pack(os.fsencode(name))))  # immutable arguments may have 1024 bytes
    except OSError as error:
        raise KernelError(operation, error.errno or 0, path) from error
    finally:
        os.close(fd)
