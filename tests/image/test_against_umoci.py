"""The merged tree of several layers, on overlay and copied, against what ``umoci unpack`` makes of the same image."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from typing import Any

import pytest

from containerkit.image.codec import parse_document
from containerkit.image.contents import read_contents
from containerkit.image.drivers import choose
from containerkit.image.flatten import flattened
from containerkit.image.images import Images
from containerkit.image.layers.layer import DIRECTORY
from containerkit.linux.mount import new_mount
from containerkit.state import State
from support.images import MTIME, MadeImage, hardlink, make_tar, member, snapshot, symlink
from support.peers import umoci_unpack

pytestmark = pytest.mark.kernel

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
def images(state: State) -> Images:
    return Images(state, lambda *_, **__: pytest.fail("no registry is needed"))


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
        expected = snapshot(umoci_unpack(f"{layout}:latest", os.path.join(scratch, "bundle")))
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


LOWER = [
    member("d/", mode=0o700, uid=7), member("d/a", b"a"), member("d/s/", gid=8), member("d/s/f", b"f"),
    member("one", b"1"), hardlink("two", "one"), hardlink("d/three", "one"), member("e/"), member("e/x", b"x"),
    symlink("link", "d"), member("file", b"9"),
]  # fmt: skip
OPAQUE = ".wh..wh..opq"
CASES = {
    "own file below, then its directory deleted": [member("d/e/f", b"f"), member(".wh.d", b"")],
    "directory deleted, then an own file below": [member(".wh.d", b""), member("d/e/f", b"f")],
    "own file through a link, then its directory deleted": [member("link/f", b"f"), member(".wh.d", b"")],
    "own directory, its content and it deleted": [member("d/s/"), member("d/s/.wh.f", b""), member("d/.wh.s", b"")],
    "whiteout in a directory, then of it": [member("d/.wh.a", b""), member(".wh.d", b"")],
    "whiteouts in an opaque directory": [member("d/"), member(f"d/{OPAQUE}", b""), member("d/.wh.a", b"")],
    "opaque without an entry": [member(f"d/s/{OPAQUE}", b"")],
    "whiteout in a new directory": [member("n/"), member("n/.wh.x", b""), member("n/f", b"")],
    "whiteouts in no directory": [member("n/.wh.x", b""), member("file/.wh.x", b""), member(f"o/{OPAQUE}", b"")],
    "link to one of several names": [hardlink("new", "one")],
    "link to one of several names, one deleted": [hardlink("new", "two"), member(".wh.one", b"")],
    "one of several names replaced, then a link": [member("two", b"2"), hardlink("new", "d/three")],
    "link to one of several names, then replaced": [hardlink("new", "d/three"), member("two", b"2")],
    "one name linked to another": [hardlink("two", "one")],
    "link, then its target deleted": [hardlink("new", "d/a"), member("d/.wh.a", b"")],
    "link, then its target's directory deleted": [hardlink("new", "d/s/f"), member(".wh.d", b"")],
    "link, then its target's directory opaque": [hardlink("new", "d/s/f"), member(f"d/{OPAQUE}", b"")],
    "link, own file, then the directory deleted": [hardlink("n", "d/s/f"), member("d/g", b"g"), member(".wh.d", b"")],
    "link, then all deleted": [hardlink("new", "d/s/f"), member(OPAQUE, b"")],
    "all deleted, then new": [member(OPAQUE, b""), member("d/new", b"n")],
    "a directory in a link's place": [
        member("x/"),
        symlink("s", "x"),
        member("s/1", b""),
        member("s/"),
        member("s/2", b""),
    ],
    "a directory in a lower link's place": [member("link/1", b""), member("link/"), member("link/2", b"")],
    "another link in a link's place": [
        member("x/"),
        member("y/"),
        symlink("s", "x"),
        member("s/1", b""),
        symlink("s", "y"),
        member("s/2", b""),
    ],
    "another link in a lower link's place": [member("link/1", b""), symlink("link", "e"), member("link/2", b"")],
    "another link in a link's place, then a deletion": [
        member("link/1", b""),
        symlink("link", "e"),
        member("link/.wh.x", b""),
    ],
    "a hard link in a link's place": [
        symlink("other", "e"),
        member("link/1", b""),
        hardlink("link", "other"),
        member("link/2", b""),
    ],
    "a link on a link's way": [
        member("x/"),
        symlink("x/s", "../d"),
        symlink("s", "x/s"),
        member("s/1", b""),
        symlink("x/s", "../e"),
        member("s/2", b""),
    ],
    "a link's way deleted": [
        symlink("s", "d/s"),
        member("s/1", b""),
        member("d/.wh.s", b""),
        member("s/2", b""),
    ],
    "hard link through a link above the root": [symlink("up", "../.."), hardlink("new", "up/d/a")],
    "absolute names": [member("/d/new", b"n"), member("/e/"), member("/e/.wh.x", b""), hardlink("/new", "/d/new")],
}


def in_umoci(made: MadeImage, path: str) -> dict[str, tuple[Any, ...]]:
    layout = made.write_layout(f"{path}/layout")
    return shown(umoci_unpack(f"{layout}:latest", f"{path}/bundle"))


def in_driver(name: str, made: MadeImage, path: str, *, times: bool = False) -> dict[str, tuple[Any, ...]]:
    state = State(f"{path}/{name}")
    try:
        used = choose(state.root, name)
        image = Images(state, lambda *_, **__: pytest.fail("no registry is needed")).load(f"{path}/layout")
        fd = used.view(image.lowers)
        try:
            return shown(f"/proc/self/fd/{fd}/.", times=times)
        finally:
            os.close(fd)
    finally:
        state.close()


def shown(root: str, *, times: bool = False) -> dict[str, tuple[Any, ...]]:
    """All but the root and, unless they are wanted, times, which umoci makes up where no entry says them."""
    return {path: seen for path, seen in snapshot(root, times=times).items() if path != "."}


@pytest.mark.parametrize("entries", CASES.values(), ids=CASES.keys())
def test_order_of_deletions_links_and_content(entries: list[Any], session_directory: str) -> None:
    """Overlay, copies and umoci have one tree; the headers alone tell of it; one layer of the two unpacks to it."""
    made = MadeImage([make_tar(LOWER), make_tar(entries), make_tar([member("top", b"t")])])
    layers = parse_document(made.manifest).layers  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        expected = in_umoci(made, path)
        assert in_driver("overlay", made, path) == expected
        assert in_driver("copy", made, path) == expected
    told = {os.fsdecode(name): node.inode for name, node in read_contents(made, layers).walk()}
    assert told.keys() == expected.keys()
    for name, inode in told.items():
        mode, uid, gid, names = (expected[name][at] for at in (0, 1, 2, -1))
        if inode.kind == DIRECTORY:
            entry = inode.entry
            assert (mode, uid, gid) == (
                (oct(0o40000 | entry.mode), entry.uid, entry.gid) if entry else ("0o40755", 0, 0)
            )
        else:
            assert inode.names == len(names)
    for below in (0, 1):
        flat = b"".join(flattened(made, layers, below))
        with tempfile.TemporaryDirectory(dir=session_directory) as path:
            squashed = MadeImage([make_tar(LOWER), flat][1 - below :])
            assert in_umoci(squashed, path) == expected
            assert in_driver("overlay", squashed, path) == expected


def in_all(layers: list[list[Any]], path: str) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
    """On overlay and copied, where umoci refuses or the times count; by their headers the names are the same."""
    made = MadeImage([make_tar(layer) for layer in layers])
    made.write_layout(f"{path}/layout")
    overlay, copy = in_driver("overlay", made, path), in_driver("copy", made, path)
    told = read_contents(made, parse_document(made.manifest).layers)  # type: ignore[union-attr]
    assert {os.fsdecode(name) for name, _ in told.walk()} == overlay.keys()
    return overlay, copy


def test_a_file_that_only_a_hard_link_brought_along_is_not_in_the_way(session_directory: str) -> None:
    """A directory without an entry takes its place, as it would without the hard link."""
    lower = [member("b", b"1"), hardlink("l", "b")]
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        overlay, copy = in_all([lower, [hardlink("n", "b"), member("b/x/f", b"2")]], path)
    assert overlay == copy
    assert (overlay["n"][-1], "b/x/f" in overlay) == (("l", "n"), True)


@pytest.mark.parametrize("deletion", [".wh.b", "b/.wh..wh..opq"])
def test_a_directory_keeps_its_time_when_something_is_deleted_in_it(deletion: str, session_directory: str) -> None:
    lower = [member("b/"), member("b/c/"), member("b/x", b"1"), member("b/c/x", b"")]
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        made = MadeImage([make_tar(lower), make_tar([member("b/c/f", b"2"), member(deletion, b"")])])
        made.write_layout(f"{path}/layout")
        for name in ("overlay", "copy"):
            tree = in_driver(name, made, path, times=True)
            assert {each: seen[TIME] for each, seen in tree.items()} == dict.fromkeys(
                ["b", "b/c", "b/c/f"], MTIME * 10**9
            )


def test_an_absolute_link_to_what_was_a_file(session_directory: str) -> None:
    """The image has that place, and a directory may take it; umoci refuses every such directory."""
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        overlay, copy = in_all([[member("c", b"1")], [symlink("a", "/c"), member("a/b", b"2")]], path)
    assert overlay == copy
    assert overlay.keys() == {"a", "c", "c/b"}
