"""The merged tree of several layers, mounted as overlay, against what ``umoci unpack`` makes of the same image."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.image.images import Images
from containerkit.linux.mount import new_mount
from containerkit.state import State
from support.images import MadeImage, hardlink, make_tar, member, snapshot, symlink

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not shutil.which("umoci"), reason="umoci is not installed"),
]

# cap_net_raw+ep, revision 2 with no root id (linux/capability.h, struct vfs_cap_data)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
TIME = 4  # where a snapshot has the mtime
LONG = "long/" + "n" * 120 + "/" + "m" * 200

BASE = [
    member("./", mode=0o755),
    member("etc/", mode=0o755),
    member("etc/base", b"base", mode=0o640, uid=1000, gid=1001),
    member("etc/removed", b"x"),
    member("etc/replaced", b"old"),
    member("usr/", uid=5, gid=6, mtime=1_400_000_000.25),
    member("usr/bin/", mode=0o2755, gid=7),
    member("usr/bin/su", b"\x7fELF", mode=0o4755),
    member("usr/bin/ping", b"\x7fELF", mode=0o755, xattrs={"security.capability": CAPABILITY}),
    member("usr/share/", mode=0o711, uid=9, xattrs={"user.dir": b"d"}),
    symlink("bin", "usr/bin"),
    symlink("sbin", "/usr/bin"),
    symlink("dangling", "/nowhere/at/all", uid=42),
    hardlink("etc/base-link", "etc/base"),
    member("etc/attributed", b"a", xattrs={"user.one": b"1\n\xff", "trusted.two": b"2"}),
    member("dev/"),
    member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    member("dev/loop", type=tarfile.BLKTYPE, devmajor=7, devminor=300, mode=0o660, gid=6),
    member("dev/pipe", type=tarfile.FIFOTYPE, mode=0o1622),
    member("tmp/", mode=0o1777),
    member("empty", b""),
    member("fraction", b"t", mtime=1_500_000_000.123456),
    member("future", b"t", mtime=4_000_000_000),
    member("großer name ✓", b"u"),
    member("big-owner", b"o", uid=3_000_000_000, gid=2_999_999_999),
    member("long/"),
    member("long/" + "n" * 120 + "/"),
    member(LONG, b"l"),
    member("opaque-first/"),
    member("opaque-first/old", b"1"),
    member("opaque-last/"),
    member("opaque-last/old", b"2"),
    member("opaque-last/sub/"),
    member("opaque-last/sub/old", b"3"),
    member("gone/"),
    member("gone/file", b"4"),
    member("again/"),
    member("again/old", b"5"),
    member("file-to-dir", b"6"),
    member("dir-to-file/"),
    member("dir-to-file/old", b"7"),
    member("dir-to-link/"),
    member("dir-to-link/old", b"8"),
    member("merged/", mode=0o700, xattrs={"user.lower": b"l"}),
    member("merged/lower", b"9"),
    member("hidden-sibling", b"10"),
]

SECOND = [
    member("etc/"),
    member("etc/.wh.removed", b""),
    member("etc/replaced", b"new", mode=0o600),
    member("opaque-first/"),
    member("opaque-first/.wh..wh..opq", b""),
    member("opaque-first/new", b"a"),
    member("opaque-last/"),
    member("opaque-last/new", b"b"),
    member("opaque-last/.wh..wh..opq", b""),
    member(".wh.gone", b""),
    member(".wh.again", b""),
    member("again/", mode=0o750),
    member("again/new", b"c"),
    member("file-to-dir/"),
    member("file-to-dir/new", b"d"),
    member("dir-to-file", b"e"),
    symlink("dir-to-link", "usr"),
    member("merged/", mode=0o755),
    member("merged/upper", b"f"),
    hardlink("merged/upper-link", "merged/upper"),
    member("hidden-sibling", b"kept"),
    member(".wh.hidden-sibling", b""),
]

THIRD = [
    member("usr/share/doc/tool/copyright", b"no entries for the parents", mode=0o600),
    member("bin/tool", b"through the symlink of the lowest layer"),
    member("sbin/other", b"and through an absolute one"),
    hardlink("etc/attributed-link", "etc/attributed"),
    hardlink("ping-link", "bin/ping"),
    member("bin/.wh.su", b""),
    member("again/.wh.new", b""),
]


@pytest.fixture
def images(state_root: str) -> Iterator[Images]:
    state = State(state_root)
    yield Images(state, lambda *_, **__: pytest.fail("no registry is needed"))
    state.close()


def unpack_with_umoci(layout: str) -> str:
    bundle = os.path.join(os.path.dirname(layout), "bundle")
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", bundle], check=True, capture_output=True)
    return os.path.join(bundle, "rootfs")


def merged(lowers: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """The tree as overlay shows it, through a detached mount; an empty layer helps out where there is one only."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(lowers[0])) as empty:
        shutil.copystat(lowers[0], empty)
        stack = lowers if len(lowers) > 1 else (lowers[0], empty)
        fd = new_mount("overlay", tuple(f"lowerdir+={lower}" for lower in stack), 1)
        try:
            return snapshot(f"/proc/self/fd/{fd}/.")
        finally:
            os.close(fd)


def compare(images: Images, layers: list[bytes], unlisted: tuple[str, ...] = ()) -> None:
    """``unlisted`` directories have no entry; umoci gives them the time of unpacking, and ours must not be that."""
    with tempfile.TemporaryDirectory() as scratch:
        layout = MadeImage(layers).write_layout(os.path.join(scratch, "layout"))
        expected = snapshot(unpack_with_umoci(layout))
        image = images.load(layout)
        ours = merged(image.lowers)
    assert ours.keys() == expected.keys()
    for path in unlisted:
        assert ours[path][TIME] < expected[path][TIME]
        ours[path] = (*ours[path][:TIME], expected[path][TIME], *ours[path][TIME + 1 :])
    assert {path: (ours[path], expected[path]) for path in ours if ours[path] != expected[path]} == {}


def test_merged_tree_equals_umoci(images: Images) -> None:
    compare(images, [make_tar(layer) for layer in (BASE, SECOND)])


def test_entries_that_refer_to_lower_layers(images: Images) -> None:
    layers = [make_tar(layer) for layer in (BASE, SECOND, THIRD)]
    compare(images, layers, unlisted=("usr/share", "usr/share/doc", "usr/share/doc/tool"))


def test_old_tar_formats(images: Images) -> None:
    old = [entry for entry in BASE if entry[0].name not in {"big-owner", "etc/attributed", "fraction"}]
    compare(images, [make_tar(old, form=tarfile.GNU_FORMAT)])
