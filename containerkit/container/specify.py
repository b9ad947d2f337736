"""From a record to a spec, without touching the host: what this container may see and use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.container.options import environment, merge_env, words, working_directory
from containerkit.errors import InvalidOption
from containerkit.isolation import defaults
from containerkit.isolation.spec import ExecSpec, File, ProcessSpec, Root, Spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from containerkit.container.record import Record

_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"


def specify(record: Record, directory: str, host_files: Mapping[str, str]) -> Spec:
    """The spec of a container whose files live in ``directory``.

    ``host_files`` holds the host's ``/etc/hosts`` and ``/etc/resolv.conf``; a container in the host's network sees the
    first, every container the second.
    """
    own_network = record.network != "host"
    namespaces = tuple(name for name in Spec._field_defaults["namespaces"] if name != "network" or own_network)
    hosts = _HOSTS + f"127.0.1.1\t{record.hostname}\n" if own_network else host_files.get("/etc/hosts", _HOSTS)
    files = [File("/etc/hosts", hosts), File("/etc/resolv.conf", host_files.get("/etc/resolv.conf", ""))]
    if record.hostname:
        files.append(File("/etc/hostname", record.hostname + "\n"))
    return Spec(
        id=record.id,
        root=Root(
            lowers=record.lowers,
            directory=directory,
            readonly=record.read_only,
            volatile=not record.detached,
            in_memory=record.in_memory,
            hidden=record.hidden,
            clone=record.clone,
        ),
        process=ProcessSpec(
            args=record.args,
            env=_env(record),
            cwd=record.cwd,
            user=record.user,
            groups=record.groups,
            capabilities=record.capabilities,
            no_new_privileges=record.no_new_privileges,
            seccomp=record.seccomp,
        ),
        hostname=record.hostname,
        namespaces=namespaces,
        files=tuple(files),
        sysctls=defaults.SYSCTLS if own_network else (),
        masked_paths=defaults.masked_paths(),
        limits=record.limits,
    )


def specify_exec(
    record: Record,
    identity: str,
    command: str | Sequence[str],
    *,
    env: Mapping[str, str] | Iterable[str] = (),
    workdir: str | None = None,
    user: str | None = None,
) -> ExecSpec:
    """The spec of a process that joins the container: its environment, directory and user unless told otherwise."""
    args = words(command)
    if not args or not args[0]:
        raise InvalidOption("command: nothing to execute")
    process = ProcessSpec(
        args=args,
        env=merge_env(_env(record), environment(env)),
        cwd=working_directory(workdir) if workdir else record.cwd,
        user=str(user) if user is not None else record.user,
        groups=record.groups,
        capabilities=record.capabilities,
        no_new_privileges=record.no_new_privileges,
        seccomp=record.seccomp,
    )
    namespaces = tuple(
        name for name in ExecSpec._field_defaults["namespaces"] if name != "network" or record.network != "host"
    )
    return ExecSpec(identity, process, namespaces)


def _env(record: Record) -> tuple[str, ...]:
    """The container's variables; one that asks for another HOSTNAME gets it."""
    return merge_env((f"HOSTNAME={record.hostname}",) if record.hostname else (), record.env)
