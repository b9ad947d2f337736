"""Copies between any two places: digests stay, nothing is unpacked, skopeo agrees about what came out."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import ImageNotFound, InvalidReference, PlatformMismatch, Unsupported
from containerkit.image.archives.archive import open_archive
from containerkit.image.codec import parse_document
from containerkit.image.copies import Outgoing, Place, copy, open_place, save, sync
from containerkit.image.edit_index import IndexEditor
from containerkit.image.images import Images
from containerkit.image.model import OCI_INDEX, OCI_MANIFEST, Descriptor, Index, Platform
from containerkit.image.transfer import copy_image
from containerkit.registry import serve
from containerkit.registry.client import connect
from support import edited
from support.images import MadeImage, describe, digest
from support.rawhttp import Repository
from support.registry import Registry, skopeo

if TYPE_CHECKING:
    from pathlib import Path

    from containerkit.image.digest import Digest
    from containerkit.image.transfer import BlobSource
    from containerkit.state import State

registry_test = pytest.mark.registry
ARM = Platform("linux", "arm", "v7")


@pytest.fixture
def made() -> MadeImage:
    return edited.image()


@pytest.fixture
def layout(tmp_path: Path, made: MadeImage) -> str:
    """An OCI layout with one image."""
    path = str(tmp_path / "source")
    save(path, [Outgoing(made, edited.root(made), ("one",))], "oci")
    return path


@pytest.fixture
def index_layout(tmp_path: Path) -> tuple[str, Descriptor, MadeImage]:
    """An OCI layout with an index of two platforms and an attestation."""
    here, arm = edited.image(), edited.image([edited.MIDDLE])
    statement = here.add(b'{"statement": 1}')
    attestation = here.add(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": describe(here.config, "application/vnd.oci.image.config.v1+json"),
                "layers": [describe(statement, "application/vnd.in-toto+json")],
            }
        ).encode()
    )
    editor = IndexEditor(here, sink=here).add(edited.root(here)).add(edited.root(arm), platform=ARM, source=arm)
    about = Descriptor(OCI_MANIFEST, digest(attestation), len(attestation))
    root = editor.add(about, platform=Platform("unknown", "unknown")).finish()
    path = str(tmp_path / "index")
    save(path, [Outgoing(here, root, ("all",))], "oci")
    return path, root, here


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("docker://debian:12", Place("docker", "debian:12")),
        ("oci:/a/b:tag", Place("oci", "/a/b", "tag")),
        ("oci-archive:x.tar", Place("oci-archive", "x.tar")),
        ("docker-archive:x.tar:name:1", Place("docker-archive", "x.tar", "name:1")),
        ("containerkit:debian", Place("containerkit", "debian")),
    ],
)
def test_places(text: str, place: Place) -> None:
    assert Place.parse(text) == place


def test_a_whole_repository(tmp_path: Path, index_layout: tuple[str, Descriptor, MadeImage], layout: str) -> None:
    """Every tag with every platform; what is there already is not sent again, what the source has no more stays."""
    with serve() as source, serve() as target:
        for tag, place in (("all", index_layout[0]), ("one", layout), ("two", layout)):
            copy(f"oci:{place}", f"docker://{source.name(f'team/app:{tag}')}", all_platforms=True, connect=connect)
        there = Repository(target.host, "mirror/app")
        there.push_image("old")
        digests = sync(f"docker://{source.name('team/app')}", f"docker://{target.name('mirror/app')}", connect=connect)
        assert list(digests) == ["all", "one", "two"]
        assert digests["all"] == index_layout[1].digest
        assert there.ask("GET", "tags/list").json["tags"] == ["all", "old", "one", "two"]
        for tag, digest in digests.items():
            assert there.ask("GET", f"manifests/{tag}").headers["docker-content-digest"] == digest
        some = sync(f"docker://{source.name('team/app')}", f"oci:{tmp_path}/out", tags=["two"], connect=connect)
        assert names_in(f"{tmp_path}/out") == {"two": some["two"]}
        for wrong in ("docker://{}:1", "docker://{}@sha256:" + "0" * 64, "oci:{}", "containerkit:{}"):
            with pytest.raises(InvalidReference):
                sync(wrong.format(source.name("team/app")), "oci:out", connect=connect)
        with pytest.raises(InvalidReference):
            sync(f"docker://{source.name('team/app')}", "docker-archive:out.tar", connect=connect)


@pytest.mark.parametrize("text", ["", "debian", "docker:debian", "dir:/x", "oci:", "docker://", "oci://x"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(InvalidReference):
        Place.parse(text)


def names_in(path: str) -> dict[str, Digest]:
    with open_archive(path) as archive:
        return {label: image.descriptor.digest for image in archive.images() for label in image.labels}


@pytest.mark.parametrize("target", ["oci", "oci-archive"])
def test_digests_stay(tmp_path: Path, layout: str, made: MadeImage, target: str) -> None:
    copied = f"{target}:{tmp_path}/copy:two"
    assert copy(f"oci:{layout}:one", copied) == edited.root(made).digest
    assert names_in(str(tmp_path / "copy")) == {"two": edited.root(made).digest}
    assert skopeo_digest(copied) == edited.root(made).digest


def skopeo_digest(place: str) -> str:
    return skopeo("inspect", "--no-tags", "--format", "{{.Digest}}", place).decode().strip()


def test_a_docker_archive_keeps_the_image_id(tmp_path: Path, layout: str, made: MadeImage) -> None:
    path = str(tmp_path / "archive.tar")
    there = copy(f"oci:{layout}", f"docker-archive:{path}:example.org/x:1")
    with open_place(f"docker-archive:{path}:example.org/x:1") as found:
        assert found.descriptor.digest == there
        assert edited.manifest(found.source, found.descriptor).config.digest == digest(made.config)
    assert digest(skopeo("inspect", "--raw", "--config", f"docker-archive:{path}")) == digest(made.config)
    back = copy(f"docker-archive:{path}", f"oci:{tmp_path}/back:x")
    assert back == there


def test_an_archive_takes_one_more_image(tmp_path: Path, layout: str, made: MadeImage) -> None:
    other = edited.image([edited.TOP])
    save(tmp_path / "other", [Outgoing(other, edited.root(other), ("x",))], "oci")
    for form in ("oci-archive", "docker-archive"):
        path = f"{tmp_path}/{form}"
        copy(f"oci:{layout}", f"{form}:{path}:example.org/a:1")
        copy(f"oci:{layout}", f"{form}:{path}:example.org/b:1")
        copy(f"oci:{tmp_path}/other", f"{form}:{path}:example.org/a:1")
        with open_archive(path) as archive:
            found = {
                name: edited.manifest(archive, image.descriptor).config.digest
                for image in archive.images()
                for name in image.names
            }
        assert found == {"example.org/a:1": digest(other.config), "example.org/b:1": digest(made.config)}


def test_one_platform_or_all(tmp_path: Path, index_layout: tuple[str, Descriptor, MadeImage]) -> None:
    path, root, here = index_layout
    assert copy(f"oci:{path}", f"oci:{tmp_path}/one:x") == edited.root(here).digest
    arm = copy(f"oci:{path}", f"oci:{tmp_path}/arm:x", platform="linux/arm/v7")
    assert arm not in (root.digest, edited.root(here).digest)
    assert copy(f"oci:{path}", f"oci-archive:{tmp_path}/all:x", all_platforms=True) == root.digest
    with open_archive(f"{tmp_path}/all") as archive:
        document = parse_document(edited.read(archive, root), OCI_INDEX)
        assert isinstance(document, Index)
        assert [edited.read(archive, child)[:1] for child in document.manifests] == [b"{"] * 3
    with pytest.raises(PlatformMismatch, match="linux/arm/v7"):
        copy(f"oci:{path}", f"oci:{tmp_path}/none:x", platform="linux/s390x")
    with pytest.raises(PlatformMismatch):
        copy(f"oci:{tmp_path}/one", f"oci:{tmp_path}/none:x", platform="linux/s390x")


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_compression_on_the_way(tmp_path: Path, layout: str, made: MadeImage, compression: str) -> None:
    target = f"oci:{tmp_path}/packed:x"
    there = copy(f"oci:{layout}", target, compression=compression)
    assert there != edited.root(made).digest
    with open_place(target) as found:
        manifest = edited.manifest(found.source, found.descriptor)
        assert manifest.config.digest == digest(made.config)
        assert {layer.media_type.rpartition("tar")[2] for layer in manifest.layers} == {
            "+zstd" if compression == "zstd" else ""
        }
    skopeo("copy", target, f"oci:{tmp_path}/checked:x")


def test_compression_of_all_platforms(tmp_path: Path, index_layout: tuple[str, Descriptor, MadeImage]) -> None:
    target = f"oci:{tmp_path}/packed:x"
    copy(f"oci:{index_layout[0]}", target, compression="zstd", all_platforms=True)
    with open_place(target) as found:
        document = parse_document(edited.read(found.source, found.descriptor), OCI_INDEX)
        assert isinstance(document, Index)
        assert [str(child.platform) for child in document.manifests[1:]] == ["linux/arm/v7", "unknown/unknown"]
        kinds = {layer.media_type for layer in edited.manifest(found.source, document.manifests[1]).layers}
        assert kinds == {"application/vnd.oci.image.layer.v1.tar+zstd"}


def test_missing_images(tmp_path: Path, layout: str) -> None:
    with pytest.raises(FileNotFoundError):
        copy(f"oci:{tmp_path}/missing", f"oci:{tmp_path}/x:y")
    save(tmp_path / "two", [Outgoing(*each, (name,)) for name, each in two_images().items()], "oci")
    with pytest.raises(ImageNotFound):
        copy(f"oci:{tmp_path}/two:no", f"oci:{tmp_path}/x:y")
    assert not os.path.exists(tmp_path / "x")


def two_images() -> dict[str, tuple[MadeImage, Descriptor]]:
    found = {name: edited.image([layer]) for name, layer in (("a", edited.LOWEST), ("b", edited.MIDDLE))}
    return {name: (each, edited.root(each)) for name, each in found.items()}


@registry_test
def test_to_and_from_registries(tmp_path: Path, registry: Registry, layout: str, made: MadeImage) -> None:
    first, second = (f"docker://{registry.name(name)}" for name in ("copies/first:1", "copies/second:1"))
    expected = edited.root(made).digest
    assert copy(f"oci:{layout}", first, connect=connect) == expected
    assert skopeo_digest(first) == expected
    before = set(os.listdir("/tmp"))
    assert copy(first, second, connect=connect) == expected
    assert {name for name in set(os.listdir("/tmp")) - before if "archive" in name} == set()
    assert copy(second, f"oci-archive:{tmp_path}/back:x", connect=connect) == expected
    skopeo("copy", second, f"oci:{tmp_path}/theirs:x")
    assert names_in(f"{tmp_path}/theirs") == {"x": expected}


@registry_test
def test_all_platforms_to_a_registry(
    tmp_path: Path, registry: Registry, index_layout: tuple[str, Descriptor, MadeImage]
) -> None:
    path, root, _ = index_layout
    target = f"docker://{registry.name('copies/all:1')}"
    assert copy(f"oci:{path}", target, connect=connect, all_platforms=True) == root.digest
    assert digest(skopeo("inspect", "--raw", target)) == root.digest
    assert copy(target, f"oci:{tmp_path}/back:x", connect=connect, all_platforms=True) == root.digest


@pytest.mark.kernel
def test_the_store_as_a_source_and_a_target(tmp_path: Path, state: State, layout: str, made: MadeImage) -> None:
    images = Images(state, lambda *_, **__: pytest.fail("no registry is needed"))
    image = images.load(layout, "example.org/stored:1")
    target = f"oci:{tmp_path}/out:x"
    assert copy("containerkit:example.org/stored:1", target, state=state) == image.digest
    given: list[Any] = []

    def register(source: BlobSource, root: Descriptor, name: str) -> Digest:
        sink = MadeImage([])
        copy_image(root, source, sink)
        given.append((root.digest, name, len(sink.blobs)))
        return root.digest

    assert copy(target, "containerkit:new", register=register) == image.digest
    assert given == [(edited.root(made).digest, "new", len(made.layers) + 2)]
    state.close()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("place", ["containerkit:new", "docker-archive:{}/x.tar:new", "docker-daemon:new"])
def test_all_platforms_do_not_go_where_there_is_one(
    tmp_path: Path, index_layout: tuple[str, Descriptor, MadeImage], place: str, *, nested: bool
) -> None:
    path, root, here = index_layout
    if nested:
        root = IndexEditor(here, sink=here).add(root).finish()
        save(tmp_path / "nested", [Outgoing(here, root)], "oci")
        path = str(tmp_path / "nested")

    def register(*_: object) -> Digest:
        return pytest.fail("nothing may be copied")

    with pytest.raises(Unsupported, match="2 images") as caught:
        copy(f"oci:{path}", place.format(tmp_path), all_platforms=True, register=register)
    assert "platform=" in caught.value.remedy
    assert not os.path.exists(tmp_path / "x.tar")


def test_all_platforms_of_one_image_go_anywhere(tmp_path: Path, layout: str, made: MadeImage) -> None:
    about = edited.image([edited.MIDDLE])
    editor = IndexEditor(made, sink=made).add(edited.root(made))
    root = editor.add(edited.root(about), platform=Platform("unknown", "unknown"), source=about).finish()
    save(tmp_path / "one", [Outgoing(made, root)], "oci")
    for path in (layout, f"{tmp_path}/one"):
        target = f"docker-archive:{path}.tar:example.org/x:1"
        assert copy(f"oci:{path}", target, all_platforms=True)
        with open_archive(f"{path}.tar") as archive:
            (image,) = archive.images()
            assert edited.manifest(archive, image.descriptor).config.digest == digest(made.config)


@registry_test
def test_an_image_object_is_pushed_by_its_only_name(
    state: State, registry: Registry, layout: str, made: MadeImage
) -> None:
    images = Images(state, connect)
    name = f"{registry.host}/only:1"
    image = images.load(layout, name, unpack=False)
    other = images.edit(image).repack("zstd").commit("example.org/zstd:1", unpack=False)
    assert (other.id, len(images.get(image.id).names)) == (image.id, 2)
    assert images.push(image) == image.digest == edited.root(made).digest
    several = images.tag(image, "example.org/second:1")
    nameless = images.edit(image).append([edited.MIDDLE]).commit(unpack=False)
    for wrong, why in ((several, "second:1"), (nameless, "no name")):
        with pytest.raises(InvalidReference, match=why) as caught:
            images.push(wrong)
        assert "tag it" in caught.value.hint


def test_short_names_in_a_layout_are_no_names_of_images_here(tmp_path: Path, state: State) -> None:
    images = Images(state, lambda *_, **__: pytest.fail("no registry is needed"))
    two = two_images()
    path = str(tmp_path / "two")
    given = {"s1": ("s1", "s2"), "Upper_": ("Upper_",), "example.org/full:1": ("example.org/full:1", "s3")}
    made = [*two.values(), (edited.image([edited.LOWEST, edited.TOP]), None)]
    outgoing = [
        Outgoing(image, edited.root(image), names) for (image, _), names in zip(made, given.values(), strict=True)
    ]
    save(path, outgoing, "oci")
    loaded = images.load_all(path, unpack=False)
    assert [image.names for image in loaded] == [(), (), ("example.org/full:1",)]
    assert images.load(path, "s2", unpack=False).digest == images.get("docker.io/library/s2:latest").digest
    alone = str(tmp_path / "alone")
    save(alone, [Outgoing(outgoing[1].source, outgoing[1].descriptor, ("s1",))], "oci")
    assert images.load(alone, "other:1", unpack=False).names == ("other:1",)
    assert images.get("s2").names == ("s2:latest",)
