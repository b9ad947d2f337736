"""Ways into the store beside the common: other platforms, other digests, imports with changes, names of layouts."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

import containerkit as ck
from containerkit.errors import (
    CorruptLayer,
    ImageNotFound,
    InvalidOption,
    InvalidPlatform,
    PlatformMismatch,
)
from containerkit.image import model
from containerkit.image.digest import Digest
from support import crash
from support.images import MadeImage, describe, digest, make_tar, member

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

LAYER = make_tar([member("./"), member("etc/"), member("etc/a", b"1")])
ARM = {"os": "linux", "architecture": "arm64", "variant": "v8"}
EPOCH = 1_600_000_000


@pytest.fixture
def host(state_root: str) -> Iterator[ck.Host]:
    with closing(ck.Host(root=state_root)) as host:
        yield host


# Other platforms


@pytest.fixture
def arm(tmp_path: Path) -> str:
    return MadeImage([LAYER], platform=ARM).write_layout(str(tmp_path / "arm"), "x/arm:1")


def both_platforms(path: str) -> dict[str, str]:
    """A layout of one index with an image for arm64 and one for this machine: the digests of their configs."""
    here, there = MadeImage([LAYER]), MadeImage([LAYER], platform=ARM)
    here.blobs |= {**there.blobs, digest(here.manifest): here.manifest, digest(there.manifest): there.manifest}
    rows = [
        {**describe(made.manifest, made.media_type), "platform": platform}
        for made, platform in ((there, ARM), (here, {"os": "linux", "architecture": _architecture(here)}))
    ]
    here.raw = json.dumps({"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": rows}).encode()
    here.media_type = model.OCI_INDEX
    here.write_layout(path, "x/both:1")
    return {"here": digest(here.config), "there": digest(there.config)}


def _architecture(made: MadeImage) -> str:
    return str(json.loads(made.config)["architecture"])


def test_an_image_for_another_platform_is_loaded_edited_and_copied(host: ck.Host, arm: str, tmp_path: Path) -> None:
    images = host.images
    with pytest.raises(PlatformMismatch):
        images.load(arm)
    assert images.list() == []
    loaded = images.load(arm, platform="linux/arm64")
    assert str(loaded.config.platform) == "linux/arm64/v8"
    edited = images.edit("x/arm:1").configure(env={"A": "b"}).commit("arm:2")
    assert (edited.run.env, edited.config.platform) == (("A=b",), loaded.config.platform)
    assert images.copy(f"oci:{arm}", "containerkit:arm:3", platform="linux/arm64") == loaded.digest
    assert images.copy(f"oci:{arm}", "containerkit:arm:4") == loaded.digest
    with pytest.raises(PlatformMismatch):
        images.copy(f"oci:{arm}", "containerkit:arm:5", platform="linux/s390x")
    for form in ("docker-archive", "oci-archive"):
        images.save(str(tmp_path / form), "arm:2", format=form)
        images.remove("arm:2")
        with pytest.raises(PlatformMismatch):
            images.load(str(tmp_path / form))
        assert images.load(str(tmp_path / form), platform="linux/arm64").id == edited.id
        [again] = images.load_all(str(tmp_path / form), platform="linux/arm64")
        assert again.names == ("arm:2",)
    crash.expect_whole(host.state)


def test_the_platform_says_which_image_of_an_index_is_loaded(host: ck.Host, tmp_path: Path) -> None:
    ids = both_platforms(str(tmp_path / "both"))
    layout = str(tmp_path / "both")
    assert host.images.load(layout).id == ids["here"]
    assert host.images.load(layout, platform="linux/arm64").id == ids["there"]
    assert host.images.get("x/both:1").id == ids["there"]
    assert [image.id for image in host.images.load_all(layout, platform="linux/arm64")] == [ids["there"]]
    host.images.copy(f"oci:{layout}", "containerkit:copied:1", platform="linux/arm64")
    assert host.images.get("copied:1").id == ids["there"]
    host.images.copy(f"oci:{layout}", "containerkit:copied:1")
    assert host.images.get("copied:1").id == ids["here"]
    with pytest.raises(InvalidPlatform):
        host.images.load(layout, platform="linux/")


# Digests by another algorithm


def sha512(content: bytes) -> Digest:
    return Digest("sha512:" + hashlib.sha512(content).hexdigest())


def test_an_image_named_by_sha512(host: ck.Host, tmp_path: Path) -> None:
    made = MadeImage([LAYER], diff_ids=[sha512(LAYER)])
    packed = gzip.compress(LAYER, 1, mtime=0)

    def row(content: bytes, media_type: str) -> dict[str, Any]:
        return {**describe(content, media_type), "digest": sha512(content)}

    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": model.OCI_MANIFEST,
            "config": row(made.config, model.OCI_CONFIG),
            "layers": [row(packed, model.OCI_LAYER + "+gzip")],
        }
    ).encode()
    layout = tmp_path / "layout"
    (layout / "blobs" / "sha512").mkdir(parents=True)
    for content in (packed, made.config, manifest):
        (layout / "blobs" / "sha512" / sha512(content).hex).write_bytes(content)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    index = {"schemaVersion": 2, "manifests": [row(manifest, model.OCI_MANIFEST)]}
    (layout / "index.json").write_text(json.dumps(index))

    image = host.images.load(layout, tag="s:1")
    assert (image.id, image.digest) == (sha512(made.config), sha512(manifest))
    for name in ("s:1", image.id, image.id.hex, image.id.short, f"sha512:{image.id.hex[:9]}", f"s@{image.digest}"):
        assert host.images.get(name) == image
    with pytest.raises(ImageNotFound):
        host.images.get(f"sha256:{image.id.hex[:9]}")
    assert host.images.read_file(image, "/etc/a") == b"1"
    with host.images.mount(image) as fd:
        assert os.listdir(fd) == ["etc"]
    assert len(host.images.edit(image).append([LAYER]).commit("s:2").layers) == 2
    assert host.images.edit(image).annotate({"a": "b"}).commit("s:3").id == image.id
    repacked = host.images.edit(image).repack("zstd").commit("s:5")
    assert (repacked.id, repacked.layers[0].descriptor.media_type[-4:]) == (image.id, "zstd")
    assert host.images.get("s:1").digest == image.digest
    host.images.save(str(tmp_path / "saved"), "s:1", format="oci")
    assert host.images.load(tmp_path / "saved", tag="s:4").id == image.id
    assert host.images.verify() == ()
    crash.expect_whole(host.state)
    host.images.remove("s:2")
    host.images.remove(image.id)
    assert host.images.list() == []
    assert os.listdir(host.state.path("blobs/sha512")) == []


# Imports


def root(path: Path) -> str:
    (path / "etc").mkdir(parents=True)
    (path / "etc" / "a").write_bytes(b"1")
    return str(path)


def test_an_import_takes_what_commit_takes(host: ck.Host, tmp_path: Path) -> None:
    image = host.images.import_rootfs(
        root(tmp_path / "root"),
        "made:1",
        changes=['CMD ["/bin/x"]', "ENV A=b", "LABEL team=y"],
        message="from a directory",
        platform="linux/arm64/v8",
    )
    assert (image.run.command, image.run.labels, image.run.env[-1]) == (("/bin/x",), {"team": "y"}, "A=b")
    assert str(image.config.platform) == "linux/arm64/v8"
    assert host.images.history(image)[0].comment == "from a directory"
    assert image.config.created == ""
    with pytest.raises(InvalidOption, match="FROM"):
        host.images.import_rootfs(tmp_path / "root", "made:2", changes=["FROM x"])
    with pytest.raises(InvalidPlatform):
        host.images.import_rootfs(tmp_path / "root", "made:2", platform="linux//")
    assert host.images.list() == [image]
    crash.expect_whole(host.state)


def test_the_date_of_an_import_and_of_a_layer(host: ck.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root(tmp_path / "root")
    first = host.images.import_rootfs(path, "plain:1")
    os.utime(f"{path}/etc/a", (EPOCH + 5, EPOCH + 5))
    assert host.images.import_rootfs(path, "plain:1") != first
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
    imported, appended = [], []
    for seconds in (5, 6):
        os.utime(f"{path}/etc/a", (EPOCH + seconds, EPOCH + seconds))
        imported.append(host.images.import_rootfs(path, "dated:1").digest)
        appended.append(host.images.edit("plain:1").append(path).commit("appended:1").digest)
    assert (len(set(imported)), len(set(appended))) == (1, 1)
    config = host.images.get("dated:1").config
    assert config.created == config.history[0].created == "2020-09-13T12:26:40Z"
    assert {file.mtime for file in host.images.tree("dated:1").files} == {EPOCH * 10**9}
    assert host.images.import_rootfs(path, "later:1", epoch=EPOCH + 1).digest not in imported
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    for use in (lambda: host.images.import_rootfs(path, "x"), lambda: host.images.edit("plain:1").append(path)):
        with pytest.raises(InvalidOption, match="SOURCE_DATE_EPOCH"):
            use()


@pytest.mark.parametrize("pack", [bytes, lambda tar: gzip.compress(tar, mtime=0)], ids=["plain", "gzip"])
def test_an_import_from_a_stream(host: ck.Host, tmp_path: Path, pack: Any) -> None:
    packed = pack(LAYER)
    (tmp_path / "tar").write_bytes(packed)
    by_path = host.images.import_rootfs(tmp_path / "tar", "path:1")
    with open(tmp_path / "tar", "rb") as file:
        assert host.images.import_rootfs(file, "file:1") == by_path
        assert not file.closed
    assert host.images.import_rootfs(io.BytesIO(packed), "memory:1") == by_path
    reading, writing = os.pipe()
    with open(writing, "wb") as way_in, open(reading, "rb", buffering=0) as way_out:
        way_in.write(packed)
        way_in.close()
        assert host.images.import_rootfs(way_out, "pipe:1") == by_path
    with pytest.raises(CorruptLayer):
        host.images.import_rootfs(io.BytesIO(b"no tar" * 1000), "none:1")


# Names


def test_a_layout_is_loaded_by_its_own_word_for_the_image(host: ck.Host, tmp_path: Path) -> None:
    made = MadeImage([LAYER])
    layout = made.write_layout(str(tmp_path / "layout"), "latest")
    assert host.images.load(layout).names == ()
    assert host.images.load(layout, tag="latest").names == ("latest:latest",)
    odd = made.write_layout(str(tmp_path / "odd"), "v1.0+x")
    assert host.images.load(odd, tag="v1.0+x").id == digest(made.config)
    named = made.write_layout(str(tmp_path / "named"), "x/y:1")
    assert "x/y:1" in host.images.load(named, tag="x/y:1").names
