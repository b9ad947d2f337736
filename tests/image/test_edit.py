"""Pure edits: what comes out unpacks as what went in, keeps what it does not know, and is the same every time."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import (
    BlobNotFound,
    CorruptLayer,
    DigestMismatch,
    ImageNotFound,
    ImageTooLarge,
    InvalidImage,
    LayerTooLarge,
    PlatformMismatch,
)
from containerkit.image.codec import parse_document
from containerkit.image.edit import Editor
from containerkit.image.edit_index import IndexEditor, repack
from containerkit.image.flatten import flattened
from containerkit.image.images import Images
from containerkit.image.layers.layer import FILE, TarReader
from containerkit.image.limits import STANDARD
from containerkit.image.model import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Descriptor,
    Index,
    Platform,
)
from containerkit.image.scratch import Scratch
from support import edited
from support.images import MadeImage, digest, hardlink, make_tar, member, symlink

if TYPE_CHECKING:
    from pathlib import Path

    from containerkit.image.image import Image
    from containerkit.state import State

kernel = pytest.mark.kernel


def raw(source: Any, descriptor: Descriptor) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(edited.read(source, descriptor))
    return document


def configs(editor: Editor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest and the config that come out."""
    root = editor.finish()
    return raw(editor.source, root), raw(editor.source, edited.manifest(editor.source, root).config)


def docker_image() -> MadeImage:
    made = edited.image()
    made.media_type = DOCKER_MANIFEST
    made.document["mediaType"] = DOCKER_MANIFEST
    made.document["config"]["mediaType"] = DOCKER_CONFIG
    for layer in made.document["layers"]:
        layer["mediaType"] = DOCKER_LAYER + ".gzip"
    made.add(made.manifest)
    return made


@kernel
@pytest.mark.parametrize("below", [0, 1, 2])
def test_squashed_layers_unpack_to_the_same_tree(tmp_path: Path, below: int) -> None:
    made = edited.image()
    before = edited.tree(made, edited.root(made), str(tmp_path / "before"))
    editor = Editor(made, edited.root(made)).squash(3 - below)
    after = edited.tree(editor.source, editor.finish(), str(tmp_path / "after"))
    assert len(editor.layers) == below + 1
    assert {
        path: (before.get(path), after.get(path))
        for path in before.keys() | after
        if before.get(path) != after.get(path)
    } == {}


@kernel
def test_flattened_is_one_layer_without_whiteouts(tmp_path: Path) -> None:
    made = edited.image(compress=False)
    editor = Editor(made, edited.root(made)).flatten()
    assert editor.layers[0].media_type == OCI_LAYER + "+gzip"
    path = tmp_path / "layer.tar"
    path.write_bytes(gzip.decompress(edited.read(editor.source, editor.layers[0])))
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert len(names) == len(set(names))
    assert not [name for name in names if ".wh." in name]
    assert digest(path.read_bytes()) == edited.config(editor.source, editor.finish()).diff_ids[0]
    before = edited.tree(made, edited.root(made), str(tmp_path / "before"))
    assert edited.tree(editor.source, editor.finish(), str(tmp_path / "after")) == before


@kernel
def test_a_squashed_layer_deletes_only_what_the_base_has() -> None:
    made = edited.image()
    layers = edited.manifest(made, edited.root(made)).layers
    names = member_names(b"".join(flattened(made, layers, 1)))
    assert {name for name in names if ".wh." in name} == {
        ".wh.gone",
        "again/.wh.old",
        "etc/.wh.removed",
        "opaque/.wh.old",
        "opaque/.wh.sub",
    }
    assert not any("temporary" in name for name in names)
    assert "bin/tool" not in names
    assert "usr/bin/tool" in names


def member_names(content: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getnames()


def entries_of(content: bytes) -> list[Any]:
    reader = TarReader(io.BytesIO(content).read1)
    return list(iter(reader.next, None))


@pytest.mark.parametrize("count", [2, 3])
def test_a_layer_that_is_not_what_its_diff_id_says_is_noticed(count: int) -> None:
    layers = [make_tar([member(name, b"x")]) for name in "abc"]
    wrong = "sha256:" + "1" * 64
    made = MadeImage(layers, diff_ids=[digest(layers[0]), digest(layers[1]), wrong])
    made.add(made.manifest)
    with pytest.raises(DigestMismatch) as caught:
        Editor(made, edited.root(made)).squash(count)
    assert (caught.value.expected, caught.value.actual) == (wrong, digest(layers[2]))
    assert caught.value.layer == digest(made.layers[2])


@kernel
def test_holes_become_zeros(tmp_path: Path) -> None:
    """Engines refuse sparse members when they save."""
    source = tmp_path / "tree"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        file.seek(2 << 20)
        file.write(b"middle")
        file.truncate(8 << 20)
    with open(source / "hole", "wb") as file:
        file.truncate(4 << 20)
    content = subprocess.run(["tar", "-C", source, "-cS", "--format=gnu", "."], check=True, capture_output=True).stdout
    made = edited.image([content, make_tar([member("more", b"m")])], history=[])
    layers = edited.manifest(made, edited.root(made)).layers
    flat = b"".join(flattened(made, layers))
    assert [entry.sparse for entry in entries_of(content) if entry.kind == FILE] != [None, None]
    assert [entry.sparse for entry in entries_of(flat) if entry.kind == FILE] == [None, None, None]
    (tmp_path / "flat.tar").write_bytes(flat)
    target = tmp_path / "out"
    target.mkdir()
    subprocess.run(["tar", "-C", target, "-xf", tmp_path / "flat.tar"], check=True)
    for name in ("sparse", "hole"):
        subprocess.run(["cmp", source / name, target / name], check=True)
    assert (target / "more").read_bytes() == b"m"


def test_history_keeps_count_with_the_layers() -> None:
    made = edited.image()
    editor = Editor(made, edited.root(made)).squash(2, created_by="squash")
    _, config = configs(editor)
    assert [step.get("created_by") for step in config["history"]] == [
        "ADD lowest",
        "ENV A=1",
        "RUN middle",
        "RUN top",
        "CMD sh",
        "squash",
    ]
    assert [not step.get("empty_layer") for step in config["history"]] == [True, False, False, False, False, True]
    assert config["history"][3]["x-step"] == 1
    assert len(config["rootfs"]["diff_ids"]) == 2


def test_an_image_without_history_gets_steps_for_its_old_layers() -> None:
    made = edited.image(history=[])
    _, config = configs(Editor(made, edited.root(made)).append([edited.MIDDLE], created_by="RUN"))
    assert config["history"] == [{}, {}, {}, {"created_by": "RUN"}]


def test_nothing_done_changes_nothing() -> None:
    made = edited.image()
    root = edited.root(made)
    assert Editor(made, root).configure().remove().squash(1).annotate({}).finish() == root
    assert Editor(made, root).configure(env={"A": "1"}).finish() == root


def test_what_is_not_known_stays() -> None:
    made = edited.image()
    editor = Editor(made, edited.root(made)).append([edited.MIDDLE]).configure(user="u")
    manifest, config = configs(editor)
    assert manifest["x-manifest"] == {"z": 1}
    assert manifest["layers"][0]["x-layer"] == "kept"
    assert config["x-config"] == [1]
    assert config["config"]["X"] == {"y": 1}


def test_the_same_edits_give_the_same_digest() -> None:
    digests = set()
    for _ in range(2):
        made = edited.image()
        editor = Editor(made, edited.root(made)).flatten().append([edited.TOP[:700], edited.TOP[700:]])
        digests.add(editor.configure(labels={"a": "b"}, cmd=["x"]).annotate({"k": "v"}).finish().digest)
    assert len(digests) == 1


def test_configure_sets_every_field() -> None:
    made = edited.image()
    check = {"Test": ["CMD", "true"], "Interval": 10**9}
    editor = Editor(made, edited.root(made)).configure(
        env={"B": "3", "C": "4"}, cmd=["c"], entrypoint=["e"], user="1:2", workdir="/w", labels={"l": "1"},
        exposed_ports=["80", "53/udp"], volumes=["/v"], stop_signal="SIGINT", healthcheck=check, author="me",
        created="2024-01-01T00:00:00Z", architecture="arm", variant="v7", os="linux", created_by="LABEL l=1",
    )  # fmt: skip
    _, config = configs(editor)
    assert config["config"] == {
        "Env": ["A=1", "B=3", "C=4"], "X": {"y": 1}, "Cmd": ["c"], "Entrypoint": ["e"], "User": "1:2",
        "WorkingDir": "/w", "Labels": {"l": "1"}, "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Volumes": {"/v": {}},
        "StopSignal": "SIGINT", "Healthcheck": check,
    }  # fmt: skip
    assert (config["author"], config["created"]) == ("me", "2024-01-01T00:00:00Z")
    assert (config["os"], config["architecture"], config["variant"]) == ("linux", "arm", "v7")
    assert config["history"][-1] == {
        "created": "2024-01-01T00:00:00Z", "created_by": "LABEL l=1", "empty_layer": True,
    }  # fmt: skip


def test_remove_and_empty_values_take_away() -> None:
    made = edited.image()
    editor = Editor(made, edited.root(made))
    editor.configure(labels={"l": "1", "m": "2"}, exposed_ports=["80"], cmd=["x"], user="u")
    editor.remove(env=["A", "no"], labels=["l", "no"], exposed_ports=["80"]).configure(cmd=[], user="")
    _, config = configs(editor)
    assert config["config"] == {"Env": ["B=2"], "X": {"y": 1}, "Labels": {"m": "2"}, "ExposedPorts": {}}


def test_annotations() -> None:
    made = edited.image()
    manifest, _ = configs(Editor(made, edited.root(made)).annotate({"a": "1", "b": "2"}).annotate({"a": None}))
    assert manifest["annotations"] == {"b": "2"}


def test_docker_images_stay_docker_images() -> None:
    made = docker_image()
    editor = Editor(made, edited.root(made)).append([edited.MIDDLE], compression="none").append([edited.TOP])
    manifest, _ = configs(editor)
    assert manifest["mediaType"] == DOCKER_MANIFEST
    assert manifest["config"]["mediaType"] == DOCKER_CONFIG
    assert [layer["mediaType"] for layer in manifest["layers"][3:]] == [DOCKER_LAYER, DOCKER_LAYER + ".gzip"]


@pytest.mark.parametrize("how", ["append", "repack"])
def test_a_docker_image_with_zstd_becomes_one_of_ocis(how: str) -> None:
    made = docker_image()
    editor = Editor(made, edited.root(made))
    editor = editor.repack("zstd") if how == "repack" else editor.append([edited.MIDDLE], compression="zstd")
    manifest, _ = configs(editor)
    assert editor.finish().media_type == manifest["mediaType"] == OCI_MANIFEST
    assert manifest["config"]["mediaType"] == OCI_CONFIG
    types = [layer["mediaType"] for layer in manifest["layers"]]
    assert types == [f"{OCI_LAYER}+{'zstd' if how == 'repack' else 'gzip'}"] * 3 + [f"{OCI_LAYER}+zstd"] * (
        len(types) - 3
    )


def test_a_layer_keeps_its_keys_below_a_squash_on_a_new_base_and_in_another_compression() -> None:
    made = edited.image()
    made.document["layers"][0]["annotations"] = {"a": "1", "io.github.containers.zstd-chunked.manifest-checksum": "2"}
    made.document["layers"][0]["urls"] = ["http://127.0.0.1:9/"]
    made.add(made.manifest)
    first = made.document["layers"][0]
    manifest, _ = configs(Editor(made, edited.root(made)).squash(2))
    assert manifest["layers"][0] == first
    old = edited.image([edited.LOWEST])
    rebased = Editor(made, edited.root(made))
    base = edited.manifest(made, edited.root(made))
    rebased.rebase(edited.manifest(old, edited.root(old)), base, bases=Scratch(old, made))
    manifest, _ = configs(rebased)
    assert manifest["layers"][:3] == made.document["layers"]
    manifest, _ = configs(Editor(made, edited.root(made)).repack("zstd"))
    repacked = manifest["layers"][0]
    assert (repacked["x-layer"], repacked["annotations"], "urls" in repacked) == ("kept", {"a": "1"}, False)
    assert repacked["digest"] != first["digest"]


@kernel
@pytest.mark.parametrize("kind", ["tar", "gzip", "directory", "pieces"])
def test_append_takes_whatever_a_layer_may_come_as(tmp_path: Path, kind: str) -> None:
    content = make_tar([member("./", mode=0o755), member("added", b"1")])
    path: Any = tmp_path / "layer"
    if kind == "directory":
        path.mkdir()
        (path / "added").write_bytes(b"1")
    else:
        path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    made = edited.image()
    editor = Editor(made, edited.root(made)).append(iter([content]) if kind == "pieces" else path)
    tree = edited.unpacked(editor.source, editor.finish(), str(tmp_path))
    with open(os.path.join(tree, "added")) as file:
        assert file.read() == "1"


def test_a_directory_is_the_same_layer_at_any_time(tmp_path: Path) -> None:
    digests = set()
    for number in range(2):
        source = tmp_path / str(number)
        source.mkdir()
        (source / "file").write_bytes(b"1")
        os.utime(source / "file", (1_700_000_000 + number, 1_700_000_000 + number))
        made = edited.image()
        digests.add(Editor(made, edited.root(made)).append(source, epoch=1_600_000_000).finish().digest)
    assert len(digests) == 1


def test_a_variable_has_a_name() -> None:
    made = edited.image()
    for name in ("", "A=B"):
        with pytest.raises(ValueError, match="variable"):
            Editor(made, edited.root(made)).configure(env={name: "1"})


def test_append_refuses_what_is_no_tar(tmp_path: Path) -> None:
    made = edited.image()
    path = tmp_path / "layer"
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(CorruptLayer):
        Editor(made, edited.root(made)).append(path)
    with pytest.raises(FileNotFoundError):
        Editor(made, edited.root(made)).append(tmp_path / "missing")


BASE_2 = make_tar([member("etc/", mode=0o755), member("etc/base", b"second base")])


@kernel
def test_rebase_exchanges_the_lowest_layers(tmp_path: Path) -> None:
    made = edited.image()
    old = edited.image([edited.LOWEST], history=edited.HISTORY[:2])
    new = edited.image(
        [make_tar([member("etc/", mode=0o755)]), BASE_2], history=[{"created_by": "1"}, {"created_by": "2"}]
    )
    manifests = [edited.manifest(each, edited.root(each)) for each in (old, new)]
    editor = Editor(made, edited.root(made)).rebase(*manifests, bases=Scratch(old, new))
    _, config = configs(editor)
    assert [step["created_by"] for step in config["history"]] == ["1", "2", "RUN middle", "RUN top", "CMD sh"]
    assert config["config"]["X"] == {"y": 1}
    assert [layer.digest for layer in editor.layers[:2]] == [layer.digest for layer in manifests[1].layers]
    assert editor.layers[2:] == edited.manifest(made, edited.root(made)).layers[1:]


def test_rebase_refuses_what_is_not_built_on_the_base() -> None:
    made = edited.image()
    other = edited.image([BASE_2])
    manifest = edited.manifest(other, edited.root(other))
    with pytest.raises(InvalidImage, match="not built on"):
        Editor(made, edited.root(made)).rebase(manifest, manifest, bases=other)


def test_rebase_refuses_another_platform() -> None:
    made, old = edited.image(), edited.image([edited.LOWEST])
    new = MadeImage([BASE_2], platform={"os": "linux", "architecture": "s390x"})
    new.add(new.manifest)
    manifests = [edited.manifest(each, edited.root(each)) for each in (old, new)]
    with pytest.raises(PlatformMismatch, match="s390x"):
        Editor(made, edited.root(made)).rebase(*manifests, bases=Scratch(old, new))


@pytest.mark.parametrize("compression", ["none", "zstd", "gzip"])
def test_repacking_keeps_config_and_diff_ids(compression: str) -> None:
    made = edited.image()
    source, root = repack(made, edited.root(made), compression)
    manifest = edited.manifest(source, root)
    assert manifest.config == edited.manifest(made, edited.root(made)).config
    suffix = "" if compression == "none" else f"+{compression}"
    assert {layer.media_type for layer in manifest.layers} == {OCI_LAYER + suffix}
    if compression == "none":
        assert [layer.digest for layer in manifest.layers] == list(edited.config(source, root).diff_ids)


def nested(made: MadeImage, below: Descriptor, names: int, depth: int) -> Descriptor:
    """Indexes within indexes, each of which names the next one so many times."""
    for _ in range(depth):
        rows = [describe_descriptor(below) | {"annotations": {"number": str(number)}} for number in range(names)]
        body = made.add(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows}).encode())
        below = Descriptor(OCI_INDEX, digest(body), len(body))
    return below


def describe_descriptor(descriptor: Descriptor) -> dict[str, Any]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def test_repacking_does_everything_once() -> None:
    made = edited.image([edited.TOP])
    source, root = repack(made, nested(made, edited.root(made), 100, 4), "zstd")
    for _ in range(4):
        children = parse_index(source, root).manifests
        assert [child.annotations["number"] for child in children] == [str(number) for number in range(100)]
        assert len({child.digest for child in children}) == 1
        root = children[-1]
    assert edited.manifest(source, root).layers[0].media_type == f"{OCI_LAYER}+zstd"


@pytest.mark.parametrize(("names", "depth"), [(1, 5), (2, 60), (1, 300)])
def test_repacking_refuses_indexes_without_end(names: int, depth: int) -> None:
    made = edited.image([edited.TOP])
    with pytest.raises(ImageTooLarge) as caught:
        repack(made, nested(made, edited.root(made), names, depth), "zstd")
    assert (caught.value.limit, caught.value.allowed) == ("index_depth", 4)


def several(made: MadeImage, count: int) -> Descriptor:
    """An index of images that share their layers."""
    rows = []
    for number in range(count):
        made.document["annotations"] = {"number": str(number)}
        made.add(made.manifest)
        rows.append(describe_descriptor(edited.root(made)))
    body = made.add(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows}).encode())
    return Descriptor(OCI_INDEX, digest(body), len(body))


def test_repacking_counts_what_it_reads_and_packs_a_shared_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, packed = edited.image(), []
    pack = Scratch.pack

    def counted(scratch: Scratch, pieces: Any, compression: str) -> Any:
        packed.append(compression)
        return pack(scratch, pieces, compression)

    monkeypatch.setattr(Scratch, "pack", counted)
    source, root = repack(made, several(made, 64), "zstd")
    assert len(packed) == len(edited.LAYERS)
    found = [edited.manifest(source, child) for child in parse_index(source, root).manifests]
    assert [manifest.annotations["number"] for manifest in found] == [str(number) for number in range(64)]
    assert len({manifest.layers for manifest in found}) == 1
    for layer in found[0].layers:
        assert digest(edited.read(source, layer)) == layer.digest
    with pytest.raises(ImageTooLarge) as caught:
        repack(made, several(made, 65), "zstd")
    assert (caught.value.limit, caught.value.allowed) == ("index_reads", 64)


def test_repacking_twice_ends_with_the_last() -> None:
    made = edited.image()
    once, again = (Editor(made, edited.root(made)) for _ in range(2))
    for compression in ("gzip", "zstd", "none"):
        again.repack(compression).repack("gzip").repack(compression)
        once.repack(compression)
        assert again.layers == once.layers


def test_an_image_that_was_removed_and_is_here_again(state: State, tmp_path: Path) -> None:
    images = Images(state, lambda *_, **__: pytest.fail("no registry is needed"))
    layout = edited.image().write_layout(str(tmp_path / "layout"))
    hold = images.hold
    image = images.load(layout, "app:1", unpack=False)
    edit = images.edit(image)
    images.remove(image)

    def pulled_just_now(image: Image | str) -> Image:
        images.load(layout, "app:1", unpack=False)
        return hold(image)

    images.hold = pulled_just_now  # type: ignore[method-assign]
    with pytest.raises(ImageNotFound, match="removed"):
        edit.flatten()
    assert images.edit("app:1").flatten().commit("flat:1", unpack=False).names == ("flat:1",)
    lost = image.layers[0].descriptor.digest
    edit = images.edit(image)
    os.unlink(f"{state.root}/blobs/sha256/{lost.hex}")
    images.hold = hold  # type: ignore[method-assign]
    with pytest.raises(BlobNotFound):  # it is not gone, it is damaged
        edit.flatten()


def test_finish_brings_everything_to_the_sink() -> None:
    made, sink = edited.image(), MadeImage([])
    root = Editor(made, edited.root(made), sink).append([edited.MIDDLE]).finish()
    manifest = edited.manifest(sink, root)
    for blob in (*manifest.layers, manifest.config):
        assert digest(edited.read(sink, blob)) == blob.digest


def test_an_index_is_no_image_to_edit() -> None:
    made = edited.image()
    index = IndexEditor(made, sink=made).add(edited.root(made)).finish()
    with pytest.raises(InvalidImage, match="index"):
        Editor(made, index)


def parse_index(source: Any, root: Descriptor) -> Index:
    parsed = parse_document(edited.read(source, root), root.media_type)
    assert isinstance(parsed, Index)
    return parsed


def test_index_editing() -> None:
    first, second, third = edited.image(), edited.image([edited.LOWEST]), edited.image([edited.MIDDLE])
    roots = [edited.root(each) for each in (first, second, third)]
    sink = MadeImage([])
    editor = IndexEditor(first, sink=sink).add(roots[0])
    editor.add(roots[1], platform=Platform("linux", "arm", "v7"), annotations={"a": "1"}, source=second)
    root = editor.annotate({"index": "yes"}).finish()
    index = parse_index(sink, root)
    assert root.media_type == OCI_INDEX
    assert index.annotations == {"index": "yes"}
    assert [item.digest for item in index.manifests] == [item.digest for item in roots[:2]]
    assert index.manifests[0].platform == edited.config(first, roots[0]).platform
    assert str(index.manifests[1].platform) == "linux/arm/v7"
    assert all(sink.has(blob) for blob in edited.manifest(second, roots[1]).layers)

    again = IndexEditor(sink, root, sink).replace(roots[1].digest, roots[2], source=third).remove(roots[0].digest)
    again.set_platform(roots[2].digest, Platform("linux", "arm", "v6")).annotate({"b": "2"}, roots[2].digest)
    (only,) = parse_index(sink, again.finish()).manifests
    assert (only.digest, str(only.platform), only.annotations) == (
        roots[2].digest,
        "linux/arm/v6",
        {"a": "1", "b": "2"},
    )
    assert IndexEditor(sink, root).finish() == root
    with pytest.raises(ImageNotFound):
        again.remove(roots[0].digest)


def test_a_hard_link_whose_base_name_is_deleted_keeps_its_content(tmp_path: Path) -> None:
    base = make_tar([member("a", b"content" * 100), symlink("s", "a")])
    layers = [base, make_tar([hardlink("b", "a"), hardlink("c", "a")]), make_tar([member(".wh.a", b"")])]
    made = edited.image(layers, history=[])
    flat = b"".join(flattened(made, edited.manifest(made, edited.root(made)).layers, 1))
    path = tmp_path / "flat.tar"
    path.write_bytes(flat)
    with tarfile.open(path) as tar:
        assert tar.extractfile("b").read() == b"content" * 100  # type: ignore[union-attr]
        assert tar.getmember("c").linkname == "b"
        assert sorted(tar.getnames()) == [".wh.a", "b", "c"]


@pytest.mark.parametrize(
    ("links", "written"),
    [
        ([("a", "b")], []),
        ([("b", "a")], []),
        ([("a", "a")], []),
        ([("c", "b"), ("b", "c"), ("a", "c")], [("c", "a")]),
        ([("other", "b")], [("other", "a")]),
    ],
)
def test_a_hard_link_that_stands_in_the_base_is_not_written_again(
    links: list[tuple[str, str]], written: list[tuple[str, str]]
) -> None:
    """Written as a file of its own, it would be parted from the other names."""
    base = make_tar([member("a", b"content"), hardlink("b", "a"), member("other", b"o")])
    made = edited.image([base, make_tar([hardlink(*link) for link in links])], history=[])
    flat = b"".join(flattened(made, edited.manifest(made, edited.root(made)).layers, 1))
    assert [(entry.name.decode(), entry.link.decode()) for entry in entries_of(flat)] == written


def test_holes_beyond_a_layers_size_are_refused_before_anything_is_written() -> None:
    size = STANDARD.layer_size // 2 + 1
    hole = {"GNU.sparse.major": "0", "GNU.sparse.size": str(size), "GNU.sparse.map": "0,1"}
    layers = [make_tar([member(name, b"x", pax_headers=hole)]) for name in "ab"]
    made = edited.image(layers, history=[])
    descriptors = edited.manifest(made, edited.root(made)).layers
    assert next(flattened(made, descriptors[:1]))
    with pytest.raises(LayerTooLarge) as caught:
        next(flattened(made, descriptors))
    assert (caught.value.limit, caught.value.found, caught.value.entry) == ("layer_size", 2 * size, "b")
