"""Collections: what goes, what stays, and in which order; leases; the last use."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

from containerkit.image.images import Images
from containerkit.image.model import Descriptor
from containerkit.image.store import inventory, leases
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.gc import bringing_in, gc
from containerkit.image.store.inventory import disk_bytes
from containerkit.image.store.leases import end_lease, lease, touch, touch_in
from containerkit.image.store.usage import df
from containerkit.image.store.verify import verify
from containerkit.state import State
from support import crash
from support.images import MadeImage, digest, make_tar, member

if TYPE_CHECKING:
    from typing import BinaryIO

    from containerkit.image.images import Image

pytestmark = pytest.mark.kernel

BASE = make_tar([member("base", b"b" * 300_000)])


def made(name: str, size: int = 200_000) -> MadeImage:
    top = make_tar([member(name, name.encode() * (size // len(name)))])
    return MadeImage([BASE, top], compress=False, config={"Labels": {"name": name}})


class Registry(MadeImage):
    """A source whose downloads can go on."""

    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        return io.BytesIO(self.blobs[descriptor.digest][offset:])


def images_of(state: State, remote: MadeImage) -> Images:
    return Images(state, lambda *_, **__: remote)


def pull(state: State, name: str, *, used: float = 0) -> Image:
    """Bring in an image of its own that was last used ``used`` seconds ago."""
    image = images_of(state, made(name)).pull(name)
    past = time.time_ns() - int(used * 1e9)
    state.database.execute("UPDATE images SET created_ns = ? WHERE id = ?", (past, image.id))
    return image


def names(state: State) -> list[str]:
    return sorted(name for (name,) in state.database.execute("SELECT name FROM names"))


def short(state: State) -> str:
    """The images that are there, as one word of their first letters."""
    return "".join(name.rpartition("/")[2][0] for name in names(state))


def files(state: State) -> set[str]:
    return {
        f"{place}/{name}" for place in ("blobs/sha256", "layers", "ingest") for name in os.listdir(state.path(place))
    }


def put(state: State, content: bytes) -> str:
    return BlobStore(state.root).put_bytes(content)


def test_what_nothing_needs_goes_while_others_bring_in(state: State) -> None:
    os.mkdir(state.path("layers", "0" * 64))
    rubbish = put(state, b"rubbish")
    with bringing_in(state):
        collected = gc(state)
        assert collected.blobs == (rubbish,)
        assert collected.layers == ("0" * 64,)
        assert collected.bytes >= 4096
    assert files(state) == set()
    assert gc(state) == (0, (), (), (), ())


def test_what_a_lease_has_brought_in_or_looked_for_stays(state: State) -> None:
    old, other = put(state, b"old"), put(state, b"other")
    with lease(state):
        new = put(state, b"new")
        assert BlobStore(state.root).has(Descriptor("x", digest(b"old"), 3))
        assert gc(state).blobs == (other,)
        with lease(state):
            pass
        assert gc(state).blobs == ()
    assert set(gc(state).blobs) == {old, new}


def test_a_blob_that_was_missed_under_a_lease_is_kept_when_another_process_brings_it(state: State) -> None:
    with lease(state):
        assert not BlobStore(state.root).has(Descriptor("x", digest(b"late"), 4))
        pid = crash.start(lambda: put(State(state.root), b"late"))
        assert os.waitpid(pid, 0)[1] == 0
        assert gc(state).blobs == ()
    assert gc(state).blobs == (digest(b"late"),)


def test_a_lease_holds_against_other_processes_and_ends_with_its_own(state: State) -> None:
    read, write = os.pipe()

    def hold_and_rest() -> None:
        own = State(state.root)
        with lease(own):
            put(own, b"held")
            os.write(write, b".")
            signal.pause()

    pid = crash.start(hold_and_rest)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    assert gc(state).blobs == ()
    crash.kill(pid)
    assert gc(state).blobs == (digest(b"held"),)


def test_a_forked_child_neither_ends_nor_prolongs_a_lease(state: State) -> None:
    read, write = os.pipe()

    def rest() -> None:
        os.close(write)
        os.read(read, 1)

    with lease(state):
        put(state, b"mine")
        assert os.waitpid(crash.start(lambda: None), 0)[1] == 0
        child = crash.start(rest)
        assert gc(state).blobs == ()
    assert gc(state).blobs == (digest(b"mine"),)
    os.close(write)
    os.close(read)
    assert os.waitpid(child, 0)[1] == 0


def test_a_lease_with_a_name_outlives_its_process(state: State) -> None:
    def bring(fail: bool) -> None:
        own = State(state.root)
        with lease(own, "build"):
            put(own, b"1")
            if fail:
                os.kill(os.getpid(), signal.SIGKILL)
        own.close()

    assert os.waitpid(crash.start(lambda: bring(True)), 0)[1] == signal.SIGKILL
    assert gc(state).blobs == (digest(b"1"),)
    assert os.waitpid(crash.start(lambda: bring(False)), 0)[1] == 0
    assert leases.leases(state) == {"build": {("blob", digest(b"1"))}}
    assert gc(state).blobs == ()
    assert end_lease(state, "build")
    assert not end_lease(state, "build")
    assert gc(state).blobs == (digest(b"1"),)


def test_an_image_under_a_lease_is_not_evicted(state: State) -> None:
    image = pull(state, "app", used=100)
    with lease(state, "keep"):
        assert BlobStore(state.root).has(Descriptor("x", image.id, 0)) is False  # another size, held all the same
        assert gc(state, max_age=10).images == ()
    assert gc(state, max_age=10, max_bytes=0).images == ()
    end_lease(state, "keep")
    assert gc(state, max_age=10).images == (image.id,)
    assert files(state) == set()


def test_max_age_counts_from_the_last_use(state: State) -> None:
    for name, used in (("a", 500), ("b", 300), ("c", 0)):
        pull(state, name, used=used)
    assert gc(state, max_age=1000).images == ()
    touch(state, images_of(state, made("a")).get("a").id)
    collected = gc(state, max_age=100)
    assert len(collected.images) == 1
    assert short(state) == "ac"
    assert verify(state) == []


def test_max_bytes_takes_the_longest_unused_and_counts_what_is_shared_once(state: State) -> None:
    for number, name in enumerate("dcba"):
        pull(state, name, used=1000 - number)
    before = df(state)
    whole = before.blobs + before.layers
    unique = before.images[0].unique
    assert gc(state, max_bytes=whole).images == ()
    assert len(gc(state, max_bytes=whole - 1).images) == 1
    assert short(state) == "abc"
    assert len(gc(state, max_bytes=whole - 3 * unique).images) == 2
    assert short(state) == "a"
    after = df(state)
    assert after.blobs + after.layers <= whole - 3 * unique
    assert verify(state) == []
    gc(state, max_bytes=0)
    assert (short(state), files(state)) == ("", set())


def test_keep_and_containers_hold_images(state: State) -> None:
    for name in ("app", "busy", "example.org/team/x", "zoo"):
        pull(state, name, used=100)
    busy = images_of(state, made("busy")).get("busy")
    state.database.execute("INSERT INTO containers VALUES ('1', 'c', ?, '{}', 0)", (busy.id,))
    gc(state, max_age=1, max_bytes=0, keep=["example.org/*", "zoo"])
    assert names(state) == [
        "docker.io/library/busy:latest",
        "docker.io/library/zoo:latest",
        "example.org/team/x:latest",
    ]
    gc(state, max_age=1, keep=["other.*", "z??:latest"])
    assert names(state) == ["docker.io/library/busy:latest", "docker.io/library/zoo:latest"]
    state.database.execute("DELETE FROM containers")
    gc(state, max_age=1, keep=[busy.id])
    assert names(state) == ["docker.io/library/busy:latest"]


def test_dry_run_tells_and_changes_nothing(state: State) -> None:
    pull(state, "a", used=100)
    pull(state, "b")
    put(state, b"rubbish")
    BlobStore(state.root)
    with open(state.path("ingest", "partial-sha256-" + "0" * 64), "wb") as file:
        file.write(bytes(5000))
    before = files(state), names(state)
    told = gc(state, max_age=10, partial_age=0, dry_run=True)
    assert (files(state), names(state)) == before
    assert gc(state, max_age=10, partial_age=0) == told
    assert len(told.partials) == len(told.images) == len(told.layers) == 1


def test_bytes_are_those_that_the_disk_gets_back(state: State) -> None:
    pull(state, "a", used=100)
    places = [state.path(part) for part in ("blobs", "layers", "ingest")]
    before = sum(map(disk_bytes, places))
    freed = gc(state, max_age=10).bytes
    assert freed == before - sum(map(disk_bytes, places)) > 500_000


def test_partial_downloads_go_by_age_and_never_under_their_writer(state: State) -> None:
    descriptor = Descriptor("x", digest(b"y" * 500_000), 500_000)
    with pytest.raises(ConnectionError), BlobStore(state.root).ingest(descriptor, Registry([])) as ingest:  # noqa: PT012
        ingest.write(b"y" * 400_000)
        assert gc(state, partial_age=0).partials == ()
        raise ConnectionError
    [name] = os.listdir(state.path("ingest"))
    assert list(BlobStore(state.root).digests()) == []
    images = images_of(state, Registry([]))
    assert gc(state).partials == images.gc().partials == ()
    assert images.gc(partial_age=0, dry_run=True).partials == (name,)
    os.utime(state.path("ingest", name), (0, 0))
    assert gc(state).partials == (name,)
    assert files(state) == set()


def test_work_in_progress_is_spared_and_that_of_the_dead_is_not(state: State) -> None:
    read, write = os.pipe()

    def rest() -> None:
        own = State(state.root)
        with bringing_in(own):
            os.makedirs(own.path("ingest", "layer-x", "tree"))
            os.write(write, b".")
            signal.pause()

    pid = crash.start(rest)
    os.read(read, 1)
    os.close(read)
    os.close(write)
    gc(state, partial_age=0)
    assert files(state) == {"ingest/layer-x"}
    crash.kill(pid)
    with lease(state):
        os.utime(state.path("ingest", "layer-x"))
    gc(state)
    assert files(state) == set()


def test_a_damaged_manifest_costs_no_blob(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pull(state, "app")
    put(state, b"rubbish")
    path = BlobStore(state.root).path(image.digest)
    with open(path, "rb") as file:
        whole = file.read()
    with open(path, "wb") as file:
        file.write(whole[:-1])
    monkeypatch.setattr(inventory, "_read", {})  # as a process finds it that has never read it
    assert gc(state).blobs == ()
    with open(path, "wb") as file:
        file.write(whole)
    assert gc(state).blobs == (digest(b"rubbish"),)
    assert verify(state) == []


def test_touch_writes_at_most_once_a_minute(state: State) -> None:
    image = pull(state, "app", used=100)

    def used() -> list[tuple[int]]:
        return state.database.execute("SELECT used_ns FROM uses").fetchall()

    touch(state, image.id)
    first = used()
    assert len(first) == 1
    touch(state, image.id)
    with state.transaction() as database:
        touch_in(database, image.id)
        touch_in(database, "sha256:nothing")
    assert used() == first
    state.database.execute("UPDATE uses SET used_ns = used_ns - 61000000000")
    touch(state, image.id)
    assert used() > first
    images_of(state, made("app")).remove("app")
    assert used() == []


def test_collections_side_by_side(state: State) -> None:
    for number in range(50):
        put(state, b"%d" % number)
        os.makedirs(state.path("layers", f"{number:064x}", "d"))
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(sum(map(len, gc(State(state.root))[2:4])))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 100
    assert files(state) == set()


def test_an_image_that_comes_back_after_its_eviction_keeps_its_content(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process loads it again between the two transactions of a collection."""
    from containerkit.image.store import gc as module

    images = images_of(state, MadeImage([make_tar([member("file", b"content")])]))
    image = images.pull("example.org/app:1")
    sweep = module._Collection.sweep

    def late(self: object, evicted: list[str], partial_age: float) -> object:
        assert list(evicted) == [image.id]
        images.pull("example.org/app:1")
        return sweep(self, evicted, partial_age)  # type: ignore[arg-type]

    monkeypatch.setattr(module._Collection, "sweep", late)
    gc(state, max_bytes=0)
    assert [each.id for each in images.list()] == [image.id]
    assert verify(state) == []
