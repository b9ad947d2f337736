"""The way of whole images: from a registry into a state root and back, and what a bad one leaves."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import (
    BlobUnknown,
    ContainerkitError,
    DigestMismatch,
    ManifestUnknown,
    RegistryDisconnected,
    RegistryUnavailable,
    SizeMismatch,
)
from containerkit.image.digest import Digest
from containerkit.image.images import Images
from containerkit.image.store.ingest import partial_path
from containerkit.registry.client import connect
from support.faulty import answer, head, raw
from support.registry import GREETING, skopeo

if TYPE_CHECKING:
    from containerkit.state import State
    from support.faulty import Action, Connection, Faulty
    from support.registry import Registry

pytestmark = [pytest.mark.registry, pytest.mark.kernel]

IMAGE = "/v2/some/image"


@pytest.fixture
def images(state: State) -> Images:
    return Images(state, connect)


def tree(root: str) -> list[str]:
    """Every file of content below a state root."""
    parts = [os.path.join(root, part) for part in ("blobs", "layers", "ingest")]
    return [os.path.join(top, name) for part in parts for top, _, names in os.walk(part) for name in names]


def blob_file(layout: str, digest: str) -> str:
    return os.path.join(layout, "blobs/sha256", digest.partition(":")[2])


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_pull(busybox: str, busybox_layout: str, images: Images, state: State) -> None:
    image = images.pull(busybox)
    entry = json.loads(read(os.path.join(busybox_layout, "index.json")))["manifests"][0]
    manifest = json.loads(read(blob_file(busybox_layout, entry["digest"])))
    assert (image.digest, image.id) == (entry["digest"], manifest["config"]["digest"])
    assert image.names == (busybox,)
    for row in (manifest["config"], *manifest["layers"]):
        assert read(blob_file(state.root, row["digest"])) == read(blob_file(busybox_layout, row["digest"]))
    greeting, base = image.lowers
    assert read(os.path.join(greeting, "greeting")) == GREETING.encode()
    assert read(os.path.join(base, "bin/busybox")) == read("/bin/busybox")
    assert images.pull(busybox) == images.get(image.id) == image


def test_both_manifest_formats_are_one_image(busybox: str, busybox_docker: str, images: Images) -> None:
    one, other = images.pull(busybox), images.pull(busybox_docker)
    assert one.lowers == other.lowers
    assert one.run == other.run


def test_pull_by_digest(busybox: str, images: Images) -> None:
    image = images.pull(busybox)
    name = f"{busybox.rpartition(':')[0]}@{image.digest}"
    assert images.pull(name).id == image.id
    assert name in images.get(image.id).names


def test_push_what_was_pulled(busybox: str, registry: Registry, images: Images, tmp_path: str) -> None:
    image = images.pull(busybox)
    name = registry.name("copied/busybox:2")
    images.tag(image, name)
    assert images.push(name) == image.digest
    assert skopeo("inspect", "--raw", f"docker://{name}") == skopeo("inspect", "--raw", f"docker://{busybox}")
    skopeo("copy", f"docker://{name}", f"oci:{tmp_path}/layout:2")  # it verifies every blob


def test_unknown_image_and_registry(registry: Registry, images: Images, state: State) -> None:
    with pytest.raises(ManifestUnknown, match="busybox:none"):
        images.pull(registry.name("busybox:none"))
    with pytest.raises(RegistryUnavailable, match=r"127\.0\.0\.1:1 cannot be reached"):
        images.pull("127.0.0.1:1/busybox")
    assert images.list() == []
    assert tree(state.root) == []


@pytest.fixture
def served(faulty: Faulty, busybox_layout: str) -> tuple[Faulty, str, bytes]:
    """The busybox image on the faulty server; with the path of its first layer and that layer's content."""
    entry = json.loads(read(os.path.join(busybox_layout, "index.json")))["manifests"][0]
    body = read(blob_file(busybox_layout, entry["digest"]))
    manifest = json.loads(body)
    faulty.on("GET", f"{IMAGE}/manifests/1", answer(200, body, content_type=entry["mediaType"]))
    for row in (manifest["config"], *manifest["layers"]):
        content = read(blob_file(busybox_layout, row["digest"]))
        faulty.on("GET", f"{IMAGE}/blobs/{row['digest']}", answer(200, content))
    layer = manifest["layers"][0]["digest"]
    return faulty, f"{IMAGE}/blobs/{layer}", read(blob_file(busybox_layout, layer))


def cut(content: bytes) -> Action:
    return raw(head(200, {"content_length": str(len(content))}), content[: len(content) // 2])


def flip(content: bytes) -> Action:
    middle = len(content) // 2
    return answer(200, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (cut, RegistryDisconnected),
        (flip, DigestMismatch),
        (lambda content: answer(200, content[:-1]), SizeMismatch),
        (lambda content: answer(200, content + b"!"), SizeMismatch),
        (lambda _: answer(404), BlobUnknown),
        (lambda _: answer(500), RegistryUnavailable),
    ],
    ids=["cut", "flipped", "short", "long", "missing", "failing"],
)
def test_a_bad_layer_leaves_what_was_verified_to_the_next_pull(
    fault: object,
    error: type[ContainerkitError],
    served: tuple[Faulty, str, bytes],
    busybox_layout: str,
    images: Images,
    state: State,
) -> None:
    faulty, path, content = served
    name = f"{faulty.host}/some/image:1"
    entry = json.loads(read(os.path.join(busybox_layout, "index.json")))["manifests"][0]
    upper = json.loads(read(blob_file(busybox_layout, entry["digest"])))["layers"][1]
    act = fault(content)  # type: ignore[operator]

    def late(connection: Connection) -> None:
        wait_for(partial_path(state.root, Digest(upper["digest"])), upper["size"])
        act(connection)

    faulty.on("GET", path, late)
    with pytest.raises(error):
        images.pull(name)
    assert images.list() == []
    left = [name for name in tree(state.root) if "partial-" not in name]  # a download that can go on, and notes
    assert left == [blob_file(state.root, upper["digest"])]
    faulty.seen.clear()
    faulty.on("GET", path, answer(200, content))
    assert images.pull(name).names == (name,)
    assert not [request for request in faulty.seen if upper["digest"] in request.path]


def wait_for(path: str, size: int) -> None:
    """Until a layer has come to the last byte: then it waits for the one below."""
    deadline = time.monotonic() + 30
    while not os.path.exists(path) or os.path.getsize(path) < size:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_layer_that_is_cut_once_goes_on_where_it_was(served: tuple[Faulty, str, bytes], images: Images) -> None:
    faulty, path, content = served
    half = len(content) // 2
    rest = answer(206, content[half:], content_range=f"bytes {half}-{len(content) - 1}/{len(content)}")
    faulty.on("GET", path, cut(content), rest)
    assert images.pull(f"{faulty.host}/some/image:1").size > len(content)
    ranges = [request.headers.get("range") for request in faulty.seen if request.path == path]
    assert ranges == [None, f"bytes={half}-"]
