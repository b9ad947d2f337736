"""Unpacked layers that are not what their blobs say, and housekeeping on every driver and at every depth."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from typing import TYPE_CHECKING

import pytest

import containerkit as ck
from containerkit.image.drivers import choose
from containerkit.image.images import Images
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.gc import gc
from containerkit.image.store.inventory import disk_bytes
from containerkit.image.store.leases import LAYER, hold, lease
from containerkit.image.store.usage import df
from containerkit.image.store.verify import verify
from containerkit.linux.tree import remove_tree
from containerkit.state import State
from support import facts
from support.disks import disk
from support.images import MadeImage, digest, hardlink, make_tar, member, symlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kernel

LOWER = make_tar(
    [
        member("usr/bin/a", b"a" * 5000, mode=0o4755),
        member("dir/", mode=0o2775, uid=3, gid=4),
        member("dir/gone", b"1"),
        member("dir/kept", b"k" * (1 << 20)),
        member("shut/x", b"1"),
        symlink("bin", "usr/bin"),
        symlink("link", "dir/kept"),
        member("empty"),
    ]
)
UPPER = make_tar(
    [
        member("bin/b", b"b" * 300),  # through the symlink below
        member("dir/.wh.gone"),
        member("shut/"),
        member("shut/.wh..wh..opq"),
        member("shut/y", b"2"),
        hardlink("second", "dir/kept"),  # copied up
        member("one", b"one"),
        hardlink("two", "one"),
        member("top/only/deep", b"3"),
    ]
)
DRIVERS = ("overlay", "copy", "btrfs")


@pytest.fixture(scope="module", autouse=True)
def btrfs() -> Iterator[str]:
    """Mounted before any test starts, for what a test mounts must be gone with it."""
    with contextlib.ExitStack() as stack:
        at = ""
        with contextlib.suppress(pytest.skip.Exception):
            at = stack.enter_context(disk("btrfs", 1 << 30))
        yield at


@pytest.fixture(params=DRIVERS)
def root(request: pytest.FixtureRequest, session_directory: str, btrfs: str) -> Iterator[str]:
    """A state root of one driver, empty of what is under way in the end."""
    if request.param == "btrfs" and not btrfs:
        facts.skip("mkfs.btrfs, and a kernel that mounts btrfs")
    at = tempfile.mkdtemp(dir=btrfs if request.param == "btrfs" else session_directory)
    with contextlib.closing(State(at)) as state:
        choose(state.root, request.param)
        yield at
        assert os.listdir(state.path("ingest")) == []
    remove_tree(at)


@pytest.fixture
def state(root: str) -> Iterator[State]:
    with contextlib.closing(State(root)) as state:
        yield state


def images_of(state: State, remote: MadeImage) -> Images:
    return Images(state, lambda *_, **__: remote)


def pulled(state: State) -> tuple[ck.Image, str]:
    """An image, and the tree of its upper layer."""
    image = images_of(state, MadeImage([LOWER, UPPER])).pull("app")
    return image, image.lowers[0]


def rewrite(path: str, content: bytes) -> None:
    """Other content of the same length at the same time."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def unlink_hard(tree: str) -> None:
    shutil.copy2(f"{tree}/two", f"{tree}/new")
    os.rename(f"{tree}/new", f"{tree}/two")


def and_time(change: Callable[[str], object], *parents: str) -> Callable[[str], None]:
    """The change, with the times of these directories as they were."""

    def changed(tree: str) -> None:
        times = [(f"{tree}/{name}", os.stat(f"{tree}/{name}")) for name in parents]
        change(tree)
        for path, status in times:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return changed


@pytest.mark.parametrize(
    ("damage", "path", "what"),
    [
        (lambda tree: rewrite(f"{tree}/usr/bin/b", b"EVIL"), "/usr/bin/b", "other content"),
        (lambda tree: os.truncate(f"{tree}/usr/bin/b", 3), "/usr/bin/b", "3 bytes, not 300"),
        (lambda tree: os.chmod(f"{tree}/top/only/deep", 0o4700), "/top/only/deep", "mode 4700"),
        (lambda tree: os.chown(f"{tree}/one", 7, 0), "/one", "belongs to 7:0"),
        (lambda tree: os.utime(f"{tree}/top"), "/top", "time"),
        (lambda tree: os.setxattr(f"{tree}/top", "user.x", b"y"), "/top", "attributes"),
        (and_time(lambda tree: os.unlink(f"{tree}/one"), ""), "/one", "not there"),
        (and_time(lambda tree: shutil.rmtree(f"{tree}/top/only"), "top"), "/top/only", "not there"),
        (and_time(lambda tree: os.mkdir(f"{tree}/top/new"), "top"), "/top/new", "does not belong"),
        (and_time(lambda tree: os.mkfifo(f"{tree}/zz"), ""), "/zz", "does not belong"),
        (and_time(unlink_hard, ""), "/two", "hard link"),
        (and_time(lambda tree: os.replace(f"{tree}/one", f"{tree}/shut/y"), "", "shut"), "/one", "not there"),
    ],
)
def test_every_damage_of_a_layer_is_told_and_repaired(
    state: State, damage: Callable[[str], object], path: str, what: str
) -> None:
    image, tree = pulled(state)
    assert verify(state) == []
    damage(tree)
    [problem] = verify(state)
    chain_id = image.layers[1].chain_id
    assert (problem.kind, problem.subject, problem.image) == ("layer-damaged", chain_id, image.id)
    assert (problem.path, problem.repaired) == (path, False)
    assert what in problem.message
    assert verify(state, deep=False) == []
    assert [(each.path, each.repaired) for each in verify(state, repair=True)] == [(path, True)]
    assert verify(state) == []


def test_a_damaged_lower_layer_is_not_told_of_those_above(state: State) -> None:
    image, _ = pulled(state)
    lower = state.path("layers", image.layers[0].chain_id.hex)
    rewrite(f"{lower}/dir/kept", b"EVIL")
    os.unlink(f"{lower}/link")
    [problem] = verify(state)
    assert (problem.subject, problem.path) == (image.layers[0].chain_id, "/dir/kept")
    assert "2 more" in problem.message
    assert verify(state, repair=True)[0].repaired
    assert verify(state) == []


def test_a_mark_of_overlay_belongs_to_the_layer(session_directory: str) -> None:
    with tempfile.TemporaryDirectory(dir=session_directory) as at, contextlib.closing(State(at)) as state:
        choose(at, "overlay")
        _, tree = pulled(state)
        os.removexattr(f"{tree}/shut", "trusted.overlay.opaque")
        [problem] = verify(state, repair=True)
        assert (problem.path, problem.repaired) == ("/shut", True)
        and_time(lambda tree: os.unlink(f"{tree}/dir/gone"), "dir")(tree)
        assert [each.path for each in verify(state, repair=True)] == ["/dir/gone"]
        assert stat.S_ISCHR(os.lstat(f"{tree}/dir/gone").st_mode)


def test_a_layer_in_use_is_told_and_left(state: State) -> None:
    image, tree = pulled(state)
    rewrite(f"{tree}/one", b"EVIL")
    state.database.execute("INSERT INTO containers VALUES ('c1', 'worker', ?, '{}', 0)", (image.id,))
    [problem] = verify(state, repair=True)
    assert not problem.repaired
    assert "worker" in problem.message
    state.database.execute("DELETE FROM containers")
    with lease(state):
        hold(state.root, LAYER, image.layers[1].chain_id)
        assert [each.repaired for each in verify(state, repair=True)] == [False]
    assert [each.repaired for each in verify(state, repair=True)] == [True]
    assert verify(state) == []


def test_a_layer_without_its_blob_is_not_judged(state: State) -> None:
    image, tree = pulled(state)
    rewrite(f"{tree}/one", b"EVIL")
    blob = BlobStore(state.root).path(image.layers[1].descriptor.digest)
    os.rename(blob, f"{blob}.away")
    assert {problem.kind for problem in verify(state)} == {"blob-missing", "foreign-file"}
    os.rename(f"{blob}.away", blob)
    assert [problem.kind for problem in verify(state)] == ["layer-damaged"]


def test_a_layer_that_is_not_unpacked_is_no_problem(state: State) -> None:
    image, tree = pulled(state)
    lower = state.path("layers", image.layers[0].chain_id.hex)
    driver = choose(state.root)
    driver.remove(lower)
    assert verify(state) == []
    rewrite(f"{tree}/one", b"EVIL")
    assert [problem.path for problem in verify(state, repair=True)] == ["/one"]
    assert verify(state) == []
    driver.remove(tree)
    assert verify(state) == []
    assert os.listdir(state.path("layers")) == []


def test_df_counts_what_a_container_has_written(root: str, busybox_root: str) -> None:
    with contextlib.closing(ck.Host(root=root)) as host:
        host.images.import_rootfs(busybox_root, "busybox:1")
        container = host.containers.create("busybox:1", ["dd", "if=/dev/urandom", "of=/big", "bs=1M", "count=3"])
        container.start()
        assert container.wait(60) == 0
        os.sync()  # btrfs gives out blocks late
        [usage] = host.images.df().containers
        assert 3 << 20 <= usage.writable <= usage.size
        assert usage.writable == disk_bytes(f"{container.directory}/{'rootfs' if container.record.clone else 'upper'}")
        assert host.images.verify() == ()
        container.remove()
        host.images.remove("busybox:1")
        usage_after = host.images.df()
        assert (usage_after.writable, usage_after.blobs, usage_after.layers) == (0, 0, 0)


def test_collections_and_figures_agree(state: State) -> None:
    pulled(state)
    usage = df(state)
    assert usage.layers > 2 << 20 if choose(state.root).whole else usage.layers > 1 << 20
    state.database.execute("DELETE FROM images")
    expected = df(state).unneeded
    collected = gc(state)
    assert collected.bytes == expected == usage.blobs + usage.layers
    assert len(collected.layers) == 2
    assert os.listdir(state.path("layers")) == []


# Depth


def make_deep(path: str, depth: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("nested", dir_fd=fd)
        below = os.open("nested", os.O_RDONLY, dir_fd=fd)
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        os.close(fd)
        fd = below
    os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_trees_of_any_depth_are_counted_and_removed(session_directory: str) -> None:
    at = tempfile.mkdtemp(dir=session_directory)
    make_deep(at, 3000)
    before, most = descriptors(), 0
    opened = os.open

    def counted(*args: object, **options: object) -> int:
        nonlocal most
        fd: int = opened(*args, **options)  # type: ignore[arg-type]
        most = max(most, fd)
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", counted)
        os.mkdir(f"{at}/nested/sibling")
        output = subprocess.run(["du", "-s", "-B1", at], check=True, capture_output=True).stdout
        assert disk_bytes(at) == int(output.split()[0])
        remove_tree(at)
    assert not os.path.exists(at)
    assert descriptors() == before
    assert most < before + 200


def test_a_tree_that_several_remove_at_once_is_gone(session_directory: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    at = tempfile.mkdtemp(dir=session_directory)
    for name in "abc":
        os.mkdir(f"{at}/{name}")
        make_deep(f"{at}/{name}", 400)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(remove_tree, at) for _ in range(4)]:
            done.result()
    assert not os.path.exists(at)


def test_links_are_removed_and_not_followed(session_directory: str) -> None:
    with tempfile.TemporaryDirectory(dir=session_directory) as at:
        os.makedirs(f"{at}/kept/inside")
        os.makedirs(f"{at}/tree/below")
        os.symlink("../../kept", f"{at}/tree/below/link")
        remove_tree(f"{at}/tree")
        assert os.listdir(at) == ["kept"]
        os.symlink("kept", f"{at}/link")
        remove_tree(f"{at}/link")
        remove_tree(f"{at}/nothing")
        assert os.listdir(f"{at}/kept") == ["inside"]


def test_a_container_that_nests_without_end_can_be_counted_and_removed(root: str, busybox_root: str) -> None:
    with contextlib.closing(ck.Host(root=root)) as host:
        host.images.import_rootfs(busybox_root, "busybox:1")
        container = host.containers.create("busybox:1", ["true"])
        container.start()
        assert container.wait(60) == 0
        make_deep(f"{container.directory}/{'rootfs' if container.record.clone else 'upper'}", 1500)
        assert [usage.name for usage in host.images.df().containers] == [container.name]
        assert host.images.gc().blobs == ()
        container.remove()
        assert os.listdir(f"{root}/containers") == []


# Images without layers


def test_an_image_without_layers_is_an_empty_tree(state: State) -> None:
    images = images_of(state, MadeImage([]))
    images.pull("empty")
    with images.mount("empty") as fd:
        assert os.listdir(f"/proc/self/fd/{fd}") == []
        assert stat.S_IMODE(os.stat(f"/proc/self/fd/{fd}").st_mode) == 0o755
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir(f"/proc/self/fd/{fd}/x")
    flat = images.edit("empty").flatten().commit("flat")
    [layer] = flat.layers
    assert layer.diff_id == digest(bytes(1024))
    assert len(flat.config.history) == 1
    with images.mount(flat) as fd:
        assert os.listdir(f"/proc/self/fd/{fd}") == []
    with pytest.raises(ValueError, match="squash 0"):
        images.edit("empty").squash(0)
    assert verify(state) == []
