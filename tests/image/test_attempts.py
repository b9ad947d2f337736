"""What a pull that fails or is killed leaves for the next one, how long that stays, and what never does."""

from __future__ import annotations

import errno
import io
import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import CorruptLayer, DigestMismatch
from containerkit.image.images import Images
from containerkit.image.store.attempts import NOTES
from containerkit.image.store.gc import gc
from containerkit.image.store.ingest import partial_path
from containerkit.image.store.verify import verify
from support import crash
from support.images import MadeImage, digest, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

    from containerkit.image.model import Descriptor
    from containerkit.state import State

pytestmark = pytest.mark.kernel

LAYERS = [make_tar([member(f"f{number}", os.urandom(50_000))]) for number in range(3)]


class Registry(MadeImage):
    """Downloads from it can go on. The layer ``bad`` comes when all others have, and is what ``fault`` gives."""

    def __init__(self, state: State, bad: int = 2, layers: list[bytes] = LAYERS) -> None:
        super().__init__(layers, config={"Labels": {"size": str(len(layers))}})
        self.state = state
        self.add(self.manifest)
        self.bad = self.layers[bad]
        self.fault: Callable[[], bytes] | None = None

    def open(self, descriptor: Descriptor) -> BinaryIO:
        if self.fault is None or descriptor.digest != digest(self.bad):
            return super().open(descriptor)
        deadline = time.monotonic() + 30
        while not all(self.has_come(layer) for layer in self.layers if layer != self.bad):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return io.BytesIO(self.fault())

    def has_come(self, layer: bytes) -> bool:
        """As a blob, or to the last byte: then it waits for the layers below."""
        if digest(layer) in blobs(self.state):
            return True
        partial = partial_path(self.state.root, digest(layer))
        with suppress(FileNotFoundError):
            above = self.layers.index(layer) > self.layers.index(self.bad)
            return above and os.path.getsize(partial) == len(layer)
        return False

    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        return io.BytesIO(self.blobs[descriptor.digest][offset:])


def blobs(state: State) -> set[str]:
    return {f"sha256:{name}" for name in os.listdir(state.path("blobs/sha256"))}


def fetched(remote: Registry) -> set[str]:
    return set(remote.opened) & {digest(layer) for layer in remote.layers}


def notes(state: State) -> list[str]:
    return [state.path("ingest", name) for name in os.listdir(state.path("ingest")) if name.startswith(NOTES)]


def files(state: State) -> set[str]:
    return {
        f"{place}/{name}" for place in ("blobs/sha256", "layers", "ingest") for name in os.listdir(state.path(place))
    }


def images_of(state: State, remote: MadeImage) -> Images:
    return Images(state, lambda *_, **__: remote)


def raising(error: BaseException) -> Callable[[], bytes]:
    def fault() -> bytes:
        raise error

    return fault


def fail(state: State, remote: Registry, error: BaseException) -> None:
    remote.fault = raising(error)
    with pytest.raises(type(error)):
        images_of(state, remote).pull("app")
    remote.fault = None
    remote.opened.clear()


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("verb", ["pull", "copy"])
def test_the_next_pull_fetches_only_what_is_missing(state: State, bad: int, verb: str) -> None:
    remote = Registry(state, bad)
    images = images_of(state, remote)

    def bring() -> object:
        return images.pull("app") if verb == "pull" else images.copy("docker://app", "containerkit:app")

    remote.fault = raising(ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        bring()
    assert blobs(state) == {digest(layer) for layer in remote.layers if layer != remote.bad}
    assert len(os.listdir(state.path("layers"))) == bad
    assert images.list() == []
    remote.fault = None
    remote.opened.clear()
    bring()
    assert fetched(remote) == {digest(remote.bad)}
    assert os.listdir(state.path("ingest")) == []
    assert verify(state) == []
    images.remove("app")
    assert files(state) == set()


def test_it_stays_for_a_day_whatever_is_removed(state: State) -> None:
    other = images_of(state, MadeImage([make_tar([member("other", b"1")])]))
    other.pull("other")
    remote = Registry(state)
    fail(state, remote, ConnectionResetError("gone"))
    left = {f"blobs/sha256/{digest(layer).hex}" for layer in remote.layers[:2]}
    other.remove("other")
    assert files(state) > left
    assert len(files(state)) == 5  # two blobs, two layers and the notes
    assert gc(state) == other.prune(all=True) == (0, (), (), (), ())
    told = gc(state, partial_age=0, dry_run=True)
    assert (len(told.blobs), len(told.layers), told.partials) == (2, 2, (os.path.basename(notes(state)[0]),))
    os.utime(notes(state)[0], (time.time() - 86_000,) * 2)
    assert gc(state).blobs == ()
    os.utime(notes(state)[0], (time.time() - 87_000,) * 2)
    assert gc(state) == told
    assert files(state) == set()


def test_a_budget_takes_it(state: State) -> None:
    fail(state, Registry(state), ConnectionResetError("gone"))
    assert len(gc(state, max_bytes=1 << 40).blobs) == 2
    assert files(state) == set()


def test_what_a_killed_pull_has_brought_stays(state: State) -> None:
    remote = Registry(state)
    remote.fault = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    assert os.waitpid(crash.start(lambda: images_of(state, remote).pull("app")), 0)[1] == signal.SIGKILL
    gc(state)
    remote.fault = None
    remote.opened.clear()
    images_of(state, remote).pull("app")
    assert fetched(remote) == {digest(remote.bad)}
    crash.expect_whole(state)


def test_wrong_content_is_not_kept(state: State) -> None:
    remote = Registry(state)
    remote.fault = lambda: bytes(len(remote.bad))
    with pytest.raises(DigestMismatch):
        images_of(state, remote).pull("app")
    assert blobs(state) == {digest(layer) for layer in remote.layers[:2]}
    crash.expect_whole(state)


def test_nothing_stays_on_a_full_disk_or_of_a_refused_image(state: State) -> None:
    fail(state, Registry(state), OSError(errno.ENOSPC, "full"))
    assert files(state) == set()
    damaged = bytearray(LAYERS[2])
    damaged[0] ^= 1
    remote = Registry(state, layers=[*LAYERS[:2], bytes(damaged)])
    remote.fault = lambda: remote.bad
    with pytest.raises(CorruptLayer):
        images_of(state, remote).pull("app")
    assert files(state) == set()


def test_a_load_that_fails_leaves_nothing_and_takes_nothing_of_others(state: State, tmp_path: Path) -> None:
    fail(state, Registry(state), ConnectionResetError("gone"))
    before = files(state)
    made = MadeImage([make_tar([member("other", b"1")]), LAYERS[0], b"no tar at all" * 100])
    layout = made.write_layout(str(tmp_path / "layout"), "bad:1")
    with pytest.raises(CorruptLayer):
        images_of(state, made).load(layout)
    assert files(state) == before
    crash.expect_whole(state)


def test_what_gets_a_name_meanwhile_goes_with_its_image(state: State) -> None:
    """Another pull of the same image ends well before the first one fails."""
    remote = Registry(state)

    def fault() -> bytes:
        pid = crash.start(lambda: images_of(state, MadeImage(LAYERS, config={"Labels": {"size": "3"}})).pull("app"))
        assert os.waitpid(pid, 0)[1] == 0
        raise ConnectionResetError("gone")

    remote.fault = fault
    with pytest.raises(ConnectionResetError):
        images_of(state, remote).pull("app")
    assert notes(state) == []
    assert verify(state) == []
    images_of(state, remote).remove("app")
    assert files(state) == set()


def test_of_two_attempts_only_what_got_a_name_is_struck_out(state: State) -> None:
    more = make_tar([member("more", os.urandom(50_000))])
    fail(state, Registry(state, 3, [LAYERS[0], LAYERS[1], more, LAYERS[2]]), ConnectionResetError("gone"))
    [path] = notes(state)
    os.utime(path, (time.time() - 3600,) * 2)
    before = os.stat(path).st_mtime_ns
    images = images_of(state, MadeImage(LAYERS))
    image = images.pull("app")
    assert notes(state) == [path]
    assert os.stat(path).st_mtime_ns == before
    images.remove(image)
    assert len(blobs(state)) == len(os.listdir(state.path("layers"))) == 1
    fail(state, Registry(state), ConnectionResetError("gone"))
    crash.expect_whole(state)


def test_a_collection_leaves_the_notes_of_a_running_attempt(state: State) -> None:
    remote = Registry(state)

    def fault() -> bytes:
        gc(state, partial_age=0)
        assert len(notes(state)) == 1
        raise ConnectionResetError("gone")

    remote.fault = fault
    with pytest.raises(ConnectionResetError):
        images_of(state, remote).pull("app")
    assert len(blobs(state)) == 2
    crash.expect_whole(state)


def test_damaged_notes_keep_what_can_be_read(state: State) -> None:
    fail(state, Registry(state), ConnectionResetError("gone"))
    [path] = notes(state)
    with open(path, "ab") as file:
        file.write(b"\0\xff\nblob\nlayer ../../x\nblob sha256:x y\n")
    assert gc(state) == (0, (), (), (), ())
    crash.expect_whole(state)
