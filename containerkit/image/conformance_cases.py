"""The layers of the conformance check: every hard case of the image specification's ``layer.md`` and some more."""

from __future__ import annotations

from tarfile import BLKTYPE, CHRTYPE, DIRTYPE, FIFOTYPE, LNKTYPE, REGTYPE, SYMTYPE
from typing import NamedTuple

WHITEOUT, OPAQUE, SPARSE = b"whiteout", b"opaque", b"sparse"
TIME = 1_500_000_000_123_456_789
LATER = 4_000_000_000_000_000_001

# cap_net_raw+ep, revision 2 (linux/capability.h, struct vfs_cap_data)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


class Item(NamedTuple):
    """One entry of a layer. ``at`` is where it lands, where that is not its path: a symlink leads there."""

    kind: bytes
    path: str
    data: bytes = b""
    target: str = ""
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = TIME
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    at: str = ""

    @property
    def real(self) -> str:
        """Where it lands."""
        return self.at or self.path

    @property
    def deletes(self) -> bool:
        """Whether it takes away what lower layers have: a whiteout, or a device that means the same."""
        return self.kind in {WHITEOUT, OPAQUE} or (self.kind == CHRTYPE and self.device == (0, 0))


def _file(path: str, data: bytes = b"content", mode: int = 0o644, **fields: object) -> Item:
    return Item(REGTYPE, path, data, mode=mode)._replace(**fields)  # type: ignore[arg-type]


def _directory(path: str, mode: int = 0o755, **fields: object) -> Item:
    return Item(DIRTYPE, path, mode=mode)._replace(**fields)  # type: ignore[arg-type]


def _symlink(path: str, target: str) -> Item:
    return Item(SYMTYPE, path, target=target)


def _hard(path: str, target: str, at: str = "") -> Item:
    return Item(LNKTYPE, path, target=target, at=at)


def _gone(path: str, at: str = "") -> Item:
    return Item(WHITEOUT, path, at=at)


def _opaque(path: str) -> Item:
    return Item(OPAQUE, path)


def _marked(path: str) -> Item:
    return Item(CHRTYPE, path, mode=0)


_LONG = "/".join(f"long-{number}-" + "n" * 200 for number in range(6))
_LONG_PARENTS = [_directory(_LONG[: end - 1]) for end in range(208, len(_LONG), 208)]

BASE = (
    _directory("", 0o755, mtime=TIME - 5),
    _directory("etc", 0o750, gid=7),
    _file("etc/kept", b"kept", 0o640, uid=1000, gid=1001),
    _file("etc/changed", b"old", mtime=LATER),
    _file("etc/deleted"),
    _directory("share", 0o2775, gid=50, mtime=TIME - 7, xattrs=(("trusted.kept", b"\xff\0"),)),
    _file("share/lower"),
    _directory("attributed", 0o700, xattrs=(("trusted.gone", b"1"),)),
    _directory("usr"),
    _directory("usr/bin", uid=5),
    _file("usr/bin/tool", b"tool", 0o755),
    _file("usr/bin/other", b"other", 0o4755, uid=9),
    _file("usr/bin/ping", b"ping", 0o755, xattrs=(("security.capability", CAPABILITY), ("trusted.t", b"t"))),
    _symlink("bin", "usr/bin"),
    _symlink("absolute", "/usr/bin"),
    _symlink("far", "up/../absolute"),
    _directory("up"),
    _directory("dir-to-file"),
    _directory("dir-to-file/sub"),
    _file("dir-to-file/sub/file"),
    _file("file-to-dir"),
    _symlink("link-to-dir", "etc"),
    _symlink("link-to-file", "etc/kept"),
    _directory("dir-to-link"),
    _file("dir-to-link/file"),
    _file("file-to-parent"),
    _symlink("loop-one", "loop-two"),
    _symlink("loop-two", "loop-one"),
    _symlink("loop", "loop/loop"),
    _symlink("dangling", "/nowhere/at/all")._replace(uid=42),
    _directory("opaque-first"),
    _file("opaque-first/old"),
    _directory("opaque-first/sub"),
    _file("opaque-first/sub/old"),
    _directory("opaque-last", 0o711),
    _file("opaque-last/old"),
    _directory("opaque-last/sub"),
    _file("opaque-last/sub/old"),
    _directory("removed"),
    _directory("removed/deep"),
    _file("removed/deep/file"),
    _directory("reborn"),
    _file("reborn/old"),
    _directory("late"),
    _file("late/old"),
    _directory("late/sub"),
    _file("late/sub/old"),
    _file("sibling", b"old"),
    _file("single", b"one name"),
    _file("pair-one", b"two names", uid=3),
    _hard("pair-two", "pair-one"),
    _directory("dev"),
    Item(CHRTYPE, "dev/null", mode=0o666, device=(1, 3)),
    Item(BLKTYPE, "dev/loop", mode=0o660, gid=6, device=(7, 300)),
    Item(FIFOTYPE, "dev/pipe", mode=0o1622),
    _directory("tmp", 0o1777),
    _file("large-owner", uid=3_000_000_000, gid=2_999_999_999),
    _file("empty", b""),
    Item(SPARSE, "sparse", b"the end", mode=0o600),
    _file("n" * 255),
    _file("größe ✓ \U0001f40b/x".replace("/x", "")),
    _file("odd: name, with = and \\ and\nline"),
    *_LONG_PARENTS,
    _file(_LONG),
    _gone("nothing-below"),
    _gone("etc/nothing-below"),
    _file("marked"),
    _file("marked-and-new", b"old"),
    _marked("marked-below-nothing"),
    _file("trio-one", b"three names"),
    _directory("trio"),
    _hard("trio/two", "trio-one"),
    _directory("left"),
    _file("left/file", b"left"),
    _directory("opened", 0o750, uid=4),
    _file("opened/file", b"opened"),
    _directory("opened/sub"),
    _file("opened/sub/file"),
)

SECOND = (
    _gone("etc/deleted"),
    _file("etc/changed", b"new", 0o600),
    _gone("never-was"),
    _file("share/new", gid=0),  # without an entry for its parent, which keeps all it has
    _directory("attributed", 0o711, mtime=LATER),
    _file("dir-to-file", b"now a file"),
    _gone("dir-to-file/sub"),  # below a file: umoci deletes so what the directory had
    _directory("file-to-dir", 0o700),
    _file("file-to-dir/file"),
    _directory("link-to-dir"),
    _file("link-to-dir/file"),
    _file("link-to-file", b"no longer a link"),
    _symlink("dir-to-link", "usr"),
    _opaque("opaque-first"),
    _file("opaque-first/new"),
    _directory("opaque-first/sub"),
    _file("opaque-first/sub/new"),
    _directory("opaque-last", 0o755),
    _file("opaque-last/new"),
    _directory("opaque-last/sub"),
    _file("opaque-last/sub/new"),
    _opaque("opaque-last"),
    _gone("removed"),
    _gone("reborn"),
    _directory("reborn", 0o750),
    _file("reborn/new"),
    _directory("late"),
    _file("late/new"),
    _directory("late/sub"),
    _gone("late"),
    _file("sibling", b"new"),
    _gone("sibling"),
    _file("bin/second", at="usr/bin/second"),
    _file("absolute/third", at="usr/bin/third"),
    _file("far/fourth", at="usr/bin/fourth"),
    _hard("linked", "single"),
    _hard("bin/other-link", "usr/bin/other", at="usr/bin/other-link"),
    _hard("pair-three", "linked"),
    _directory("directory-twice"),
    _file("directory-twice", b"and then a file"),
    _gone("opaque-first/old"),  # twice: the opaque directory hides it already
    _directory("fresh"),
    _gone("fresh/nothing-below"),  # in a directory that no layer below has
    _file("fresh/file"),
    _gone("not-there/file"),  # in one that no layer has at all
    _gone("single/file"),  # below what is a file
    _marked("marked"),
    _marked("marked-and-new"),
    _file("marked-and-new", b"new"),
    _hard("trio-three", "trio-one"),  # overlay must bring all names of a file along
    _hard("linked-and-left", "left/file"),  # and take back what it brought along
    _gone("left"),
    _hard("linked-and-opened", "opened/sub/file"),
    _opaque("opened"),
)

THIRD = (
    _directory("", 0o711, uid=1, mtime=LATER),
    _gone("bin/tool", at="usr/bin/tool"),
    _gone("single"),
    _gone("pair-two"),
    _directory("dir-to-file"),
    _file("dir-to-file/again"),
    _gone("reborn/new"),
    _directory("tmp", 0o1777),
    _file("tmp/file"),
    _gone("tmp"),
    _gone("dir-to-link"),
    _gone("loop"),
    _gone("sparse"),
)

LAST = (
    _file("only", b"what is left"),
    _opaque(""),
    _directory("etc"),
    _file("etc/new"),
)

LAYERS = (BASE, SECOND, THIRD, LAST)
