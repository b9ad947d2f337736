"""State roots on disks that are read-only, and on such as have no byte left."""

from __future__ import annotations

import io
import os
import subprocess
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import ContainerkitError, KernelError, StateError
from containerkit.image.images import Images
from containerkit.image.store.gc import gc
from containerkit.image.store.verify import verify
from containerkit.state import State
from support import crash
from support.disks import small_disk
from support.images import MadeImage, digest, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

MADE = MadeImage([make_tar([member("etc/"), member("etc/a", b"1")])])
OTHER = MadeImage([make_tar([member("b", b"2" * 10_000)])])
SIZE = 16 << 20


def images_of(state: State, made: MadeImage = MADE) -> Images:
    return Images(state, lambda *_, **__: made)


@contextmanager
def read_only(path: str) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", path], check=True)


def look(state: State, tmp_path: Path) -> None:
    """All that reads the image ``app`` alone."""
    images = images_of(state)
    assert [image.names for image in images.list()] == [("app:latest",)]
    assert [file.path for file in images.tree("app").files] == ["/etc", "/etc/a"]
    assert images.read_file("app", "/etc/a") == b"1"
    with images.open_file("app", "/etc/a") as file:
        assert file.read() == b"1"
    assert len(images.history("app")) == 1
    assert images.diff("app", "app") == ()
    assert len(images.df().images) == 1
    assert verify(state, deep=False) == []
    images.save(tmp_path / "saved", "app")
    assert os.path.getsize(tmp_path / "saved")
    with images.mount("app") as fd:
        assert os.listdir(fd) == ["etc"]
    images.edit("app").configure(env={"A": "b"})


@pytest.mark.parametrize("ended", ["closed", "killed"])
def test_a_read_only_state_root_can_be_looked_at(state_root: str, tmp_path: Path, ended: str) -> None:
    def bring() -> None:
        with closing(State(state_root)) as state:
            images_of(state).pull("app")
            if ended == "killed":
                os.kill(os.getpid(), 9)

    with small_disk(state_root, SIZE):
        assert os.waitpid(crash.start(bring), 0)[1] == (9 if ended == "killed" else 0)
        assert os.path.exists(os.path.join(state_root, "state.db-wal")) == (ended == "killed")
        with read_only(state_root), closing(State(state_root)) as state:
            look(state, tmp_path)


def test_a_read_only_state_root_cannot_be_changed(state_root: str, tmp_path: Path) -> None:
    layout = OTHER.write_layout(str(tmp_path / "layout"), "other:1")
    packed = subprocess.run(["tar", "-C", layout, "-cz", "."], check=True, capture_output=True).stdout
    with small_disk(state_root, SIZE):
        with closing(State(state_root)) as state:
            images_of(state).pull("app")
        with read_only(state_root), closing(State(state_root)) as state:
            images = images_of(state, OTHER)
            for change in (
                lambda: images.pull("other"),
                lambda: images.load(layout),
                lambda: images.load(io.BytesIO(packed)),
                lambda: images.import_rootfs(layout, "made:1"),
                lambda: images.edit("app").configure(env={"A": "b"}).commit("edited:1"),
                lambda: images.copy(f"oci:{layout}", "containerkit:copied:1"),
                lambda: images.tag("app", "again:1"),
                lambda: images.remove("app"),
                lambda: images.prune(all=True),
                images.gc,
            ):
                with pytest.raises(StateError, match=r"[Rr]ead-?only"):
                    change()
            with pytest.raises(KernelError, match="Read-only"):  # it unpacks once more
                images.verify()
            assert [image.names for image in images.list()] == [("app:latest",)]


def test_a_state_root_that_is_writable_elsewhere(state_root: str, tmp_path: Path) -> None:
    """What is looked at there stays, and what comes is seen."""
    here = tmp_path / "here"
    here.mkdir()
    with small_disk(state_root, SIZE), closing(State(state_root)) as writer:
        images_of(writer).pull("app")
        writer.close()
        subprocess.run(["mount", "--bind", state_root, here], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", here], check=True)
        try:
            with closing(State(here)) as reader:
                look(reader, tmp_path)
                images_of(writer).tag("app", "again:1")
                writer.close()
                assert images_of(reader).get("again:1").names == ("again:1", "app:latest")
                with images_of(reader).lease():
                    images_of(reader).hold("app")
                    images_of(writer).remove(images_of(writer).get("app").id)
                    assert gc(writer).blobs == ()
                assert digest(MADE.config) in gc(writer).blobs
        finally:
            subprocess.run(["umount", here], check=True)


def fill(path: str) -> None:
    """To the last byte."""
    with open(os.path.join(path, "filler"), "ab", buffering=0) as file, pytest.raises(OSError, match="No space"):  # noqa: PT012
        while True:
            file.write(bytes(4096))
    assert os.statvfs(path).f_bfree == 0


@pytest.mark.parametrize("new", [True, False], ids=["a new process's", "one that is open"])
@pytest.mark.parametrize("verb", ["remove", "prune", "gc", "budget"])
def test_a_full_disk_can_be_freed(state_root: str, verb: str, new: bool) -> None:
    with small_disk(state_root, SIZE), closing(State(state_root)) as state:
        images = images_of(state, OTHER)
        images.pull("other")
        with images.lease("kept"):
            images_of(state).pull("app")
        images.remove("app")
        images.end_lease("kept")
        state.close()
        assert not os.path.exists(state.path("state.db-shm"))
        assert new or state.database  # open, with a WAL that has no room yet
        fill(state_root)
        before = os.statvfs(state_root).f_bfree
        if verb == "remove":
            images.remove("other")
        elif verb == "prune":
            assert len(images.prune(all=True).images) == 1
        elif verb == "budget":
            assert len(images.gc(max_bytes=0).images) == 1
        else:
            assert len(images.gc().blobs) == 3
        assert os.statvfs(state_root).f_bfree > before
        assert len(images.list()) == (verb == "gc")
        os.unlink(os.path.join(state_root, "filler"))
        crash.expect_whole(state)
        room = os.stat(state.path("room"))
        assert room.st_blocks * 512 == room.st_size > 0


def test_a_full_disk_without_room_is_named(state_root: str) -> None:
    with small_disk(state_root, SIZE), closing(State(state_root)) as state:
        images_of(state).pull("app")
        state.close()
        os.unlink(state.path("room"))
        fill(state_root)
        with pytest.raises(StateError, match=r"state\.db.*no space left"):
            images_of(state).remove("app")
        with pytest.raises(ContainerkitError, match="No space left"):
            images_of(state, OTHER).pull("other")
        os.unlink(os.path.join(state_root, "filler"))
        images_of(state).remove("app")
        crash.expect_whole(state)


def test_no_room_is_taken_of_a_small_disk(state_root: str) -> None:
    with small_disk(state_root, 2 << 20), closing(State(state_root)) as state:
        images_of(state).pull("app")
        assert not os.path.exists(state.path("room"))
