"""Artifacts: any files, pushed and pulled, found by what they refer to, and unable to leave their directory."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import DigestMismatch, DocumentTooLarge, InvalidImage, NotAnImage, UnsafeEntry
from containerkit.image.codec import parse_document, require_image
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry import artifacts, discovery, serve
from containerkit.registry.artifacts import File
from containerkit.registry.client import connect
from support import rawhttp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from containerkit.registry.repository import Repository
    from support.registry import Registry

KIND = "application/vnd.example.report"


@pytest.fixture(scope="module")
def ours() -> Iterator[Any]:
    with serve() as registry:
        yield registry


@pytest.fixture(params=["ours", "docker-registry"])
def raw(request: pytest.FixtureRequest, ours: Any, registry: Registry) -> rawhttp.Repository:
    return rawhttp.Repository(ours.host if request.param == "ours" else registry.host)


@pytest.fixture
def repository(raw: rawhttp.Repository) -> Iterator[Repository]:
    with connect(Reference.parse(f"{raw.host}/{raw.name}"), push=True).origin as opened:
        yield opened


def test_files_there_and_back(repository: Repository, raw: rawhttp.Repository, tmp_path: Path) -> None:
    big = os.urandom(3_000_000)
    (tmp_path / "big").write_bytes(big)
    files = [
        File("report.json", b'{"ok":true}', "application/json", {"org.example.a": "b"}),
        File("deep/er/big.bin", tmp_path / "big"),
        File("empty", b""),
    ]
    pushed = artifacts.push(repository, files, KIND, tag="report", annotations={"org.example.build": "17"})
    document = raw.ask("GET", "manifests/report", accept=OCI_MANIFEST).json
    assert document["artifactType"] == KIND
    assert document["annotations"] == {"org.example.build": "17"}
    assert document["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }
    assert document["layers"][0]["annotations"] == {
        "org.opencontainers.image.title": "report.json",
        "org.example.a": "b",
    }
    for target in ("report", pushed.digest):
        there = tmp_path / target.replace(":", "-")
        pulled = artifacts.pull(repository, target, there)
        assert pulled.descriptor.digest == pushed.digest
        assert {name: (there / name).read_bytes() for name in pulled.files} == {
            "report.json": b'{"ok":true}',
            "deep/er/big.bin": big,
            "empty": b"",
        }
        assert sorted(os.listdir(there)) == ["deep", "empty", "report.json"]
    _, manifest = artifacts.resolve(repository, "report")
    assert artifacts.read(repository, manifest.layers[0]) == b'{"ok":true}'
    with pytest.raises(DocumentTooLarge):
        artifacts.read(repository, manifest.layers[1], 1000)


def test_an_artifact_is_no_image(repository: Repository) -> None:
    pushed = artifacts.push(repository, [], KIND, annotations={"only": "annotations"})
    body = repository.manifest(pushed)
    with pytest.raises(NotAnImage):
        require_image(parse_document(body))  # type: ignore[arg-type]


def test_it_is_found_by_its_subject(repository: Repository, raw: rawhttp.Repository) -> None:
    subject, _ = repository.resolve(Reference(repository.registry, repository.name, raw.push_image("app") and "app"))
    pushed = artifacts.push(repository, [File("sbom", b"{}")], KIND, subject=subject, annotations={"a": "b"})
    artifacts.push(repository, [File("other", b"[]")], KIND + ".other", subject=subject)
    (found,) = discovery.referrers(repository, subject.digest, KIND)
    assert (found.digest, found.size, found.artifact_type) == (pushed.digest, pushed.size, KIND)
    assert found.annotations == {"a": "b"}
    assert len(discovery.referrers(repository, subject.digest)) == 2
    discovery.delete_manifest(repository, pushed.digest)
    if not discovery.knows_referrers(repository, subject.digest):
        discovery.remove_referrer(repository, subject.digest, pushed.digest)
    assert discovery.referrers(repository, subject.digest, KIND) == ()
    assert len(discovery.referrers(repository, subject.digest)) == 1


def test_nothing_is_sent_twice(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts.push(repository, [File("a", b"content")], KIND)
    sent = []
    monkeypatch.setattr(repository, "put", lambda descriptor, _: sent.append(descriptor))
    artifacts.push(repository, [File("b", b"content")], KIND)
    assert sent == []


NAMES = ["../x", "/etc/x", "a/../x", "a//x", "..", ".", "a/", "./x", "x\0y"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out(repository: Repository, raw: rawhttp.Repository, tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeEntry):
        artifacts.push(repository, [File(name, b"x")], KIND)
    document = raw.image(artifactType=KIND)
    document["layers"] = [{**document["layers"][0], "annotations": {artifacts.TITLE: name}}]
    assert raw.push_manifest("evil", document).status == 201
    with pytest.raises(UnsafeEntry):
        artifacts.pull(repository, "evil", tmp_path / "in" / "here")
    assert os.listdir(tmp_path) == []


UNUSABLE = {
    "a long part": "x" * 256,
    "a long part in bytes": "\u20ac" * 86,
    "deep": "a/" * 64 + "x",
    "long": "/".join(["x" * 255] * 12),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_names_that_no_file_can_have(
    repository: Repository, raw: rawhttp.Repository, tmp_path: Path, what: str
) -> None:
    with pytest.raises(UnsafeEntry):
        artifacts.push(repository, [File(UNUSABLE[what], b"x")], KIND)
    document = raw.image(artifactType=KIND)
    document["layers"] = [{**document["layers"][0], "annotations": {artifacts.TITLE: UNUSABLE[what]}}]
    assert raw.push_manifest("evil", document).status == 201
    with pytest.raises(UnsafeEntry):
        artifacts.pull(repository, "evil", tmp_path / "in")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UnsafeEntry) as caught:  # the parser of manifests knows no such text
        artifacts.push(repository, [File("a\ud800", b"x")], KIND)
    str(caught.value).encode()


def test_the_longest_names(repository: Repository, tmp_path: Path) -> None:
    names = ["x" * 255, "a/" * 63 + "x", "/".join(["y" * 255] * 11)]
    artifacts.push(repository, [File(name, b"x") for name in names], KIND, tag="a")
    pulled = artifacts.pull(repository, "a", tmp_path)
    assert all(os.path.getsize(path) == 1 for path in pulled.files.values())


def test_a_directory_where_the_file_should_be(repository: Repository, tmp_path: Path) -> None:
    artifacts.push(repository, [File("a", b"new")], KIND, tag="a")
    (tmp_path / "a").mkdir()
    with pytest.raises(UnsafeEntry, match="a directory is where"):
        artifacts.pull(repository, "a", tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_links_in_the_directory_lead_nowhere(repository: Repository, tmp_path: Path) -> None:
    artifacts.push(repository, [File("link/file", b"new"), File("file", b"new")], KIND, tag="a")
    os.mkdir(tmp_path / "outside")
    os.mkdir(tmp_path / "in")
    (tmp_path / "outside" / "file").write_bytes(b"old")
    os.symlink(tmp_path / "outside", tmp_path / "in" / "link")
    with pytest.raises(UnsafeEntry):
        artifacts.pull(repository, "a", tmp_path / "in")
    os.unlink(tmp_path / "in" / "link")
    os.symlink(tmp_path / "outside" / "file", tmp_path / "in" / "file")
    artifacts.pull(repository, "a", tmp_path / "in")
    assert (tmp_path / "in" / "file").read_bytes() == b"new"  # the link was replaced
    assert (tmp_path / "outside" / "file").read_bytes() == b"old"


def test_a_name_twice(repository: Repository, raw: rawhttp.Repository, tmp_path: Path) -> None:
    with pytest.raises(InvalidImage):
        artifacts.push(repository, [File("a", b"1"), File("a", b"2")], KIND)
    document = raw.image(artifactType=KIND)
    layer = {**document["layers"][0], "annotations": {artifacts.TITLE: "a"}}
    raw.push_manifest("twice", {**document, "layers": [layer, layer]})
    with pytest.raises(InvalidImage):
        artifacts.pull(repository, "twice", tmp_path)


def test_other_content_does_not_appear(ours: Any, tmp_path: Path) -> None:
    raw = rawhttp.Repository(ours.host)
    with connect(Reference.parse(f"{raw.host}/{raw.name}"), push=True).origin as repository:
        artifacts.push(repository, [File("a", b"content")], KIND, tag="a")
        with open(os.path.join(ours.directory, "blobs/sha256", Digest.of(b"content").hex), "wb") as file:
            file.write(b"CONTENT")
        (tmp_path / "a").write_bytes(b"before")
        with pytest.raises(DigestMismatch):
            artifacts.pull(repository, "a", tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {"a": b"before"}


def test_an_index_is_no_artifact(repository: Repository, raw: rawhttp.Repository) -> None:
    digest = raw.push_image("image")
    size = len(raw.ask("GET", "manifests/image", accept=OCI_MANIFEST).body)
    row = {**rawhttp.describe(digest, size), "platform": {"os": "linux", "architecture": "amd64"}}
    kind = "application/vnd.oci.image.index.v1+json"
    assert raw.push_manifest("index", {"schemaVersion": 2, "mediaType": kind, "manifests": [row]}).status == 201
    with pytest.raises(InvalidImage):
        artifacts.resolve(repository, "index")


def test_a_descriptor_of_a_pushed_artifact_is_what_the_registry_has(repository: Repository) -> None:
    pushed = artifacts.push(repository, [File("a", b"1")], KIND)
    assert json.loads(repository.manifest(Descriptor(OCI_MANIFEST, pushed.digest, pushed.size)))["artifactType"] == KIND
