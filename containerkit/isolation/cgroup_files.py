"""Reading cgroup files: the few helpers that v1 and v2 share."""

from __future__ import annotations

import os
from typing import NamedTuple

_SIGKILL = 9


class Stats(NamedTuple):
    """What a container has used. -1: not accounted, or not limited."""

    memory: int
    """bytes, page cache included"""
    memory_inactive_file: int
    """bytes of page cache not used lately; Docker subtracts them from ``memory``"""
    memory_peak: int
    memory_limit: int
    cpu_ns: int
    throttled_ns: int
    pids: int
    pids_limit: int


def read(path: str) -> str:
    """The content of a file; empty where it is not there, or its cgroup vanishes meanwhile (ENODEV)."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def read_int(path: str) -> int:
    """The number in a file; -1 for ``max`` and where it is not there."""
    text = read(path).strip()
    return int(text) if text.isdecimal() else -1


def read_keys(path: str) -> dict[str, int]:
    """The lines ``key number`` of a file."""
    pairs = (line.split() for line in read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}  # noqa: PLR2004


def children(directory: str) -> list[str]:
    """The cgroups below ``directory``, deepest first, itself last; nothing where it is gone."""
    found: list[str] = []
    try:
        with os.scandir(directory) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return found
    for path in below:
        found.extend(children(path))
    return [*found, directory]


def processes(directory: str) -> tuple[int, ...]:
    """The pids in a cgroup and all below it, as the caller's pid namespace numbers them."""
    return tuple(int(pid) for path in children(directory) for pid in read(f"{path}/cgroup.procs").split())


def signal_all(directory: str, number: int = _SIGKILL) -> None:
    """Send a signal to every process in a cgroup and below."""
    for pid in processes(directory):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
