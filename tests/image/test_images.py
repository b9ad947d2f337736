"""Images in and out of a state root, from sources in memory, archives and directories."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import threading
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import (
    AmbiguousImage,
    BlobNotFound,
    ContainerkitError,
    CorruptLayer,
    DigestMismatch,
    ImageInUse,
    ImageNotFound,
    InvalidArchive,
    InvalidImage,
    InvalidReference,
    PlatformMismatch,
    SizeMismatch,
    UnsafeEntry,
    UnsupportedMediaType,
)
from containerkit.image import model
from containerkit.image.images import Image, Images
from containerkit.state import State
from support.images import MTIME, MadeImage, describe, digest, hardlink, make_tar, member, snapshot, symlink
from support.peers import umoci_unpack

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

LOWER = make_tar([member("./"), member("etc/"), member("etc/a", b"1"), member("etc/b", b"2" * 100_000)])
UPPER = make_tar([member("etc/"), member("etc/.wh.a", b""), member("etc/c", b"3")])
RUN = {"Cmd": ["sh"], "Env": ["A=1"], "WorkingDir": "/etc"}


def images_of(state: State, remote: MadeImage) -> Images:
    return Images(state, lambda *_, **__: remote)


def left_in(state: State) -> dict[str, list[str]]:
    places = ("blobs/sha256", "layers", "ingest")
    left = {place: sorted(os.listdir(state.path(place))) for place in places}
    rows = state.database.execute("SELECT id FROM images UNION SELECT name FROM names")
    left["rows"] = [row for (row,) in rows]
    return left


NOTHING: dict[str, list[str]] = {"blobs/sha256": [], "layers": [], "ingest": [], "rows": []}


def test_pull_gives_a_whole_image(state: State) -> None:
    made = MadeImage([LOWER, UPPER], config=RUN)
    image = images_of(state, made).pull("example.org/app:1")
    assert (image.id, image.digest) == (digest(made.config), digest(made.manifest))
    assert image.names == ("example.org/app:1",)
    assert image.size == len(made.config) + sum(map(len, made.layers))
    assert (image.run.command, image.run.env, image.run.workdir) == (("sh",), ("A=1",), "/etc")
    assert [layer.diff_id for layer in image.layers] == [digest(LOWER), digest(UPPER)]
    assert [layer.descriptor.digest for layer in image.layers] == [digest(layer) for layer in made.layers]
    assert image.config.raw == made.config
    assert sorted(os.listdir(f"{image.lowers[1]}/etc")) == ["a", "b"]
    assert sorted(os.listdir(f"{image.lowers[0]}/etc")) == ["a", "c"]
    assert left_in(state)["ingest"] == []


def test_what_is_here_is_not_fetched_again(state: State) -> None:
    made = MadeImage([LOWER, UPPER])
    images = images_of(state, made)
    images.pull("example.org/app:1")
    assert sorted(made.opened) == sorted(made.blobs)
    made.opened.clear()
    assert images.pull("example.org/app:2").names == ("example.org/app:1", "example.org/app:2")
    other = MadeImage([LOWER, make_tar([member("other", b"")])])
    images_of(state, other).pull("example.org/other")
    assert (made.opened, other.opened) == ([], [digest(other.config), digest(other.layers[1])])


def test_uncompressed_and_many_layers(state: State) -> None:
    layers = [make_tar([member(f"f{number}", bytes([number]))]) for number in range(20)]
    image = images_of(state, MadeImage(layers, compress=False)).pull("app")
    assert [os.listdir(lower) for lower in image.lowers] == [[f"f{number}"] for number in reversed(range(20))]
    repeated = images_of(state, MadeImage([LOWER, LOWER, LOWER])).pull("repeated")
    assert len(set(repeated.lowers)) == 3


def test_index_of_indexes(state: State) -> None:
    made = MadeImage([LOWER])
    here = {"os": "linux", "architecture": json.loads(made.config)["architecture"]}
    wrong = {**describe(b"never read", model.OCI_MANIFEST), "platform": {"os": "plan9", "architecture": "mips"}}
    manifest = made.add(made.manifest)
    inner = {"schemaVersion": 2, "mediaType": model.OCI_INDEX,
             "manifests": [wrong, {**describe(manifest, model.OCI_MANIFEST), "platform": here}]}  # fmt: skip
    inner_raw = made.add(json.dumps(inner).encode())
    made.media_type = model.OCI_INDEX
    made.raw = json.dumps({"schemaVersion": 2, "manifests": [wrong, describe(inner_raw, model.OCI_INDEX)]}).encode()
    images = images_of(state, made)
    image = images.pull(f"example.org/app@{digest(made.raw)}")
    assert image.digest == digest(manifest)
    assert images.get(f"example.org/app@{digest(made.raw)}") == image
    assert images.get(f"example.org/app@{image.digest}") == image
    with pytest.raises(ImageNotFound):
        images.get(f"example.org/another@{image.digest}")


def damaged(change: Callable[[MadeImage], None], **options: Any) -> MadeImage:
    made = MadeImage([LOWER, UPPER], **options)
    change(made)
    return made


def replace_layer(made: MadeImage, content: bytes) -> None:
    """Something else under the digest of the upper layer."""
    made.blobs[digest(made.layers[1])] = content


def bad_layer(*members: Any, cut: int | None = None) -> MadeImage:
    return MadeImage([LOWER, make_tar(members)[:cut]])


def raw(content: bytes, media_type: str = model.OCI_MANIFEST) -> MadeImage:
    made = MadeImage([LOWER])
    made.raw, made.media_type = content, media_type
    return made


BAD: dict[str, tuple[MadeImage, type[Exception], str]] = {
    "truncated blob": (damaged(lambda made: replace_layer(made, made.layers[1][:-20])), SizeMismatch, "sha256"),
    "longer blob": (damaged(lambda made: replace_layer(made, made.layers[1] + b"x")), SizeMismatch, "has more"),
    "corrupt blob": (
        damaged(lambda made: replace_layer(made, made.layers[1][:40] + b"####" + made.layers[1][44:])),
        DigestMismatch,
        "should be",
    ),
    "other blob": (
        damaged(lambda made: replace_layer(made, bytes(len(made.layers[1]))), compress=False),
        DigestMismatch,
        "should be",
    ),
    "absent blob": (damaged(lambda made: made.blobs.pop(digest(made.layers[1]))), BlobNotFound, "sha256"),
    "corrupt config": (
        damaged(lambda made: made.blobs.update({digest(made.config): made.config[:-1] + b" "})),
        DigestMismatch,
        "should be",
    ),
    "short config": (
        damaged(lambda made: made.blobs.update({digest(made.config): made.config[:-1]})),
        SizeMismatch,
        "has only",
    ),
    "wrong diff id": (
        MadeImage([LOWER, UPPER], diff_ids=[digest(LOWER), digest(b"x")]),
        DigestMismatch,
        "unpacked layer",
    ),
    "too few diff ids": (MadeImage([LOWER, UPPER], diff_ids=[digest(LOWER)]), InvalidImage, "2 layers"),
    "not json": (raw(b"<html>not here</html>"), InvalidImage, "not JSON"),
    "unknown type": (raw(b'{"schemaVersion":2}', "application/x-other"), UnsupportedMediaType, "application/x-other"),
    "schema 1": (raw(b'{"schemaVersion":1}', model.DOCKER_SCHEMA1_SIGNED), UnsupportedMediaType, "schema 1"),
    "architecture": (
        MadeImage([LOWER], platform={"os": "linux", "architecture": "z80"}),
        PlatformMismatch,
        "example.org/bad:1 has no image for linux/.*it has linux/z80",
    ),
    "wrong env": (MadeImage([LOWER], config={"Env": "A=1"}), InvalidImage, "Env"),
    "truncated layer": (bad_layer(member("big", b"x" * 9000), cut=4000), CorruptLayer, "'big'"),
    "not a tar": (MadeImage([LOWER, b"text" * 1000]), CorruptLayer, "not a tar"),
    "dotdot": (bad_layer(member("../x", b"")), UnsafeEntry, r"\.\./x"),
    "symlink": (bad_layer(symlink("door", "/tmp"), member("door/x", b"")), UnsafeEntry, "door"),
    "hard link": (bad_layer(hardlink("x", "../../etc/passwd")), UnsafeEntry, "'x'"),
    "hard link to nothing": (bad_layer(hardlink("x", "etc/nothing")), CorruptLayer, "etc/nothing"),
    "parent is a file": (bad_layer(member("f", b""), member("f/x", b"")), CorruptLayer, "'f'"),
    "name too long": (bad_layer(member("n" * 300, b"")), CorruptLayer, "nnn"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_leaves_nothing(state: State, name: str) -> None:
    made, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        images_of(state, made).pull("example.org/bad:1")
    assert type(caught.value) is kind
    assert isinstance(caught.value, ContainerkitError)
    assert left_in(state) == NOTHING


def test_a_bad_image_leaves_others_alone(state: State) -> None:
    good = images_of(state, MadeImage([LOWER])).pull("good")
    before = left_in(state)
    with pytest.raises(UnsafeEntry):
        images_of(state, bad_layer(member("../x", b""))).pull("bad")
    assert left_in(state) == before
    assert os.path.isdir(good.lowers[0])


def test_missing_names(state: State) -> None:
    images = images_of(state, MadeImage([LOWER]))
    with pytest.raises(ImageNotFound, match="missing"):
        images.pull("app:missing")
    for name in ("nothing", "sha256:" + "0" * 64, "abcdef", "Not A Name", ""):
        with pytest.raises(ImageNotFound):
            images.get(name)
    with pytest.raises(InvalidReference):
        images.pull("Not A Name")
    assert left_in(state) == NOTHING


def test_names_and_ids(state: State) -> None:
    first = images_of(state, MadeImage([LOWER])).pull("app")
    images = images_of(state, MadeImage([UPPER]))
    second = images.pull("other:2")
    for name in ("app", "app:latest", "docker.io/library/app", first.id, first.id.hex, first.id.short):
        assert images.get(name) == first
    assert images.list() == [second, first]
    with pytest.raises(InvalidReference):
        images.tag(first, f"app@{first.digest}")
    assert images.tag("app", "other:2").names == ("app:latest", "other:2")
    assert images.get(second.id).names == ()
    images.remove("app")
    assert images.get(first.id).names == ("other:2",)
    images.remove(first.id.short)
    assert images.list() == [second]
    images.remove(second)
    assert left_in(state) == NOTHING
    with pytest.raises(ImageNotFound):
        images.remove(second)
    with pytest.raises(ImageNotFound):
        images.tag(first, "again")


def test_ambiguous_prefix(state: State) -> None:
    made = [MadeImage([LOWER], config={"Labels": {"n": str(number)}}) for number in range(17)]
    for number, image in enumerate(made):
        images_of(state, image).pull(f"app:{number}")
    heads = [digest(image.config).hex for image in made]
    images = images_of(state, made[0])
    shared = next((head[:2] for head in heads if sum(other[:2] == head[:2] for other in heads) > 1), None)
    if shared is None:  # make one: rows are enough for this question
        row = list(state.database.execute("SELECT * FROM images LIMIT 1").fetchone())
        row[0] = row[0][:9] + ("0" * 62)
        state.database.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        shared = row[0][7:9]
    with pytest.raises(AmbiguousImage, match=shared):
        images.get(shared)


def test_removal_spares_what_others_need(state: State) -> None:
    images = images_of(state, MadeImage([LOWER]))
    kept = images.pull("kept")
    images_of(state, MadeImage([LOWER, UPPER])).pull("gone")
    images.remove("gone")
    assert os.listdir(state.path("layers")) == [os.path.basename(kept.lowers[0])]
    assert len(os.listdir(state.path("blobs/sha256"))) == 3
    assert sorted(os.listdir(f"{kept.lowers[0]}/etc")) == ["a", "b"]


def test_an_image_in_use_stays(state: State) -> None:
    images = images_of(state, MadeImage([LOWER]))
    image = images.pull("app")
    images.tag("app", "second")
    state.database.execute("INSERT INTO containers VALUES ('1', 'busy', ?, '{}', 0)", (image.id,))
    images.remove("second")
    for name in ("app", image.id, image):
        with pytest.raises(ImageInUse, match="busy"):
            images.remove(name)
    assert images.get("app").names == ("app:latest",)
    state.database.execute("DELETE FROM containers")
    images.remove("app")
    assert left_in(state) == NOTHING


def test_what_a_dead_process_left_is_swept(state: State) -> None:
    os.makedirs(state.path("ingest", "layer-x", "d"))
    with open(state.path("ingest", "blob-x"), "wb"):
        pass
    images_of(state, MadeImage([LOWER])).pull("app")
    assert left_in(state)["ingest"] == []


def pull_in_process(root: str, number: int) -> None:
    state = State(root)
    layers = [LOWER, make_tar([member(f"f{number % 2}", os.urandom(0))])]
    images_of(state, MadeImage(layers)).pull(f"app:{number}")
    state.close()


def test_many_processes_pull_at_once(state: State) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=pull_in_process, args=(state.root, number)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    images = images_of(state, MadeImage([LOWER]))
    assert len(images.list()) == 2
    assert sum(len(image.names) for image in images.list()) == 8
    assert len(os.listdir(state.path("layers"))) == 3
    assert left_in(state)["ingest"] == []


def test_many_threads_pull_at_once(state: State) -> None:
    made = MadeImage([LOWER, UPPER])
    raised: list[BaseException] = []

    def pull(number: int) -> None:
        try:
            images_of(state, made).pull(f"app:{number}")
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=pull, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert len(images_of(state, made).get("app:0").names) == 6


def test_push_sends_what_is_missing(state: State) -> None:
    images = images_of(state, MadeImage([LOWER, UPPER]))
    image = images.pull("example.org/app:1")
    target = MadeImage([LOWER])
    pushing = Images(state, lambda *_, **__: target)
    pushing.tag(image, "example.com/app:2")
    assert pushing.push("example.com/app:2") == image.digest
    assert target.opened == []
    assert {digest(target.manifest), *target.blobs} >= {
        image.digest,
        image.id,
        *(one.descriptor.digest for one in image.layers),
    }
    assert images_of(State(state.path("copy")), target).pull("example.com/app:2") == Image(
        state.path("copy"), _row(state, image), ()
    )


def _row(state: State, image: Image) -> tuple[str, str, str, str, str, int, int]:
    query = "SELECT id, manifest, media_type, run, layers, size, created_ns FROM images WHERE id = ?"
    row: tuple[str, str, str, str, str, int, int] = state.database.execute(query, (image.id,)).fetchone()
    return row


# Archives


def docker_archive(path: str, *images: tuple[MadeImage, list[str]]) -> str:
    """As ``docker save`` has made them for years: plain layers beside a manifest.json."""
    rows, files = [], {}
    for made, tags in images:
        config = f"{digest(made.config).hex}.json"
        names = [f"{digest(layer).hex}/layer.tar" for layer in made.layers]
        files.update({config: made.config, **dict(zip(names, made.layers, strict=True))})
        rows.append({"Config": config, "RepoTags": tags, "Layers": names})
    files["manifest.json"] = json.dumps(rows).encode()
    with open(path, "wb") as file:
        file.write(make_tar([member(name, content) for name, content in files.items()]))
    return path


@pytest.fixture
def made() -> MadeImage:
    return MadeImage([LOWER, UPPER], config=RUN)


def test_load_oci_layouts(state: State, made: MadeImage) -> None:
    images = images_of(state, made)
    layout = made.write_layout(state.path("cache/layout"), "example.org/app:1")
    image = images.load(layout)
    assert (image.id, image.digest, image.names) == (digest(made.config), digest(made.manifest), ("example.org/app:1",))
    images.remove(image)
    subprocess.run(["tar", "-C", layout, "-cf", f"{layout}.tar", "."], check=True)
    assert images.load(f"{layout}.tar", tag="named:1").names == ("named:1",)
    subprocess.run(["gzip", f"{layout}.tar"], check=True)
    assert images.load(f"{layout}.tar.gz").names == ("named:1", "example.org/app:1")
    assert left_in(state)["ingest"] == []


def test_load_docker_archives(state: State) -> None:
    first, second = MadeImage([LOWER], compress=False), MadeImage([LOWER, UPPER])
    images = images_of(state, first)
    path = docker_archive(state.path("cache/a.tar"), (first, ["one:1", "uno:1"]), (second, ["two:2"]))
    with pytest.raises(AmbiguousImage, match=r"one:1, two:2"):
        images.load(path)
    with pytest.raises(ImageNotFound, match="three"):
        images.load(path, tag="three")
    assert left_in(state) == NOTHING
    assert images.load(path, tag="docker.io/library/two:2").id == digest(second.config)
    assert images.load(path, tag="uno:1").names == ("one:1", "uno:1")
    assert images.get("one:1").id == digest(first.config)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci"])
def test_load_what_skopeo_writes(state: State, made: MadeImage, form: str) -> None:
    layout = made.write_layout(state.path("cache/layout"))
    target = state.path("cache/target")
    name = "app:1" if form == "docker-archive" else "1"
    command = ["skopeo", "--insecure-policy", "copy", f"oci:{layout}:latest", f"{form}:{target}:{name}"]
    subprocess.run(command, check=True, capture_output=True)
    image = images_of(state, made).load(target)
    assert [layer.diff_id for layer in image.layers] == [digest(LOWER), digest(UPPER)]
    assert image.run.command == ("sh",)
    assert image.names == (("app:1",) if form == "docker-archive" else ())


def test_bad_archives(state: State, made: MadeImage) -> None:
    images = images_of(state, made)
    whole = docker_archive(state.path("cache/whole.tar"), (MadeImage([LOWER], compress=False), ["a"]))
    with open(whole, "rb") as file:
        content = file.read()
    bad = {
        "truncated": content[: len(content) // 2],
        "text": b"this is no tar" * 100,
        "empty": b"",
        "other": make_tar([member("readme", b"x")]),
        "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 100,
        "no file": make_tar([member("manifest.json", b'[{"Config":"c","Layers":[]}]')]),
        "no json": make_tar([member("manifest.json", b"[")]),
        "no images": make_tar([member("manifest.json", b"[]")]),
    }
    for name, damaged_content in bad.items():
        path = state.path("cache", name)
        with open(path, "wb") as file:
            file.write(damaged_content)
        with pytest.raises(InvalidArchive):
            images.load(path)
    with pytest.raises(FileNotFoundError):
        images.load(state.path("cache/nothing"))
    with pytest.raises(InvalidArchive):
        images.load(state.path("blobs"))
    assert left_in(state) == NOTHING


def test_a_layout_without_a_blob(state: State, made: MadeImage) -> None:
    layout = made.write_layout(state.path("cache/layout"))
    os.unlink(f"{layout}/blobs/sha256/{digest(made.layers[1]).hex}")
    with pytest.raises(BlobNotFound, match=digest(made.layers[1])):
        images_of(state, made).load(layout)
    assert left_in(state) == NOTHING


# Root file systems

ROOTFS = [
    member("./", mode=0o750),
    member("bin/"),
    member("bin/busy", b"\x7f" * 5000, mode=0o4755),
    hardlink("bin/box", "bin/busy"),
    member("etc/", mtime=MTIME + 0.5, xattrs={"user.x": b"1"}),
    symlink("etc/link", "/bin/busy", uid=1),
    member("empty", b""),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_import_of_a_tar(state: State, suffix: str) -> None:
    tar = state.path("cache/rootfs.tar")
    with open(tar, "wb") as file:
        file.write(make_tar(ROOTFS))
    if suffix:
        subprocess.run(["gzip" if suffix == ".gz" else "zstd", "-q", tar], check=True)
    image = images_of(state, MadeImage([])).import_rootfs(tar + suffix, tag="base:1")
    assert image.names == ("base:1",)
    assert [layer.diff_id for layer in image.layers] == [digest(make_tar(ROOTFS))]
    assert len(snapshot(image.lowers[0])) == len(ROOTFS)


def test_import_of_a_directory_equals_it(state: State) -> None:
    images = images_of(state, MadeImage([]))
    tar = state.path("cache/rootfs.tar")
    with open(tar, "wb") as file:
        file.write(make_tar(ROOTFS))
    source = images.import_rootfs(tar, tag="base:1").lowers[0]
    first = images.import_rootfs(source, tag="base:2")
    assert snapshot(first.lowers[0]) == snapshot(source)
    assert images.import_rootfs(source, tag="base:3") == first
    assert first.config.platform.os == "linux"
    with pytest.raises(FileNotFoundError):
        images.import_rootfs(state.path("nothing"), tag="base:4")


def test_a_tar_that_is_none(state: State) -> None:
    path = state.path("cache/rootfs.tar")
    with open(path, "wb") as file:
        file.write(b"#!/bin/sh\n" * 1000)
    with pytest.raises(CorruptLayer, match="not a tar"):
        images_of(state, MadeImage([])).import_rootfs(path, tag="base:1")
    assert left_in(state) == NOTHING


def test_peers_read_what_is_imported(state: State) -> None:
    images = images_of(state, MadeImage([]))
    tar = state.path("cache/rootfs.tar")
    with open(tar, "wb") as file:
        file.write(make_tar(ROOTFS))
    image = images.import_rootfs(images.import_rootfs(tar, tag="a").lowers[0], tag="b")
    target = MadeImage([])
    Images(state, lambda *_, **__: target).push("b")
    layout = target.write_layout(state.path("cache/layout"))
    unpacked = umoci_unpack(f"{layout}:latest", state.path("cache/bundle"))
    assert snapshot(unpacked) == snapshot(image.lowers[0])


def test_a_stream_that_breaks_off(state: State) -> None:
    class Ranged(MadeImage):
        """Worth going on with."""

        def open_at(self, descriptor: model.Descriptor, offset: int) -> io.BytesIO:
            return io.BytesIO(self.blobs[descriptor.digest][offset:])

    made = Ranged([LOWER, make_tar([member("big", os.urandom(5 << 20))])], compress=False)

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 2 << 20:
                raise ConnectionResetError("gone")
            return super().read(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "open", lambda descriptor: Broken(made.blobs[descriptor.digest]))
        with pytest.raises(ConnectionResetError, match="gone"):
            images_of(state, made).pull("app")
    left = left_in(state)
    assert f"partial-sha256-{digest(made.layers[1]).hex}" in left["ingest"]
    assert {name[:8] for name in left["ingest"]} == {"partial-"}  # notes of the other layer, where that was faster
    assert not left["rows"]
    assert images_of(state, made).pull("app").id == digest(made.config)
    assert left_in(state)["ingest"] == []
    assert images_of(state, made).pull("app").names == ("app:latest",)


def test_tarfile_reads_a_docker_archive_with_links(state: State) -> None:
    """Early docker archives share a layer by a symlink."""
    made = MadeImage([LOWER], compress=False)
    files = [
        member("c.json", made.config),
        member("one/layer.tar", LOWER),
        symlink("two/layer.tar", "../one/layer.tar"),
        member(
            "manifest.json", json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": ["two/layer.tar"]}]).encode()
        ),
    ]
    path = state.path("cache/linked.tar")
    with open(path, "wb") as file:
        file.write(make_tar(files, tarfile.USTAR_FORMAT))
    assert images_of(state, made).load(path, tag="app").lowers
