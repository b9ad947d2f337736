"""Archives and layouts: what we write, skopeo, umoci, podman and docker take; what they write, we read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import threading
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from containerkit.errors import AmbiguousImage, DigestMismatch, InvalidArchive
from containerkit.image.archives.archive import open_archive
from containerkit.image.archives.layout import REF_NAME
from containerkit.image.copies import Outgoing, save
from containerkit.image.edit_index import IndexEditor
from containerkit.image.model import OCI_INDEX, Platform
from support import edited
from support.images import MadeImage, digest
from support.peers import docker, podman, umoci
from support.registry import skopeo

if TYPE_CHECKING:
    from pathlib import Path

NAME = "example.org/team/app:1"


@pytest.fixture
def images() -> list[Outgoing]:
    """Two images that share a layer."""
    made, other = edited.image(), edited.image([edited.LOWEST, edited.TOP])
    return [
        Outgoing(made, edited.root(made), (NAME, "docker.io/library/same:2")),
        Outgoing(other, edited.root(other), ("docker.io/library/other:1",)),
    ]


def saved(images: list[Outgoing], form: str) -> bytes:
    target = io.BytesIO()
    save(target, images, form)
    return target.getvalue()


def config_of(image: Outgoing) -> str:
    return edited.manifest(image.source, image.descriptor).config.digest


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci"])
def test_what_is_saved_is_read_again(tmp_path: Path, images: list[Outgoing], form: str) -> None:
    path = str(tmp_path / "saved")
    there = save(path, images, form)
    with open_archive(path) as archive:
        found = archive.images()
        assert [image.names for image in found] == [image.names for image in images]
        assert [image.descriptor.digest for image in found] == [descriptor.digest for descriptor in there]
        for image, original in zip(found, images, strict=True):
            manifest = edited.manifest(archive, image.descriptor)
            before = edited.manifest(original.source, original.descriptor)
            assert manifest.config.digest == before.config.digest
            assert [layer.digest for layer in manifest.layers] == [layer.digest for layer in before.layers]
            for blob in (manifest.config, *manifest.layers):
                assert digest(edited.read(archive, blob)) == blob.digest
        assert archive.choose("same:2").descriptor == found[0].descriptor
        with pytest.raises(AmbiguousImage):
            archive.choose(None)
    if form != "docker-archive":
        assert [item.digest for item in there] == [image.descriptor.digest for image in images]


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_archives_are_deterministic_and_share_blobs(images: list[Outgoing], form: str) -> None:
    content = saved(images, form)
    assert content == saved(images, form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    assert len({member.name for member in members}) == len(members)
    assert {(member.mtime, member.uid, member.mode) for member in members} == {(0, 0, 0o644)}
    layers = [member for member in members if member.size > 10_000]
    assert len(layers) == 1  # the shared lowest
    assert len(content) % 10240 == 0


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_a_failed_save_leaves_what_was_there(tmp_path: Path, images: list[Outgoing], form: str) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"old")
    made = edited.image()
    layer = made.layers[1]
    made.blobs[digest(layer)] = layer[:-1] + b"!"
    with pytest.raises(DigestMismatch):
        save(path, [images[1], Outgoing(made, edited.root(made))], form)
    assert os.listdir(tmp_path) == ["saved"]
    assert path.read_bytes() == b"old"


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_archives_from_streams(images: list[Outgoing], packer: str) -> None:
    content = PACKERS[packer](saved(images, "docker-archive"))
    read, write = os.pipe()
    with open(write, "wb") as target, open(read, "rb") as source:
        writer = threading.Thread(target=lambda: (target.write(content), target.close()))
        writer.start()
        with open_archive(source) as archive:
            assert [image.names for image in archive.images()] == [image.names for image in images]
            manifest = edited.manifest(archive, archive.images()[0].descriptor)
            assert digest(edited.read(archive, manifest.layers[2])) == manifest.layers[2].digest
        writer.join()


def test_archives_from_file_objects(tmp_path: Path, images: list[Outgoing]) -> None:
    content = saved(images, "oci-archive")
    with open_archive(io.BytesIO(content)) as archive:
        assert len(archive.images()) == 2
    path = tmp_path / "archive"
    path.write_bytes(content)
    with open(path, "rb") as file:
        with open_archive(file) as archive:
            assert len(archive.images()) == 2
        assert not file.closed


@pytest.mark.parametrize("content", [b"", b"BZh9", b"\x1f\x8b", b"no archive" * 1000])
def test_what_is_no_archive(content: bytes) -> None:
    with pytest.raises(InvalidArchive), open_archive(io.BytesIO(content)):
        pass


@pytest.mark.parametrize("field", ["Config", "Layers"])
@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_an_archive_names_no_file_outside(tmp_path: Path, images: list[Outgoing], field: str, name: str) -> None:
    path = tmp_path / "archive"
    path.mkdir()
    with tarfile.open(fileobj=io.BytesIO(saved(images[1:], "docker-archive"))) as tar:
        tar.extractall(path, filter="data")
    rows = json.loads((path / "manifest.json").read_bytes())
    inside = rows[0]["Config"] if field == "Config" else rows[0]["Layers"][0]
    target = name if name.startswith("/") else str(tmp_path / "outside")
    if not name.startswith("/"):
        os.rename(path / inside, target)
    rows[0][field] = name if field == "Config" else [name, *rows[0]["Layers"][1:]]
    (path / "manifest.json").write_text(json.dumps(rows))
    with pytest.raises(InvalidArchive), open_archive(str(path)):
        pass


def multi_platform() -> tuple[MadeImage, Outgoing]:
    here, arm = edited.image(), edited.image([edited.MIDDLE])
    editor = IndexEditor(here, sink=here).add(edited.root(here))
    editor.add(edited.root(arm), platform=Platform("linux", "arm", "v7"), source=arm)
    return here, Outgoing(here, editor.finish(), (NAME,))


def test_all_platforms_of_an_index(tmp_path: Path) -> None:
    made, image = multi_platform()
    save(tmp_path / "layout", [image], "oci")
    with open_archive(str(tmp_path / "layout")) as archive:
        (stored,) = archive.images()
        assert (stored.descriptor.media_type, stored.descriptor.digest) == (OCI_INDEX, image.descriptor.digest)
    save(tmp_path / "arm", [image], "oci", platform="linux/arm")
    save(tmp_path / "here.tar", [image])
    with open_archive(str(tmp_path / "arm")) as archive:
        assert edited.manifest(archive, archive.images()[0].descriptor).layers[0].size > 0
    with open_archive(str(tmp_path / "here.tar")) as archive:
        config = edited.manifest(archive, archive.images()[0].descriptor).config
        assert config.digest == digest(made.config)


def test_platforms_side_by_side_in_an_index_json(tmp_path: Path) -> None:
    made, image = multi_platform()
    save(tmp_path / "layout", [image], "oci")
    blob = tmp_path / "layout/blobs/sha256" / image.descriptor.digest.hex
    (tmp_path / "layout/index.json").write_bytes(blob.read_bytes())
    with open_archive(str(tmp_path / "layout")) as archive:
        assert len(archive.images()) == 2
        assert archive.choose(None).descriptor.digest == edited.root(made).digest


def test_layouts_of_very_many_names(tmp_path: Path, images: list[Outgoing]) -> None:
    first = images[0]
    entry = json.dumps({"mediaType": OCI_INDEX, "digest": first.descriptor.digest, "size": 2, "annotations": {}})
    rows = ",".join(entry.replace("{}", f'{{"{REF_NAME}":"t{number}"}}') for number in range(12_000))
    (tmp_path / "index.json").write_text(f'{{"schemaVersion":2,"manifests":[{rows}]}}')
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    with open_archive(str(tmp_path)) as archive:
        (found,) = archive.images()
        assert found.labels == tuple(f"t{number}" for number in range(12_000))
    names = [f"t{number}" for number in range(10_000, 50_000)]
    save(tmp_path, [first._replace(names=(*names, *names[:10]))], "oci")
    entries = index(tmp_path)
    assert [row["annotations"][REF_NAME] for row in entries] == [f"t{number}" for number in range(50_000)]
    assert len({row["digest"] for row in entries}) == 1
    save(tmp_path / "tar", [first._replace(names=tuple(names))], "oci-archive")


@pytest.mark.parametrize("entry", [{"annotations": []}, {"annotations": {"a": [1]}}, {"digest": []}, []])
def test_a_layout_with_a_bad_index_is_not_added_to(tmp_path: Path, images: list[Outgoing], entry: object) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    with pytest.raises(InvalidArchive):
        save(tmp_path, images, "oci")


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci"])
def test_saving_nothing_is_an_error(tmp_path: Path, form: str) -> None:
    with pytest.raises(ValueError, match="no image"):
        save(tmp_path / "x", iter(()), form)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [False, True])
def test_a_directory_of_skopeo_is_told_by_name(tmp_path: Path, images: list[Outgoing], *, packed: bool) -> None:
    save(tmp_path / "layout", images[1:], "oci")
    path = tmp_path / "dir"
    skopeo("copy", f"oci:{tmp_path}/layout", f"dir:{path}")
    if packed:
        with tarfile.open(tmp_path / "dir.tar", "w") as tar:
            tar.add(path, ".")
        path = tmp_path / "dir.tar"
    with pytest.raises(InvalidArchive, match="skopeo's dir: transport") as caught, open_archive(str(path)):
        pass
    assert "skopeo copy dir:" in caught.value.hint


def test_a_name_moves_within_a_layout(tmp_path: Path, images: list[Outgoing]) -> None:
    path = tmp_path / "layout"
    save(path, [images[0]], "oci")
    save(path, [images[1]._replace(names=(NAME,))], "oci")
    with open_archive(str(path)) as archive:
        found = {name: image.descriptor.digest for image in archive.images() for name in image.names}
    assert found == {
        NAME: images[1].descriptor.digest,
        "docker.io/library/same:2": images[0].descriptor.digest,
    }


def test_two_images_with_one_tag_in_a_layout(tmp_path: Path, images: list[Outgoing]) -> None:
    save(tmp_path / "layout", images, "oci")
    labels = [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index(tmp_path / "layout")]
    assert labels == [NAME, "2", "docker.io/library/other:1"]


def index(layout: Path) -> list[dict[str, Any]]:
    manifests: list[dict[str, Any]] = json.loads((layout / "index.json").read_bytes())["manifests"]
    return manifests


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci"])
def test_skopeo_takes_what_we_write(tmp_path: Path, images: list[Outgoing], form: str) -> None:
    save(tmp_path / "ours", images, form)
    copied = tmp_path / "copied"
    skopeo("copy", f"{form}:{tmp_path}/ours:{NAME}", f"oci:{copied}:x")
    skopeo("copy", f"{form}:{tmp_path}/ours:{NAME}", f"docker-archive:{tmp_path}/theirs.tar:{NAME}")
    with open_archive(str(copied)) as archive, open_archive(str(tmp_path / "theirs.tar")) as theirs:
        (image,) = archive.images()
        manifest = edited.manifest(archive, image.descriptor)
        assert list(edited.config(archive, image.descriptor).diff_ids) == list(
            edited.config(images[0].source, images[0].descriptor).diff_ids
        )
        if form != "docker-archive":
            assert image.descriptor.digest == images[0].descriptor.digest
            assert manifest.config.digest == config_of(images[0])  # skopeo drops foreign keys when it converts
        (image,) = theirs.images()
        assert image.names == (NAME,)
        assert edited.manifest(theirs, image.descriptor).config.digest == config_of(images[0])


def test_umoci_takes_our_layout_and_we_take_its(tmp_path: Path, images: list[Outgoing]) -> None:
    layout = str(tmp_path / "layout")
    save(layout, [images[0]._replace(names=(NAME,))], "oci")
    umoci("config", "--image", f"{layout}:1", "--tag", "2", "--config.user", "7")
    with open_archive(layout) as archive:
        assert [image.labels for image in archive.images()] == [("1",), ("2",)]
        assert edited.config(archive, archive.images()[1].descriptor).config["User"] == "7"


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_podman_loads_what_we_save_and_saves_what_we_load(tmp_path: Path, form: str) -> None:
    made = edited.image()
    image = Outgoing(made, edited.root(made), (NAME,))
    path = str(tmp_path / "ours.tar")
    save(path, [image], form)
    with podman() as run:
        run("load", "-q", "-i", path)
        listed = run("images", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}").split()
        assert listed == [config_of(image), NAME]
        for their in ("docker-archive", "oci-archive"):
            target = str(tmp_path / f"{their}.tar")
            run("save", "-q", "--format", their, "-o", target, NAME)
            with open_archive(target) as archive:
                (stored,) = archive.images()
                assert stored.names == (NAME,)
                if their == form:  # podman drops foreign keys when it converts
                    assert edited.manifest(archive, stored.descriptor).config.digest == config_of(image)
                before = edited.config(made, edited.root(made)).diff_ids
                assert edited.config(archive, stored.descriptor).diff_ids == before


@pytest.mark.kernel
def test_docker_loads_what_we_save_and_saves_what_we_load(tmp_path: Path) -> None:
    made = edited.image()
    image = Outgoing(made, edited.root(made), (NAME, "docker.io/library/same:2"))
    with docker() as run:
        for form in ("docker-archive", "oci-archive"):
            path = str(tmp_path / "ours.tar")
            save(path, [image], form)
            run("load", "-q", "-i", path)
            listed = run("image", "inspect", "--format", "{{.Id}} {{.RepoTags}}", NAME).strip()
            assert listed.split(" ", 1)[0] == config_of(image)
            assert sorted(listed.split(" ", 1)[1].strip("[]").split()) == [NAME, "same:2"]
            target = str(tmp_path / "theirs.tar")
            run("save", "-o", target, NAME, "same:2")
            with open_archive(target) as archive:
                (stored,) = archive.images()
                assert sorted(stored.names) == ["docker.io/library/same:2", NAME]
                assert edited.manifest(archive, stored.descriptor).config.digest == config_of(image)
            run("rmi", "-f", NAME, "same:2")
