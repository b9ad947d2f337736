"""What a watcher is told of a pull."""

from __future__ import annotations

import pytest

from containerkit.image.images import Images
from containerkit.image.progress import DONE, MOVING, PRESENT, Progress
from containerkit.state import State
from support.images import MadeImage, make_tar, member

pytestmark = pytest.mark.kernel

LAYERS = [make_tar([member(f"file{number}", bytes(3_000_000 + number))]) for number in range(3)]


def test_every_byte_is_told_and_the_total_from_the_beginning(state_root: str) -> None:
    made = MadeImage(LAYERS)
    events: list[Progress] = []
    images = Images(State(state_root), lambda *_, **__: made)
    images.pull("example.org/app:1", progress=events.append)
    total = sum(layer.size for layer in images.get("example.org/app:1").manifest.layers)
    assert {event.total for event in events} == {total}
    assert events[-1].total_done == total
    assert [event.total_done for event in events] == sorted(event.total_done for event in events)
    assert sum(event.phase == DONE for event in events) == len(LAYERS)
    assert any(event.phase == MOVING and event.done < event.size for event in events) or all(
        event.size < 1 << 20 for event in events
    )
    events.clear()
    images.pull("example.org/app:2", progress=events.append)
    assert [event.phase for event in events] == [PRESENT] * len(LAYERS)
    assert events[-1].total_done == events[-1].total == total


def test_a_watcher_may_stop_a_pull(state_root: str) -> None:
    def enough(_: Progress) -> None:
        raise KeyboardInterrupt

    images = Images(State(state_root), lambda *_, **__: MadeImage(LAYERS))
    with pytest.raises(KeyboardInterrupt):
        images.pull("example.org/app:1", progress=enough)
    assert images.list() == []
