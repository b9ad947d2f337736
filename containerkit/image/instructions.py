"""Docker's instructions as changes of an image's config: what ``docker commit --change`` and ``import --change`` take.

CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME and WORKDIR, in shell and JSON form
(Dockerfile reference). Variables are those of the config, as they are at that line.
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
_PORT = re.compile(r"(\d+)(?:-(\d+))?(?:/(tcp|udp|sctp))?", re.ASCII | re.IGNORECASE)
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
    seen: set[str] = set()
    for line in changes:
        name, _, rest = line.strip().replace("\\\n", " ").partition(" ")
        name, rest = name.upper(), rest.strip()
        instruction = _INSTRUCTIONS.get(name)
        if instruction is None:
            raise InvalidOption(f"changes: {line!r} cannot be applied", hint=f"one of {', '.join(_INSTRUCTIONS)}")
        if not rest:
            raise InvalidOption(f"changes: {line!r} says nothing")
        try:
            instruction(changed, rest)
        except ValueError as error:
            raise InvalidOption(f"changes: {line!r}: {error}") from error
        seen.add(name)
        if name == "ENTRYPOINT" and "CMD" not in seen:
            changed.pop("Cmd", None)  # it was made for another entrypoint
    return changed


def _cmd(config: Config, rest: str) -> None:
    config["Cmd"] = _command(config, rest)


def _entrypoint(config: Config, rest: str) -> None:
    config["Entrypoint"] = _command(config, rest) or None


def _command(config: Config, rest: str) -> list[str]:
    given = _json_words(rest)
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
        match = _PORT.fullmatch(word)
        if not match:
            raise ValueError(f"{word!r} is no port")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 < first <= last <= MOST_PORTS:
            raise ValueError(f"{word!r} is no range of ports")
        ports.update({f"{port}/{(match[3] or 'tcp').lower()}": {} for port in range(first, last + 1)})
    config["ExposedPorts"] = ports


def _volume(config: Config, rest: str) -> None:
    words = _json_words(rest)
    paths = [_expanded(config, word) for word in words] if words is not None else split(rest, _variables(config))
    if not all(path.strip() for path in paths):
        raise ValueError("a volume needs a path")
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path.strip(): {} for path in paths}}


def _workdir(config: Config, rest: str) -> None:
    path = posixpath.join("/", config.get("WorkingDir") or "/", _expanded(config, rest))
    config["WorkingDir"] = posixpath.normpath(path).replace("//", "/")


def _user(config: Config, rest: str) -> None:
    config["User"] = _expanded(config, rest)


def _stop_signal(config: Config, rest: str) -> None:
    name = _expanded(config, rest)
    known = {*signal.Signals.__members__, *(member[3:] for member in signal.Signals.__members__)}
    if not (name.upper() in known or (name.isdigit() and 0 < int(name) < signal.NSIG)):
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
    while rest.startswith("--"):
        option, _, rest = rest.partition(" ")
        key, _, value = option[2:].partition("=")
        rest = rest.strip()
        if key in _CHECK_TIMES:
            check[_CHECK_TIMES[key]] = duration(value)
        elif key == "retries" and value.isdigit():
            check["Retries"] = int(value)
        else:
            raise ValueError(f"{option!r} is no option of HEALTHCHECK")
    word, _, command = rest.partition(" ")
    command = command.strip()
    if word.upper() != "CMD" or not command:
        raise ValueError("neither NONE nor CMD")
    given = _json_words(command)
    config["Healthcheck"] = {"Test": ["CMD-SHELL", command] if given is None else ["CMD", *given], **check}


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
    first = rest.split(None, 1)
    if "=" not in first[0]:
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
    """A JSON list of strings, or None: then it is the shell form."""
    if not text.startswith("["):
        return None
    try:
        words: Sequence[Any] = json.loads(text)
    except ValueError:
        return None
    return [str(word) for word in words] if all(isinstance(word, str) for word in words) else None
