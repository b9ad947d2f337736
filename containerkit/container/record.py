"""What is written down about a container: the record in the database, and the small files that its keeper writes."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from containerkit.isolation.limits import Limits
from containerkit.linux import process


class Record(NamedTuple):
    """A container as it was created: all that a start needs, in any process, with nothing left to look up.

    ``owner`` is (pid, start time) of the process that it ends with, or empty for a detached container. ``clone`` is how
    it gets a tree of its own (:class:`~containerkit.isolation.spec.Root`), empty where its changes lie on the layers.
    The first ``entrypoint`` words of ``args`` are the entrypoint, the others the command.
    """

    id: str
    name: str
    image: str
    image_name: str
    created_ns: int
    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: str
    hostname: str
    network: str
    limits: Limits
    lowers: tuple[str, ...]
    capabilities: tuple[str, ...]
    stop_signal: str
    labels: dict[str, str]
    owner: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    read_only: bool = False
    no_new_privileges: bool = False
    seccomp: bool = True
    hidden: tuple[str, ...] = ()
    in_memory: int = 0
    clone: str = ""
    entrypoint: int = 0

    @property
    def detached(self) -> bool:
        """Whether it outlives the process that made it."""
        return not self.owner

    def owner_lives(self) -> bool:
        """Whether the process that it ends with is still there; True for a detached one."""
        return not self.owner or process.start_time(self.owner[0]) == self.owner[1]

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(self._asdict(), separators=(",", ":"))


def load(text: str) -> Record:
    """The inverse of :meth:`Record.dump`; fields of a newer version are passed over."""
    data = json.loads(text)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    values["limits"] = Limits(*values["limits"])
    known: dict[str, Any] = {key: value for key, value in values.items() if key in Record._fields}
    return Record(**known)


class Running(NamedTuple):
    """The file ``state``: who runs there, by pid and start time (clock ticks since boot), and since when."""

    pid: int
    start: int
    keeper: int
    keeper_start: int
    since_ns: int

    def keeper_lives(self) -> bool:
        """Whether the keeper is at work: then the container runs, or has just ended and is being cleaned up."""
        return process.start_time(self.keeper) == self.keeper_start


class Ended(NamedTuple):
    """The file ``exit``."""

    exit_code: int
    oom_kills: int
    at_ns: int


def read_running(directory: str) -> Running | None:
    """The file ``state`` of a container's directory; None before its first start."""
    numbers = _numbers(f"{directory}/state", len(Running._fields))
    return Running(*numbers) if numbers else None


def read_ended(directory: str) -> Ended | None:
    """The file ``exit`` of a container's directory; None until it has ended."""
    numbers = _numbers(f"{directory}/exit", len(Ended._fields))
    return Ended(*numbers) if numbers else None


def write_ended(directory: str, ended: Ended) -> None:
    """What the keeper would have written, had it not been killed."""
    with open(f"{directory}/exit.new", "w") as file:
        file.write(" ".join(map(str, ended)) + "\n")
    os.rename(f"{directory}/exit.new", f"{directory}/exit")


def _numbers(path: str, count: int) -> tuple[int, ...]:
    try:
        with open(path) as file:
            words = file.read().split()
    except OSError:
        return ()
    return tuple(map(int, words[:count])) if len(words) >= count else ()
