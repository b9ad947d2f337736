"""The Plan: a start after every decision, as an ordered tuple of primitive operations.

An operation is a plain tuple, name first: ``("mount", "proc", "/proc", (), 14)``. Plain values only (int, str, bytes,
bool, tuple), because a plan travels to the launcher by :mod:`marshal`, which the interpreter has built in; both ends
are the same interpreter. :data:`FORMS` is the whole vocabulary: what each operation is called and how it reads.

The launcher executes; it holds no policy. :func:`describe` tells in words what it would do.
"""

from __future__ import annotations

import marshal

from containerkit.linux import namespaces

Operation = tuple[object, ...]

# name -> how it reads, with the operands by position. The launcher's tables have the same names.
FORMS = {
    # before the process is born, in the keeper
    "make_directory": "make directory {0} with mode {1:o}",
    "clone_tree": "make {1} from {0} by {2}, unless it is there",
    "write_file": "write {0}",
    "make_cgroup": "make cgroup {0}",
    "write_knob": "set {0} to {1}",
    "attach_device_filter": "attach a device filter of {1} to {0}",
    # in the new process, in the host's view
    "become_session": "become the leader of a new session",
    "stdio": "take over stdin, stdout and stderr",
    "undumpable": "hide from ptrace and /proc/PID/exe",
    "join_tasks": "join cgroups by {0}",
    "enter": "enter the {0:namespaces} namespaces of the container",
    "unshare": "make a new {0:namespaces} namespace",
    "new_keyring": "join a new session keyring",
    "private_mounts": "stop mounts from propagating to the host",
    "tmpfs_layer": "put the writable layer on a tmpfs at {0} ({1}), hiding {2}",
    "overlay_root": "mount an overlay at {0}: lower {1}, upper {2}, work {3}, options {4}",
    "bind_root": "bind {0} onto itself with attributes {1:attributes}",
    "hold_binds": "hold {0} from the host",
    "pivot_root": "make {0} the root and let go of the host's",
    # in the new process, in the container's view
    "mount": "mount {0} at {1} with {2} and attributes {3:attributes}",
    "set_attributes": "give the mount at {0} the attributes {1:attributes}",
    "attach_binds": "attach the held files at {0:names}",
    "make_devices": "make devices {0:names}",
    "make_symlinks": "make symbolic links {0:names}",
    "loopback_up": "bring the loopback interface up",
    "set_hostname": "set the host name to {0}",
    "set_sysctl": "set sysctl {0} to {1}",
    "mask_paths": "mask {0}",
    "readonly_paths": "make read-only {0}",
    "readonly_root": "make the root read-only",
    "set_umask": "set the umask to {0:o}",
    "make_workdir": "make the working directory {0} where it is missing",
    "find_user": "find user {0!r} in the container's passwd and group",
    "load_seccomp": "load a seccomp filter of {0}",
    "drop_bounding": "drop every capability but {0:capabilities} from the bounding set",
    "become_user": "become the user, with capabilities {0:capabilities} for root",
    "no_new_privileges": "set no_new_privs",
    "change_directory": "change to {0}",
    "die_with_keeper": "die when the keeper dies",
    "execute": "execute {0} with {1:count} environment variables",
    # after the end, in the keeper
    "remove_cgroup": "remove cgroup {0}",
    "remove_tree": "remove {0}",
}


class Plan:
    """Everything that the launcher needs for one process; file descriptors travel beside it.

    ``kind`` is ``container`` or ``exec``. ``clone_flags`` are the ``CLONE_NEW*`` of the new process and ``into`` the
    cgroup v2 directory that it is born in, or empty. With ``setns_pid`` the keeper first enters the pid namespace of
    the pidfd that came with the plan. ``directory`` receives the files ``state``, ``exit`` and, with ``log``,
    ``log``; an exec has none. ``with_owner``: all ends when the owner ends. ``kill`` is a ``cgroup.kill`` file, a v1
    freezer directory, or empty. ``oom`` is the file that counts OOM kills and the key in it.

    A plain class, because the keeper holds it in memory and :mod:`typing` alone would cost it 0.8 MB.
    """

    __slots__ = (
        "cleanup", "clone_flags", "directory", "inside", "into", "kill", "kind", "log", "oom", "prepare", "setns_pid",
        "with_owner",
    )  # fmt: skip

    def __init__(
        self,
        *,
        kind: str,
        prepare: tuple[Operation, ...],
        clone_flags: int,
        into: str,
        setns_pid: bool,
        inside: tuple[Operation, ...],
        cleanup: tuple[Operation, ...],
        directory: str,
        log: bool,
        with_owner: bool,
        kill: str,
        oom: tuple[str, str],
    ) -> None:
        self.kind = kind
        self.prepare = prepare
        self.clone_flags = clone_flags
        self.into = into
        self.setns_pid = setns_pid
        self.inside = inside
        self.cleanup = cleanup
        self.directory = directory
        self.log = log
        self.with_owner = with_owner
        self.kill = kill
        self.oom = oom

    def fields(self) -> dict[str, object]:
        """Every field by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fields() == other.fields()

    __hash__ = None  # type: ignore[assignment]


def encode(plan: Plan) -> bytes:
    """The plan as bytes for :func:`decode` in the same interpreter."""
    return marshal.dumps(plan.fields())


def decode(data: bytes) -> Plan:
    """The inverse of :func:`encode`."""
    return Plan(**marshal.loads(data))  # noqa: S302 - both ends are one process family on a private socket


class _Words:
    """One operand, in words."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        value = self.value
        if isinstance(value, int):
            return _bits(value, spec)
        if isinstance(value, bytes):
            return f"{len(value)} bytes"
        if not isinstance(value, tuple):
            return format(value, spec)
        if spec == "count":
            return str(len(value))  # what they hold may be secret
        told = (str(item[0]) if spec == "names" else format(_Words(item), "") for item in value)
        return ", ".join(told) or "nothing"


def _bits(value: int, spec: str) -> str:
    if spec == "namespaces":
        return namespaces.describe(value)
    if spec == "attributes":
        from containerkit.linux.mount import ATTRIBUTES

        return ",".join(name for name, bit in ATTRIBUTES.items() if value & bit) or "none"
    if spec == "capabilities":
        from containerkit.linux.capabilities import names

        return ", ".join(names(value)) or "none"
    return format(value, spec)


def describe(plan: Plan) -> str:
    """The plan as text, one line an operation, in the order in which they happen."""

    def lines(title: str, operations: tuple[Operation, ...]) -> list[str]:
        told = [FORMS[str(name)].format(*map(_Words, operands)) for name, *operands in operations]
        return [title, *(f"  {index:2}. {line}" for index, line in enumerate(told, 1))] if told else []

    born = f"with new namespaces {namespaces.describe(plan.clone_flags) or 'none'}"
    if plan.into:
        born += f", in cgroup {plan.into}"
    text = lines("Prepare:", plan.prepare)
    text += lines(f"In the new process, born {born}:", plan.inside)
    text += lines("Afterwards:", plan.cleanup)
    return "\n".join(text)
