"""The mount system calls.

Classic ``mount(2)``, ``umount2(2)`` and ``pivot_root(2)``, and the file-descriptor API of Linux 5.2 and later
(``fsopen``, ``fsconfig``, ``fsmount``, ``move_mount``, ``open_tree``, ``mount_setattr``), which needs no option page
and makes mounts that nobody can see until they are attached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from containerkit.errors.base import KernelError
from containerkit.linux.libc import check, fsencode, libc, machine_number, syscall

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2

FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OVERLAYFS = 0x794C7630

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_PIVOT_ROOT = machine_number(x86_64=155, aarch64=41)

_LONG = 200  # fsconfig takes strings below 256 bytes

# Mount options that are attributes of the mount itself, as mount(8) spells them.
ATTRIBUTES = {
    "ro": MOUNT_ATTR_RDONLY,
    "nosuid": MOUNT_ATTR_NOSUID,
    "nodev": MOUNT_ATTR_NODEV,
    "noexec": MOUNT_ATTR_NOEXEC,
    "noatime": MOUNT_ATTR_NOATIME,
    "strictatime": MOUNT_ATTR_STRICTATIME,
}

_CLASSIC = {
    MOUNT_ATTR_RDONLY: MS_RDONLY,
    MOUNT_ATTR_NOSUID: MS_NOSUID,
    MOUNT_ATTR_NODEV: MS_NODEV,
    MOUNT_ATTR_NOEXEC: MS_NOEXEC,
}


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    """``mount(2)``."""
    result = libc.mount(
        fsencode(source), fsencode(target), fsencode(fstype), ctypes.c_ulong(flags), fsencode(data) if data else None
    )
    check(result, "mount", target)


def umount2(target: str, flags: int = 0) -> None:
    """``umount2(2)``."""
    check(libc.umount2(fsencode(target), flags), "umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    """``pivot_root(2)``; "." for both stacks the old root on top of the new one, ready to be detached."""
    check(
        syscall(_PIVOT_ROOT, ctypes.c_char_p(fsencode(new_root)), ctypes.c_char_p(fsencode(put_old))),
        "pivot_root",
        new_root,
    )


def fsopen(fstype: str) -> int:
    """``fsopen(2)``: a configuration fd for a new file system, close-on-exec."""
    return check(syscall(_FSOPEN, ctypes.c_char_p(fsencode(fstype)), FSOPEN_CLOEXEC), "fsopen", fstype)


def fsconfig_set_string(fd: int, key: str, value: str) -> None:
    """``fsconfig(2)`` with ``FSCONFIG_SET_STRING``; the kernel takes values below 256 bytes."""
    arguments = ctypes.c_char_p(fsencode(key)), ctypes.c_char_p(fsencode(value))
    check(syscall(_FSCONFIG, fd, FSCONFIG_SET_STRING, *arguments, 0), "fsconfig", f"{key}={value}")


def fsconfig_set_flag(fd: int, key: str) -> None:
    """``fsconfig(2)`` with ``FSCONFIG_SET_FLAG``."""
    check(syscall(_FSCONFIG, fd, FSCONFIG_SET_FLAG, ctypes.c_char_p(fsencode(key)), None, 0), "fsconfig", key)


def fsconfig_create(fd: int, what: str = "") -> None:
    """``fsconfig(2)`` with ``FSCONFIG_CMD_CREATE``: makes the superblock. ``what`` names it in the error."""
    if syscall(_FSCONFIG, fd, FSCONFIG_CMD_CREATE, None, None, 0) < 0:
        code = ctypes.get_errno()
        try:
            hint = os.read(fd, 512).decode(errors="replace").strip()  # the kernel's own words, where it has any
        except OSError:
            hint = ""
        ctypes.set_errno(code)
        check(-1, "fsconfig", what, hint)


def fsmount(fd: int, attributes: int = 0) -> int:
    """``fsmount(2)``: a detached mount of the configured file system, as an ``O_PATH`` fd, close-on-exec."""
    return check(syscall(_FSMOUNT, fd, FSMOUNT_CLOEXEC, attributes), "fsmount")


def move_mount(from_fd: int, to_fd: int, to_path: str = "") -> None:
    """``move_mount(2)``: attaches the detached mount ``from_fd`` at ``to_path`` below ``to_fd``, or at ``to_fd``."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if to_path else MOVE_MOUNT_T_EMPTY_PATH)
    paths = ctypes.c_char_p(b""), ctypes.c_char_p(fsencode(to_path))
    check(syscall(_MOVE_MOUNT, from_fd, paths[0], to_fd, paths[1], flags), "move_mount", to_path)


def open_tree(
    path: str, flags: int = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE, dir_fd: int = AT_FDCWD
) -> int:
    """``open_tree(2)``: by default a detached recursive copy (bind) of the mount at ``path``, as an ``O_PATH`` fd."""
    if not path:
        flags |= AT_EMPTY_PATH
    return check(syscall(_OPEN_TREE, dir_fd, ctypes.c_char_p(fsencode(path)), flags), "open_tree", path)


def mount_setattr(
    path: str, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0, flags: int = 0, dir_fd: int = AT_FDCWD
) -> None:
    """``mount_setattr(2)`` (Linux 5.12): attributes and propagation; ``flags=AT_RECURSIVE`` for the whole tree."""
    if not path:
        flags |= AT_EMPTY_PATH
    attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", attr_set, attr_clr, propagation, 0), 32)
    result = syscall(_MOUNT_SETATTR, dir_fd, ctypes.c_char_p(fsencode(path)), flags, attributes, 32)
    check(result, "mount_setattr", path)


def new_mount(fstype: str, options: tuple[str, ...] = (), attributes: int = 0) -> int:
    """A new file system as a detached mount: fsopen, fsconfig for each ``key`` or ``key=value``, fsmount.

    Values of 200 bytes and more are paths too long for ``fsconfig``; they are passed as ``/proc/self/fd/N``.
    """
    fd = fsopen(fstype)
    held: list[int] = []
    try:
        for option in options:
            key, is_pair, value = option.partition("=")
            if not is_pair:
                fsconfig_set_flag(fd, key)
                continue
            if len(value) >= _LONG and value.startswith("/"):
                held.append(os.open(value, os.O_PATH | os.O_CLOEXEC))
                value = f"/proc/self/fd/{held[-1]}"
            fsconfig_set_string(fd, key, value)
        fsconfig_create(fd, fstype)
        return fsmount(fd, attributes)
    finally:
        os.close(fd)
        for path_fd in held:
            os.close(path_fd)


def file_system(path: str) -> int:
    """The type of the file system that ``path`` is on, as its magic number (``statfs(2)``)."""
    buffer = ctypes.create_string_buffer(256)
    check(libc.statfs(fsencode(path), buffer), "statfs", path)
    return int(struct.unpack_from("=q", buffer)[0])


def probe_overlay(lower: str, upper: str, work: str) -> None:
    """Make an overlay and let it go unattached. Raises :class:`KernelError` where this file system cannot hold one."""
    os.close(new_mount("overlay", (f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}")))


def mount_overlay(
    at: str, lowers: tuple[str, ...], upper: str, work: str, options: tuple[str, ...], attributes: int = 0
) -> None:
    """Mount an overlay at ``at``: ``lowers`` top layer first; without ``upper`` it is read-only.

    Uses ``lowerdir+`` (Linux 6.5: hundreds of layers, no escaping); older kernels get one option page by mount(2),
    which holds about 4,000 bytes and takes neither ``,`` nor ``:`` in paths. Raises :class:`KernelError`.
    """
    writable = (f"upperdir={upper}", f"workdir={work}") if upper else ()
    try:
        tree = new_mount("overlay", (*(f"lowerdir+={lower}" for lower in lowers), *writable, *options), attributes)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        data = ",".join(("lowerdir=" + ":".join(lowers), *writable, *options))
        flags = sum(flag for attribute, flag in _CLASSIC.items() if attributes & attribute)
        try:
            mount("overlay", at, "overlay", flags, data)
        except KernelError:
            raise error from None  # it was not the form of the request
        return
    try:
        move_mount(tree, AT_FDCWD, at)
    finally:
        os.close(tree)
