"""From a Spec to a Plan: every decision about how and in which order, without touching the host.

:class:`Facts` is all that the host contributes. Same spec, same facts, same plan: ``containerkit.explain`` prints it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors.base import Unsupported
from containerkit.isolation import defaults
from containerkit.isolation.plan import Operation, Plan
from containerkit.linux import capabilities
from containerkit.linux.mount import ATTRIBUTES, MOUNT_ATTR_NODEV, MOUNT_ATTR_RDONLY
from containerkit.linux.namespaces import CLONE_NEWCGROUP, CLONE_NEWPID, NAMES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from containerkit.isolation.cgroup_layout import CgroupLayout
    from containerkit.isolation.spec import ExecSpec, ProcessSpec, Root, Spec
    from containerkit.linux.fileview import Mount

# redirects and metacopy would tie the writable layer to these very lowers; a layer tar could not say so.
_OVERLAY_OPTIONS = ("index=off", "metacopy=off", "redirect_dir=off")


class Facts(NamedTuple):
    """What the host contributes to a plan, and how long the container is to live."""

    cgroups: CgroupLayout
    cgroup_mounts: tuple[Mount, ...] = ()
    seccomp: bytes = b""
    known_capabilities: int = (1 << 41) - 1
    log: bool = True
    with_owner: bool = True
    remove: bool = False


def compile_container(spec: Spec, facts: Facts) -> Plan:
    """The plan that starts ``spec`` as a container of its own.

    Raises :class:`Unsupported` for what cannot be isolated.
    """
    layout = facts.cgroups
    root = spec.root
    flags = 0
    for name in spec.namespaces:
        flags |= NAMES[name]
    inside: list[Operation] = [*_birth(), ("join_tasks", layout.tasks)]
    if flags & CLONE_NEWCGROUP:
        inside.append(("unshare", CLONE_NEWCGROUP))  # only now: the namespace's root is the cgroup at this moment
    inside += [("new_keyring",), ("private_mounts",)]
    inside += _enter_root(spec, _root_attributes(layout))
    mounts = _with_cgroups(spec.mounts, facts.cgroup_mounts)
    inside += [_mount(mount) for mount in mounts]
    inside += _devices()
    if "network" in spec.namespaces:
        inside.append(("loopback_up",))
        inside += [("set_sysctl", key, value) for key, value in spec.sysctls]
    if spec.hostname and "uts" in spec.namespaces:
        inside.append(("set_hostname", spec.hostname))
    if spec.files:
        attributes = MOUNT_ATTR_RDONLY if root.readonly else 0
        inside.append(("attach_binds", tuple((file.target, attributes) for file in spec.files)))
    if spec.process.cwd != "/":
        inside.append(("make_workdir", spec.process.cwd))
    inside += [("mask_paths", spec.masked_paths), ("readonly_paths", spec.readonly_paths)]
    if root.readonly:
        inside.append(("readonly_root",))
    inside += _become(spec.process, facts)
    cleanup: list[Operation] = [("remove_cgroup", path) for path in reversed(layout.remove)]
    if facts.remove:
        cleanup.append(("remove_tree", root.directory))
    return Plan(
        kind="container",
        prepare=(*_prepare_root(root), *_prepare_files(spec), *_prepare_cgroups(layout)),
        clone_flags=flags & ~CLONE_NEWCGROUP,
        into=layout.into,
        setns_pid=False,
        inside=tuple(inside),
        cleanup=tuple(cleanup),
        directory=root.directory,
        log=facts.log,
        with_owner=facts.with_owner,
        kill=layout.kill or layout.tracking,
        oom=oom_counter(layout),
    )


def compile_exec(spec: ExecSpec, facts: Facts) -> Plan:
    """The plan that starts a process inside a running container, whose pidfd travels with it."""
    layout = facts.cgroups
    flags = 0
    for name in spec.namespaces:
        flags |= NAMES[name]
    inside: list[Operation] = [
        *_birth(),
        ("join_tasks", layout.tasks),
        ("enter", flags & ~CLONE_NEWPID),
        ("new_keyring",),
    ]
    inside += _become(spec.process, facts)
    return Plan(
        kind="exec",
        prepare=_prepare_cgroups(layout, parents=False),
        clone_flags=0,
        into=layout.into,
        setns_pid=True,
        inside=tuple(inside),
        cleanup=tuple(("remove_cgroup", path) for path in layout.remove),
        directory="",
        log=False,
        with_owner=facts.with_owner,
        kill=layout.kill or layout.tracking,
        oom=oom_counter(layout),
    )


def oom_counter(layout: CgroupLayout) -> tuple[str, str]:
    """The file in which the kernel counts OOM kills of this container, and the key of the line."""
    for task in layout.tasks:
        directory = task.removesuffix("/tasks")
        if "/memory" in directory or ",memory" in directory:
            return (f"{directory}/memory.oom_control", "oom_kill")
    if layout.mode == "v2" and layout.into:
        return (f"{layout.into.partition('/exec-')[0]}/memory.events", "oom_kill")
    return ("", "")


def _birth() -> tuple[Operation, ...]:
    """Out of sight before anything of the container can look: its processes must not reach the host's interpreter."""
    return (("undumpable",), ("become_session",), ("stdio",))


def _prepare_root(root: Root) -> tuple[Operation, ...]:
    if root.clone:
        clone = ("clone_tree", root.lowers[0], f"{root.directory}/rootfs", root.clone)
        return (("make_directory", root.directory, 0o710), clone)
    names = ("merged",) if root.in_memory else ("upper", "work", "merged")
    return (
        ("make_directory", root.directory, 0o710),
        *(("make_directory", f"{root.directory}/{name}", 0o755) for name in names),
    )


def _prepare_files(spec: Spec) -> tuple[Operation, ...]:
    return tuple(("write_file", _source(spec, file.target), file.content, 0o644) for file in spec.files)


def _source(spec: Spec, target: str) -> str:
    return f"{spec.root.directory}/{target.rpartition('/')[2]}"


def _prepare_cgroups(layout: CgroupLayout, *, parents: bool = True) -> tuple[Operation, ...]:
    operations: list[Operation] = [("make_cgroup", path, parents) for path in dict.fromkeys(layout.dirs)]
    operations += [("write_knob", path, value) for path, value, _ in layout.writes]
    if layout.device_program:
        operations.append(("attach_device_filter", layout.into, layout.device_program))
    return tuple(operations)


def _root_attributes(layout: CgroupLayout) -> int:
    """Where no device filter can be enforced, the root takes no device nodes at all."""
    return 0 if layout.devices_enforced else MOUNT_ATTR_NODEV


def _enter_root(spec: Spec, attributes: int) -> list[Operation]:
    root = spec.root
    base = f"{root.directory}/merged"
    operations: list[Operation] = []
    if root.clone:
        tree = f"{root.directory}/rootfs"
        return [*_hold_files(spec), ("bind_root", tree, attributes), ("pivot_root", tree)]
    if root.in_memory:
        lowest = root.lowers[-1].rstrip("/")
        operations.append(("tmpfs_layer", base, (f"size={root.in_memory}", "mode=755"), root.hidden, lowest))
        at, upper, work = f"{base}/merged", f"{base}/upper", f"{base}/work"
    else:
        at, upper, work = base, f"{root.directory}/upper", f"{root.directory}/work"
    options = (*_OVERLAY_OPTIONS, "volatile") if root.volatile else _OVERLAY_OPTIONS
    operations += _hold_files(spec)
    operations += [("overlay_root", at, root.lowers, upper, work, options, attributes), ("pivot_root", at)]
    return operations


def _hold_files(spec: Spec) -> list[Operation]:
    return [("hold_binds", tuple(_source(spec, file.target) for file in spec.files))] if spec.files else []


def _with_cgroups(mounts: Iterable[Mount], cgroups: tuple[Mount, ...]) -> list[Mount]:
    """The cgroup mounts belong right behind /sys, which holds their mount point."""
    ordered: list[Mount] = []
    for mount in mounts:
        ordered.append(mount)
        if mount.target == "/sys":
            ordered += cgroups
    return ordered


def _mount(mount: Mount) -> Operation:
    attributes = 0
    options = []
    for option in mount.options:
        if option in ATTRIBUTES:
            attributes |= ATTRIBUTES[option]
        else:
            options.append(option)
    if "remount" in options:
        return ("set_attributes", mount.target, attributes)
    return ("mount", mount.type, mount.target, tuple(options), attributes)


def _devices() -> list[Operation]:
    nodes = tuple((device.path, device.mode, device.major, device.minor) for device in defaults.DEVICES)
    return [("make_devices", nodes), ("make_symlinks", defaults.DEVICE_LINKS)]


def _become(process: ProcessSpec, facts: Facts) -> list[Operation]:
    """The way down: everything that needs rights first, then their loss, then the exec."""
    if not process.args:
        raise Unsupported("a process without a command cannot be executed")
    bits = capabilities.mask(process.capabilities) & facts.known_capabilities
    if not facts.cgroups.devices_enforced:
        bits &= ~capabilities.mask(("CAP_MKNOD",))  # without a device filter a device node would be the host's disk
    operations: list[Operation] = [
        ("set_umask", process.umask),
        ("find_user", process.user, process.groups),
        ("change_directory", process.cwd),
    ]
    load: list[Operation] = [("load_seccomp", facts.seccomp)] if process.seccomp else []
    if process.no_new_privileges:
        # With no_new_privs the filter may come last and so need not allow what the steps before it do.
        operations += [("drop_bounding", bits), ("become_user", bits), ("no_new_privileges",), *load]
    else:
        operations += [*load, ("drop_bounding", bits), ("become_user", bits)]
    # setresuid clears the parent-death signal (prctl(2)), so it is set after it.
    return [*operations, ("die_with_keeper",), ("execute", process.args, process.env)]
