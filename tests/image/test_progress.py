"""What a watcher is told of pulls, pushes and copies, and the ready bars, by the real packages."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import ImageNotFound, Unsupported
from containerkit.image.digest import Digest
from containerkit.image.images import Images
from containerkit.image.progress import DONE, MOVING, PRESENT, Bar, Progress, shown
from support.images import MadeImage, make_tar, member

if TYPE_CHECKING:
    from pathlib import Path

    from containerkit.state import State

pytestmark = pytest.mark.kernel

LAYERS = [make_tar([member(f"file{number}", bytes(3_000_000 + number))]) for number in range(3)]


def test_every_byte_is_told_and_the_total_from_the_beginning(state: State) -> None:
    made = MadeImage(LAYERS)
    events: list[Progress] = []
    images = Images(state, lambda *_, **__: made)
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


def test_a_watcher_may_stop_a_pull(state: State) -> None:
    def enough(_: Progress) -> None:
        raise KeyboardInterrupt

    images = Images(state, lambda *_, **__: MadeImage(LAYERS))
    with pytest.raises(KeyboardInterrupt):
        images.pull("example.org/app:1", progress=enough)
    assert images.list() == []


@pytest.fixture
def images(state: State) -> Images:
    """A host whose only registry takes everything."""
    there = MadeImage(LAYERS)
    there.add(there.manifest)
    return Images(state, lambda *_, **__: there)


@pytest.fixture
def local(images: Images, tmp_path: Path) -> str:
    """The name of an image that only the host has."""
    other = MadeImage([make_tar([member("other", bytes(range(256)) * 9000)])], compress=False)
    other.add(other.manifest)
    images.load(other.write_layout(str(tmp_path / "other")), tag="example.org/local:1")
    return "example.org/local:1"


def test_a_push_is_told_like_a_pull(images: Images, local: str) -> None:
    events: list[Progress] = []
    images.push(local, progress=events.append)
    image = images.get(local)
    assert {event.total for event in events} == {image.size}
    assert events[-1].total_done == image.size
    assert {event.digest for event in events if event.phase == DONE} == {image.id, image.manifest.layers[0].digest}
    assert any(event.phase == MOVING for event in events)
    events.clear()
    images.push(local, progress=events.append)
    assert {event.phase for event in events} == {PRESENT}


@pytest.mark.parametrize(
    "target",
    ["oci:{}/copy:1", "oci-archive:{}/copy.tar:1", "docker-archive:{}/copy.tar:a:1", "docker://example.org/b:1"],
)
def test_copies_are_told(images: Images, local: str, tmp_path: Path, target: str) -> None:
    events: list[Progress] = []
    images.copy(f"containerkit:{local}", target.format(tmp_path), progress=events.append)
    assert {event.total for event in events} == {images.get(local).size}
    assert events[-1].total_done == events[-1].total
    assert any(event.phase == MOVING for event in events)
    assert sum(event.phase == DONE for event in events) == 2


def test_a_copy_into_the_store_is_told(images: Images) -> None:
    events: list[Progress] = []
    images.copy("docker://example.org/app:1", "containerkit:example.org/copied:1", progress=events.append)
    assert events[-1].total_done == events[-1].total > 0
    assert sum(event.phase == DONE for event in events) == len(LAYERS)


def names_of_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("by", [True, "tqdm", "rich"])
def test_a_bar_by_one_argument(
    images: Images,
    local: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    by: bool | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws on a terminal only
    monkeypatch.setenv("TERM", "xterm")
    before = names_of_threads()
    for action in (
        lambda: images.pull("example.org/app:1", progress=by),
        lambda: images.push(local, progress=by),
        lambda: images.copy(f"containerkit:{local}", f"oci:{tmp_path}/out:1", progress=by),
    ):
        action()
        out, shown_there = capfd.readouterr()
        assert out == ""
        assert "example.org" in shown_there or "out:1" in shown_there
        assert ("━" if by == "rich" else "%|") in shown_there
    assert names_of_threads() <= before


def test_a_bar_goes_after_a_failure(images: Images, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImageNotFound):
        images.pull("example.org/app:missing", progress="rich")

    def breaks() -> None:
        with shown("rich") as watcher:
            assert watcher is not None
            watcher(Progress(MOVING, Digest.of(b""), 1, 5, 1, 9))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert not [name for name in names_of_threads() if "_RefreshThread" in name]
    capfd.readouterr()


def test_a_bar_of_ones_own_can_be_used_again(capfd: pytest.CaptureFixture[str]) -> None:
    bar = Bar("mine", "tqdm")
    for _ in range(2):
        bar(Progress(MOVING, Digest.of(b""), 1, 2, 1, 2))
        bar(Progress(MOVING, Digest.of(b""), 2, 2, 2, 2))
        bar(Progress(DONE, Digest.of(b""), 2, 2, 2, 2))
        assert "mine" in capfd.readouterr().err
        bar(Progress(PRESENT, Digest.of(b""), 2, 2, 2, 2))  # nothing is left to show
        assert capfd.readouterr().err == ""


def test_words_that_are_no_bar(images: Images) -> None:
    with pytest.raises(ValueError, match="dots"):
        images.pull("example.org/app:1", progress="dots")  # type: ignore[arg-type]
    images.pull("example.org/app:1", progress=False)


@pytest.mark.parametrize(
    ("without", "asked", "names"),
    [(["tqdm", "rich"], "True", "tqdm or rich"), (["tqdm"], "'tqdm'", "tqdm"), (["rich"], "'rich'", "rich")],
)
def test_where_no_package_for_a_bar_is_installed(without: list[str], asked: str, names: str) -> None:
    code = f"""
import sys
for name in {without!r}:
    sys.modules[name] = None
from containerkit.errors import Unsupported
from containerkit.image.progress import shown
try:
    shown({asked}).__enter__()
except Unsupported as error:
    print(error.reason, "|", error.remedy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    remedy = f"pip install {without[0]}, or containerkit[progress]"
    assert done.stdout.strip() == f"there is no progress bar without {names} | {remedy}"


def test_rich_where_tqdm_is_not_installed() -> None:
    code = """
import sys
sys.modules["tqdm"] = None
from containerkit.image.progress import Bar
Bar()
assert "rich.progress" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_moved_where_the_bar_cannot_be(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(Unsupported, match="tqdm or rich"):
        images.pull("example.org/app:1", progress=True)
    assert images.list() == []
