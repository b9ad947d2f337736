"""Docker's create options: checked, merged with the image's configuration, written down as a :class:`Record`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from containerkit.container.record import Record
from containerkit.errors import InvalidOption, Unsupported
from containerkit.image.host_image import HostImage
from containerkit.isolation import defaults
from containerkit.isolation.limits import parse_limits
from containerkit.isolation.process import signal_number
from containerkit.linux import capabilities, process
from containerkit.state import WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.image.images import Image
    from containerkit.image.runconfig import RunConfig

    Source = Image | HostImage

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}", re.ASCII)
_HOSTNAME_MAX = 63
NETWORKS = ("none", "host")


def make_record(
    image: Source,
    state_root: str,
    command: str | Sequence[str] | None = None,
    *,
    name: str | None = None,
    env: Mapping[str, str] | Iterable[str] = (),
    workdir: str | None = None,
    user: str | None = None,
    group_add: Iterable[str | int] = (),
    hostname: str | None = None,
    entrypoint: str | Sequence[str] | None = None,
    network: str = "none",
    read_only: bool = False,
    detach: bool = False,
    labels: Mapping[str, str] | None = None,
    cap_add: Iterable[str] = (),
    cap_drop: Iterable[str] = (),
    no_new_privileges: bool = False,
    seccomp: bool = True,
    stop_signal: str | int | None = None,
    **limits: Any,
) -> Record:
    """The record of a new container on the host whose state is at ``state_root``.

    ``limits`` are those of :func:`~containerkit.isolation.limits.parse_limits`: ``memory``, ``cpus``, ``pids_limit``
    and their like. ``env`` is a mapping or ``KEY=value`` strings. ``entrypoint`` replaces the image's and drops its
    command. Raises :class:`InvalidOption` that names the option, :class:`Unsupported` for a network yet to come.
    """
    config = image.run
    first, rest = _args(config, command, entrypoint)
    identity = os.urandom(32).hex()
    return Record(
        id=identity,
        name=_name(name, identity),
        image=image.id,
        image_name=image.names[0] if image.names else image.id,
        created_ns=time.time_ns(),
        args=(*first, *rest),
        env=merge_env(defaults.ENV, config.env, environment(env)),
        cwd=working_directory(workdir or config.workdir or "/"),
        user=str(user) if user is not None else config.user,
        groups=_several("group_add", group_add),
        hostname=_hostname(hostname, identity, network),
        network=_network(network),
        limits=parse_limits(**limits),
        lowers=image.lowers,
        capabilities=_capabilities(cap_add, cap_drop),
        stop_signal=_stop_signal(stop_signal if stop_signal is not None else config.stop_signal),
        labels={**config.labels, **_labels(labels)},
        owner=() if detach else (os.getpid(), process.start_time(os.getpid())),
        read_only=_flag("read_only", read_only),
        no_new_privileges=_flag("no_new_privileges", no_new_privileges),
        seccomp=_flag("seccomp", seccomp),
        hidden=outermost(map(os.path.realpath, (*image.hidden, state_root))) if isinstance(image, HostImage) else (),
        in_memory=image.in_memory if isinstance(image, HostImage) else 0,
        clone=_clone(image.driver, state_root),
        entrypoint=len(first),
    )


def _clone(driver: str, state_root: str) -> str:
    """How a container of an image gets a tree of its own; empty for overlay, which needs none."""
    if driver in WHOLE:
        return driver
    if driver not in {"overlay", ""}:
        raise Unsupported(
            f"containers do not run on the storage driver {driver!r} of {state_root} yet",
            remedy="use a state root with the driver 'overlay', 'btrfs' or 'copy'",
        )
    return ""


def outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that lie below no other of them."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return tuple(kept)


def words(command: str | Sequence[str] | None, option: str = "command") -> tuple[str, ...]:
    """A command as a tuple of strings; a string is split as a shell would, without expanding anything."""
    if command is None:
        return ()
    if isinstance(command, str):
        import shlex

        try:
            return tuple(shlex.split(command))
        except ValueError as error:
            raise InvalidOption(f"{option}: {command!r} does not split into words: {error}") from error
    if not isinstance(command, Iterable):
        raise InvalidOption(f"{option}: {command!r} is neither a list of strings nor a string")
    checked = tuple(os.fspath(word) if isinstance(word, os.PathLike) else word for word in command)
    for word in checked:
        if not isinstance(word, str):
            raise InvalidOption(f"{option}: {word!r} is not a string")
        if "\0" in word:
            raise InvalidOption(f"{option}: {word!r} holds a NUL")
    return checked


def environment(env: Mapping[str, str] | Iterable[str]) -> tuple[str, ...]:
    """``KEY=value`` strings from a mapping or from such strings. Raises :class:`InvalidOption`."""
    items = getattr(env, "items", None)
    if items is None and (isinstance(env, str) or not isinstance(env, Iterable)):
        raise InvalidOption(f"env: {env!r} is neither a mapping nor a list of KEY=value")
    for key, value in items() if items is not None else ():
        if not isinstance(key, str) or "=" in key or value is None:
            raise InvalidOption(f"env: {key!r} with the value {value!r} is no variable")
    entries = [f"{key}={value}" for key, value in items()] if items is not None else list(env)
    for entry in entries:
        if not isinstance(entry, str) or "\0" in entry or not entry.partition("=")[0] or "=" not in entry:
            raise InvalidOption(f"env: {entry!r} is not KEY=value")
    return tuple(entries)


def merge_env(*parts: Iterable[str]) -> tuple[str, ...]:
    """Later entries replace earlier ones of the same key, in place."""
    merged: dict[str, str] = {}
    for part in parts:
        for entry in part:
            key, _, value = entry.partition("=")
            merged[key] = value
    return tuple(f"{key}={value}" for key, value in merged.items())


def _args(
    config: RunConfig, command: str | Sequence[str] | None, entrypoint: str | Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Entrypoint and command. Docker's rule: a new entrypoint drops the image's command, a command only that."""
    first, rest = config.entrypoint, words(command)
    if entrypoint is not None:
        first = words((entrypoint,) if isinstance(entrypoint, str) and entrypoint else entrypoint or (), "entrypoint")
    else:
        rest = rest or config.command
    if not any((*first, *rest)[:1]):
        raise InvalidOption("command: none given, and the image has neither entrypoint nor command")
    return first, rest


def _name(name: str | None, identity: str) -> str:
    if name is None:
        return f"ck-{identity[:12]}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidOption(f"name: {name!r} is no container name", hint="letters, digits, and _ . - after the first")
    return name


def working_directory(path: str) -> str:
    """A working directory, without dots and doubled slashes. Raises :class:`InvalidOption`."""
    if not isinstance(path, str) or not path.startswith("/"):
        raise InvalidOption(f"workdir: {path!r} is not absolute")
    if "\0" in path:
        raise InvalidOption(f"workdir: {path!r} holds a NUL")
    return os.path.normpath(path).replace("//", "/")


def _hostname(hostname: str | None, identity: str, network: str) -> str:
    if hostname is None:
        return "" if network == "host" else identity[:12]
    fits = isinstance(hostname, str) and 0 < len(os.fsencode(hostname)) <= _HOSTNAME_MAX
    if not fits or re.search(r"[\s\0/]", hostname):
        raise InvalidOption(
            f"hostname: {hostname!r} is no host name", hint=f"1 to {_HOSTNAME_MAX} bytes without space or slash"
        )
    return hostname


def _network(network: str) -> str:
    if network in NETWORKS:
        return network
    if network in {"bridge", "default"}:
        raise Unsupported("network 'bridge' is not there yet", remedy="use network='none' or network='host'")
    raise InvalidOption(f"network: {network!r} is unknown", hint="'none' or 'host'")


def _capabilities(add: Iterable[str], drop: Iterable[str]) -> tuple[str, ...]:
    """Docker's rule: ``ALL`` in either list, drops first."""
    add_all, added = _capability_mask("cap_add", add)
    drop_all, dropped = _capability_mask("cap_drop", drop)
    held = 0 if drop_all else capabilities.mask(defaults.CAPABILITIES)
    if add_all:
        held = (1 << (capabilities.last_cap() + 1)) - 1
    return capabilities.names(held & ~dropped | added)


def _capability_mask(option: str, names: Iterable[str]) -> tuple[bool, int]:
    """Whether ``ALL`` is among them, and the others as bits."""
    wanted = {name.upper() for name in _several(option, names)}
    try:
        return "ALL" in wanted, capabilities.mask(wanted - {"ALL"})
    except InvalidOption as error:
        raise InvalidOption(f"{option}: {error.message}") from error


def _stop_signal(signal: str | int) -> str:
    try:
        return str(signal_number(signal or "TERM"))
    except InvalidOption as error:
        raise InvalidOption(f"stop_signal: {signal!r} is no signal") from error


def _several(option: str, values: Iterable[str | int]) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidOption(f"{option}: {values!r} is not a list")
    return tuple(map(str, values))


def _labels(labels: Mapping[str, str] | None) -> dict[str, str]:
    if labels is not None and not isinstance(labels, Mapping):
        raise InvalidOption(f"labels: {labels!r} is not a mapping")
    return {str(key): str(value) for key, value in (labels or {}).items()}


def _flag(option: str, value: bool) -> bool:
    if value not in {True, False}:
        raise InvalidOption(f"{option}: {value!r} is neither True nor False")
    return bool(value)
