"""Processes that work on one state root at random and are killed at random, and what must hold afterwards."""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from typing import TYPE_CHECKING

from containerkit.container.containers import Containers
from containerkit.errors import ImageInUse, ImageNotFound
from containerkit.image.images import Images
from containerkit.image.store.gc import gc
from containerkit.image.store.inventory import Inventory
from containerkit.image.store.verify import verify
from containerkit.registry.client import connect
from containerkit.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Verb = Callable[[Images, State, random.Random], object]


def verbs(names: Sequence[str], layouts: Sequence[str]) -> dict[str, Verb]:
    """What a process may do: names are of a registry, layouts are directories."""

    def remove(images: Images, _: State, chance: random.Random) -> None:
        if there := images.list():
            images.remove(chance.choice(there))

    def commit(images: Images, state: State, chance: random.Random) -> None:
        """Of a container that was never started, with a writable layer made by hand."""
        if not (there := images.list()):
            return
        container = Containers(state, images).create(chance.choice(there), ["none"], detach=True)
        os.makedirs(f"{container.directory}/upper/made")
        for number in range(20):
            with open(f"{container.directory}/upper/made/{number}", "wb") as file:
                file.write(chance.randbytes(20_000))
        container.commit(f"committed:{chance.randrange(3)}")
        container.remove(force=True)

    return {
        "commit": commit,
        "pull": lambda images, _, chance: images.pull(chance.choice(names)),
        "load": lambda images, _, chance: images.load(chance.choice(layouts), tag=f"loaded:{chance.randrange(3)}"),
        "remove": remove,
        "gc": lambda _, state, chance: gc(state, max_age=chance.choice([None, None, 0.05]), partial_age=0),
    }


def work(root: str, todo: Mapping[str, Verb], seed: int, more: Callable[[], bool]) -> None:
    """Do one thing after another while ``more()``. What another process has removed just now is no failure."""
    chance = random.Random(seed)  # noqa: S311 - chance, not a secret
    state = State(root)
    images = Images(state, connect)
    while more():
        verb = chance.choice(sorted(todo))
        try:
            todo[verb](images, state, chance)
        except (ImageNotFound, ImageInUse):
            continue
    state.close()


def remove_containers(state: State) -> None:
    """Those that killed processes have left."""
    containers = Containers(state, Images(state, connect))
    for container in containers.list(all=True):
        container.remove(force=True)


def start(target: Callable[[], object]) -> int:
    """Run ``target`` in a forked process, whose exit status is 1 after an exception: its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        target()
        status = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def kill(pid: int) -> int:
    """Kill it and wait: its wait status."""
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def expect_whole(state: State) -> None:
    """The store is whole, and one collection leaves only what is needed."""
    assert verify(state) == []
    gc(state, partial_age=0)
    inventory = Inventory(state)
    needed = inventory.leased().union(*(image.content for image in inventory.images()))
    assert inventory.stored() == needed
    assert os.listdir(state.path("ingest")) == []
    assert verify(state) == []
