"""Mirrors that give something else, and servers slow beyond use: what is kept, who is asked next, who is told."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import BlobUnknown, ContentMismatch, DigestMismatch, RegistryTimeout
from containerkit.image.digest import Digest
from containerkit.image.images import Images
from containerkit.image.model import OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.image.store.blobs import BlobStore
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credentials
from containerkit.registry.mirrors import Mirrors
from containerkit.registry.ranges import Ranges
from containerkit.registry.server.server import serve
from support.faulty import Faulty, answer, head, raw
from support.images import MadeImage, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.state import State
    from support.faulty import Action, Connection

NAME = "some/image"
BIG = 3 << 20
PIECE = 256 << 10
SIDE_BY_SIDE = Ranges(connections=4, smallest=1 << 20, piece=PIECE, fast=float("inf"))


def whole(content: bytes) -> Action:
    """The content, by ranges where asked for."""

    def act(connection: Connection) -> None:
        wanted = connection.request.headers.get("range", "")
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        body = content[int(first or 0) : int(last or len(content)) + 1]
        headers = {"content_length": str(len(body))}
        if wanted:
            end = int(first) + len(body) - 1
            headers["content_range"] = f"bytes {first}-{end}/{len(content)}"
        connection.send(head(206 if wanted else 200, headers) + body)

    return act


def chunked(body: bytes) -> Action:
    return raw(head(200, {"transfer_encoding": "chunked"}), f"{len(body):x}\r\n".encode(), body, b"\r\n0\r\n\r\n")


def trickle(body: bytes, *, pause: float = 0.02) -> Action:
    """The headers at once, then byte by byte."""

    def act(connection: Connection) -> None:
        connection.send(head(200, {"content_length": str(len(body))}))
        for number in range(len(body)):
            if connection.closing.wait(pause):
                return
            connection.send(body[number : number + 1])

    return act


def trickled_headers(connection: Connection) -> None:
    for letter in head(200, {"content_length": "0", "x": "y" * 10_000}):
        if connection.closing.wait(0.02):
            return
        connection.send(bytes([letter]))


@pytest.fixture
def mirror() -> Iterator[Faulty]:
    with Faulty() as server:
        yield server


@pytest.fixture
def second() -> Iterator[Faulty]:
    with Faulty() as server:
        yield server


@pytest.fixture
def registries(faulty: Faulty, mirror: Faulty, second: Faulty) -> Registries:
    settings = Mirrors({faulty.host: [mirror.host, second.host]}, files=())
    return Registries(credentials=Credentials({}), mirrors=settings, timeout=0.3, ranges=SIDE_BY_SIDE)


def put(server: Faulty, made: MadeImage, *, wrong: Callable[[bytes], Action] = whole) -> None:
    """All of the image; what ``wrong`` makes of each layer."""
    server.on("GET", f"/v2/{NAME}/manifests/1", answer(200, made.manifest, content_type=OCI_MANIFEST))
    server.on("GET", f"/v2/{NAME}/blobs/{Digest.of(made.config)}", whole(made.config))
    for layer in made.layers:
        server.on("GET", f"/v2/{NAME}/blobs/{Digest.of(layer)}", wrong(layer))


def flipped(content: bytes) -> bytes:
    return content[:-600] + bytes([content[-600] ^ 1]) + content[-599:]


WRONG: dict[str, Callable[[bytes], Action]] = {
    "a byte flipped": lambda content: whole(flipped(content)),
    "zeros": lambda content: whole(bytes(len(content))),
    "html": lambda content: whole(b"<html>".ljust(len(content))),
    "too long": lambda content: whole(content + b"!"),
    "too short": lambda content: whole(content[:-1]),
    "too long, chunked": lambda content: chunked(content + b"!"),
    "too short, chunked": lambda content: chunked(content[:-1]),
    "empty, chunked": lambda _: chunked(b""),
    "cut, then more of something else": lambda content: raw(
        head(200, {"content_length": str(len(content))}), bytes(1000)
    ),
}


@pytest.mark.kernel
@pytest.mark.parametrize("size", [1000, BIG])
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("what", WRONG)
def test_a_pull_goes_round_a_mirror_that_gives_wrong_layers(
    what: str, gzipped: bool, size: int, faulty: Faulty, mirror: Faulty, second: Faulty, registries: Registries,
    state: State,
) -> None:  # fmt: skip
    """The next mirror is asked, which lies too, then the registry itself; and nothing wrong is left anywhere."""
    tar = make_tar([member("file", os.urandom(size))])
    made = MadeImage([tar]) if gzipped else MadeImage([tar], compress=False)
    put(mirror, made, wrong=WRONG[what])
    put(second, made, wrong=WRONG["zeros"])
    put(faulty, made)
    image = Images(state, registries.connect).pull(f"{faulty.host}/{NAME}:1")
    assert os.path.getsize(os.path.join(image.lowers[0], "file")) == size
    layer = Digest.of(made.layers[0])
    told = list(registries.mirror_failures)
    assert [line.partition(": ")[0] for line in told] == [mirror.host, second.host]
    assert all(layer in line for line in told)
    for digest in BlobStore(state.root).digests():
        assert BlobStore(state.root).read(digest)  # verified
    assert not [name for name in os.listdir(os.path.join(state.root, "ingest")) if "partial" in name]


@pytest.mark.kernel
def test_what_all_have_wrong_is_an_error(
    faulty: Faulty, mirror: Faulty, second: Faulty, registries: Registries, state: State
) -> None:
    made = MadeImage([make_tar([member("file", os.urandom(BIG))])])
    for server in (mirror, second, faulty):
        put(server, made, wrong=WRONG["a byte flipped"])
    with pytest.raises(DigestMismatch, match=Digest.of(made.layers[0])):
        Images(state, registries.connect).pull(f"{faulty.host}/{NAME}:1")
    assert not list(BlobStore(state.root).digests()) or Digest.of(made.layers[0]) not in BlobStore(state.root).digests()


@pytest.mark.kernel
def test_an_image_that_lies_about_itself_is_nobodys_fault(
    faulty: Faulty, mirror: Faulty, second: Faulty, registries: Registries, state: State
) -> None:
    """A layer that is what its digest says, and not what the config says: asking others would not help."""
    made = MadeImage([make_tar([member("file", b"x" * 100)])], diff_ids=[Digest.of(b"other")])
    put(mirror, made)
    with pytest.raises(ContentMismatch):
        Images(state, registries.connect).pull(f"{faulty.host}/{NAME}:1")
    assert not registries.mirror_failures
    assert (len(second.seen), len(faulty.seen)) == (0, 0)


def test_a_copy_goes_round_it_too(faulty: Faulty, mirror: Faulty, registries: Registries) -> None:
    from containerkit.image.transfer import copy_image

    made = MadeImage([make_tar([member("file", os.urandom(BIG))])])
    put(mirror, made, wrong=WRONG["a byte flipped"])
    put(faulty, made)
    name = Reference.parse(f"{faulty.host}/{NAME}:1")
    with serve() as registry:
        there = Reference.parse(registry.name("copied:1"))
        with registries.connect(name) as source, registries.connect(there, push=True) as sink:
            descriptor, _ = source.resolve(name)
            sink.put_manifest(there, descriptor.media_type, copy_image(descriptor, source, sink))
            layer = Descriptor(OCI_LAYER, Digest.of(made.layers[0]), len(made.layers[0]))
            with sink.open(layer) as stream:
                assert stream.read() == made.layers[0]
    assert len(registries.mirror_failures) == 1


def test_a_store_goes_round_it_too(
    faulty: Faulty, mirror: Faulty, registries: Registries, blob: tuple[Descriptor, bytes], tmp_path: Any
) -> None:
    path = f"/v2/{NAME}/blobs/{blob[0].digest}"
    mirror.on("GET", path, whole(flipped(blob[1])))
    faulty.on("GET", path, whole(blob[1]))
    (tmp_path / "ingest").mkdir()
    store = BlobStore(str(tmp_path))
    with registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source:
        store.fetch(blob[0], source)
    assert store.read(blob[0].digest) == blob[1]
    assert f"{mirror.host}: gave something else for {blob[0].digest}" in registries.mirror_failures


def test_the_last_error_says_what_mirrors_did(faulty: Faulty, mirror: Faulty, registries: Registries) -> None:
    mirror.on("GET", f"/v2/{NAME}/blobs/{Digest.of(b'x')}", answer(500))
    descriptor = Descriptor(OCI_LAYER, Digest.of(b"x"), 1)
    with (
        registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source,
        pytest.raises(BlobUnknown) as caught,
    ):
        source.open(descriptor)
    assert any(mirror.host in note and "500" in note for note in caught.value.__notes__)


def test_a_mirror_that_gives_another_part_is_passed_over(
    faulty: Faulty, mirror: Faulty, registries: Registries
) -> None:
    content = os.urandom(BIG)
    descriptor = Descriptor(OCI_LAYER, Digest.of(content), BIG)
    path = f"/v2/{NAME}/blobs/{descriptor.digest}"
    mirror.on("GET", path, raw(head(206, {"content_length": "5", "content_range": f"bytes 7-11/{BIG}"}), b"wrong"))
    faulty.on("GET", path, whole(content))
    with registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source, source.open(descriptor) as stream:
        assert stream.read() == content
    assert any("another part" in failure for failure in registries.mirror_failures)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_mirror_that_breaks_off_is_gone_on_from(
    side_by_side: bool, faulty: Faulty, mirror: Faulty, second: Faulty, registries: Registries
) -> None:
    """The next one is asked from the byte on that was reached, and no byte comes twice."""
    content = os.urandom(BIG)
    descriptor = Descriptor(OCI_LAYER, Digest.of(content), BIG)
    if not side_by_side:
        registries.ranges = Ranges(connections=1)
    path = f"/v2/{NAME}/blobs/{descriptor.digest}"
    headers = {"content_length": str(BIG)}
    if side_by_side:
        headers = {"content_length": str(PIECE), "content_range": f"bytes 0-{PIECE - 1}/{BIG}"}
    mirror.on("GET", path, raw(head(206 if side_by_side else 200, headers), content[:10_000]))
    end = f"{PIECE - 1}" if side_by_side else ""
    second.on(
        "GET",
        path,
        raw(
            head(206, {"content_length": str(BIG), "content_range": f"bytes 10000-{PIECE - 1}/{BIG}"}),
            content[10_000:20_000],
        ),
    )
    faulty.on("GET", path, whole(content))
    with registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source, source.open(descriptor) as stream:
        assert stream.read() == content
    assert second.seen[0].headers["range"] == f"bytes=10000-{end}"
    assert any(each.headers["range"].startswith("bytes=20000-") for each in faulty.seen)
    assert {line.partition(": ")[0] for line in registries.mirror_failures} == {mirror.host, second.host}


@pytest.mark.parametrize("what", ["body", "headers"])
def test_a_mirror_that_trickles_is_skipped(
    what: str, faulty: Faulty, mirror: Faulty, registries: Registries, blob: tuple[Descriptor, bytes]
) -> None:
    path = f"/v2/{NAME}/blobs/{blob[0].digest}"
    mirror.on("GET", path, trickle(blob[1]) if what == "body" else trickled_headers)
    faulty.on("GET", path, whole(blob[1]))
    with registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source, source.open(blob[0]) as stream:
        assert stream.read() == blob[1]
    assert len(mirror.seen) == 1
    assert mirror.host in registries.mirror_failures[0]
    sent = int(faulty.seen[0].headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    assert (sent > 0) == (what == "body")  # the rest only


@pytest.mark.parametrize("what", ["body", "headers"])
def test_a_registry_that_trickles_is_too_slow(
    what: str, faulty: Faulty, blob: tuple[Descriptor, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from containerkit.registry import transport

    monkeypatch.setattr(transport.time, "sleep", lambda _: None)
    monkeypatch.setattr("containerkit.registry.transport.DELAYS", (0.0,))
    path = f"/v2/{NAME}/blobs/{blob[0].digest}"
    faulty.on("GET", path, trickle(blob[1]) if what == "body" else trickled_headers)
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=()), timeout=0.2)
    slow = rf"{faulty.host} sends too slowly: \d+ bytes in \d\.\d seconds"
    with (
        registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source,
        contextlib.ExitStack() as stack,
        pytest.raises(RegistryTimeout, match=slow) as caught,
    ):
        stack.enter_context(source.open(blob[0])).read()
    assert caught.value.retryable
    assert isinstance(caught.value, TimeoutError)
    assert len(faulty.seen) >= 2


def test_a_rate_of_nothing_lets_everything_pass(faulty: Faulty) -> None:
    content = b"0123456789" * 6
    descriptor = Descriptor(OCI_LAYER, Digest.of(content), len(content))
    faulty.on("GET", f"/v2/{NAME}/blobs/{descriptor.digest}", trickle(content, pause=0.02))
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=()), timeout=0.3, slowest=0)
    with registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source, source.open(descriptor) as stream:
        assert stream.read() == content
    assert len(faulty.seen) == 1


def test_a_slow_reader_is_not_a_slow_server(
    faulty: Faulty, blob: tuple[Descriptor, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the time that is spent waiting for bytes counts."""
    faulty.on("GET", f"/v2/{NAME}/blobs/{blob[0].digest}", whole(blob[1]))
    registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=()), timeout=0.2, slowest=1e7)
    with registries.connect(Reference.parse(f"{faulty.host}/{NAME}")) as source, source.open(blob[0]) as stream:
        parts = []
        while piece := stream.read(200_000):
            parts.append(piece)
            time.sleep(0.15)
        assert b"".join(parts) == blob[1]
    assert len(faulty.seen) == 1
