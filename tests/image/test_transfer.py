"""Copies of whole images: several blobs at once, each once, in the order that registries need; what stops them."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import DigestMismatch, ImageTooLarge
from containerkit.image.limits import STANDARD
from containerkit.image.model import DOCKER_LAYER, DOCKER_MANIFEST, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.progress import DONE, PRESENT, Progress
from containerkit.image.rewrite import rewritten
from containerkit.image.transfer import AT_ONCE, copy_image
from support import edited
from support.images import MadeImage, describe, digest, make_tar, member

if TYPE_CHECKING:
    from typing import BinaryIO

    from containerkit.image.digest import Digest

WAIT = 20.0


def image(count: int, size: int = 1000) -> MadeImage:
    made = MadeImage([make_tar([member(f"file{number}", os.urandom(size))]) for number in range(count)])
    made.add(made.manifest)
    return made


def index_of(*images: MadeImage) -> tuple[MadeImage, Descriptor]:
    """One source with all of them, and an index."""
    whole = MadeImage([])
    whole.blobs = {name: content for each in images for name, content in each.blobs.items()}
    rows = [describe(each.manifest, OCI_MANIFEST) for each in images]
    body = whole.add(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows}).encode())
    return whole, Descriptor(OCI_INDEX, digest(body), len(body))


class Sink:
    """Notes what is put, and how many puts there were at a time."""

    def __init__(self) -> None:
        self.there: dict[Digest, bytes] = {}
        self.order: list[Digest] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.together = threading.Event()

    def has(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.there

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        content = self.take(stream)
        with self.lock:
            self.running -= 1
            self.there[descriptor.digest] = content
            self.order.append(descriptor.digest)

    def take(self, stream: BinaryIO) -> bytes:
        return b"".join(iter(lambda: stream.read(100), b""))


class Meeting(Sink):
    """Nobody's put ends before so many are running."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(wanted)

    def take(self, stream: BinaryIO) -> bytes:
        self.barrier.wait(WAIT)
        return super().take(stream)


def test_several_blobs_at_once_and_never_more() -> None:
    made = image(2 * AT_ONCE - 1)  # with the config: two full rounds
    sink = Meeting(AT_ONCE)
    copy_image(edited.root(made), made, sink)
    assert sink.most == AT_ONCE
    assert len(sink.order) == 2 * AT_ONCE


def test_one_at_a_time_where_the_sink_says_so() -> None:
    class Tape(Sink):
        at_once = 1

    first, second = image(3), image(2)
    source, root = index_of(first, second)
    sink = Tape()
    copy_image(root, source, sink)
    assert sink.most == 1
    expected = [digest(content) for each in (first, second) for content in (*each.layers, each.config, each.manifest)]
    assert sink.order == expected


def test_blobs_before_manifests_before_indexes_and_each_once() -> None:
    first, second = image(4), image(3)
    shared = first.layers[0]
    second.document["layers"].insert(0, describe(shared, OCI_LAYER + "+gzip"))
    second.add(second.manifest)
    inner, inner_root = index_of(first, second)
    body = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                {"mediaType": OCI_INDEX, "digest": inner_root.digest, "size": inner_root.size},
                describe(first.manifest, OCI_MANIFEST),
            ],
        }
    ).encode()
    inner.add(body)
    root = Descriptor(OCI_INDEX, digest(body), len(body))
    sink = Sink()
    assert copy_image(root, inner, sink) == body
    assert len(sink.order) == len(set(sink.order))
    place = {name: number for number, name in enumerate(sink.order)}
    for each in (first, second):
        needs = [digest(each.config), *(row["digest"] for row in each.document["layers"])]
        assert max(place[name] for name in needs) < place[digest(each.manifest)] < place[inner_root.digest]
    assert root.digest not in place  # the caller puts it, by its tag
    assert inner.opened.count(digest(shared)) == 1


def test_what_is_there_is_not_read() -> None:
    made = image(3)
    sink = Sink()
    copy_image(edited.root(made), made, sink)
    made.opened.clear()
    sink.order.clear()
    copy_image(edited.root(made), made, sink)
    assert sink.order == []
    assert made.opened == [edited.root(made).digest]


def test_the_first_failure_is_raised_and_cancels_the_rest() -> None:
    made = image(8)
    broken = digest(made.layers[1])
    started = threading.Event()

    class Failing(Sink):
        def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
            if descriptor.digest == broken:
                assert started.wait(WAIT)
                raise DigestMismatch("the first", expected="", actual="")
            started.set()
            deadline = time.monotonic() + WAIT
            while time.monotonic() < deadline:  # as a transfer that goes on for ever
                stream.seek(0)
                stream.read(1)
            raise AssertionError("it was not cancelled")

    sink = Failing()
    with pytest.raises(DigestMismatch, match="the first"):
        copy_image(edited.root(made), made, sink)
    assert sink.order == []
    assert len(made.opened) <= 1 + AT_ONCE  # the manifest, and no blob after the failure
    assert not [each.name for each in threading.enumerate() if each.name.startswith("containerkit-copy")]


def test_a_source_that_says_nothing_does_not_hold_up_the_failure() -> None:
    """Nor does an interrupt wait for it: streams that can be interrupted are."""
    made = image(4)
    broken = digest(made.layers[1])
    silent, interrupted = threading.Barrier(5), threading.Event()  # the config's and the other layers' streams

    class Silent(io.BytesIO):
        def read(self, _: int | None = -1, /) -> bytes:
            silent.wait(WAIT)
            assert interrupted.wait(WAIT), "it was not interrupted"
            raise ConnectionError("interrupted")

        def interrupt(self) -> None:
            interrupted.set()

    class Source:
        def open(self, descriptor: Descriptor) -> BinaryIO:
            if descriptor.media_type == OCI_MANIFEST:
                return made.open(descriptor)
            if descriptor.digest != broken:
                return Silent()
            silent.wait(WAIT)
            raise DigestMismatch("the first", expected="", actual="")

    with pytest.raises(DigestMismatch, match="the first"):
        copy_image(edited.root(made), Source(), Sink())
    assert interrupted.is_set()


def test_a_watcher_may_stop_a_copy() -> None:
    def enough(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_image(edited.root(made := image(3)), made, Sink(), progress=enough)


def test_every_byte_is_told() -> None:
    made = image(3)
    sink = Sink()
    there = digest(made.layers[0])
    sink.there[there] = made.layers[0]
    events: list[Progress] = []
    copy_image(edited.root(made), made, sink, progress=events.append)
    blobs = {digest(content): len(content) for content in (*made.layers, made.config)}
    assert {event.total for event in events} == {sum(blobs.values())}
    assert events[-1].total_done == events[-1].total
    ends = {event.digest: event for event in events if event.phase in (DONE, PRESENT)}
    assert {name: event.done for name, event in ends.items()} == blobs
    assert [name for name, event in ends.items() if event.phase == PRESENT] == [there]


def test_an_index_of_too_many_documents() -> None:
    made = [image(1) for _ in range(STANDARD.index_reads + 1)]
    copy_image((pair := index_of(*made[:-1]))[1], pair[0], Sink())
    source, root = index_of(*made)
    with pytest.raises(ImageTooLarge) as caught:
        copy_image(root, source, sink := Sink())
    assert (caught.value.limit, caught.value.allowed) == ("index_reads", STANDARD.index_reads)
    assert sink.order == []


def test_indexes_in_indexes_without_end() -> None:
    source, root = index_of(image(1))
    for _ in range(STANDARD.index_depth):
        row = {"mediaType": OCI_INDEX, "digest": root.digest, "size": root.size}
        body = source.add(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [row]}).encode())
        root = Descriptor(OCI_INDEX, digest(body), len(body))
    with pytest.raises(ImageTooLarge) as caught:
        copy_image(root, source, sink := Sink())
    assert caught.value.limit == "index_depth"
    assert sink.order == []


class Elsewhere(Sink):
    """A sink that can take some content from a neighbour."""

    def __init__(self, neighbour: set[Digest]) -> None:
        super().__init__()
        self.neighbour = neighbour
        self.asked: dict[Digest, list[str]] = {}

    def send(self, descriptor: Descriptor, content: Any, repositories: list[str]) -> bool:
        self.asked[descriptor.digest] = repositories
        if descriptor.digest in self.neighbour:
            self.there[descriptor.digest] = b""
            return False
        with content() as stream:
            self.put(descriptor, stream)
        return True


def test_what_the_registry_has_elsewhere_is_not_sent() -> None:
    made = image(3)
    known = digest(made.layers[2])
    sink = Elsewhere({known})
    events: list[Progress] = []
    copy_image(edited.root(made), made, sink, elsewhere=lambda _: ["other/one"], progress=events.append)
    assert known not in made.opened
    assert known not in sink.order
    assert sink.asked[known] == ["other/one"]
    assert {event.phase for event in events if event.digest == known} == {PRESENT}


class Halves:
    """Packs a layer to half of it, so to speak."""

    at_once = 2

    def __init__(self, sink: Sink, known: dict[Digest, Descriptor] | None = None) -> None:
        self.sink = sink
        self.before = known or {}

    def known(self, layer: Descriptor) -> Descriptor | None:
        return self.before.get(layer.digest)

    def put(self, _: Descriptor, stream: BinaryIO) -> Descriptor:
        half = stream.read()[::2]
        packed = Descriptor(OCI_LAYER + "+zstd", digest(half), len(half))
        self.sink.put(packed, io.BytesIO(half))
        return packed


def test_packed_layers_change_every_document_above() -> None:
    first = MadeImage([make_tar([member("a", b"a" * 5000)])], compress=False)
    second = MadeImage([make_tar([member("b", b"b" * 5000)])])  # compressed already
    for each in (first, second):
        each.add(each.manifest)
    source, root = index_of(first, second)
    sink = Sink()
    index = json.loads(copy_image(root, source, sink, pack=Halves(sink)))
    assert index["manifests"][0]["digest"] != digest(first.manifest)
    assert index["manifests"][1] == describe(second.manifest, OCI_MANIFEST)
    manifest = json.loads(sink.there[index["manifests"][0]["digest"]])
    half = first.layers[0][::2]
    assert manifest["layers"] == [describe(half, OCI_LAYER + "+zstd")]
    assert sink.there[digest(half)] == half
    assert digest(first.layers[0]) not in sink.there
    assert digest(first.manifest) not in sink.there


def test_dockers_manifest_with_zstd_becomes_one_of_ocis() -> None:
    rows = [{"mediaType": DOCKER_LAYER, "digest": digest(b"a"), "size": 1, "x": 1}]
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest(b"c"), "size": 1}
    body = json.dumps({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": config, "layers": rows}).encode()
    zstd, gzip = (Descriptor(kind, digest(b"p"), 7) for kind in (OCI_LAYER + "+zstd", DOCKER_LAYER + ".gzip"))
    oci = json.loads(rewritten(body, {digest(b"a"): zstd}))
    assert oci["mediaType"] == OCI_MANIFEST
    assert oci["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert oci["layers"] == [{"mediaType": OCI_LAYER + "+zstd", "digest": digest(b"p"), "size": 7, "x": 1}]
    assert json.loads(rewritten(body, {digest(b"a"): gzip}))["mediaType"] == DOCKER_MANIFEST
    assert rewritten(body, {digest(b"other"): gzip}) is body
