"""Reading from Debian's docker-registry what skopeo and umoci put there."""

from __future__ import annotations

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import BlobUnknown, ImageNotFound, ManifestUnknown, RegistryUnavailable, SizeMismatch
from containerkit.image.digest import Digest
from containerkit.image.model import DOCKER_LIST, DOCKER_MANIFEST, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry.client import connect
from support.registry import skopeo

if TYPE_CHECKING:
    from collections.abc import Callable

    from containerkit.registry.repository import Repository
    from support.registry import Registry

pytestmark = pytest.mark.registry


def descriptors(manifest: bytes) -> list[Descriptor]:
    """The config and layers of a manifest, read by hand."""
    document = json.loads(manifest)
    rows = [document["config"], *document["layers"]]
    return [Descriptor(row["mediaType"], Digest(row["digest"]), row["size"]) for row in rows]


def test_resolve_gives_the_bytes_that_skopeo_sees(
    busybox: str, busybox_docker: str, repository: Callable[..., Repository]
) -> None:
    for name, media_type in ((busybox, OCI_MANIFEST), (busybox_docker, DOCKER_MANIFEST)):
        descriptor, body = repository(name).resolve(Reference.parse(name))
        assert body == skopeo("inspect", "--raw", f"docker://{name}")
        assert descriptor == Descriptor(media_type, Digest("sha256:" + hashlib.sha256(body).hexdigest()), len(body))


def test_resolve_by_digest_and_manifest_give_the_same(busybox: str, repository: Callable[..., Repository]) -> None:
    reference = Reference.parse(busybox)
    remote = repository(busybox)
    descriptor, body = remote.resolve(reference)
    assert remote.resolve(reference.with_digest(descriptor.digest)) == (descriptor, body)
    assert remote.manifest(descriptor) == body
    assert remote.open(descriptor).read() == body


def test_blobs_are_those_of_the_layout(
    busybox: str, busybox_layout: str, repository: Callable[..., Repository]
) -> None:
    remote = repository(busybox)
    blobs = descriptors(remote.resolve(Reference.parse(busybox))[1])
    assert len(blobs) == 3
    for blob in blobs:
        with (
            open(os.path.join(busybox_layout, "blobs/sha256", blob.digest.hex), "rb") as file,
            remote.open(blob) as got,
        ):
            assert got.read() == file.read()
            assert got.read(1) == b""


def test_threads_share_one_repository(busybox: str, repository: Callable[..., Repository]) -> None:
    remote = repository(busybox)
    blobs = descriptors(remote.resolve(Reference.parse(busybox))[1])

    def pull(blob: Descriptor) -> Digest:
        with remote.open(blob) as stream:
            return Digest.of(b"".join(iter(lambda: stream.read(4096), b"")))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pull, blobs * 8)) == [blob.digest for blob in blobs * 8]


def test_index_of_two_platforms(busybox: str, registry: Registry, repository: Callable[..., Repository]) -> None:
    one, _ = repository(busybox).resolve(Reference.parse(busybox))
    entry = {"mediaType": one.media_type, "digest": one.digest, "size": one.size}
    platforms = [{"os": "linux", "architecture": architecture} for architecture in ("amd64", "riscv64")]
    manifests = [{**entry, "platform": each} for each in platforms]
    body = json.dumps({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": manifests}).encode()
    name = Reference.parse(registry.name("busybox:many"))
    remote = repository(str(name))
    digest = remote.put_manifest(name, DOCKER_LIST, body)
    assert remote.resolve(name) == (Descriptor(DOCKER_LIST, digest, len(body)), body)
    assert skopeo("inspect", "--raw", f"docker://{name}") == body


def test_unknown_tag_repository_and_blob(
    busybox: str, registry: Registry, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    for name in (registry.name("busybox:nope"), registry.name("nope/nope:1")):
        with pytest.raises(ManifestUnknown, match=name) as caught:
            repository(name).resolve(Reference.parse(name))
        assert isinstance(caught.value, ImageNotFound)
        assert (caught.value.status, caught.value.retryable) == (404, False)
        assert caught.value.code in ("MANIFEST_UNKNOWN", "NAME_UNKNOWN")
        assert caught.value.url.startswith(f"http://{registry.host}/v2/")
    missing, _ = blob
    assert not repository(busybox).has(missing)
    with pytest.raises(BlobUnknown, match=missing.digest):
        repository(busybox).open(missing)


def test_wrong_size_in_a_descriptor(busybox: str, repository: Callable[..., Repository]) -> None:
    remote = repository(busybox)
    manifest, body = remote.resolve(Reference.parse(busybox))
    layer = descriptors(body)[1]
    for wrong in (layer.size - 1, layer.size + 1):
        with pytest.raises(SizeMismatch, match=layer.digest) as caught:
            remote.open(Descriptor(OCI_LAYER, layer.digest, wrong))
        assert (caught.value.expected, caught.value.actual) == (wrong, layer.size)
    with pytest.raises(SizeMismatch):
        remote.manifest(Descriptor(manifest.media_type, manifest.digest, manifest.size + 1))


def test_content_that_rotted_on_the_server(registry: Registry, repository: Callable[..., Repository]) -> None:
    """docker-registry checks a manifest when it reads it, and a blob never: that is left to us."""
    name = Reference.parse(registry.name("rotten:1"))
    remote = repository(str(name))
    body = json.dumps({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": []}).encode()
    with open(registry.blob_path(remote.put_manifest(name, DOCKER_LIST, body)), "r+b") as file:
        file.write(body.replace(b"[]", b"{}"))
    with pytest.raises(RegistryUnavailable, match="rotten:1") as caught:
        remote.resolve(name)
    assert caught.value.status == 500
    layer = Descriptor(OCI_LAYER, Digest.of(b"a layer"), 7)
    remote.put(layer, io.BytesIO(b"a layer"))
    os.truncate(registry.blob_path(layer.digest), 5)
    with pytest.raises(SizeMismatch, match=layer.digest) as wrong:
        remote.open(layer).read()
    assert (wrong.value.expected, wrong.value.actual) == (7, 5)


def test_loopback_goes_round_the_proxies_of_the_environment(busybox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    reference = Reference.parse(busybox)
    with connect(reference) as remote:
        assert remote.resolve(reference)[0].media_type == OCI_MANIFEST


def test_a_dropped_repository_closes_its_connections(busybox: str) -> None:
    """No close(): the leak fixture, and ResourceWarning as an error, say whether a socket is left."""
    reference = Reference.parse(busybox)
    connect(reference).resolve(reference)
