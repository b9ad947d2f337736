"""What is Docker's, or nobody's, in OCI layouts and in the store: manifests, lists, archives, bzip2 and xz."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import tarfile
import tempfile
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import (
    CorruptLayer,
    DigestMismatch,
    ImageTooLarge,
    InvalidArchive,
    PlatformMismatch,
    UnsupportedMediaType,
)
from containerkit.image import model
from containerkit.image.archives.archive import open_archive
from containerkit.image.archives.files import DirectoryFiles, TarFiles
from containerkit.image.archives.tarindex import places
from containerkit.image.copies import Outgoing, copy, save
from containerkit.image.digest import Digest
from containerkit.image.install import Installer
from containerkit.image.limits import ImageLimits
from containerkit.image.reference import Reference
from containerkit.image.transfer import resolve_manifest
from support import edited
from support.images import MadeImage, describe, digest, hardlink, make_tar, member, snapshot, symlink
from support.peers import docker, podman, skopeo, umoci_unpack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

NAME = "example.org/team/app:1"
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
PACK: dict[str, Callable[[bytes], bytes]] = {"bzip2": bz2.compress, "xz": lzma.compress, "": bytes}
FORMS = ("oci", "oci-archive")


def docker_image(layers: list[bytes] | None = None) -> MadeImage:
    """An image as docker push makes it."""
    made = edited.image(layers)
    made.media_type = made.document["mediaType"] = model.DOCKER_MANIFEST
    made.document["config"]["mediaType"] = model.DOCKER_CONFIG
    for layer in made.document["layers"]:
        layer["mediaType"] = model.DOCKER_LAYER + ".gzip"
    made.add(made.manifest)
    return made


def archive_of(path: Path, layers: list[tuple[bytes, bytes]], name: str = NAME) -> str:
    """A docker archive with these layers, plain and as they lie there."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest(plain) for plain, _ in layers]},
    }
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    row = {"Config": "c.json", "RepoTags": [name], "Layers": names}
    members = [("c.json", json.dumps(config).encode()), ("manifest.json", json.dumps([row]).encode())]
    members += [(layer, packed) for layer, (_, packed) in zip(names, layers, strict=True)]
    path.write_bytes(make_tar([member(*each) for each in members]))
    return str(path)


def described(row: dict[str, Any]) -> model.Descriptor:
    return model.Descriptor(row["mediaType"], Digest(row["digest"]), row["size"])


def types(manifest: dict[str, Any]) -> set[str]:
    return {manifest["mediaType"], manifest["config"]["mediaType"], *(row["mediaType"] for row in manifest["layers"])}


@pytest.mark.parametrize("form", FORMS)
def test_docker_manifests_become_oci_in_layouts(tmp_path: Path, form: str) -> None:
    made = docker_image()
    made.document["layers"][1] |= {"mediaType": FOREIGN, "urls": ["http://127.0.0.1:9/x"], "annotations": {"a": "b"}}
    made.add(made.manifest)
    (there,) = save(str(tmp_path / "saved"), [Outgoing(made, edited.root(made), (NAME,))], form)
    with open_archive(str(tmp_path / "saved")) as archive:
        (image,) = archive.images()
        assert image.descriptor.digest == there.digest != edited.root(made).digest
        assert image.descriptor.media_type == there.media_type == model.OCI_MANIFEST
        document = json.loads(edited.read(archive, image.descriptor))
        blobs = [edited.read(archive, blob) for blob in edited.manifest(archive, image.descriptor).layers]
    assert types(document) == {model.OCI_MANIFEST, model.OCI_CONFIG, model.OCI_LAYER + "+gzip", NONDISTRIBUTABLE}
    before = made.document
    assert document["x-manifest"] == before["x-manifest"]
    for now, old in zip((document["config"], *document["layers"]), (before["config"], *before["layers"]), strict=True):
        assert {**now, "mediaType": 0} == {**old, "mediaType": 0}  # digests, urls and foreign keys stay
    assert blobs == made.layers


@pytest.mark.parametrize("nested", [False, True])
def test_docker_lists_become_indexes_in_layouts(tmp_path: Path, *, nested: bool) -> None:
    here, arm = docker_image(), docker_image([edited.MIDDLE])
    here.blobs.update(arm.blobs)
    platforms: list[dict[str, Any]] = [
        {"os": "linux", "architecture": "amd64", "features": ["sse4"]},
        {"os": "linux", "architecture": "arm", "variant": "v7"},
    ]
    rows = [
        {**describe(image.manifest, image.media_type), "platform": platform}
        for image, platform in zip((here, arm), platforms, strict=True)
    ]
    body = here.add(json.dumps({"schemaVersion": 2, "mediaType": model.DOCKER_LIST, "manifests": rows}).encode())
    kind = model.DOCKER_LIST
    if nested:
        outer = {"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": [describe(body, kind)]}
        body, kind = here.add(json.dumps(outer).encode()), model.OCI_INDEX
    root = model.Descriptor(kind, digest(body), len(body))
    (there,) = save(str(tmp_path / "saved"), [Outgoing(here, root, (NAME,))], "oci")
    assert there.media_type == model.OCI_INDEX
    with open_archive(str(tmp_path / "saved")) as archive:
        found = json.loads(edited.read(archive, there))
        if nested:
            (row,) = found["manifests"]
            assert row["mediaType"] == model.OCI_INDEX
            found = json.loads(edited.read(archive, described(row)))
        assert found["mediaType"] == model.OCI_INDEX
        assert [row["platform"] for row in found["manifests"]] == platforms
        for row, image in zip(found["manifests"], (here, arm), strict=True):
            manifest = edited.manifest(archive, described(row))
            assert manifest.media_type == row["mediaType"] == model.OCI_MANIFEST
            assert manifest.config.digest == digest(image.config)
    if not nested:
        skopeo("copy", "--all", f"oci:{tmp_path}/saved:{NAME.rpartition(':')[2]}", f"dir:{tmp_path}/all")


def test_a_copy_says_the_digest_there(tmp_path: Path) -> None:
    made = docker_image()
    source = made.write_layout(str(tmp_path / "docker"))
    there = copy(f"oci:{source}", f"oci:{tmp_path}/copied:1")
    assert there != digest(made.manifest)
    assert json.loads(skopeo("inspect", f"oci:{tmp_path}/copied:1"))["Digest"] == there


@pytest.mark.kernel
def test_other_engines_read_layouts_of_docker_archives(tmp_path: Path) -> None:
    packed = [(edited.LOWEST, edited.LOWEST), (edited.MIDDLE, bz2.compress(edited.MIDDLE)),
              (edited.TOP, lzma.compress(edited.TOP))]  # fmt: skip
    with open_archive(archive_of(tmp_path / "docker.tar", packed)) as archive:
        image = archive.choose(None)
        outgoing = [Outgoing(archive, image.descriptor, image.names)]
        saved = {form: save(str(tmp_path / form), outgoing, form)[0] for form in ("docker-archive", *FORMS)}
        again = edited.manifest(archive, image.descriptor)
    assert [layer.media_type for layer in again.layers] == [model.OCI_LAYER, *[f"{model.OCI_LAYER}+gzip"] * 2]
    assert {each.digest for each in saved.values()} == {image.descriptor.digest}
    for form in saved:
        reference = f"{form}:{tmp_path}/{form}:{NAME if form == 'docker-archive' else NAME.rpartition(':')[2]}"
        told = json.loads(skopeo("inspect", "--config", reference))["rootfs"]["diff_ids"]
        assert told == [digest(plain) for plain, _ in packed]
        skopeo("copy", reference, f"dir:{tmp_path}/copied-{form}")
    ours = snapshot(umoci_unpack(f"{tmp_path}/oci:1", str(tmp_path / "bundle")))
    made = edited.image()
    assert ours == edited.tree(made, edited.root(made), str(tmp_path / "made"))
    with podman() as run:
        for form in ("docker-archive", "oci-archive"):
            run("load", "-q", "-i", str(tmp_path / form))
            assert run("image", "inspect", "--format", "{{.Id}}", NAME).strip() == again.config.digest.hex
            run("rmi", "-f", NAME)


@pytest.mark.parametrize("kind", ["bzip2", "xz"])
@pytest.mark.parametrize("sign", [".", "+"])
def test_unnamed_layer_types_of_layouts(tmp_path: Path, kind: str, sign: str) -> None:
    made = MadeImage([edited.LOWEST, edited.TOP], compress=False)
    packed = made.add(PACK[kind](edited.TOP))
    base = model.DOCKER_LAYER if sign == "." else model.OCI_LAYER
    made.document["layers"][1] = {**describe(packed, f"{base}{sign}{kind}"), "x": 1}
    path = made.write_layout(str(tmp_path / "layout"))
    with open_archive(path) as archive:
        image = archive.choose(None)
        assert archive.images() == (image,)
        layers = edited.manifest(archive, image.descriptor).layers
        assert [layer.media_type for layer in layers] == [model.OCI_LAYER, model.OCI_LAYER + "+gzip"]
        assert digest(edited.read(archive, layers[1])) == layers[1].digest
        assert json.loads(edited.read(archive, image.descriptor))["layers"][1]["x"] == 1
    made.blobs[digest(packed)] = packed[: len(packed) // 2]
    with pytest.raises(UnsupportedMediaType, match=kind):
        Installer(str(tmp_path), made, "x").install(*made.resolve(Reference.parse("x")))


@pytest.mark.parametrize("kind", ["bzip2", "xz"])
def test_damaged_and_wrong_layers_of_archives(tmp_path: Path, kind: str) -> None:
    packed = PACK[kind](edited.TOP)
    with pytest.raises(CorruptLayer), open_archive(archive_of(tmp_path / "cut", [(edited.TOP, packed[:-20])])):
        pass
    with pytest.raises(DigestMismatch), open_archive(archive_of(tmp_path / "wrong", [(edited.LOWEST, packed)])):
        pass


def test_large_layers_lie_in_the_scratch_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("containerkit.image.scratch.IN_MEMORY", 1000)
    seen: list[str | None] = []
    spooled = tempfile.SpooledTemporaryFile

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options.get("dir"))
        return spooled(*args, **options)

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", spy)
    path = archive_of(tmp_path / "a", [(edited.LOWEST, bz2.compress(edited.LOWEST))])
    with open_archive(path, str(tmp_path)) as archive:
        layer = edited.manifest(archive, archive.choose(None).descriptor).layers[0]
        assert digest(edited.read(archive, layer)) == layer.digest
    assert seen == [str(tmp_path)]


@pytest.mark.parametrize("kind", ["", "bzip2"])
def test_a_layer_that_is_not_what_the_config_says_goes_into_no_archive(tmp_path: Path, kind: str) -> None:
    made = MadeImage([edited.TOP], compress=False, diff_ids=["sha256:" + "1" * 64])
    if kind:
        made.document["layers"] = [describe(made.add(PACK[kind](edited.TOP)), model.OCI_LAYER + "+gzip")]
    made.add(made.manifest)
    with pytest.raises(DigestMismatch) as caught:
        save(str(tmp_path / "saved"), [Outgoing(made, edited.root(made), (NAME,))])
    assert caught.value.actual == digest(edited.TOP)
    assert not (tmp_path / "saved").exists()


def test_what_is_saved_of_a_bzip2_layer_is_gzip(tmp_path: Path) -> None:
    made = MadeImage([edited.TOP], compress=False)
    made.document["layers"] = [describe(made.add(bz2.compress(edited.TOP)), model.OCI_LAYER + "+gzip")]
    made.add(made.manifest)
    (there,) = save(str(tmp_path / "saved"), [Outgoing(made, edited.root(made), (NAME,))])
    with open_archive(str(tmp_path / "saved")) as archive:
        assert archive.choose(None).descriptor.digest == there.digest
    with tarfile.open(tmp_path / "saved") as tar:
        assert not [name for name in tar.getnames() if "bzip2" in name]


@pytest.mark.parametrize("media_type", [model.DOCKER_SCHEMA1_SIGNED, model.OCI_MANIFEST, "application/x-foo"])
def test_schema_1_and_unknown_types_by_name(tmp_path: Path, media_type: str) -> None:
    made = MadeImage([])
    made.raw, made.media_type = b'{"schemaVersion":1,"fsLayers":[],"history":[]}', media_type
    if media_type == "application/x-foo":
        made.raw = b'{"schemaVersion":2}'
    path = made.write_layout(str(tmp_path / "layout"))
    with pytest.raises(UnsupportedMediaType) as caught:
        copy(f"oci:{path}", f"oci:{tmp_path}/copied:1", all_platforms=True)
    assert caught.value.media_type == media_type


def many(path: Path, count: int) -> str:
    block = make_tar([member("m", b"")])[:512]
    with path.open("wb") as file:
        for _ in range(count // 1000):
            file.write(block * 1000)
        file.write(bytes(1024))
    return str(path)


def test_an_archive_of_too_many_members(tmp_path: Path) -> None:
    path = many(tmp_path / "many", 500_000)
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLarge) as caught, open_archive(path):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.limit, caught.value.allowed, caught.value.found) == ("members", 100_000, 100_001)
    assert peak < 1 << 20
    with pytest.raises(ImageTooLarge), open_archive(path, limits=ImageLimits(members=10)):
        pass


def test_headers_and_names_of_an_archive_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "pax").write_bytes(make_tar([member("a" * (2 << 20), b"x")]))
    with pytest.raises(ImageTooLarge) as caught, open_archive(str(tmp_path / "pax")):
        pass
    assert caught.value.limit == "metadata"
    (tmp_path / "long").write_bytes(make_tar([member("a" * 600, b"x"), member("b" * 200, b"y")]))
    with (tmp_path / "long").open("rb") as file:
        assert list(places(file.fileno())) == ["b" * 200]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_where_the_files_of_a_tar_lie(tmp_path: Path, form: int) -> None:
    content = make_tar(
        [
            member("d/"),
            member("./d/file", b"content"),
            member("d/" + "n" * 180, b"long"),
            symlink("d/near", "file"),
            symlink("far", "d/near"),
            hardlink("hard", "d/file"),
            symlink("loop", "loop"),
            symlink("out", "../../etc/passwd"),
            member("twice", b"1"),
            member("twice", b"22"),
            member("was-file", b"x"),
            symlink("was-file", "twice"),
        ],
        form,
    )
    (tmp_path / "tar").write_bytes(content)
    with (tmp_path / "tar").open("rb") as file:
        found = {name: content[at : at + size] for name, (at, size) in places(file.fileno()).items()}
    assert found == {
        "d/file": b"content",
        "d/" + "n" * 180: b"long",
        "d/near": b"content",
        "far": b"content",
        "hard": b"content",
        "twice": b"22",
        "was-file": b"22",
    }
    for cut in (100, 512 * 3 + 5):
        (tmp_path / "tar").write_bytes(content[:cut])
        with pytest.raises(InvalidArchive), open_archive(str(tmp_path / "tar")):
            pass


def test_all_platforms_of_nested_indexes_are_named(tmp_path: Path) -> None:
    made = MadeImage([edited.TOP])

    def index(rows: list[dict[str, Any]]) -> bytes:
        document = {"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": rows}
        return made.add(json.dumps(document).encode())

    def entry(architecture: str, variant: str = "") -> dict[str, Any]:
        platform = {"os": "linux", "architecture": architecture, "variant": variant}
        return {**describe(made.manifest, made.media_type), "platform": platform}

    first, second = index([entry("arm", "v7"), entry("riscv64")]), index([entry("ppc64le"), entry("unknown")])
    outer = index([entry("s390x"), describe(first, model.OCI_INDEX), describe(second, model.OCI_INDEX)])
    root = model.Descriptor(model.OCI_INDEX, digest(outer), len(outer))
    expected = ("linux/arm/v7", "linux/ppc64le", "linux/riscv64", "linux/s390x", "linux/unknown")
    for find in (
        lambda: resolve_manifest(made, root),
        lambda: Installer(str(tmp_path), made, "x").install(root, outer),
    ):
        with pytest.raises(PlatformMismatch, match="it has linux/arm/v7, linux/ppc64le") as caught:
            find()
        assert caught.value.available == expected


@pytest.mark.kernel
@pytest.mark.parametrize("compress", [False, True])
def test_docker_loads_several_images_with_several_names(tmp_path: Path, *, compress: bool) -> None:
    """Two images that share a layer, four names."""
    one, two = (
        edited.image([edited.LOWEST], compress=compress),
        edited.image([edited.LOWEST, edited.MIDDLE], compress=compress),
    )
    names = ["docker.io/library/one:1", "docker.io/library/one:2", "127.0.0.1:5000/x/one:1"]
    outgoing = [Outgoing(one, edited.root(one), (name,)) for name in names]
    outgoing.append(Outgoing(two, edited.root(two), (NAME,)))
    with docker() as run:
        for form in ("docker-archive", "oci-archive"):
            save(str(tmp_path / form), outgoing, form)
            run("load", "-q", "-i", str(tmp_path / form))
            listed = run("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}").splitlines()
            assert sorted(listed) == sorted(
                [*(f"{name.removeprefix('docker.io/library/')} {digest(one.config)}" for name in names),
                 f"{NAME} {digest(two.config)}"]
            )  # fmt: skip
            run("rmi", "-f", digest(one.config), digest(two.config))


def test_a_packed_archive_from_a_stream_has_layers_in_every_form(tmp_path: Path) -> None:
    packed = [(edited.LOWEST, lzma.compress(edited.LOWEST)), (edited.TOP, edited.TOP)]
    archive_of(tmp_path / "plain", packed)
    with open_archive(io.BytesIO(bz2.compress((tmp_path / "plain").read_bytes()))) as archive:
        layers = edited.manifest(archive, archive.choose(NAME).descriptor).layers
        assert [digest(edited.read(archive, layer)) for layer in layers] == [layer.digest for layer in layers]


CONFIG = {"architecture": "amd64", "os": "linux", "config": {}}


def rows_of_one_file(path: Path, rows: int, config: dict[str, Any], layer: bytes = b"") -> str:
    """A docker archive whose rows each call the one config, and the one layer, by a name of their own."""
    members = [member("config", json.dumps(config).encode())]
    members += [hardlink(f"config{number}", "config") for number in range(rows)]
    members += [member("layer", layer), *(hardlink(f"layer{number}", "layer") for number in range(rows))]
    layers = len(config["rootfs"]["diff_ids"])
    manifest = [
        {"Config": f"config{number}", "RepoTags": [f"a:{number}"], "Layers": [f"layer{number}"] * layers}
        for number in range(rows)
    ]
    path.write_bytes(make_tar([member("manifest.json", json.dumps(manifest).encode()), *members], tarfile.USTAR_FORMAT))
    return str(path)


def test_a_config_of_many_rows_is_parsed_once(tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "rootfs": {"type": "layers", "diff_ids": []},
        "history": [{"empty_layer": True}] * 200_000,  # some 0.3 s, and 100 MB
    }
    with open_archive(rows_of_one_file(tmp_path / "rows", 1000, config)) as archive:
        images = archive.images()
    assert [image.labels for image in images] == [(f"a:{number}",) for number in range(1000)]
    assert len({image.descriptor for image in images}) == 1


def noting(monkeypatch: pytest.MonkeyPatch, files: type[TarFiles | DirectoryFiles]) -> list[str]:
    """The names of the files that an archive of this kind opens from now on."""
    opened: list[str] = []
    whole = files.open

    def noted(self: Any, name: str) -> BinaryIO:
        opened.append(name)
        return whole(self, name)

    monkeypatch.setattr(files, "open", noted)
    return opened


@pytest.mark.parametrize("kind", PACK)
def test_a_layer_of_many_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    opened = noting(monkeypatch, TarFiles)
    config = {**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(edited.TOP)]}}
    path = rows_of_one_file(tmp_path / "rows", 5, config, PACK[kind](edited.TOP))
    with open_archive(path) as archive:
        assert len({image.descriptor for image in archive.images()}) == 1
    assert [name for name in opened if name.startswith("layer")] == ["layer0"]


def test_one_layer_is_not_what_two_diff_ids_say(tmp_path: Path) -> None:
    config = {**CONFIG, "rootfs": {"type": "layers", "diff_ids": [digest(edited.TOP), digest(edited.LOWEST)]}}
    path = rows_of_one_file(tmp_path / "rows", 1, config, bz2.compress(edited.TOP))
    with pytest.raises(DigestMismatch), open_archive(path):
        pass


def test_an_archive_of_too_many_images_or_config_bytes(tmp_path: Path) -> None:
    config = {**CONFIG, "rootfs": {"type": "layers", "diff_ids": []}}
    with pytest.raises(ImageTooLarge) as caught, open_archive(rows_of_one_file(tmp_path / "rows", 1001, config)):
        pass
    assert (caught.value.limit, caught.value.allowed, caught.value.found) == ("images", 1000, 1001)
    with open_archive(str(tmp_path / "rows"), limits=ImageLimits(images=1001)) as archive:
        assert len(archive.images()) == 1001
    names = [f"c{number}" for number in range(5)]
    contents = [json.dumps({**config, "author": name + " " * (7 << 20)}).encode() for name in names]
    manifest = json.dumps([{"Config": name, "Layers": []} for name in names]).encode()
    members = [member("manifest.json", manifest), *map(member, names, contents)]
    (tmp_path / "configs").write_bytes(make_tar(members))
    with pytest.raises(ImageTooLarge, match="configs") as caught, open_archive(str(tmp_path / "configs")):
        pass
    assert (caught.value.limit, caught.value.allowed) == ("configs", 32 << 20)


def test_a_shared_layer_becomes_gzip_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, entries = edited.image([edited.TOP]), []
    packed = made.add(bz2.compress(edited.TOP))
    for number in range(8):
        made.document["layers"] = [describe(packed, f"{model.OCI_LAYER}+bzip2")]
        made.document["annotations"] = {"number": str(number)}
        entries.append(describe(made.add(made.manifest), model.OCI_MANIFEST))
    both = {"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": entries}
    entries = [*entries, describe(made.add(json.dumps(both).encode()), model.OCI_INDEX)]
    path = made.write_layout(str(tmp_path / "layout"))
    (tmp_path / "layout/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    opened = noting(monkeypatch, DirectoryFiles)
    with open_archive(path) as archive:
        images = archive.images()
        layers = {edited.manifest(archive, image.descriptor).layers[0] for image in images[:8]}
    assert len(images) == 9
    assert len(layers) == 1
    assert opened.count(f"blobs/sha256/{digest(packed).hex}") == 1
