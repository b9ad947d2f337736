"""Images whose layers stay as they travel until somebody needs their files; and what a mount keeps."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.container.containers import Containers
from containerkit.errors import DigestMismatch, ImageNotFound, LayerTooLarge, PathNotInImage, SizeMismatch
from containerkit.image.images import Images
from containerkit.image.layers.extract import Extractor
from containerkit.image.limits import ImageLimits
from containerkit.state import State, driver_of
from support import crash
from support.images import MadeImage, digest, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

LOWER = make_tar([member("./"), member("etc/"), member("etc/a", b"1"), member("etc/b", b"2" * 100_000)])
UPPER = make_tar([member("etc/"), member("etc/.wh.a", b""), member("etc/c", b"3")])


@pytest.fixture(params=["overlay", "copy"])
def host(request: pytest.FixtureRequest, state_root: str) -> Iterator[ck.Host]:
    with closing(ck.Host(root=state_root, driver=request.param)) as host:
        yield host


@pytest.fixture
def layout(tmp_path: Path) -> str:
    return MadeImage([LOWER, UPPER]).write_layout(str(tmp_path / "layout"))


def trees(host: ck.Host) -> list[str]:
    return os.listdir(host.state.path("layers"))


def test_what_is_not_unpacked_is_there_for_all_that_needs_no_files(host: ck.Host, layout: str, tmp_path: Path) -> None:
    image = host.images.load(layout, tag="app:1", unpack=False)
    assert (image.unpacked, trees(host)) == (False, [])
    assert [file.path for file in host.images.tree("app:1").files] == ["/etc", "/etc/b", "/etc/c"]
    assert host.images.read_file("app:1", "/etc/c") == b"3"
    edited = host.images.edit("app:1").append([make_tar([member("new", b"4")])]).commit("app:2", unpack=False)
    host.images.save(str(tmp_path / "saved"), "app:2", format="oci-archive")
    assert host.images.copy("containerkit:app:2", f"oci:{tmp_path}/copied") == edited.digest
    host.images.import_rootfs(str(tmp_path / "layout"), "imported:1", unpack=False)
    assert trees(host) == []
    assert host.images.verify() == ()
    assert host.images.df().layers == 0
    blobs = os.listdir(host.state.path("blobs/sha256"))
    assert host.images.gc().bytes == 0
    assert os.listdir(host.state.path("blobs/sha256")) == blobs
    assert host.images.load(layout, tag="app:1").unpacked
    assert len(trees(host)) == 2
    assert not host.images.get("app:2").unpacked
    assert host.images.unpack("app:2").unpacked
    assert len(trees(host)) == 3


def test_a_pull_without_unpacking_verifies_blobs_and_chooses_no_driver(state_root: str) -> None:
    with closing(State(state_root)) as state:
        for change, kind in ((lambda blob: blob[:-1], SizeMismatch), (lambda blob: blob[:-1] + b"?", DigestMismatch)):
            made = MadeImage([LOWER, UPPER])
            made.blobs[digest(made.layers[1])] = change(made.layers[1])
            with pytest.raises(kind):
                Images(state, lambda *_, made=made, **__: made).pull("app", unpack=False)
        wrong = MadeImage([LOWER, UPPER], diff_ids=[digest(LOWER), digest(b"x")])
        images = Images(state, lambda *_, **__: wrong)
        images.pull("app", unpack=False)
        assert (driver_of(state_root), os.listdir(state.path("ingest"))) == ("", [])
        with pytest.raises(DigestMismatch, match="unpacked layer"):
            images.unpack("app")
        with pytest.raises(DigestMismatch), images.mount("app"):
            pass
        with pytest.raises(DigestMismatch):
            Containers(state, images).create("app", ["x"])
        assert not images.get("app").unpacked
        assert state.database.execute("SELECT 1 FROM containers").fetchone() is None
        images.limits = ImageLimits(layer_size=1000)
        with pytest.raises(LayerTooLarge):
            images.unpack("app")


def test_an_import_that_is_no_tar_is_refused_also_without_unpacking(host: ck.Host, tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"#!/bin/sh\n" * 1000)
    with pytest.raises(ck.errors.CorruptLayer, match="not a tar"):
        host.images.import_rootfs(tmp_path / "none", "none:1", unpack=False)
    assert os.listdir(host.state.path("blobs/sha256")) == []


def test_containers_and_mounts_unpack_what_is_missing(host: ck.Host, busybox_root: str) -> None:
    image = host.images.import_rootfs(busybox_root, "busybox:1", unpack=False)
    assert host.run("busybox:1", ["cat", "/etc/passwd"], check=True).stdout
    assert image.unpacked
    for _ in range(2):  # heals
        for name in trees(host):
            shutil.rmtree(host.state.path("layers", name))
        assert host.run(image, ["/bin/true"]).exit_code == 0
    for name in trees(host):
        shutil.rmtree(host.state.path("layers", name))
    with host.images.mount(image) as fd:
        assert "bin" in os.listdir(fd)
    created = host.containers.create(image, ["/bin/true"])
    created.start()
    assert created.wait(30) == 0
    created.remove()


def test_many_processes_unpack_one_image_at_once(host: ck.Host, layout: str) -> None:
    host.images.load(layout, tag="app:1", unpack=False)
    root = host.root

    def look() -> None:
        with closing(ck.Host(root=root)) as own, own.images.mount("app:1") as fd:
            assert sorted(os.listdir(f"/proc/self/fd/{fd}/etc")) == ["b", "c"]

    pids = [crash.start(look) for _ in range(6)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert len(trees(host)) == 2
    crash.expect_whole(host.state)


# What a mount gives, and keeps


def test_the_descriptor_of_a_mount_is_a_directorys(host: ck.Host, layout: str) -> None:
    host.images.load(layout, tag="app:1")
    with host.images.mount("app:1") as fd:
        assert os.listdir(fd) == ["etc"]
        assert sorted(os.listdir(f"/proc/self/fd/{fd}/etc")) == ["b", "c"]
        file = os.open("etc/c", os.O_RDONLY, dir_fd=fd)
        try:
            assert os.read(file, 10) == b"3"
        finally:
            os.close(file)
        assert stat.S_ISDIR(os.stat("etc", dir_fd=fd).st_mode)
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("new", dir_fd=fd)
        assert not os.get_inheritable(fd)


def test_a_mount_keeps_its_layers(host: ck.Host, layout: str) -> None:
    host.images.load(layout, tag="app:1")

    def remove() -> None:
        with closing(ck.Host(root=host.root)) as other:
            other.images.remove("app:1")
            other.images.gc()

    with host.images.mount("app:1") as fd:
        assert os.waitpid(crash.start(remove), 0)[1] == 0
        assert sorted(os.listdir(f"/proc/self/fd/{fd}/etc")) == ["b", "c"]
        with pytest.raises(ImageNotFound), host.images.mount("app:1"):
            pass
    host.images.gc()
    assert trees(host) == []


# Images that vanish between look-up and use


def test_an_image_that_vanishes_is_not_found(host: ck.Host, layout: str, tmp_path: Path) -> None:
    images = host.images
    image = images.load(layout, tag="app:1")
    edit = images.edit(image)
    images.remove(image)
    for use in (
        lambda: images.tree(image),
        lambda: images.history(image),
        lambda: images.read_file(image, "/etc/b"),
        lambda: images.open_file(image, "/etc/b"),
        lambda: images.diff(image, image),
        lambda: images.save(str(tmp_path / "saved"), image),
        lambda: images.edit(image),
        lambda: images.unpack(image),
        lambda: images.mount(image).__enter__(),
        lambda: images.tag(image, "again:1"),
        lambda: host.containers.create(image, ["x"]),
        lambda: image.config,
        lambda: image.manifest,
        lambda: image.layers,
        lambda: image.descriptor,
        lambda: edit.squash(2),
        lambda: edit.annotate({"a": "b"}).commit("again:1"),
    ):
        with pytest.raises(ImageNotFound):
            use()
    assert not os.path.exists(tmp_path / "saved")
    assert (images.list(), os.listdir(host.state.path("blobs/sha256"))) == ([], [])


def test_an_image_that_vanishes_while_it_is_unpacked_is_whole_or_not_found(
    host: ck.Host, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.images.load(layout, tag="app:1", unpack=False)
    unpack = Extractor.unpack

    def remove_first(self: Extractor, *arguments: object) -> None:
        pid = crash.start(lambda: Images(State(host.root), lambda *_, **__: MadeImage([])).remove("app:1"))
        os.waitpid(pid, 0)
        unpack(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Extractor, "unpack", remove_first)
    with host.images.mount("app:1") as fd:
        assert sorted(os.listdir(f"/proc/self/fd/{fd}/etc")) == ["b", "c"]
    with pytest.raises(ImageNotFound):
        host.images.get("app:1")


def test_a_file_that_was_opened_can_be_read_to_its_end(host: ck.Host, layout: str) -> None:
    host.images.load(layout, tag="app:1")
    with host.images.open_file("app:1", "/etc/b") as file:
        host.images.remove("app:1")
        assert file.read() == b"2" * 100_000


def test_a_directory_has_no_content(host: ck.Host, layout: str) -> None:
    host.images.load(layout, tag="app:1")
    for read in (host.images.read_file, host.images.open_file):
        with pytest.raises(PathNotInImage, match="'/etc' is a directory"):
            read("app:1", "/etc")
