"""The content store under many processes, and under processes that are killed at random moments.

``CONTAINERKIT_STRESS_SECONDS`` and ``CONTAINERKIT_KILLS`` make these longer: 60 and 200 in a full run.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from containerkit.image.images import Images
from containerkit.registry.client import connect
from support import crash
from support.images import MadeImage, make_tar, member
from support.registry import skopeo

if TYPE_CHECKING:
    from containerkit.state import State
    from support.registry import Registry

pytestmark = [pytest.mark.kernel, pytest.mark.registry]

SECONDS = float(os.environ.get("CONTAINERKIT_STRESS_SECONDS", "20"))
KILLS = int(os.environ.get("CONTAINERKIT_KILLS", "25"))
PROCESSES = 8
IMAGES = 4


@pytest.fixture(scope="module")
def served(registry: Registry, session_directory: str) -> tuple[list[str], list[str]]:
    """Images over a shared base: their names in a registry, and layouts of the same."""
    chance = random.Random(3)  # noqa: S311 - chance, not a secret
    base = make_tar([member("base/"), *(member(f"base/{n}", chance.randbytes(200_000)) for n in range(20))])
    names, layouts = [], []
    for number in range(IMAGES):
        own = make_tar([member("own/"), *(member(f"own/{n}", chance.randbytes(20_000)) for n in range(40))])
        top = make_tar([member("base/.wh.0", b""), member("number", bytes([number]))])
        layout = os.path.join(session_directory, f"stress-{number}")
        MadeImage([base, own, top], config={"Cmd": [str(number)]}).write_layout(layout, "1")
        names.append(registry.name(f"stress{number}:1"))
        layouts.append(layout)
        skopeo("copy", f"oci:{layout}:1", f"docker://{names[-1]}")
    return names, layouts


@pytest.mark.timeout(SECONDS * 2 + 120)
def test_processes_that_pull_remove_and_collect_never_lose_a_reachable_blob(
    state: State, served: tuple[list[str], list[str]]
) -> None:
    todo = crash.verbs(*served)
    todo["look"] = lambda _, state, __: _expect_no_problem(state)
    end = time.monotonic() + SECONDS
    pids = [
        crash.start(lambda seed=seed: crash.work(state.root, todo, seed, lambda: time.monotonic() < end))  # type: ignore[misc]
        for seed in range(PROCESSES)
    ]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * PROCESSES
    crash.remove_containers(state)
    crash.expect_whole(state)
    pulled = Images(state, connect).pull(served[0][0])
    assert len(os.listdir(f"{pulled.lowers[-1]}/base")) == 20


def _expect_no_problem(state: State) -> None:
    from containerkit.image.store.verify import verify

    assert verify(state, deep=False) == []


@pytest.mark.timeout(KILLS * 10 + 120)
def test_a_process_that_is_killed_leaves_a_whole_store(state: State, served: tuple[list[str], list[str]]) -> None:
    chance = random.Random()  # noqa: S311 - chance, not a secret
    todo = crash.verbs(*served)
    todo["pull again"] = todo["pull"]
    for _ in range(KILLS):
        seed = chance.randrange(1 << 30)
        pid = crash.start(lambda seed=seed: crash.work(state.root, todo, seed, lambda: True))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.6))
        assert crash.kill(pid) == 9, f"seed {seed} ended by itself"
        crash.remove_containers(state)
        crash.expect_whole(state)
    images = Images(state, connect)
    assert [len(images.pull(name).lowers) for name in served[0]] == [3] * IMAGES
    crash.expect_whole(state)
