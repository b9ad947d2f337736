"""Docker's instructions as changes of an image's config: what ``docker commit --change`` and ``import --change`` take.

CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR, in shell and JSON form
(Dockerfile reference). Variables are those of the config, as they are at that line. What Docker 20.10 takes and what
it makes of it is the measure; beyond it ``STOPSIGNAL``, which a newer one takes, too.
"""

from __future__ import annotations

import json
import posixpath
import re
import signal
from typing import TYPE_CHECKING, Any

from containerkit.errors import InvalidOption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Config = dict[str, Any]

SHELL = ("/bin/sh", "-c")
NOT_TRIGGERED = {"ONBUILD", "FROM", "MAINTAINER"}
MOST_PORTS = 65535
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::([-+])([^}]*))?\})", re.ASCII)
_PORTS = re.compile(r"(\d+)(?:-(\d+)(?:-.*)?)?", re.ASCII)
_PROTOCOLS = ("tcp", "udp", "sctp")
_FIRST_WORD = re.compile(r"""(?:\\.|"(?:\\.|[^"\\])*"|'[^']*'|[^\s"'\\])+""", re.DOTALL)
_REAL_TIME = re.compile(r"RTMIN\+([1-9]|1[0-5])|RTMAX-([1-9]|1[0-4])", re.ASCII)
LEAST_INTERVAL = 10**6  # nanoseconds
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)", re.ASCII)
_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_CHECK_TIMES = {
    "interval": "Interval",
    "timeout": "Timeout",
    "start-period": "StartPeriod",
    "start-interval": "StartInterval",
}


def apply_changes(config: Mapping[str, Any], changes: Iterable[str]) -> Config:
    """A config (the ``config`` object of an image) with the instructions applied in order; the given one stays.

    Raises :class:`InvalidOption` that names the line.
    """
    if isinstance(changes, str):
        raise InvalidOption(f"changes: {changes!r} is one string, not a list of instructions")
    changed: Config = json.loads(json.dumps(dict(config)))
    given = False
    for line in changes:
        name, _, rest = line.strip().replace("\\\n", "").partition(" ")
        name, rest = name.upper(), rest.strip()
        instruction = _INSTRUCTIONS.get(name)
        if instruction is None:
            raise InvalidOption(f"changes: {line!r} cannot be applied", hint=f"one of {', '.join(_INSTRUCTIONS)}")
        if not rest and name not in _MAY_BE_EMPTY:
            raise InvalidOption(f"changes: {line!r} says nothing")
        try:
            instruction(changed, rest)
        except ValueError as error:
            raise InvalidOption(f"changes: {line!r}: {error}") from error
        given = given or (name == "CMD" and bool(changed["Cmd"]))
        if name == "ENTRYPOINT" and not given:
            changed.pop("Cmd", None)  # it was made for another entrypoint
    return changed


def change_container(config: Mapping[str, Any], changes: Iterable[str]) -> Config:
    """As :func:`apply_changes`, for the config of a container: what is left empty then, the container's stands for.

    So ``ENTRYPOINT []`` alone changes nothing, as ``docker commit`` has it.
    """
    changed = apply_changes(config, changes)
    keys = ["User", "WorkingDir"]
    if not changed.get("Entrypoint"):
        keys += ["Cmd", "Entrypoint"]
    for key in keys:
        if not changed.get(key) and config.get(key):
            changed[key] = config[key]
    return changed


def _cmd(config: Config, rest: str) -> None:
    config["Cmd"] = _command(config, rest)


def _entrypoint(config: Config, rest: str) -> None:
    config.pop("Entrypoint", None)
    if rest and (command := _command(config, rest)):
        config["Entrypoint"] = command


def _command(config: Config, rest: str) -> list[str]:
    given = _json_words(rest)
    if not rest:
        return [*(config.get("Shell") or SHELL)]
    return given if given is not None else [*(config.get("Shell") or SHELL), rest]


def _env(config: Config, rest: str) -> None:
    variables = dict(entry.partition("=")[::2] for entry in config.get("Env") or ())
    variables.update(_pairs(config, rest))
    config["Env"] = [f"{key}={value}" for key, value in variables.items()]


def _label(config: Config, rest: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **_pairs(config, rest)}


def _expose(config: Config, rest: str) -> None:
    ports = dict(config.get("ExposedPorts") or {})
    for word in split(rest, _variables(config)):
        if word:
            ports.update(_exposed(word))
    config["ExposedPorts"] = ports


def _exposed(word: str) -> Config:
    """``[[IP:]HOST:]PORTS[/PROTOCOL]``, as ``docker run -p`` has it; only what is inside the container counts."""
    spec, _, rest = word.partition("/")
    protocol = rest.partition("/")[0].lower() or "tcp"
    if protocol not in _PROTOCOLS:
        raise ValueError(f"{protocol!r} is none of {', '.join(_PROTOCOLS)}")
    address, host, inside = ["", "", *spec.rsplit(":", 2)][-3:]
    if address:
        _check_address(address)
    ports = _range(inside)
    if host and len(ports) > 1 and len(_range(host)) != len(ports):
        raise ValueError(f"{word!r} has ranges of different lengths")
    if host:
        _range(host)
    return {f"{port}/{protocol}": {} for port in ports}


def _check_address(text: str) -> None:
    import ipaddress

    bracketed = text.startswith("[") and text.endswith("]")
    if ":" in text and not bracketed:
        raise ValueError(f"{text!r} is no address: one of IPv6 stands in brackets")
    ipaddress.ip_address(text[1:-1] if bracketed else text)


def _range(text: str) -> range:
    match = _PORTS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last <= MOST_PORTS:
        raise ValueError(f"{text!r} is neither a port nor a range of ports")
    return range(first, last + 1)


def _volume(config: Config, rest: str) -> None:
    words = _json_words(rest)
    paths = [_expanded(config, word).strip() for word in (rest.split() if words is None else words)]
    if not paths or not all(paths):
        raise ValueError("a volume needs a path")
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}


def _workdir(config: Config, rest: str) -> None:
    path = _expanded(config, rest)
    if not path:
        raise ValueError("a directory needs a name")
    if not path.startswith("/"):
        path = posixpath.normpath(posixpath.join("/", config.get("WorkingDir") or "/", path)).replace("//", "/")
    config["WorkingDir"] = path


def _user(config: Config, rest: str) -> None:
    config["User"] = _expanded(config, rest)


def _stop_signal(config: Config, rest: str) -> None:
    name = _expanded(config, rest)
    short = name.upper().removeprefix("SIG")
    known = f"SIG{short}" in signal.Signals.__members__ or _REAL_TIME.fullmatch(short)
    if not (known or (name.isascii() and name.isdigit() and 0 < int(name) < signal.NSIG)):
        raise ValueError(f"{name!r} is no signal")
    config["StopSignal"] = name


def _onbuild(config: Config, rest: str) -> None:
    name = rest.split(maxsplit=1)[0]
    if name.upper() in NOT_TRIGGERED:
        raise ValueError(f"{name} is no trigger")
    config["OnBuild"] = [*(config.get("OnBuild") or ()), rest]


def _healthcheck(config: Config, rest: str) -> None:
    if rest.upper() == "NONE":
        config["Healthcheck"] = {"Test": ["NONE"]}
        return
    check: Config = {}
    given: set[str] = set()
    while rest.startswith("--"):
        option, _, rest = rest.partition(" ")
        key, _, value = option[2:].partition("=")
        rest = rest.strip()
        if key in given:
            raise ValueError(f"--{key} is given twice")
        given.add(key)
        check |= _check_option(option, key, value)
    word, _, command = rest.partition(" ")
    words = _json_words(command.strip())
    if word.upper() != "CMD" or not command.strip() or words == []:
        raise ValueError("neither NONE nor CMD with a command")
    config["Healthcheck"] = {"Test": ["CMD-SHELL", command.strip()] if words is None else ["CMD", *words], **check}


def _check_option(option: str, key: str, value: str) -> Config:
    """One option of HEALTHCHECK; an empty one says nothing."""
    if key not in {*_CHECK_TIMES, "retries"}:
        raise ValueError(f"{option!r} is no option of HEALTHCHECK")
    if not value:
        return {}
    if key == "retries":
        if not (value.isascii() and value.isdigit() and int(value)):
            raise ValueError(f"{option!r} is no number from 1 up")
        return {"Retries": int(value)}
    nanoseconds = duration(value)
    if nanoseconds < LEAST_INTERVAL:
        raise ValueError(f"{option!r} is less than 1ms")
    return {_CHECK_TIMES[key]: nanoseconds}


_INSTRUCTIONS: dict[str, Callable[[Config, str], None]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "HEALTHCHECK": _healthcheck,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _stop_signal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
_MAY_BE_EMPTY = {"CMD", "ENTRYPOINT"}  # in the shell form, of a shell with nothing to do


def duration(text: str) -> int:
    """Go's duration (``1m30s``) in nanoseconds. Raises ``ValueError``."""
    parts = _PART.findall(text)
    if text != "0" and (not parts or "".join(map("".join, parts)) != text):
        raise ValueError(f"{text!r} is no duration")
    return sum(round(float(number) * _NANOSECONDS[unit]) for number, unit in parts)


def split(text: str, variables: Mapping[str, str]) -> list[str]:
    """Words as a Dockerfile has them: quotes, backslashes, and variables except in single quotes.

    Raises ``ValueError`` for a quote without an end.
    """
    words: list[str] = []
    word: str | None = None
    quote, position = "", 0
    while position < len(text):
        character = text[position]
        variable = _VARIABLE.match(text, position) if character == "$" and quote != "'" else None
        position += 1
        if variable:
            word = (word or "") + _value(variable, variables)
            position = variable.end()
        elif character == "\\" and quote != "'" and position < len(text):
            kept = "\\" if quote and text[position] not in '"$\\' else ""
            word = (word or "") + kept + text[position]
            position += 1
        elif character in {'"', "'"} and quote in {"", character}:
            quote, word = "" if quote else character, word or ""
        elif character.isspace() and not quote:
            words, word = ([*words, word], None) if word is not None else (words, None)
        else:
            word = (word or "") + character
    if quote:
        raise ValueError("a quote has no end")
    return words if word is None else [*words, word]


def _value(variable: re.Match[str], variables: Mapping[str, str]) -> str:
    value = variables.get(variable[1] or variable[2], "")
    if variable[3] == "-":
        return value or variable[4]
    return (variable[4] if value else "") if variable[3] == "+" else value


def _pairs(config: Config, rest: str) -> dict[str, str]:
    """``KEY=value ...``, or the older form ``KEY value``."""
    begins = _FIRST_WORD.match(rest)
    if begins and "=" not in begins[0]:
        first = rest.split(None, 1)
        if len(first) < 2:  # noqa: PLR2004
            raise ValueError(f"{rest!r} has no value")
        return {first[0]: _expanded(config, first[1])}
    pairs = {}
    for word in split(rest, _variables(config)):
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError(f"{word!r} is not KEY=value")
        pairs[key] = value
    return pairs


def _expanded(config: Config, text: str) -> str:
    return " ".join(split(text, _variables(config)))


def _variables(config: Config) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in config.get("Env") or ())


def _json_words(text: str) -> list[str] | None:
    """A JSON list of strings, or None: then it is the shell form. Raises ``ValueError`` for a list of other things."""
    if not text.startswith("["):
        return None
    try:
        words: Sequence[Any] = json.loads(text)
    except ValueError:
        return None
    if not all(isinstance(word, str) for word in words):
        raise ValueError("a JSON list must be one of strings")
    return [*words]
