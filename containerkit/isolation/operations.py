"""The launcher's vocabulary: one small function for each operation of a plan.

``PREPARE`` and ``CLEANUP`` run in the keeper, ``INSIDE`` in the new process between its birth and its exec. Nothing
here decides anything. Everything is imported before the first container starts: inside a container's root no module
is loaded and no name is looked up.
"""

from __future__ import annotations

import errno as errnos
import os

from containerkit.errors.base import KernelError
from containerkit.linux import bpf, capabilities, namespaces, network, process, seccomp, users
from containerkit.linux import mount as mounts
from containerkit.linux.tree import make_directory, remove_tree

TYPE_CHECKING = False  # typing itself would cost every keeper 0.8 MB
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TYPE, _DIRECTORY, _LINK, _REGULAR, _CHARACTER = 0o170000, 0o040000, 0o120000, 0o100000, 0o020000
_PASSWD_LIMIT = 1 << 20
_OPEN_FILES = os.O_RDONLY | os.O_CLOEXEC


class Context:
    """What operations hand to later ones: fds that came with the plan, held binds, the user that was found."""

    __slots__ = ("account", "binds", "fds")

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds  # stdin, stdout, stderr, then a pidfd to join or nothing
        self.binds: tuple[int, ...] = ()
        self.account = users.Account(0, 0, (), "/")


# --- in the keeper


def make_cgroup(directory: str, parents: bool) -> None:
    """A cgroup. An exec's without ``parents``: it must not bring back the cgroup of a container that has just ended."""
    if parents:
        make_directory(directory)
        return
    try:
        os.mkdir(directory)
    except FileExistsError:
        return


def write_file(path: str, content: str, mode: int) -> None:
    """Small files: host name, hosts, cgroup knobs."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)


def clone_tree(source: str, target: str, how: str) -> None:
    """A tree of a container's own, whole or not there; one that is there is kept."""
    if os.path.isdir(target):
        return
    new = f"{target}.new"
    remove_tree(new)  # of a start that was killed
    # Few state roots need these: they would be dirty memory in every keeper.
    if how == "btrfs":
        from containerkit.linux.btrfs import create_snapshot

        create_snapshot(source, new)
    else:
        from containerkit.linux.clone import clone_tree as clone

        clone(source, new)
    os.rename(new, target)


def write_knob(path: str, value: str) -> None:
    """A file that the kernel made: never created, written in one call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def attach_device_filter(directory: str, program: bytes) -> None:
    """The device allow-list of a cgroup v2."""
    bpf.filter_devices(directory, program)


def remove_cgroup(directory: str) -> None:
    """A cgroup without processes, and those below it; one that is gone already is fine."""
    try:
        with os.scandir(directory) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        for path in below:
            remove_cgroup(path)
        os.rmdir(directory)
    except FileNotFoundError:
        return


# --- in the new process, in the host's view


def stdio(context: Context) -> None:
    """0, 1 and 2 from the plan's fds, which are all above 2; everything else closes at exec."""
    for target, fd in enumerate(context.fds[:3]):
        os.dup2(fd, target)


def join_tasks(_: Context, files: tuple[str, ...]) -> None:
    """Cgroup v1: a single-threaded process that writes 0 to ``tasks`` moves alone, without a grace period."""
    for path in files:
        write_knob(path, "0")


def enter(context: Context, flags: int) -> None:
    """The namespaces of the container whose pidfd came with the plan."""
    namespaces.setns(context.fds[3], flags)


def private_mounts(_: Context) -> None:
    """Nothing that is mounted from here on reaches the host."""
    mounts.mount("", "/", "", mounts.MS_REC | mounts.MS_PRIVATE)


def tmpfs_layer(_: Context, at: str, options: tuple[str, ...], hidden: tuple[str, ...], lower: str) -> None:
    """A writable layer in memory, in which a hidden directory is empty (opaque) and a hidden file is a whiteout."""
    mounts.move_mount(mounts.new_mount("tmpfs", options, mounts.MOUNT_ATTR_NOSUID), mounts.AT_FDCWD, at)
    upper = f"{at}/upper"
    for directory in (upper, f"{at}/work", f"{at}/merged"):
        os.mkdir(directory)
        os.chmod(directory, 0o755)  # noqa: S103 - whatever the umask
    for path in hidden:
        try:
            kind = os.lstat(lower + path).st_mode & _TYPE
        except OSError:
            continue
        if kind == _DIRECTORY:
            _mirror(lower, upper, path)
            os.setxattr(upper + path, "trusted.overlay.opaque", b"y")
        elif kind != _LINK:
            _mirror(lower, upper, os.path.dirname(path))
            os.mknod(upper + path, _CHARACTER, os.makedev(0, 0))


def _mirror(lower: str, upper: str, path: str) -> None:
    """A directory in the upper layer, and its parents, like those below."""
    if path in ("", "/") or os.path.isdir(upper + path):
        return
    _mirror(lower, upper, os.path.dirname(path))
    status = os.lstat(lower + path)
    os.mkdir(upper + path)
    os.chown(upper + path, status.st_uid, status.st_gid)
    os.chmod(upper + path, status.st_mode & 0o7777)


def overlay_root(
    _: Context, at: str, lowers: tuple[str, ...], upper: str, work: str, options: tuple[str, ...], attributes: int
) -> None:
    """The container's root, mounted where it will be pivoted to."""
    mounts.mount_overlay(at, lowers, upper, work, options, attributes)


def bind_root(_: Context, tree: str, attributes: int) -> None:
    """The container's own tree, which becomes a mount to pivot to, with no restriction of the file system it is on."""
    fd = mounts.open_tree(tree, mounts.OPEN_TREE_CLONE | mounts.OPEN_TREE_CLOEXEC)
    try:
        restrictions = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC
        mounts.mount_setattr("", attributes, restrictions, dir_fd=fd)
        mounts.move_mount(fd, mounts.AT_FDCWD, tree)
    finally:
        os.close(fd)


def hold_binds(context: Context, sources: tuple[str, ...]) -> None:
    """Detached copies of files and directories of the host, taken while the host can still be seen."""
    context.binds = tuple(mounts.open_tree(source) for source in sources)


def pivot_root(_: Context, new_root: str) -> None:
    """The new root takes the place of the host's, which is then detached, whole, from this namespace."""
    os.chdir(new_root)
    mounts.pivot_root(".", ".")
    mounts.umount2(".", mounts.MNT_DETACH)
    os.chdir("/")


# --- in the new process, in the container's view: "/" is the container's root, so no link can lead out of it


def mount(_: Context, fstype: str, target: str, options: tuple[str, ...], attributes: int) -> None:
    """A new file system. A target that is a link is refused: an image must not choose where /proc goes."""
    fd = _mount_point(target, directory=True)
    try:
        _move(mounts.new_mount(fstype, options, attributes), fd)
    finally:
        os.close(fd)


def _mount_point(target: str, *, directory: bool) -> int:
    """An ``O_PATH`` fd of the mount point, made where it is missing."""
    flags = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECTORY if directory else 0)
    try:
        return os.open(target, flags)
    except FileNotFoundError:
        if directory:
            make_directory(target)
        else:
            make_directory(os.path.dirname(target))
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        return os.open(target, flags)
    except OSError as error:
        raise KernelError(
            "open mount point", error.errno or 0, target, hint="the image has a link or file there"
        ) from error


def attach_binds(context: Context, targets: tuple[tuple[str, int], ...]) -> None:
    """The held copies, in order, each with its mount attributes."""
    for source, (target, attributes) in zip(context.binds, targets, strict=True):
        fd = _mount_point(target, directory=os.path.isdir(f"/proc/self/fd/{source}"))
        try:
            mounts.move_mount(source, fd)
        finally:
            os.close(fd)
        if attributes:
            mounts.mount_setattr(target, attributes)


def make_devices(_: Context, devices: tuple[tuple[str, int, int, int], ...]) -> None:
    """Character devices: path, mode, major, minor."""
    for path, mode, major, minor in devices:
        os.mknod(path, _CHARACTER | mode, os.makedev(major, minor))
        os.chmod(path, mode)


def make_symlinks(_: Context, links: tuple[tuple[str, str], ...]) -> None:
    """Links: path, target."""
    for path, target in links:
        os.symlink(target, path)


def set_sysctl(_: Context, key: str, value: str) -> None:
    """A namespaced kernel parameter (sysctl(8)); dots separate."""
    write_knob("/proc/sys/" + key.replace(".", "/"), value)


def mask_paths(_: Context, paths: tuple[str, ...]) -> None:
    """/dev/null over files, an empty read-only tmpfs over directories; paths that do not exist need no mask."""
    empty = -1
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        if os.fstat(fd).st_mode & _TYPE != _DIRECTORY:
            _move(mounts.open_tree("/dev/null"), fd)
        elif empty < 0:
            _move(mounts.new_mount("tmpfs", ("size=0",), mounts.MOUNT_ATTR_RDONLY), fd)
            empty = os.open(path, os.O_PATH | os.O_CLOEXEC)
        else:
            _move(mounts.open_tree("", dir_fd=empty), fd)
        os.close(fd)
    if empty >= 0:
        os.close(empty)


def _move(tree: int, to: int) -> None:
    try:
        mounts.move_mount(tree, to)
    finally:
        os.close(tree)


def readonly_paths(_: Context, paths: tuple[str, ...]) -> None:
    """Each path bound onto itself, read-only."""
    for path in paths:
        try:
            tree = mounts.open_tree(path)
        except KernelError as error:
            if error.errno == errnos.ENOENT:
                continue
            raise
        mounts.mount_setattr("", mounts.MOUNT_ATTR_RDONLY, flags=mounts.AT_RECURSIVE, dir_fd=tree)
        mounts.move_mount(tree, mounts.AT_FDCWD, path)
        os.close(tree)


def find_user(context: Context, user: str, groups: tuple[str, ...]) -> None:
    """Numbers for names, from the container's own files.

    Bytes that are parsed, never a look-up by the host's libraries.
    """
    context.account = users.lookup(user, _small_file("/etc/passwd"), _small_file("/etc/group"), groups)


def _small_file(path: str) -> bytes:
    try:
        fd = os.open(path, _OPEN_FILES | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(fd, _PASSWD_LIMIT) if os.fstat(fd).st_mode & _TYPE == _REGULAR else b""
    finally:
        os.close(fd)


def become_user(context: Context, root_capabilities: int) -> None:
    """Groups, group, user, capabilities, in the order in which each is still allowed; each is read back."""
    account = context.account
    if account.uid != 0:
        _hand_over_pipes(account.uid)
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    held = (os.getresuid(), os.getresgid(), sorted(os.getgroups()))
    if held != ((account.uid,) * 3, (account.gid,) * 3, sorted(set(account.groups))):
        raise KernelError("setresuid", errnos.EPERM, hint=f"wanted {account}, the kernel holds {held}")
    bits = root_capabilities & capabilities.capget().permitted if account.uid == 0 else 0
    capabilities.capset(capabilities.Sets(bits, bits, 0))


def _hand_over_pipes(uid: int) -> None:
    """Make the user the owner of stdin, stdout and stderr, so that it can open /dev/stdout.

    Pipes alone: whatever else was passed in, a file or /dev/null, is the host's.
    """
    reader, writer = os.pipe()
    pipes = os.fstat(reader).st_dev
    os.close(reader)
    os.close(writer)
    for fd in range(3):
        if os.fstat(fd).st_dev == pipes:
            os.fchown(fd, uid, -1)


def no_new_privileges(_: Context) -> None:
    """``PR_SET_NO_NEW_PRIVS``, read back."""
    process.prctl(process.PR_SET_NO_NEW_PRIVS, 1)
    if process.prctl(process.PR_GET_NO_NEW_PRIVS) != 1:
        raise KernelError("prctl PR_SET_NO_NEW_PRIVS", errnos.EPERM)


def change_directory(_: Context, path: str) -> None:
    """The working directory; a link to a descriptor that leads out of the root is refused."""
    os.chdir(path)
    if process.unreachable_directory():
        raise KernelError("chdir", errnos.EXDEV, path, hint="it lies outside the container's root")


def execute(context: Context, arguments: tuple[str, ...], environment: tuple[str, ...]) -> None:
    """``execve(2)``, looking along PATH like execvp(3). Comes back only to raise."""
    variables = dict(entry.partition("=")[::2] for entry in environment)
    variables.setdefault("HOME", context.account.home)
    command = arguments[0]
    if "/" in command:
        os.execve(command, arguments, variables)
    denied = None
    for directory in (variables.get("PATH") or "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").split(
        ":"
    ):
        try:
            os.execve(f"{directory or '.'}/{command}", arguments, variables)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            denied = error
    raise denied or FileNotFoundError(errnos.ENOENT, os.strerror(errnos.ENOENT), command)


PREPARE: dict[str, Callable[..., Any]] = {
    "make_directory": make_directory,
    "clone_tree": clone_tree,
    "write_file": write_file,
    "make_cgroup": make_cgroup,
    "write_knob": write_knob,
    "attach_device_filter": attach_device_filter,
}

INSIDE: dict[str, Callable[..., Any]] = {
    "become_session": lambda _: os.setsid(),
    "stdio": stdio,
    "undumpable": lambda _: process.prctl(process.PR_SET_DUMPABLE, 0),
    "join_tasks": join_tasks,
    "enter": enter,
    "unshare": lambda _, flags: namespaces.unshare(flags),
    "new_keyring": lambda _: process.join_new_session_keyring(),
    "private_mounts": private_mounts,
    "tmpfs_layer": tmpfs_layer,
    "overlay_root": overlay_root,
    "bind_root": bind_root,
    "hold_binds": hold_binds,
    "pivot_root": pivot_root,
    "mount": mount,
    "set_attributes": lambda _, target, attributes: mounts.mount_setattr(target, attributes),
    "attach_binds": attach_binds,
    "make_devices": make_devices,
    "make_symlinks": make_symlinks,
    "loopback_up": lambda _: network.set_up("lo"),
    "set_hostname": lambda _, name: namespaces.sethostname(name),
    "set_sysctl": set_sysctl,
    "mask_paths": mask_paths,
    "readonly_paths": readonly_paths,
    "readonly_root": lambda _: mounts.mount_setattr("/", mounts.MOUNT_ATTR_RDONLY),
    "set_umask": lambda _, mask: os.umask(mask),
    "make_workdir": lambda _, path: make_directory(path),
    "find_user": find_user,
    "load_seccomp": lambda _, program: seccomp.load(program),
    "drop_bounding": lambda _, keep: capabilities.drop_bounding(keep),
    "become_user": become_user,
    "no_new_privileges": no_new_privileges,
    "change_directory": change_directory,
    "die_with_keeper": lambda _: process.prctl(process.PR_SET_PDEATHSIG, 9),
    "execute": execute,
}

CLEANUP: dict[str, Callable[..., Any]] = {
    "remove_cgroup": remove_cgroup,
    "remove_tree": remove_tree,
}
