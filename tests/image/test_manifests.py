"""Several manifests with one config: each name keeps its own, whatever other names get."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.errors import ImageNotFound, RegistryNotFound
from containerkit.image.archives.archive import open_archive
from containerkit.image.images import Image, Images
from containerkit.image.store.blobs import BlobStore
from containerkit.registry import serve
from containerkit.state import MIGRATIONS, SCHEMA, State
from support import crash
from support.images import MadeImage, describe, digest, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

LAYERS = [make_tar([member("etc/"), member("etc/a", b"1" * 5000)]), make_tar([member("etc/"), member("etc/b", b"2")])]


@pytest.fixture
def host(state_root: str) -> Iterator[ck.Host]:
    with closing(ck.Host(root=state_root)) as host:
        yield host


@pytest.fixture
def images(host: ck.Host, tmp_path: Path) -> Images:
    """A store with ``a:1``."""
    host.images.load(MadeImage(LAYERS).write_layout(str(tmp_path / "layout")), tag="a:1")
    return host.images


def blobs(images: Images) -> set[str]:
    return set(BlobStore(images.root).digests())


def test_an_edit_that_keeps_the_config_leaves_other_names_alone(images: Images, host: ck.Host) -> None:
    before = images.get("a:1")
    annotated = images.edit("a:1").annotate({"k": "v"}).commit("b:1")
    packed = images.edit("a:1").repack("zstd").commit("c:1")
    assert before.id == annotated.id == packed.id
    assert images.get("a:1").digest == before.digest
    assert images.get("b:1").digest == annotated.digest != before.digest
    assert images.get("b:1").manifest.annotations == {"k": "v"}
    assert [layer.media_type[-4:] for layer in images.get("c:1").manifest.layers] == ["zstd"] * 2
    assert images.get("c:1").size == packed.size != before.size
    assert images.get(before.id).digest == packed.digest  # the one that came last
    images.tag("a:1", "again:1")
    images.tag(annotated, "noted:1")
    images.tag(before.id, "last:1")
    assert [images.get(name).digest for name in ("again:1", "noted:1", "last:1")] == [
        before.digest,
        annotated.digest,
        packed.digest,
    ]
    images.gc()
    assert images.verify() == ()
    assert blobs(images) >= {before.digest, annotated.digest, packed.digest, *_layers(before), *_layers(packed)}
    assert [usage.names for usage in images.df().images] == [images.get("a:1").names]
    crash.expect_whole(host.state)


def _layers(image: Image) -> set[str]:
    return {layer.descriptor.digest for layer in image.layers}


def test_what_only_a_name_needed_goes_with_it(images: Images) -> None:
    first = images.get("a:1")
    packed = images.edit("a:1").repack("zstd").commit("c:1")
    own = {packed.digest, *_layers(packed)}
    assert own <= blobs(images)
    images.remove("c:1")
    assert not own & blobs(images)
    assert images.get(first.id).digest == images.get("a:1").digest == first.digest
    assert (images.get(first.id).size, images.get(first.id).media_type) == (first.size, first.media_type)
    images.edit("a:1").repack("zstd").commit("a:1")
    assert images.get(first.id).digest == packed.digest
    images.tag(first, "old:1")  # nothing has been collected meanwhile
    assert images.get("old:1").digest == first.digest
    images.remove("old:1")
    assert first.digest not in blobs(images)
    with pytest.raises(ImageNotFound, match=first.digest):
        images.tag(first, "old:2")
    with pytest.raises(ImageNotFound):
        images.get(f"a@{first.digest}")
    assert images.get(f"a@{packed.digest}").digest == packed.digest
    images.remove(packed)
    assert blobs(images) == set()


def test_a_name_that_moves_leaves_the_other_names_manifest(images: Images, tmp_path: Path) -> None:
    first = images.get("a:1")
    noted = images.edit("a:1").annotate({"k": "v"}).commit("b:1")
    other = MadeImage(LAYERS[:1]).write_layout(str(tmp_path / "other"))
    images.load(other, tag="b:1")
    assert images.get(first.id).digest == first.digest
    images.gc()
    assert noted.digest not in blobs(images)


def test_a_pinned_image_stays_what_its_name_says(state_root: str) -> None:
    made = MadeImage(LAYERS)
    with closing(State(state_root)) as state:
        images = Images(state, lambda *_, **__: made)
        name = f"example.org/pin@{digest(made.manifest)}"
        pulled = images.pull(name)
        images.edit(pulled).annotate({"k": "v"}).commit("other:1")
        images.gc()
        assert images.get(name).digest == digest(made.manifest)
        assert images.get(name).manifest.raw == made.manifest
        crash.expect_whole(state)


def two_of_one_config(path: str) -> tuple[MadeImage, MadeImage]:
    """A layout with one image under two names, once with compressed layers."""
    one, two = MadeImage(LAYERS), MadeImage(LAYERS, compress=False)
    assert one.config == two.config
    one.write_layout(path)
    for blob in (*two.blobs.values(), two.manifest):
        with open(f"{path}/blobs/sha256/{digest(blob).hex}", "wb") as file:
            file.write(blob)
    names = "org.opencontainers.image.ref.name"
    entries = [
        {**describe(made.manifest, made.media_type), "annotations": {names: f"x/y:{name}"}}
        for made, name in ((one, "one"), (two, "two"))
    ]
    with open(f"{path}/index.json", "w", encoding="utf-8") as file:
        json.dump({"schemaVersion": 2, "manifests": entries}, file)
    return one, two


def test_they_are_loaded_saved_served_and_pushed_each_as_it_is(host: ck.Host, tmp_path: Path) -> None:
    one, two = two_of_one_config(str(tmp_path / "two"))
    wanted = {"x/y:one": digest(one.manifest), "x/y:two": digest(two.manifest)}
    images = host.images
    assert [image.digest for image in images.load_all(str(tmp_path / "two"))] == list(wanted.values())
    assert {name: images.get(name).digest for name in wanted} == wanted
    assert images.get("x/y:one").names == ("x/y:one", "x/y:two")
    images.save(str(tmp_path / "saved"), images.get("x/y:one"), format="oci-archive")
    with open_archive(str(tmp_path / "saved")) as archive:
        saved = {stored.names[0]: stored.descriptor.digest for stored in archive.images()}
    assert saved == {f"docker.io/{name}": found for name, found in wanted.items()}
    images.save(str(tmp_path / "docker"), images.get("x/y:one"))
    with open_archive(str(tmp_path / "docker")) as archive:
        assert [stored.names for stored in archive.images()] == [tuple(saved)]
    with serve(images=images) as served:
        for name, found in wanted.items():
            assert images.copy(f"docker://{served.host}/{name}", f"oci:{tmp_path}/{name[-3:]}") == found
    pushed: list[str] = []
    target = MadeImage([])
    target.put_manifest = lambda _, __, body: pushed.append(digest(body)) or digest(body)  # type: ignore[method-assign,func-returns-value]
    for name in wanted:
        images.tag(name, f"example.org/{name}")
        Images(host.state, lambda *_, **__: target).push(f"example.org/{name}")
    assert pushed == list(wanted.values())


def test_loading_them_again_writes_nothing(host: ck.Host, tmp_path: Path) -> None:
    two_of_one_config(str(tmp_path / "two"))
    host.images.load_all(str(tmp_path / "two"))
    version = "PRAGMA data_version"
    with closing(sqlite3.connect(host.state.path("state.db"))) as other:
        before = other.execute(version).fetchone()
        host.images.load_all(str(tmp_path / "two"))
        assert other.execute(version).fetchone() == before


def test_a_database_of_version_2_gives_each_name_its_images_manifest(state_root: str) -> None:
    path = os.path.join(state_root, "state.db")
    with closing(sqlite3.connect(path)) as old:
        old.executescript(f"{SCHEMA}; {MIGRATIONS[2]}; PRAGMA user_version=2")
        for number in (1, 2):
            row = (f"sha256:{number:064x}", f"sha256:{number + 8:064x}", f"type {number}", "{}", "[]", number, 7)
            old.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            for tag in ("z", "a"):
                old.execute("INSERT INTO names VALUES (?, ?)", (f"docker.io/library/app{number}:{tag}", row[0]))
            old.execute("INSERT INTO uses VALUES (?, ?)", (row[0], 9))
        old.execute("INSERT INTO containers VALUES ('c', 'n', ?, '{}', 1)", (row[0],))
        old.commit()
    with closing(State(state_root)) as state:
        images = Images(state, lambda *_, **__: MadeImage([]))
        for number in (1, 2):
            for tag in ("z", "a"):
                image = images.get(f"app{number}:{tag}")
                assert (image.id[-1], image.digest[-64:]) == (str(number), f"{number + 8:064x}")
                assert (image.media_type, image.size) == (f"type {number}", number)
                assert image.names == (f"app{number}:a", f"app{number}:z")
        assert state.database.execute("SELECT count(*) FROM uses").fetchone() == (2,)
        state.database.execute("DELETE FROM images WHERE id = ?", (f"sha256:{1:064x}",))
        left = state.database.execute("SELECT name FROM names ORDER BY rowid").fetchall()
        assert left == [("docker.io/library/app2:z",), ("docker.io/library/app2:a",)]


def test_a_served_name_that_is_gone_is_not_found(host: ck.Host) -> None:
    with serve(images=host.images) as served, pytest.raises((ImageNotFound, RegistryNotFound)):
        host.images.pull(f"{served.host}/nothing:1")
