"""Every kind of hostile or broken image: a typed error that says where, and nothing left of it, inside or outside."""

from __future__ import annotations

import base64
import bz2
import errno
import gzip
import io
import json
import lzma
import os
import stat
import tarfile
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import zstandard

from containerkit.errors import (
    CompressionBomb,
    CorruptLayer,
    DigestMismatch,
    DocumentTooLarge,
    FileTooLarge,
    ImageError,
    ImageTooLarge,
    InvalidImage,
    LayerError,
    LayerTooLarge,
    LimitExceeded,
    NotAnImage,
    PathTooLong,
    PlatformMismatch,
    TooManyEntries,
    UnsafeEntry,
    UnsupportedMediaType,
)
from containerkit.image import model
from containerkit.image.codec import parse_document
from containerkit.image.contents import read_contents
from containerkit.image.drivers import choose
from containerkit.image.images import Images
from containerkit.image.install import Installer
from containerkit.image.layers.attributes import set_xattrs
from containerkit.image.layers.layer import DIRECTORY, FILE
from containerkit.image.limits import ImageLimits
from containerkit.image.reference import Reference
from containerkit.image.store.gc import bringing_in
from containerkit.registry.client import connect
from support.faulty import Faulty, answer
from support.images import MadeImage, describe, digest, hardlink, make_tar, member, snapshot, symlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from containerkit.state import State

pytestmark = pytest.mark.kernel

GOOD = make_tar([member("etc/"), member("etc/good", b"1")])
BLOCK = 512


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[str]:
    """A directory that no image may touch, even by a new link to what is in it."""
    place = tmp_path / "outside"
    place.mkdir()
    (place / "canary").write_bytes(b"untouched")
    before = snapshot(str(place)), os.stat(place / "canary").st_nlink, sorted(os.listdir(tmp_path))
    yield str(place)
    assert (snapshot(str(place)), os.stat(place / "canary").st_nlink) == before[:2]


@pytest.fixture
def images(state: State, outside: str) -> Iterator[Images]:
    """The images of a state root in which nothing may be left."""

    def nobody(reference: Reference, /, *, push: bool) -> Any:
        raise AssertionError(reference, push)

    yield Images(state, nobody)
    for place in ("blobs", "layers", "ingest"):
        assert [names for _, _, names in os.walk(state.path(place)) if names] == [], place
    assert os.listdir(state.path("layers")) == os.listdir(state.path("ingest")) == []
    assert state.database.execute("SELECT id FROM images UNION SELECT name FROM names").fetchall() == []


class Bad(NamedTuple):
    """Layers, lowest first, and what the last of them must raise; ``entry`` stands in the error, ``limit`` too."""

    layers: list[bytes]
    error: type[ImageError]
    entry: str = ""
    limit: str = ""


def checksummed(block: bytes) -> bytes:
    return block[:148] + b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:]) + block[156:]


def head(name: bytes, kind: bytes = FILE, size: bytes = b"0" * 11, **fields: bytes) -> bytes:
    """One header, whatever it says."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"0" * 11 + b"\0" * 9
    block = (block + kind + fields.get("link", b"")).ljust(257, b"\0") + b"ustar\x0000"
    return checksummed(block.ljust(BLOCK, b"\0"))


def pax(*records: bytes) -> bytes:
    """An extended header of these records, as they are."""
    content = b"".join(records)
    return head(b"pax", b"x", b"%011o" % len(content)) + content + bytes(-len(content) % BLOCK)


def record(text: bytes) -> bytes:
    """``length text``, where the length is right."""
    length = next(size for size in range(len(text), len(text) + 9) if size == len(b"%d %s\n" % (size, text)))
    return b"%d %s\n" % (length, text)


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


def huge(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11, "big")


END = bytes(2 * BLOCK)
FIRST = make_tar([member("first", b"x")]).rstrip(b"\0").ljust(2 * BLOCK, b"\0")
DATA = make_tar([member("first", b"x"), member("big", os.urandom(200_000))])
ENTRY_AT = 2 * BLOCK
OUT = "/outside-of-the-image"  # replaced by the canary's directory

BAD: dict[str, Bad] = {
    "dotdot": Bad([make_tar([member("../escaped", b"")])], UnsafeEntry, "../escaped"),
    "absolute and up": Bad([make_tar([member("/../escaped", b"")])], UnsafeEntry, "/../escaped"),
    "symlink escape": Bad([make_tar([symlink("d", OUT), member("d/canary", b"")])], UnsafeEntry, "d/canary"),
    "symlink escape by an earlier layer": Bad(
        [make_tar([symlink("d", OUT)]), make_tar([member("d/canary", b"")])], UnsafeEntry, "d/canary"
    ),
    "symlink chain over three layers": Bad(
        [make_tar([symlink("a", "../" * 9 + OUT)]), make_tar([symlink("b", "a")]), make_tar([member("b/x", b"")])],
        UnsafeEntry,
        "b/x",
    ),
    "hard link escape": Bad([make_tar([hardlink("h", "../../etc/passwd")])], UnsafeEntry, "h"),
    "hard link to an absolute path": Bad([make_tar([hardlink("h", OUT + "/canary")])], UnsafeEntry, "h"),
    "hard link through an earlier layer's symlink": Bad(
        [make_tar([symlink("d", OUT)]), make_tar([hardlink("h", "d/canary")])], UnsafeEntry, "h"
    ),
    "whiteout of dotdot": Bad([GOOD, make_tar([member("etc/"), member("etc/.wh...", b"")])], UnsafeEntry, "etc/.wh..."),
    "whiteout of dot": Bad([GOOD, make_tar([member(".wh..", b"")])], UnsafeEntry, ".wh.."),
    "whiteout of nothing": Bad([GOOD, make_tar([member(".wh.", b"")])], UnsafeEntry, ".wh."),
    "NUL in a name": Bad([FIRST + pax(b"12 path=a\0b\n") + head(b"x") + END], CorruptLayer, "a\0b"),
    "NUL in a link": Bad([FIRST + pax(b"16 linkpath=a\0b\n") + head(b"l", b"2") + END], CorruptLayer, "l"),
    "NUL in an attribute": Bad([FIRST + pax(record(b"SCHILY.xattr.a\0b=x")) + head(b"x") + END], CorruptLayer, "x"),
    "NUL in a sparse file's name": Bad(
        [pax(record(b"GNU.sparse.size=9"), record(b"GNU.sparse.name=a\0b")) + head(b"x") + END], CorruptLayer, "a\0b"
    ),
    "sparse file of 2 TiB": Bad(
        [pax(record(b"GNU.sparse.size=%d" % (2 << 40)), record(b"GNU.sparse.map=0,0")) + head(b"s") + END],
        FileTooLarge, "s", "file_size",
    ),
    "whiteout through an earlier layer's symlink": Bad(
        [make_tar([symlink("d", OUT)]), make_tar([member("d/.wh.canary", b"")])], UnsafeEntry, "d/.wh.canary"
    ),
    "opaque through an earlier layer's symlink": Bad(
        [make_tar([symlink("d", OUT)]), make_tar([member("d/.wh..wh..opq", b"")])], UnsafeEntry, "d/.wh..wh..opq"
    ),
    "attribute of 70000 bytes": Bad([make_tar([member("f", b"", xattrs={"user.x": b"x" * 70000})])], CorruptLayer, "f"),
    "attribute of 70000 bytes on a directory": Bad(
        [make_tar([member("d/", xattrs={"user.x": b"x" * 70000}), member("f", b"")])], CorruptLayer, "d"
    ),
    "attribute of 70000 bytes on the root": Bad(
        [make_tar([member("./", xattrs={"user.x": b"x" * 70000})])], CorruptLayer, "."
    ),
    "attribute without a name": Bad([FIRST + pax(record(b"SCHILY.xattr.=x")) + head(b"x") + END], CorruptLayer, "x"),
    "attribute with a name of 300 bytes": Bad(
        [make_tar([member("d/", xattrs={"user." + "x" * 295: b"x"})])], CorruptLayer, "d"
    ),
    "ACL that is none on a directory": Bad(
        [make_tar([member("d/", xattrs={"system.posix_acl_access": b"x"}), member("d/f", b"")])], CorruptLayer, "d"
    ),
    "capabilities that are none on a directory": Bad(
        [make_tar([member("d/", xattrs={"security.capability": b"x"}), member("d/f", b"")])], CorruptLayer, "d"
    ),
    "ACL that is none on the root": Bad(
        [make_tar([member("./", xattrs={"system.posix_acl_access": b"x"}), member("f", b"")])], CorruptLayer, "."
    ),
    "ACL that is none on a file": Bad(
        [make_tar([member("f", b"", xattrs={"system.posix_acl_access": b"x"})])], CorruptLayer, "f"
    ),
    "symlink to nothing": Bad([FIRST + head(b"l", b"2") + END], CorruptLayer, "l"),
    "empty name": Bad([FIRST + head(b"") + END], CorruptLayer, ""),
    "component too long": Bad([make_tar([member("n" * 256, b"")])], CorruptLayer, "n" * 256),
    "below a file": Bad([make_tar([member("f", b""), member("f/x", b"")])], CorruptLayer, "f/x"),
    "truncated in a member": Bad([DATA[:100_000]], CorruptLayer, "big"),
    "truncated in a header": Bad([DATA[: ENTRY_AT + 100]], CorruptLayer, "first"),
    "truncated in a pax header": Bad([FIRST + pax(b"10 path=a\n")], CorruptLayer, "first"),
    "checksum": Bad([damaged(DATA, ENTRY_AT + 110)], CorruptLayer, "big"),
    "pax record too long": Bad([FIRST + pax(b"99 path=a\n") + head(b"x") + END], CorruptLayer, "first"),
    "pax record too short": Bad([FIRST + pax(b"5 path=a\n") + head(b"x") + END], CorruptLayer, "first"),
    "pax record without length": Bad([FIRST + pax(b"path=a\n") + head(b"x") + END], CorruptLayer, "first"),
    "pax record of length 0": Bad([FIRST + pax(b"0 path=a\n") + head(b"x") + END], CorruptLayer, "first"),
    "pax number of 5000 digits": Bad(
        [FIRST + pax(b"5011 size=%s\n" % (b"9" * 5000)) + head(b"x") + END], CorruptLayer, "x"
    ),
    "pax time of 5000 digits": Bad(
        [FIRST + pax(b"5012 mtime=%s\n" % (b"9" * 5000)) + head(b"x") + END], CorruptLayer, "x"
    ),
    "negative size": Bad([head(b"x", size=b"\xff" * 12) + END], CorruptLayer, "x"),
    "number beyond 64 bits": Bad([head(b"x", size=b"\x9f" + b"\xff" * 11) + END], CorruptLayer, "x"),
    "impossible device": Bad(
        [make_tar([member("c", type=tarfile.CHRTYPE, devmajor=5000, devminor=1)])], CorruptLayer, "c"
    ),
    "another volume": Bad([head(b"x", b"M") + END], CorruptLayer, "x"),
    "unknown type": Bad([head(b"x", b"?") + END], CorruptLayer, "x"),
    "no tar": Bad([b"rubbish " * 200], CorruptLayer, ""),
    "sparse map without end": Bad(
        [pax(b"22 GNU.sparse.major=1\n", b"27 GNU.sparse.realsize=900\n") + head(b"s", size=b"%011o" % 2048)
         + b"1" * 2048 + END], CorruptLayer, "s",
    ),
    "sparse map outside the file": Bad(
        [pax(b"22 GNU.sparse.size=10\n", b"24 GNU.sparse.map=20,30\n") + head(b"s") + END], CorruptLayer, "s"
    ),
    "file of 2 TiB": Bad([FIRST + head(b"bomb", size=huge(2 << 40))], FileTooLarge, "bomb", "file_size"),
    "files of 257 GiB": Bad([FIRST + head(b"bomb", size=huge(257 << 30))], LayerTooLarge, "bomb", "layer_size"),
    "too deep": Bad([make_tar([member("d/" * 513, b"")])], PathTooLong, "d/" * 512 + "d", "depth"),
    "path of 5000 bytes": Bad([make_tar([member("n" * 5000, b"")])], PathTooLong, "n" * 5000, "path"),
    "link of 5000 bytes": Bad([make_tar([symlink("l", "n" * 5000)])], PathTooLong, "l", "path"),
    "pax header of 2 MiB": Bad(
        [FIRST + pax(b"2097152 comment=" + b"x" * 2_097_135 + b"\n") + head(b"x")], FileTooLarge, "first", "metadata"
    ),
    "pax headers of 2 MiB together": Bad(
        [FIRST + pax(b"600000 comment=" + b"x" * 599_984 + b"\n") * 2 + head(b"x")], FileTooLarge, "first", "metadata"
    ),
}  # fmt: skip


def aimed(layers: list[bytes], outside: str) -> list[bytes]:
    """With the canary's directory as the target; the paths are of one length, and the checksums right again."""
    made = []
    for layer in layers:
        if OUT.encode() not in layer:
            made.append(layer)
            continue
        members = []
        with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
            for info in tar:
                info.pax_headers = {}
                info.name, info.linkname = (text.replace(OUT, outside) for text in (info.name, info.linkname))
                members.append((info, b""))
        made.append(make_tar(members))
    return made


def check(error: ImageError, bad: Bad, layer: bytes, outside: str) -> None:
    entry = bad.entry.replace(OUT, outside)
    assert isinstance(error, LayerError)
    assert error.entry.removesuffix("/") == entry, error
    assert error.layer == digest(layer)
    assert digest(layer) in str(error)
    assert repr(error.entry) in str(error) or not error.entry or len(entry) > 200
    if bad.limit:
        assert isinstance(error, LimitExceeded)
        assert error.limit == bad.limit
        assert error.found > error.allowed


@pytest.mark.parametrize("name", BAD)
def test_a_bad_layer_in_a_layout(name: str, images: Images, outside: str, tmp_path: Path) -> None:
    bad = BAD[name]
    made = MadeImage(aimed(bad.layers, outside))
    with pytest.raises(bad.error) as caught:
        images.load(made.write_layout(str(tmp_path / "layout")))
    check(caught.value, bad, made.layers[-1], outside)


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if len(bad.layers) == 1])
def test_a_bad_root_file_system(name: str, images: Images, outside: str, tmp_path: Path) -> None:
    bad = BAD[name]
    layer = gzip.compress(aimed(bad.layers, outside)[0], 1)
    (tmp_path / "root.tar.gz").write_bytes(layer)
    with pytest.raises(bad.error) as caught:
        images.import_rootfs(tmp_path / "root.tar.gz", tag="bad:1")
    check(caught.value, bad, layer, outside)


@pytest.mark.parametrize("name", ["symlink escape by an earlier layer", "truncated in a member", "file of 2 TiB"])
def test_a_bad_layer_from_a_registry(name: str, state: State, images: Images, outside: str) -> None:
    bad = BAD[name]
    made = MadeImage(aimed(bad.layers, outside))
    with serving(made) as faulty, pytest.raises(bad.error) as caught:
        Images(state, connect).pull(f"{faulty.host}/app:1")
    check(caught.value, bad, made.layers[-1], outside)


class serving:  # noqa: N801 - reads like the function that it replaces
    """An image in a registry on loopback."""

    def __init__(self, made: MadeImage) -> None:
        self._faulty = Faulty()
        self._made = made

    def __enter__(self) -> Faulty:
        faulty = self._faulty.__enter__()
        faulty.on("GET", "/v2/app/manifests/1", answer(200, self._made.manifest, content_type=self._made.media_type))
        for name, content in self._made.blobs.items():
            faulty.on("GET", f"/v2/app/blobs/{name}", answer(200, content))
        return faulty

    def __exit__(self, *details: object) -> None:
        self._faulty.__exit__(*details)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def with_layer(packed: bytes, plain: bytes, kind: str = "") -> MadeImage:
    """An image whose only layer travels as ``packed``."""
    made = MadeImage([plain], compress=False)
    made.blobs.pop(digest(plain))
    made.layers = [made.add(packed)]
    named = kind if kind in {"", "zstd"} else "gzip"  # there is no type for bzip2 and xz
    made.document["layers"] = [describe(packed, model.DOCKER_LAYER + (f".{named}" if named else ""))]
    return made


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_damaged_compression(kind: str, harm: str, images: Images, tmp_path: Path) -> None:
    packed = COMPRESS[kind](DATA)
    packed = packed[: len(packed) // 2] if harm == "cut" else damaged(packed, len(packed) // 2)
    made = with_layer(packed, DATA, kind)
    with pytest.raises((CorruptLayer, DigestMismatch)) as caught:
        images.load(made.write_layout(str(tmp_path / "layout")))
    if isinstance(caught.value, CorruptLayer):
        assert caught.value.layer == digest(packed)
        assert caught.value.entry in ("", "first", "big")  # as far as it came


def install(state: State, made: MadeImage, limits: ImageLimits) -> None:
    with bringing_in(state):
        Installer(state.root, made, "bad:1", limits=limits).install(*made.resolve(Reference.parse("bad:1")))


@pytest.mark.parametrize("kind", COMPRESS)
def test_zip_bombs(kind: str, state: State, images: Images) -> None:
    bomb = make_tar([member("first", b"x"), member("bomb", bytes(30_000_000))])
    made = with_layer(COMPRESS[kind](bomb), bomb, kind)
    with pytest.raises(CompressionBomb) as caught:
        install(state, made, ImageLimits(ratio_free=1 << 20))
    error = caught.value
    assert (error.limit, error.allowed, error.entry, error.layer) == ("ratio", 200, "bomb", digest(made.layers[0]))
    assert error.found > 200
    assert images.list() == []


def files(count: int, size: int) -> bytes:
    return make_tar([member(f"f{number}", bytes(size)) for number in range(count)])


@pytest.mark.parametrize(
    ("layers", "limits", "error", "limit", "entry"),
    [
        ([files(9, 1)], {"entries": 8}, TooManyEntries, "entries", "f7"),
        ([GOOD, make_tar([member("a", b""), member("b/b/b/b/b/b/b/b/b", b"")])],
         {"entries": 8}, TooManyEntries, "entries", "b/b/b/b/b/b/b/b/b"),
        ([files(9, 1000)], {"layer_size": 5000}, LayerTooLarge, "layer_size", "f5"),
        ([files(1, 30_000)], {"layer_size": 20_000, "file_size": 1 << 40}, LayerTooLarge, "layer_size", "f0"),
        ([GOOD, files(3, 1000)], {"file_size": 999}, FileTooLarge, "file_size", "f0"),
        ([GOOD, make_tar([member("a/b/c", b"")])], {"depth": 2}, PathTooLong, "depth", "a/b/c"),
        ([make_tar([member("f", b"", xattrs={"user.x": b"x" * 99}), member("a/", xattrs={"user.x": b"x" * 50}),
                    member("b/", xattrs={"user.x": b"x" * 50})])], {"xattrs": 100}, LayerTooLarge, "xattrs", "b"),
        ([make_tar([member("ab", b""), member("abc", b"")])], {"path": 2}, PathTooLong, "path", "abc"),
    ],
)  # fmt: skip
def test_limits_of_a_layer(
    layers: list[bytes], limits: dict[str, int], error: type[LayerTooLarge], limit: str, entry: str,
    state: State, images: Images,
) -> None:  # fmt: skip
    made = MadeImage(layers)
    with pytest.raises(error) as caught:
        install(state, made, ImageLimits(**limits))  # type: ignore[arg-type]
    assert (type(caught.value), caught.value.limit, caught.value.allowed) == (error, limit, limits[limit])
    assert caught.value.entry.rstrip("/") == entry
    assert caught.value.layer in map(digest, made.layers)
    assert caught.value.found > caught.value.allowed
    assert images.list() == []


@pytest.mark.parametrize("driver", ["overlay", "copy"])
def test_a_directorys_attribute_for_which_the_file_system_has_no_room(
    driver: str, state: State, images: Images, tmp_path: Path
) -> None:
    """ext4 has an inode and a block for them; what the kernel says then is that the disk is full."""
    made = MadeImage([make_tar([member("d/", xattrs={"user.x": b"x" * 50_000}), member("d/f", b"1")])])
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.x", b"x" * 50_000)
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017 - says what there is
    else:
        pytest.skip("the file system takes an attribute of 50 kB")
    choose(state.root, driver)
    with pytest.raises(CorruptLayer, match=r"'user\.x' of 50000 bytes") as caught:
        images.load(made.write_layout(str(tmp_path / "layout")))
    assert (caught.value.entry, caught.value.layer) == ("d/", digest(made.layers[0]))


@pytest.mark.parametrize("driver", ["overlay", "copy"])
def test_attributes_that_nothing_here_can_have_are_left_out(driver: str, state: State, tmp_path: Path) -> None:
    """As tar, Docker and umoci do; podman, too, but for user.* on links and FIFOs."""
    foreign = {"com.apple.provenance": b"q", "system.nfs4_acl": b"q", "foo": b"q", "user.kept": b"1"}
    made = MadeImage([
        make_tar([
            member("d/", xattrs=foreign), member("f", b"1", xattrs=foreign), symlink("l", "f", xattrs=foreign),
            member("p", type=tarfile.FIFOTYPE, xattrs=foreign), member("./", xattrs=foreign),
        ])
    ])  # fmt: skip
    choose(state.root, driver)
    images = Images(state, connect)
    image = images.load(made.write_layout(str(tmp_path / "layout")), tag="foreign:1")
    tree = image.lowers[0]
    kept = {name: os.listxattr(f"{tree}/{name}", follow_symlinks=False) for name in ("", "d", "f", "l", "p")}
    assert kept == {"": ["user.kept"], "d": ["user.kept"], "f": ["user.kept"], "l": [], "p": []}
    assert images.verify() == ()


def test_a_file_system_without_acls() -> None:
    """proc(5) stands for it; there is one on every machine."""
    acl = bytes.fromhex("0200000001000700ffffffff04000500ffffffff20000500ffffffff")
    with pytest.raises(OSError, match="not supported"):
        os.setxattr("/proc/self/fd", "system.posix_acl_access", acl)
    fd = os.open("/proc/self/fd", os.O_RDONLY)
    try:
        set_xattrs(fd, ((b"system.posix_acl_access", acl), (b"user.a", b"1"), (b"security.selinux", b"1")))
    finally:
        os.close(fd)


def test_the_attributes_that_wait_have_a_limit_that_a_memory_holds() -> None:
    assert ImageLimits().xattrs == 64 << 20


def test_links_that_lead_to_and_fro_for_hours(images: Images, tmp_path: Path) -> None:
    """Each of no more components than a path may have."""
    to_and_fro = "/".join(["a", ".."] * 400)
    entries = [member("a/"), *(symlink(f"l{number}", f"{to_and_fro}/l{number + 1}") for number in range(30))]
    made = MadeImage([make_tar([*entries, member("l30/"), member("l0/new", b"")])])
    layout = made.write_layout(str(tmp_path / "layout"))
    manifest = parse_document(made.manifest)
    assert isinstance(manifest, model.Manifest)
    for action in (lambda: images.load(layout), lambda: read_contents(made, manifest.layers)):
        with pytest.raises(UnsafeEntry, match="never ends") as caught:
            action()
        assert caught.value.entry.startswith("l0")


def test_what_only_just_fits(state: State, tmp_path: Path) -> None:
    layers = [files(9, 1000), make_tar([member("a/b/c", b"1")])]
    limits = ImageLimits(entries=9, file_size=1000, depth=3, path=5, layers=2, image_size=sum(map(len, layers)))
    install(state, MadeImage(layers), limits)


@pytest.mark.parametrize(
    ("limits", "limit"), [({"layers": 2}, "layers"), ({"image_size": 45_000}, "image_size")]
)  # fmt: skip
def test_limits_of_an_image(limits: dict[str, int], limit: str, state: State, images: Images) -> None:
    made = MadeImage([files(1, 18_000), files(1, 19_500), files(1, 20_000)])
    with pytest.raises(ImageTooLarge) as caught:
        install(state, made, ImageLimits(**limits))  # type: ignore[arg-type]
    assert (caught.value.limit, caught.value.allowed) == (limit, limits[limit])
    assert images.list() == []


def test_a_layer_that_declares_too_much_is_not_fetched(state: State, images: Images) -> None:
    made = MadeImage([GOOD])
    made.document["layers"][0]["size"] = 1 << 50
    with pytest.raises(LayerTooLarge) as caught:
        install(state, made, ImageLimits())
    assert (caught.value.limit, caught.value.layer) == ("layer_size", digest(made.layers[0]))
    assert made.opened == []
    assert images.list() == []


def test_devices_where_they_are_not_allowed(state: State, images: Images) -> None:
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        made = MadeImage([make_tar([member("dev/"), member("dev/x", type=kind, devmajor=8, devminor=1)])])
        with pytest.raises(UnsafeEntry, match="no devices are allowed") as caught:
            install(state, made, ImageLimits(devices=False))
        assert (caught.value.entry, caught.value.layer) == ("dev/x", digest(made.layers[0]))
    assert images.list() == []


def test_a_fifo_is_no_device(state: State) -> None:
    made = MadeImage([make_tar([member("pipe", type=tarfile.FIFOTYPE)])])
    install(state, made, ImageLimits(devices=False))
    found = [f"{where}/{name}" for where, _, names in os.walk(state.path("layers")) for name in names]
    assert [stat.S_ISFIFO(os.lstat(path).st_mode) for path in found] == [True]


def edited(**changes: Any) -> MadeImage:
    made = MadeImage([GOOD])
    made.document.update(changes)
    return made


def with_config(**changes: Any) -> MadeImage:
    made = MadeImage([GOOD])
    made.config = made.add(json.dumps({**json.loads(made.config), **changes}).encode())
    made.document["config"] = describe(made.config, model.OCI_CONFIG)
    return made


def index_of(made: MadeImage, *entries: dict[str, Any]) -> MadeImage:
    made.media_type = model.OCI_INDEX
    made.raw = json.dumps({"schemaVersion": 2, "mediaType": model.OCI_INDEX, "manifests": entries}).encode()
    return made


def nested(depth: int) -> MadeImage:
    made = MadeImage([GOOD])
    inner = describe(made.add(made.manifest), model.OCI_MANIFEST)
    for _ in range(depth):
        raw = made.add(json.dumps({"schemaVersion": 2, "manifests": [inner]}).encode())
        inner = describe(raw, model.OCI_INDEX)
    made.media_type, made.raw = model.OCI_INDEX, raw
    return made


SIZE_OF_INDEX = len(json.dumps({"schemaVersion": 2, "manifests": [describe(bytes(100), model.OCI_INDEX)]}))


def cyclic() -> MadeImage:
    """Two indexes that name each other; their digests cannot both be right."""
    made = MadeImage([GOOD])
    entry = describe(b"second".ljust(SIZE_OF_INDEX), model.OCI_INDEX)
    first = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    second = json.dumps({"schemaVersion": 2, "manifests": [describe(first, model.OCI_INDEX)]}).encode()
    assert len(first) == len(second)
    made.blobs[digest(b"second".ljust(len(first)))] = second
    made.media_type, made.raw = model.OCI_INDEX, made.add(first)
    return made


def embedded(data: bytes) -> MadeImage:
    made = MadeImage([GOOD])
    made.document["config"]["data"] = base64.b64encode(data).decode()
    return made


ZEROS = "sha256:" + "0" * 64
DOCUMENTS: dict[str, tuple[Callable[[], MadeImage], type[ImageError], str]] = {
    "diff id of something else": (lambda: MadeImage([GOOD], diff_ids=[ZEROS]), DigestMismatch, ZEROS),
    "one diff id too many": (lambda: MadeImage([GOOD], diff_ids=[ZEROS] * 2), InvalidImage, "2 diff ids"),
    "no diff ids": (lambda: with_config(rootfs={"type": "layers", "diff_ids": []}), InvalidImage, "0 diff ids"),
    "more history than layers": (lambda: with_config(history=[{}, {}]), InvalidImage, "2 steps with a layer"),
    "config of 9 MiB": (lambda: with_config(author="x" * (9 << 20)), DocumentTooLarge, "8388608"),
    "config is no config": (lambda: with_config(rootfs=None), InvalidImage, "rootfs"),
    "config for nowhere": (lambda: with_config(architecture="pdp11"), PlatformMismatch, "pdp11"),
    "a value of the wrong kind": (lambda: with_config(config={"Env": "A=1"}), InvalidImage, "Env"),
    "an artifact": (
        lambda: edited(config=describe(b"{}", model.EMPTY), artifactType="application/vnd.x"), NotAnImage, "vnd.x"
    ),
    "a chart": (lambda: edited(config=describe(b"{}", "application/vnd.cncf.helm.v1")), NotAnImage, "helm"),
    "an unknown layer": (
        lambda: edited(layers=[describe(GOOD, model.OCI_LAYER + "+rar")]), UnsupportedMediaType, "rar"
    ),
    "schema 1": (lambda: edited(schemaVersion=1), UnsupportedMediaType, "schema 1"),
    "schema 3": (lambda: edited(schemaVersion=3), InvalidImage, "schemaVersion"),
    "manifest and index at once": (lambda: edited(manifests=[]), InvalidImage, "manifests"),
    "wrong size": (lambda: edited(layers=[{**describe(GOOD, model.OCI_LAYER), "size": 5}]), ImageError, ""),
    "negative size": (lambda: edited(layers=[{**describe(GOOD, model.OCI_LAYER), "size": -1}]), InvalidImage, "size"),
    "digest that climbs": (
        lambda: edited(layers=[{**describe(GOOD, model.OCI_LAYER), "digest": "sha256:../../x"}]), InvalidImage, "digest"
    ),
    "unknown algorithm": (
        lambda: edited(layers=[{**describe(GOOD, model.OCI_LAYER), "digest": "md5:" + "0" * 32}]), InvalidImage, "md5"
    ),
    "embedded data of another digest": (lambda: embedded(b"{}"), DigestMismatch, "data"),
    "no image for this platform": (
        lambda: index_of(MadeImage([GOOD]), {**describe(b"", model.OCI_MANIFEST), "platform":
                         {"os": "linux", "architecture": "pdp11"}}), PlatformMismatch, "linux/pdp11",
    ),
    "indexes in indexes": (lambda: nested(6), ImageTooLarge, "indexes within indexes"),
    "cyclic indexes": (cyclic, DigestMismatch, "sha256"),
    "empty index": (lambda: index_of(MadeImage([GOOD])), PlatformMismatch, "none"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_bad_documents(name: str, images: Images, tmp_path: Path) -> None:
    make, error, message = DOCUMENTS[name]
    made = make()
    layout = made.write_layout(str(tmp_path / "layout"))
    for key, content in made.blobs.items():  # also where the digest is another
        (tmp_path / "layout/blobs/sha256" / key.removeprefix("sha256:")).write_bytes(content)
    with pytest.raises(error) as caught:
        images.load(layout)
    assert message in str(caught.value)
    if isinstance(caught.value, UnsupportedMediaType):
        assert caught.value.media_type


@pytest.mark.parametrize("name", ["diff id of something else", "cyclic indexes", "config of 9 MiB"])
def test_bad_documents_from_a_source_that_lies(name: str, state: State, images: Images) -> None:
    make, error, message = DOCUMENTS[name]
    with pytest.raises(error, match=message):
        Images(state, lambda *_, **__: make()).pull("example.org/app:1")


def test_indexes_in_indexes_up_to_the_limit(state: State) -> None:
    install(state, nested(3), ImageLimits())
    with pytest.raises(ImageTooLarge) as caught:
        install(state, nested(3), ImageLimits(index_reads=2))
    assert (caught.value.limit, caught.value.allowed) == ("index_reads", 2)


def test_a_manifest_of_100_mb(images: Images, state: State, tmp_path: Path) -> None:
    made = MadeImage([GOOD])
    made.raw = json.dumps(made.document).encode().ljust(100_000_000)
    layout = made.write_layout(str(tmp_path / "layout"))
    with pytest.raises(DocumentTooLarge) as caught:
        images.load(layout)
    assert (caught.value.limit, caught.value.allowed, caught.value.found) == ("manifest", 4 << 20, 100_000_000)
    os.truncate(f"{layout}/blobs/sha256/{digest(made.manifest).hex}", 0)  # tmp_path is kept for a while
    with serving(made) as faulty, pytest.raises(DocumentTooLarge, match="longer than 4194304 bytes"):
        Images(state, connect).pull(f"{faulty.host}/app:1")


def test_an_index_of_100_mb_in_a_layout(images: Images, tmp_path: Path) -> None:
    layout = MadeImage([GOOD]).write_layout(str(tmp_path / "layout"))
    os.truncate(f"{layout}/index.json", 100_000_000)
    with pytest.raises((DocumentTooLarge, ImageError), match="4194304"):
        images.load(layout)


def test_headers_made_by_hand_are_right_ones() -> None:
    """But for what each is about: nothing here fails for another reason than the one it shows."""
    content = head(b"d/", DIRECTORY) + FIRST + END
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["d", "first"]
