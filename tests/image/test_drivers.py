"""Storage drivers: the conformance check on real file systems, the choice of one, containers on each."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.errors import NotConformant, StateError, Unsupported
from containerkit.image.conformance import check
from containerkit.image.conformance_cases import LAYERS
from containerkit.image.drivers import choose, driver
from containerkit.image.drivers.copy import Copy
from containerkit.image.drivers.overlay import Overlay
from containerkit.image.layers.extract import Extractor
from containerkit.linux.clone import clone_tree
from containerkit.state import State, driver_of
from support import facts
from support.disks import disk, overlay
from support.images import MadeImage, make_tar, member
from support.rootfs import tar
from support.trees import differences, fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", autouse=True)
def disks() -> Iterator[dict[str, str]]:
    """Mounted before any test starts, for what a test mounts must be gone with it; without those this host lacks."""
    mounted = {}
    with contextlib.ExitStack() as stack:
        for kind in ("btrfs", "xfs"):
            with contextlib.suppress(pytest.skip.Exception):
                mounted[kind] = stack.enter_context(disk(kind, 1 << 30))
        yield mounted


@pytest.fixture
def place(request: pytest.FixtureRequest, session_directory: str, disks: dict[str, str]) -> Iterator[str]:
    """An empty directory on the file system that the parameter names."""
    kind = request.param
    with contextlib.ExitStack() as stack:
        if kind in {"btrfs", "xfs"}:
            at = disks.get(kind) or facts.skip(f"{kind}: mkfs.{kind}, and a kernel that mounts it") or ""
        elif kind == "overlay":
            at = stack.enter_context(overlay())
        else:
            at = {"here": session_directory, "memory": "/dev/shm"}[kind]
        yield stack.enter_context(tempfile.TemporaryDirectory(dir=at))


def on(*places: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", places, indirect=True)


@on("here", "memory", "btrfs", "xfs")
def test_overlay_conforms(place: str) -> None:
    check(driver("overlay"), place)


@on("here", "memory", "btrfs", "xfs", "overlay")
def test_copy_conforms(place: str) -> None:
    check(driver("copy"), place)


@on("btrfs")
def test_btrfs_conforms(place: str) -> None:
    check(driver("btrfs"), place)


@on("here", "memory")
def test_fuse_overlayfs_conforms(place: str) -> None:
    facts.require("fuse-overlayfs")
    check(driver("fuse-overlayfs"), place)


class ForgetsDeletions(Copy):
    """Lays layers upon each other as tar(1) would."""

    def extractor(self, directory: str, below: Sequence[str] | None) -> Extractor:  # type: ignore[override]  # noqa: ARG002
        return Extractor(directory)


class TouchesWhatLiesBelow(Copy):
    """Shares directories between trees."""

    def start(self, directory: str, below: str | None) -> None:
        if below is None:
            os.mkdir(directory)
        else:
            os.rename(below, directory)
            clone_tree(directory, below)
            with open(f"{below}/etc/kept", "w") as file:
                file.write("changed")


class SetsNoAttributes(Overlay):
    def extractor(self, directory: str, below: Sequence[str] | None) -> Extractor:
        class Lazy(Extractor):
            def _dress_directory(self, fd: int, attributes: object) -> None:
                pass

        return Lazy(directory, below)


@pytest.mark.parametrize(
    ("broken", "path"), [(ForgetsDeletions, ""), (TouchesWhatLiesBelow, "/etc/kept"), (SetsNoAttributes, "/")]
)
@on("here")
def test_a_broken_driver_is_found_out(broken: type[Copy | Overlay], path: str, place: str) -> None:
    with pytest.raises(NotConformant) as caught:
        check(broken(), place)
    assert broken.name in str(caught.value)
    if path:
        assert caught.value.path == path
    assert os.listdir(place) == []


@on("here")
def test_overlay_is_chosen_and_remembered(place: str) -> None:
    root = State(place).root
    assert driver_of(root) == ""
    assert (choose(root).name, driver_of(root)) == ("overlay", "overlay")
    assert choose(root, "overlay").name == "overlay"
    assert os.listdir(f"{root}/ingest") == []


@on("overlay")
def test_a_state_root_on_an_overlay_gets_copies(place: str) -> None:
    root = State(place).root
    with pytest.raises(Unsupported, match="'copy'"):
        choose(root, "overlay")
    assert choose(root).name == "copy"


@on("here")
def test_an_empty_state_root_may_change_its_driver(place: str) -> None:
    root = State(place).root
    assert choose(root).name == "overlay"
    assert (choose(root, "copy").name, driver_of(root), choose(root).name) == ("copy", "copy", "copy")
    os.mkdir(f"{root}/layers/{'0' * 64}")
    with pytest.raises(StateError, match="holds layers of the driver copy, not of overlay"):
        choose(root, "overlay")
    os.unlink(f"{root}/driver")
    assert driver_of(root) == "overlay"  # as state roots of older versions


@on("here")
def test_btrfs_elsewhere_is_refused(place: str) -> None:
    with pytest.raises(Unsupported, match="is not on btrfs"):
        choose(State(place).root, "btrfs")


@pytest.mark.parametrize(
    ("name", "remedy"), [("aufs", "'overlay'"), ("devicemapper", "'overlay'"), ("vfs", "'copy'"), ("floppy", "btrfs")]
)
def test_drivers_that_are_gone_name_their_replacement(name: str, remedy: str) -> None:
    with pytest.raises(Unsupported) as caught:
        driver(name)
    assert name in caught.value.reason
    assert remedy in caught.value.remedy


@on("here", "xfs")
def test_a_clone_has_everything(place: str, busybox_root: str) -> None:
    source = f"{place}/source"
    clone_tree(busybox_root, source)
    with open(f"{source}/hole", "wb") as file:
        file.seek(1 << 26)
        file.write(b"end")
    os.mkfifo(f"{source}/fifo")
    os.setxattr(f"{source}/tmp", "trusted.t", b"1")
    clone_tree(source, f"{place}/clone")
    assert differences(fields(f"{place}/clone"), fields(source)) == []
    assert os.stat(f"{place}/clone/hole").st_blocks < 1024
    assert os.stat(f"{place}/clone/bin/busybox").st_nlink == os.stat(f"{source}/bin/busybox").st_nlink > 100


@on("here")
def test_a_clone_of_the_deepest_tree(place: str) -> None:
    """As deep as layers may go, with a file of several names at its end, and with few descriptors open."""
    deep = "/".join(["d"] * 511)
    os.makedirs(f"{place}/source/{deep}", 0o711)
    with open(f"{place}/source/{deep}/file", "w") as file:
        file.write("x")
    os.link(f"{place}/source/{deep}/file", f"{place}/source/d/twin")
    clone_tree(f"{place}/source", f"{place}/clone")
    assert differences(fields(f"{place}/clone"), fields(f"{place}/source")) == []
    driver("copy").remove(f"{place}/clone")
    driver("copy").remove(f"{place}/source")


@pytest.mark.parametrize(("place", "name"), [("here", "copy"), ("btrfs", "btrfs"), ("overlay", "")], indirect=["place"])
def test_containers_with_a_tree_of_their_own(place: str, name: str, busybox_root: str) -> None:
    with contextlib.closing(ck.Host(root=place)) as host:
        choose(host.root, name)
        image = host.images.import_rootfs(busybox_root, tag="busybox:1")
        before = fields(image.lowers[0])
        done = host.run(image, ["sh", "-c", "echo x > /etc/os-release; rm -r /usr; cat /etc/os-release"], check=True)
        assert done.stdout == b"x\n"
        assert os.listdir(f"{host.root}/containers") == []
        container = host.containers.create(image, ["sh", "-c", "echo again >> /n; cat /n"], detach=True)
        try:
            assert "rootfs" in ck.explain(container)
            assert not os.path.exists(container.directory)
            for _ in range(2):
                container.start()
                assert container.wait() == 0
            assert container.logs() == b"again\nagain\nagain\n"  # the root is kept over a restart
            assert sorted(os.listdir(f"{container.directory}/rootfs/tmp")) == []
        finally:
            container.remove(force=True)
        assert os.listdir(f"{host.root}/containers") == []
        read_only = host.run(image, ["sh", "-c", "touch /x"], read_only=True)
        assert b"Read-only file system" in read_only.stderr
        assert differences(fields(image.lowers[0]), before) == []
        host.images.remove(image)
        assert os.listdir(f"{host.root}/layers") == []


@on("here")
def test_containers_on_fuse_overlayfs_are_refused_with_a_remedy(place: str, busybox_root: str) -> None:
    facts.require("fuse-overlayfs")
    with contextlib.closing(ck.Host(root=place)) as host:
        choose(host.root, "fuse-overlayfs")
        host.images.import_rootfs(busybox_root, tag="busybox:1")
        with pytest.raises(Unsupported, match="'copy'"):
            host.run("busybox:1", ["true"])


def test_an_image_of_150_layers_starts(host: ck.Host, busybox_root: str, session_directory: str) -> None:
    """With paths so long that one page of mount options could not hold them all."""
    with tempfile.TemporaryDirectory(dir=session_directory) as scratch:
        with open(tar(busybox_root, f"{scratch}/base.tar"), "rb") as file:
            base = file.read()
        made = MadeImage([base, *(make_tar([member(f"layer-{number}", b"x")]) for number in range(149))])
        image = host.images.load(made.write_layout(f"{scratch}/layout"))
    assert len(image.lowers) == 150
    assert sum(map(len, image.lowers)) > 8192
    assert host.run(image, ["sh", "-c", "ls -d /layer-* | wc -l"], check=True).stdout == b"149\n"
    fd = driver("overlay").view(image.lowers)
    try:
        assert len(os.listdir(f"/proc/self/fd/{fd}/.")) > 149
    finally:
        os.close(fd)


@on("here")
def test_a_view_follows_no_redirect(place: str) -> None:
    """A directory that says it was renamed may otherwise show any other of the layers below."""
    for path in ("lower/secret/file", "upper/open"):
        os.makedirs(f"{place}/{path}")
    os.setxattr(f"{place}/upper/open", "trusted.overlay.redirect", b"secret")
    fd = driver("overlay").view((f"{place}/upper", f"{place}/lower"))
    try:
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/self/fd/{fd}/open")
    finally:
        os.close(fd)


def test_the_cases_are_all_there() -> None:
    kinds = {item.kind for layer in LAYERS for item in layer}
    assert len(kinds) == 10
