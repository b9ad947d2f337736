"""Writing to Debian's docker-registry, read back by skopeo."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import DigestMismatch, RegistryDisconnected, RegistryRejected, SizeMismatch
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from support.faulty import answer
from support.registry import skopeo

if TYPE_CHECKING:
    from collections.abc import Callable

    from containerkit.registry.repository import Repository
    from support.faulty import Faulty
    from support.registry import Registry

UPLOADS = "/v2/some/image/blobs/uploads/"


def copy_layout(remote: Repository, name: Reference, layout: str) -> bytes:
    """Push the only image of an OCI layout; its manifest."""

    def path(digest: str) -> str:
        return os.path.join(layout, "blobs/sha256", digest.partition(":")[2])

    with open(os.path.join(layout, "index.json")) as file:
        entry = json.load(file)["manifests"][0]
    with open(path(entry["digest"]), "rb") as file:
        body = file.read()
    manifest = json.loads(body)
    for row in (manifest["config"], *manifest["layers"]):
        with open(path(row["digest"]), "rb") as stream:
            remote.put(Descriptor(row["mediaType"], Digest(row["digest"]), row["size"]), stream)
    assert remote.put_manifest(name, entry["mediaType"], body) == entry["digest"]
    return body


@pytest.mark.registry
def test_skopeo_reads_back_what_we_push(
    registry: Registry, busybox_layout: str, repository: Callable[..., Repository], tmp_path: str
) -> None:
    name = Reference.parse(registry.name("pushed/busybox:1"))
    body = copy_layout(repository(str(name)), name, busybox_layout)
    assert skopeo("inspect", "--raw", f"docker://{name}") == body
    seen = json.loads(skopeo("inspect", f"docker://{name}"))
    assert seen["Layers"] == [row["digest"] for row in json.loads(body)["layers"]]
    assert "PATH=/bin:/sbin:/usr/bin:/usr/sbin" in seen["Env"]
    skopeo("copy", f"docker://{name}", f"oci:{tmp_path}/layout:1")  # it verifies every blob


@pytest.mark.registry
def test_put_twice_and_from_a_stream_that_cannot_seek(
    registry: Registry, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    remote, other = repository(registry.name("put/one")), repository(registry.name("put/two"))
    assert not remote.has(descriptor)
    remote.put(descriptor, io.BytesIO(content))
    assert remote.has(descriptor)
    remote.put(descriptor, io.BytesIO(content))
    with remote.open(descriptor) as stream:
        other.put(descriptor, stream)
    with other.open(descriptor) as stream:
        assert stream.read() == content


@pytest.mark.registry
def test_a_blob_is_never_whole_in_memory(registry: Registry, repository: Callable[..., Repository]) -> None:
    class Watched(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.largest = max(self.largest, len(data))
            return data

    content = bytes(5 << 20)
    stream = Watched(content)
    repository(registry.name("put/zeros")).put(Descriptor(OCI_LAYER, Digest.of(content), len(content)), stream)
    assert 0 < stream.largest <= 1 << 20


@pytest.mark.registry
def test_the_empty_blob(registry: Registry, repository: Callable[..., Repository]) -> None:
    remote = repository(registry.name("put/empty"))
    empty = Descriptor(OCI_LAYER, Digest.of(b""), 0)
    remote.put(empty, io.BytesIO())
    assert remote.has(empty)
    assert remote.open(empty).read() == b""


@pytest.mark.registry
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda content: content[:-1], SizeMismatch),
        (lambda content: content + b"!", SizeMismatch),
        (lambda content: b"!" + content[1:], DigestMismatch),
        (lambda _: b"", SizeMismatch),
    ],
    ids=["short", "long", "changed", "empty"],
)
def test_a_wrong_stream_is_not_kept(
    change: Callable[[bytes], bytes],
    error: type[Exception],
    registry: Registry,
    repository: Callable[..., Repository],
    blob: tuple[Descriptor, bytes],
) -> None:
    descriptor, content = blob
    remote = repository(registry.name("put/wrong"))
    with pytest.raises(error, match=descriptor.digest):
        remote.put(descriptor, io.BytesIO(change(content)))
    assert not remote.has(descriptor)


@pytest.mark.registry
def test_a_source_that_breaks_is_told_as_the_sources_error(
    registry: Registry, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    class Breaks(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 300_000:
                raise RegistryDisconnected("the source broke")
            return super().read(size)

    descriptor, content = blob
    remote = repository(registry.name("put/broken"))
    with pytest.raises(RegistryDisconnected, match="the source broke"):
        remote.put(descriptor, Breaks(content))
    assert not remote.has(descriptor)


@pytest.mark.registry
def test_a_manifest_whose_blobs_are_not_there(registry: Registry, repository: Callable[..., Repository]) -> None:
    name = Reference.parse(registry.name("put/orphan:1"))
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest.of(b"gone"), "size": 4}
    body = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": []}).encode()
    with pytest.raises(RegistryRejected, match="MANIFEST_BLOB_UNKNOWN") as caught:
        repository(str(name)).put_manifest(name, OCI_MANIFEST, body)
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (400, "MANIFEST_BLOB_UNKNOWN", False)


def test_put_manifest_under_another_digest(repository: Callable[..., Repository]) -> None:
    name = Reference.parse(f"127.0.0.1:1/a@{Digest.of(b'other')}")
    with pytest.raises(DigestMismatch):
        repository(str(name)).put_manifest(name, OCI_MANIFEST, b"{}")


def test_upload_location_keeps_its_query_and_body_is_one_put(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    faulty.on("POST", UPLOADS, answer(202, location="/elsewhere/1?_state=a%3Db"))
    faulty.on("PUT", "/elsewhere/1", answer(201))
    repository(f"{faulty.host}/some/image").put(descriptor, io.BytesIO(content))
    (put,) = faulty.requests("PUT")
    assert put.path == f"/elsewhere/1?_state=a%3Db&digest=sha256%3A{descriptor.digest.hex}"
    assert put.body == content
    assert put.headers["content-length"] == str(len(content))
    assert put.headers["content-type"] == "application/octet-stream"


def test_a_wrong_stream_is_never_sent_whole_and_the_upload_is_cancelled(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    faulty.on("POST", UPLOADS, answer(202, location="up/1"))
    with pytest.raises(DigestMismatch):
        repository(f"{faulty.host}/some/image").put(descriptor, io.BytesIO(content[:-1] + b"!"))
    assert faulty.requests("PUT") == []  # none came whole
    assert [request.path for request in faulty.requests("DELETE")] == [UPLOADS + "up/1"]


def test_upload_that_the_registry_refuses(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    faulty.on("POST", UPLOADS, answer(202, location=f"http://{faulty.host}/up?token=secret"))
    faulty.on("PUT", "/up", answer(413, b'{"errors":[{"code":"SIZE_INVALID","message":"too large"}]}'))
    with pytest.raises(RegistryRejected, match="SIZE_INVALID: too large") as caught:
        repository(f"{faulty.host}/some/image").put(descriptor, io.BytesIO(content))
    assert caught.value.url == f"http://{faulty.host}/up"
    assert "secret" not in str(caught.value)
    assert [request.path for request in faulty.requests("DELETE")] == ["/up?token=secret"]
