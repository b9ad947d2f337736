"""Pushes that send nothing twice: what the registry has, here or elsewhere, and layers compressed on their way."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import (
    BlobNotFound,
    DigestMismatch,
    InvalidImage,
    InvalidReference,
    RegistryRejected,
    RegistryUnavailable,
    UnexpectedResponse,
)
from containerkit.image.digest import Digest
from containerkit.image.images import Images
from containerkit.image.model import OCI_LAYER, Descriptor
from containerkit.image.progress import DONE, PRESENT, Progress
from containerkit.image.reference import Reference
from containerkit.registry import serve
from containerkit.registry.client import Registries, connect
from containerkit.registry.uploads import CHUNK, LARGEST_CHUNK
from containerkit.state import State
from support.counting_proxy import CountingProxy
from support.faulty import answer, raw
from support.images import MadeImage, make_tar, member
from support.registry import Registry, skopeo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from containerkit.registry.repository import Repository
    from support.faulty import Faulty

UPLOADS = "/v2/some/image/blobs/uploads/"
BIG = CHUNK + CHUNK // 2
pytestmark = [pytest.mark.registry, pytest.mark.kernel]


@pytest.fixture
def images(state_root: str) -> Iterator[Images]:
    state = State(state_root)
    yield Images(state, Registries().connect)
    state.close()


@pytest.fixture(params=["docker-registry", "ours"])
def proxy(request: pytest.FixtureRequest, registry: Registry) -> Iterator[CountingProxy]:
    """In front of a real registry; notes the requests."""
    if request.param == "ours":
        with serve() as server, CountingProxy(server.host) as proxy:
            yield proxy
    else:
        with CountingProxy(registry.host) as proxy:
            yield proxy


def bring(images: Images, tmp_path: Path, name: str, *, compress: bool = True, size: int = 3000) -> MadeImage:
    """An image of two layers in the store."""
    layers = [make_tar([member(f"file{number}", os.urandom(size // 2) * 2)]) for number in range(2)]
    made = MadeImage(layers, compress=compress)
    made.add(made.manifest)
    images.load(made.write_layout(str(tmp_path / name.replace("/", "-").replace(":", "-"))), tag=name)
    return made


def verbs(proxy: CountingProxy, verb: str) -> list[str]:
    return [line.split()[1] for line in proxy.lines if line.startswith(verb + " ")]


def test_what_another_name_has_there_is_mounted(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    one, two = (f"{proxy.host}/mounts{os.getpid()}/{name}:1" for name in ("one", "two"))
    made = bring(images, tmp_path, one)
    images.push(one)
    assert len(verbs(proxy, "PUT")) == 4
    images.tag(one, two)
    proxy.lines.clear()
    events: list[Progress] = []
    there = images.push(two, progress=events.append)
    assert len(verbs(proxy, "POST")) == 3
    assert all("mount=sha256%3A" in path and "from=mounts" in path for path in verbs(proxy, "POST"))
    assert [path.rpartition("/")[2] for path in verbs(proxy, "PUT")] == ["1"]  # the manifest alone
    assert {event.phase for event in events} == {PRESENT}
    assert events[-1].total_done == events[-1].total == sum(map(len, (*made.layers, made.config)))
    assert skopeo("inspect", "--raw", f"docker://{two}") == made.manifest
    skopeo("copy", f"docker://{two}", f"oci:{tmp_path}/copied:1")
    assert there == images.get(two).digest
    proxy.lines.clear()
    images.push(two)
    assert verbs(proxy, "POST") == []


def test_more_tags_cost_a_manifest_each(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    name = f"{proxy.host}/tags{os.getpid()}:1.2.3"
    made = bring(images, tmp_path, name)
    images.push(name, tags=["1.2", "latest"])
    blobs, manifests = (sum(f"/{kind}/" in put for put in verbs(proxy, "PUT")) for kind in ("blobs", "manifests"))
    assert (blobs, manifests) == (3, 3)
    for tag in ("1.2.3", "1.2", "latest"):
        assert skopeo("inspect", "--raw", f"docker://{name.rpartition(':')[0]}:{tag}") == made.manifest
    with pytest.raises(InvalidReference):
        images.push(name, tags=["no tag"])


def test_a_mount_that_is_not_done_becomes_an_upload(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    """The name says that the registry has it, and it has not."""
    one, two = (f"{proxy.host}/unmounted{os.getpid()}/{name}:1" for name in ("one", "two"))
    made = bring(images, tmp_path, one)
    images.tag(one, two)
    images.push(two)
    assert len(verbs(proxy, "POST")) == 3  # each both asked for the mount and opened the upload
    assert verbs(proxy, "DELETE") == []
    assert skopeo("inspect", "--raw", f"docker://{two}") == made.manifest
    skopeo("copy", f"docker://{two}", f"oci:{tmp_path}/copied:1")


def test_a_copy_within_one_registry_moves_no_blob(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    one, two = (f"{proxy.host}/within{os.getpid()}/{name}:1" for name in ("one", "two"))
    bring(images, tmp_path, one)
    images.push(one)
    images.remove(one)
    proxy.lines.clear()
    images.copy(f"docker://{one}", f"docker://{two}")
    assert not [path for path in verbs(proxy, "GET") if "/blobs/" in path]
    assert [path.rpartition("/")[2] for path in verbs(proxy, "PUT")] == ["1"]
    skopeo("copy", f"docker://{two}", f"oci:{tmp_path}/copied:1")


def test_a_pull_that_is_complete_asks_once(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    name = f"{proxy.host}/complete{os.getpid()}:1"
    bring(images, tmp_path, name)
    images.push(name)
    for action in (
        lambda: images.pull(name),
        lambda: images.copy(f"docker://{name}", f"oci:{tmp_path}/here:1"),
    ):
        action()
        proxy.lines.clear()
        action()
        assert len(proxy.lines) == 1, proxy.lines


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_plain_layers_are_compressed_on_their_way(
    images: Images, tmp_path: Path, proxy: CountingProxy, compression: str
) -> None:
    name = f"{proxy.host}/packed{os.getpid()}/{compression}:1"
    made = bring(images, tmp_path, name, compress=False, size=3 * BIG)
    events: list[Progress] = []
    there = images.push(name, compression=compression, progress=events.append)
    assert there != images.get(name).digest
    assert len(verbs(proxy, "PATCH")) >= 4
    manifest = json.loads(skopeo("inspect", "--raw", f"docker://{name}"))
    assert [row["mediaType"] for row in manifest["layers"]] == [f"{OCI_LAYER}+{compression}"] * 2
    assert manifest["config"]["digest"] == Digest.of(made.config)
    assert manifest["layers"][0]["size"] < len(made.layers[0])
    assert {event.total for event in events} == {sum(map(len, (*made.layers, made.config)))}
    assert {event.phase for event in events if event.done == event.size} >= {DONE}
    skopeo("copy", f"docker://{name}", f"oci:{tmp_path}/copied:1")
    images.remove(name)
    assert images.pull(name).id == Digest.of(made.config)  # the diff ids are checked as it is unpacked
    proxy.lines.clear()


def test_a_compressed_push_again_sends_no_layer(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    name = f"{proxy.host}/again{os.getpid()}:1"
    bring(images, tmp_path, name, compress=False)
    first = images.push(name, compression="zstd")
    proxy.lines.clear()
    assert images.push(name, compression="zstd") == first
    assert verbs(proxy, "POST") == verbs(proxy, "PATCH") == []


def test_a_docker_archive_compressed_with_zstd(images: Images, tmp_path: Path, proxy: CountingProxy) -> None:
    name = f"{proxy.host}/archive{os.getpid()}:1"
    made = bring(images, tmp_path, name, compress=False)
    images.copy(f"containerkit:{name}", f"docker-archive:{tmp_path}/saved.tar:{name}")
    images.remove(name)
    images.load(str(tmp_path / "saved.tar"))
    images.push(name, compression="zstd")
    seen = json.loads(skopeo("inspect", "--raw", f"docker://{name}"))
    assert seen["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    skopeo("copy", f"docker://{name}", f"oci:{tmp_path}/copied:1")
    assert json.loads(skopeo("inspect", "--config", "--raw", f"docker://{name}")) == json.loads(made.config)


def test_compressions_there_are_not(images: Images, tmp_path: Path) -> None:
    bring(images, tmp_path, "127.0.0.1:1/a:1")
    with pytest.raises(InvalidImage, match="brotli"):
        images.push("127.0.0.1:1/a:1", compression="brotli")


def pieces(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield bytes([number]) * (1 << 20)


def test_a_blob_whose_digest_comes_last(proxy: CountingProxy) -> None:
    name = Reference.parse(f"{proxy.host}/pieces{os.getpid()}")
    with connect(name, push=True).origin as remote:
        whole = b"".join(pieces(11))
        assert remote.put_pieces(pieces(11)) == (Digest.of(whole), len(whole))
        assert remote.put_pieces(iter(())) == (Digest.of(b""), 0)
        with remote.open(Descriptor(OCI_LAYER, Digest.of(whole), len(whole))) as stream:
            assert stream.read() == whole


def test_pieces_that_break_leave_nothing(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    def broken() -> Iterator[bytes]:
        yield bytes(CHUNK)
        raise DigestMismatch("changed", expected="", actual="")

    faulty.on("POST", UPLOADS, answer(202, location="up/1"))
    faulty.on("PATCH", UPLOADS + "up/1", answer(202, location="2"))
    with pytest.raises(DigestMismatch):
        repository(f"{faulty.host}/some/image").put_pieces(broken())
    assert faulty.requests("PUT") == []
    assert [request.path for request in faulty.requests("DELETE")] == [UPLOADS + "up/2"]


def test_a_chunk_that_breaks_goes_on_where_the_registry_is(
    faulty: Faulty, repository: Callable[..., Repository]
) -> None:
    here = UPLOADS + "up/1"
    faulty.on("POST", UPLOADS, answer(202, location="up/1"))
    cut, stay = raw(), answer(202, location="1")
    faulty.on("PATCH", here, stay, cut, stay)
    faulty.on("GET", here, answer(204, location="1", range=f"0-{CHUNK + 999}"))
    faulty.on("PUT", here, answer(201))
    digest, size = repository(f"{faulty.host}/some/image").put_pieces(pieces(6))
    assert (digest, size) == (Digest.of(b"".join(pieces(6))), 6 << 20)
    sent = faulty.requests("PATCH")
    assert [request.headers["content-range"] for request in sent] == [
        f"0-{CHUNK - 1}",
        f"{CHUNK}-{size - 1}",
        f"{CHUNK + 1000}-{size - 1}",
    ]
    assert sent[2].body == sent[1].body[1000:]


def test_a_registry_that_loses_what_it_had(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    here = UPLOADS + "up/1"
    faulty.on("POST", UPLOADS, answer(202, location="up/1"))
    faulty.on("PATCH", here, answer(202, location="1"), raw())
    faulty.on("GET", here, answer(204, location="1", range="0-99"))
    with pytest.raises(UnexpectedResponse, match="lost a part"):
        repository(f"{faulty.host}/some/image").put_pieces(pieces(6))


def test_chunks_as_large_as_the_registry_wants(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    here = UPLOADS + "up/1"
    faulty.on("POST", UPLOADS, answer(202, location="up/1", OCI_Chunk_Min_Length=str(2 * CHUNK)))
    faulty.on("PATCH", here, answer(202, location="1"))
    faulty.on("PUT", here, answer(201))
    repository(f"{faulty.host}/some/image").put_pieces(pieces(9))
    assert [len(request.body) for request in faulty.requests("PATCH")] == [2 * CHUNK, 1 << 20]


def test_chunks_larger_than_anybody_can_hold(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    faulty.on("POST", UPLOADS, answer(202, location="up/1", OCI_Chunk_Min_Length=str(LARGEST_CHUNK + 1)))
    left = pieces(100)
    with pytest.raises(UnexpectedResponse, match="chunks of 67108865 bytes"):
        repository(f"{faulty.host}/some/image").put_pieces(left)
    assert next(left)[0] == 0  # nothing of it has been read
    assert [request.path for request in faulty.requests("DELETE")] == [UPLOADS + "up/1"]


def test_a_neighbour_that_may_not_be_read_is_asked_once(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    import io

    descriptor, content = blob
    denied = answer(403, b'{"errors":[{"code":"DENIED"}]}')
    opened = answer(202, location="up/1")
    faulty.on("POST", UPLOADS, denied, opened)
    faulty.on("PUT", UPLOADS + "up/1", answer(201))
    remote = repository(f"{faulty.host}/some/image")
    for _ in range(2):
        assert remote.send(descriptor, lambda: io.BytesIO(content), ["secret/place"])
    posts = [request.path for request in faulty.requests("POST")]
    assert [("mount=" in path) for path in posts] == [True, False, False]
    assert [request.body for request in faulty.requests("PUT")] == [content] * 2


def test_of_several_neighbours_the_second_has_it(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    def never() -> None:
        raise AssertionError("nothing need be read")

    faulty.on("POST", UPLOADS, answer(202, location="up/1"), answer(201))
    remote = repository(f"{faulty.host}/some/image")
    assert not remote.send(blob[0], never, ["one/a", "some/image", "two/b"])  # type: ignore[arg-type]
    assert [path.partition("from=")[2] for path in (r.path for r in faulty.requests("POST"))] == ["one%2Fa", "two%2Fb"]
    assert [request.path for request in faulty.requests("DELETE")] == [UPLOADS + "up/1"]


def test_content_that_cannot_be_opened_cancels_the_upload(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    def gone() -> None:
        raise BlobNotFound("gone")

    faulty.on("POST", UPLOADS, answer(202, location="up/1"))
    with pytest.raises(BlobNotFound):
        repository(f"{faulty.host}/some/image").send(blob[0], gone, ["one/a"])  # type: ignore[arg-type]
    assert [request.path for request in faulty.requests("DELETE")] == [UPLOADS + "up/1"]


def test_a_registry_that_fails_is_not_taken_for_one_without_mounts(
    repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    with pytest.raises(RegistryUnavailable):
        repository("127.0.0.1:1/some/image").send(blob[0], lambda: pytest.fail("opened"), ["one/a"])


def test_a_refused_upload_ends_the_push(images: Images, tmp_path: Path, faulty: Faulty) -> None:
    """The first failure is raised, all uploads that were begun are cancelled, and no manifest is put."""
    name = f"{faulty.host}/some/image:1"
    bring(images, tmp_path, name)
    faulty.on("POST", UPLOADS, answer(202, location="up/1"))
    faulty.on("PUT", UPLOADS + "up/1", answer(413, b'{"errors":[{"code":"SIZE_INVALID","message":"too large"}]}'))
    with pytest.raises(RegistryRejected, match="too large"):
        images.push(name)
    assert not [request for request in faulty.requests("PUT") if "/manifests/" in request.path]
    assert faulty.requests("DELETE")
