"""The verbs of ``host.images`` on real images, as docs/images.md shows them."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.errors import ImageNotFound, PathNotInImage
from containerkit.image.images import Images
from containerkit.image.limits import ImageLimits
from containerkit.registry import serve
from support import rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.registry import Registry

pytestmark = pytest.mark.kernel


@pytest.fixture
def host(state_root: str, tmp_path: Path) -> Iterator[ck.Host]:
    """A host with ``base:1`` and, on top of it, ``base:2``."""
    host = ck.Host(root=state_root)
    host.images.import_rootfs(rootfs.busybox_rootfs(str(tmp_path / "busybox")), tag="base:1")
    app = tmp_path / "app"
    (app / "etc").mkdir(parents=True)
    (app / "etc" / "motd").write_text("hello\n")
    (app / "etc" / "also").symlink_to("motd")
    edit = host.images.edit("base:1").append(str(app), created_by="copy app")
    edit.configure(labels={"team": "x"}).commit("base:2")
    yield host
    host.close()


def test_looking_in(host: ck.Host) -> None:
    steps = host.images.history("base:2")
    assert [step.created_by for step in steps][-1] == "copy app"
    tree = host.images.tree("base:2")
    assert {file.layer for file in tree.files if file.path in ("/etc/motd", "/bin/busybox")} == {0, 1}
    assert host.images.read_file("base:2", "/etc/also") == b"hello\n"
    with host.images.open_file("base:2", "/etc/motd") as file:
        assert file.read() == b"hello\n"
    with pytest.raises(PathNotInImage, match="/etc/motd"):
        host.images.read_file("base:1", "/etc/motd")
    changes = [(change.kind, change.path) for change in host.images.diff("base:1", "base:2")]
    assert ("A", "/etc/motd") in changes
    assert not [change for change in changes if change[0] == "D"]


def test_a_mounted_image_is_a_directory_that_cannot_be_written(host: ck.Host) -> None:
    with host.images.mount("base:2") as fd:
        assert "bin" in os.listdir(f"/proc/self/fd/{fd}")
        with open(f"/proc/self/fd/{fd}/etc/motd") as file:
            assert file.read() == "hello\n"
        with pytest.raises(OSError, match="Read-only"), open(f"/proc/self/fd/{fd}/new", "w"):
            pass


def test_save_and_load_all(host: ck.Host, tmp_path: Path) -> None:
    archive = str(tmp_path / "all.tar")
    host.images.save(archive, "base:1", "base:2")
    with tarfile.open(archive) as tar:
        assert "manifest.json" in tar.getnames()
    with host_at(tmp_path / "other") as other:
        loaded = other.images.load_all(archive)
        assert {image.id for image in loaded} == {host.images.get(name).id for name in ("base:1", "base:2")}
        with open(archive, "rb") as file:
            assert other.images.load(file, tag="base:2").names == ("base:2",)
        assert other.run("base:2", ["cat", "/etc/also"]).stdout == b"hello\n"


def test_copies_between_the_store_a_registry_and_a_layout(host: ck.Host, registry: Registry, tmp_path: Path) -> None:
    name = registry.name("workbench:1")
    digest = host.images.copy("containerkit:base:2", f"docker://{name}")
    assert digest == host.images.get("base:2").digest
    assert host.images.copy(f"docker://{name}", f"oci:{tmp_path}/layout:x") == digest
    assert host.images.copy(f"oci:{tmp_path}/layout:x", "containerkit:copied:1") == digest
    assert host.images.get("copied:1").id == host.images.get("base:2").id
    host.images.tag("base:1", registry.name("pushed:1"))
    assert host.images.push(registry.name("pushed:1")) == host.images.get("base:1").digest


def test_a_host_serves_its_images(host: ck.Host, tmp_path: Path) -> None:
    with serve(images=host.images) as served:
        for name in ("base:2", "library/base:2"):
            target = f"oci:{tmp_path}/{name.replace('/', '-')}"
            command = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false"]
            command += [f"docker://{served.host}/{name}", target]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        with host_at(tmp_path / "other") as other:
            assert other.images.pull(f"{served.host}/base:2").digest == host.images.get("base:2").digest
            with pytest.raises(ck.errors.ManifestUnknown):
                other.images.pull(f"{served.host}/base:missing")
            with pytest.raises(ck.errors.RegistryRejected, match="read-only"):
                other.images.copy(f"docker://{served.host}/base:2", f"docker://{served.host}/new:1")


def test_edits(host: ck.Host) -> None:
    images = host.images
    flat = images.edit("base:2").flatten().commit("flat:1")
    assert len(flat.layers) == 1
    assert host.run(flat, ["cat", "/etc/motd"]).stdout == b"hello\n"
    assert images.diff("base:2", "flat:1") == ()
    assert len(images.edit("base:2").squash(2).commit("squashed:1").layers) == 1
    newer = images.edit("base:1").configure(env={"NEW": "base"}).commit("base:new")
    rebased = images.edit("base:2").rebase("base:1", newer).commit("rebased:1")
    assert host.run(rebased, ["cat", "/etc/motd"]).stdout == b"hello\n"
    same = images.edit("base:2").rebase(images.get("base:1").manifest, newer.manifest).commit()
    assert same.id == rebased.id
    with pytest.raises(ImageNotFound):
        images.edit("base:2").rebase("base:1", "missing:1")
    again = images.edit("base:1").configure(env={"NEW": "base"}).commit()
    assert again.id == newer.id


def test_housekeeping(host: ck.Host) -> None:
    images = host.images
    nameless = images.edit("base:2").configure(labels={"nameless": "1"}).commit()
    with ck.Container("base:1", ["sleep", "1000"], host=host):
        assert set(images.prune().images) == {nameless.id}
        assert images.prune(labels=["team=other"], all=True).images == ()
        gone = images.get("base:2").id
        assert set(images.prune(labels=["team=x"], all=True).images) == {gone}
        with pytest.raises(ImageNotFound):
            images.get("base:2")
        images.prune(all=True)
        assert images.get("base:1").names == ("base:1",)
    assert images.verify() == ()
    assert [usage.id for usage in images.df().images] == [images.get("base:1").id]
    assert images.gc(dry_run=True, max_bytes=0).images == (images.get("base:1").id,)
    with images.lease("mine"):
        images.read_file("base:1", "/bin/busybox")
    assert images.end_lease("mine") is True
    assert images.end_lease("mine") is False


def test_limits_and_platforms_reach_the_installer(registry: Registry, host: ck.Host, tmp_path: Path) -> None:
    name = registry.name("limited:1")
    host.images.copy("containerkit:base:2", f"docker://{name}")
    with host_at(tmp_path / "strict", limits=ImageLimits(entries=2)) as strict:
        with pytest.raises(ck.errors.TooManyEntries):
            strict.images.pull(name)
        assert strict.images.list() == []
    with pytest.raises(ck.errors.PlatformMismatch):
        host.images.pull(name, platform="linux/s390x")


def test_containers_become_images(host: ck.Host, tmp_path: Path) -> None:
    with ck.Container("base:2", ["sleep", "1000"], host=host) as container:
        container.exec(["sh", "-c", "echo new > /etc/motd; rm /etc/also"], check=True)
        assert {(change.kind, change.path) for change in container.diff()} >= {("C", "/etc/motd"), ("D", "/etc/also")}
        image = container.commit("base:3", changes=["ENV A=b"])
        container.export(str(tmp_path / "root.tar"))
    assert host.run(image, ["sh", "-c", "cat /etc/motd; echo $A; test -e /etc/also || echo gone"]).stdout == (
        b"new\nb\ngone\n"
    )
    with tarfile.open(tmp_path / "root.tar") as tar:
        names = {name.removeprefix("./") for name in tar.getnames()}
    assert "etc/motd" in names
    assert "etc/also" not in names


@pytest.mark.parametrize("driver", ["overlay", "copy"])
def test_a_driver_by_name(driver: str, tmp_path: Path) -> None:
    with host_at(tmp_path / driver, driver=driver) as host:
        host.images.import_rootfs(rootfs.busybox_rootfs(str(tmp_path / "busybox")), tag="base:1")
        with ck.Container("base:1", ["sleep", "1000"], host=host) as container:
            container.exec(["sh", "-c", "echo x > /x; rm /bin/ls"], check=True)
            assert {(change.kind, change.path) for change in container.diff()} == {
                ("A", "/x"),
                ("C", "/bin"),
                ("D", "/bin/ls"),
            }
            image = container.commit("base:2")
        with host.images.mount(image) as fd:
            assert not os.path.lexists(f"/proc/self/fd/{fd}/bin/ls")
        assert host.run(image, ["cat", "/x"]).stdout == b"x\n"


def test_the_page_shows_no_verb_that_is_not_there() -> None:
    with open(os.path.join(os.path.dirname(ck.__file__), "..", "docs", "images.md"), encoding="utf-8") as file:
        page = file.read()
    verbs = set(re.findall(r"host\.images\.([a-z_]+)\(", page))
    assert verbs
    assert [verb for verb in verbs if not hasattr(Images, verb)] == []


def host_at(root: Path, **options: object) -> HostAt:
    return HostAt(str(root), options)


class HostAt:
    """A host of its own that is closed, and whose root is removed, at the end."""

    def __init__(self, root: str, options: dict[str, object]) -> None:
        self._host = ck.Host(root=root, **options)  # type: ignore[arg-type]

    def __enter__(self) -> ck.Host:
        return self._host

    def __exit__(self, *_: object) -> None:
        self._host.close()
