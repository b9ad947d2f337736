"""The tar reader against what other programs write: GNU tar, bsdtar, Python's tarfile, and headers made by hand."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from containerkit.errors import CorruptLayer
from containerkit.image.layers.layer import DIRECTORY, FILE, LINK, SYMLINK, Entry, TarReader
from containerkit.image.limits import ImageLimits
from support import facts

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 512
END = bytes(2 * BLOCK)
SECOND = 1_000_000_000


class Read(NamedTuple):
    """An entry and its data, holes filled in."""

    entry: Entry
    data: bytes


def read(tar: bytes, piece: int = 1 << 20, **limits: Any) -> list[Read]:
    stream = io.BytesIO(tar)
    reader = TarReader(lambda: stream.read(piece), ImageLimits(**limits))
    found = []
    while entry := reader.next():
        found.append(Read(entry, filled(entry, b"".join(reader.pieces()))))
    return found


def filled(entry: Entry, stored: bytes) -> bytes:
    if entry.sparse is None:
        return stored
    content, at = bytearray(entry.sparse.size), 0
    for offset, length in entry.sparse.regions:
        content[offset : offset + length] = stored[at : at + length]
        at += length
    return bytes(content)


def head(name: bytes, kind: bytes = FILE, size: int = 0, *, magic: bytes = b"ustar\x0000", **fields: bytes) -> bytes:
    """A header; ``mode=``, ``uid=``, ``gid=``, ``size_field=``, ``mtime=``, ``link=`` and ``rest=`` as raw bytes."""
    block = name.ljust(100, b"\0")
    for key, width, default in (
        ("mode", 8, b"0000644\0"), ("uid", 8, b"0000000\0"), ("gid", 8, b"0000000\0"),
        ("size_field", 12, b"%011o\0" % size), ("mtime", 12, b"00000000001\0"),
    ):  # fmt: skip
        block += fields.get(key, default).ljust(width, b"\0")
    block += b" " * 8 + kind + fields.get("link", b"").ljust(100, b"\0") + magic.ljust(8, b"\0")
    block = (block + fields.get("rest", b"")).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def body(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


@pytest.fixture
def tree(tmp_path: Path) -> str:
    """Files whose headers need every extension that there is."""
    root = tmp_path / "tree"
    deep = root / ("d" * 90) / ("e" * 90) / ("f" * 90)
    deep.mkdir(parents=True)
    (deep / ("name" * 40)).write_bytes(b"long" * 300)
    (root / "ünïcode ☃").write_bytes(b"u")
    (root / "empty").touch()
    (root / "link").symlink_to("t" * 180)
    os.link(root / "empty", root / "hard")
    os.mkfifo(root / "fifo")
    (root / "setuid").write_bytes(b"#!" * 5000)
    (root / "setuid").chmod(0o6755)
    os.utime(root / "setuid", ns=(1, -1_500_000_000))
    os.utime(root / "empty", ns=(1, 1_234_567_890_123_456_789))
    return str(root)


def seen(root: str, *, nanoseconds: bool) -> dict[str, tuple[Any, ...]]:
    """What the file system says of each path, as the reader would say it."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            mtime = status.st_mtime_ns if nanoseconds else status.st_mtime_ns // SECOND * SECOND
            link = os.readlink(path) if os.path.islink(path) else ""
            data = b""
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    data = file.read()
            found[os.path.relpath(path, root)] = (status.st_mode & 0o7777, status.st_uid, mtime, link, data)
    return found


def told(tar: bytes, *, nanoseconds: bool) -> dict[str, tuple[Any, ...]]:
    """The same from a tar; hard links take after what they lead to."""
    found: dict[str, tuple[Any, ...]] = {}
    for entry, data in read(tar, piece=10_000):
        name = os.fsdecode(entry.name).removeprefix("./").rstrip("/")
        if entry.kind == LINK:
            found[name] = found[os.fsdecode(entry.link).removeprefix("./")]
        elif name not in {"", "."}:
            mtime = entry.mtime if nanoseconds else entry.mtime // SECOND * SECOND
            found[name] = (entry.mode, entry.uid, mtime, os.fsdecode(entry.link), data)
    return found


# The time of one file, in seconds, as each of them can write it; libarchive 3.6 says -2.5 where it means -1.5.
WRITERS: dict[str, tuple[list[str], float]] = {
    "GNU tar, gnu": (["tar", "--format=gnu"], -2),
    "GNU tar, pax": (["tar", "--format=posix"], -1.5),
    "GNU tar, pax, binary": (["tar", "--format=posix", "--pax-option=hdrcharset=BINARY", "--xattrs"], -1.5),
    "bsdtar, pax": (["bsdtar", "--format=pax"], -2),
    "bsdtar, restricted pax": (["bsdtar", "--format=paxr"], -2),
    "bsdtar, gnu": (["bsdtar", "--format=gnutar"], 2),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_other_programs_write(writer: str, tree: str) -> None:
    command, time = WRITERS[writer]
    facts.require(command[0])
    os.utime(f"{tree}/setuid", (1, time))
    # bsdtar converts names, and the locale says from what.
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    made = subprocess.run([*command, "-C", tree, "-cf", "-", "."], check=True, capture_output=True, env=environment)
    nanoseconds = writer in {"GNU tar, pax", "GNU tar, pax, binary", "bsdtar, pax"}
    assert told(made.stdout, nanoseconds=nanoseconds) == seen(tree, nanoseconds=nanoseconds)


@pytest.mark.parametrize("form", ["v7", "oldgnu", "ustar"])
def test_older_formats_of_gnu_tar(form: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "l").symlink_to("f")
    made = subprocess.run(["tar", f"--format={form}", "-C", tmp_path, "-c", "a"], check=True, capture_output=True)
    assert told(made.stdout, nanoseconds=False) == seen(str(tmp_path), nanoseconds=False)
    kinds = {read.entry.name: read.entry.kind for read in read(made.stdout)}
    assert kinds == {b"a/": DIRECTORY, b"a/f": FILE, b"a/l": SYMLINK}


@pytest.mark.parametrize("options", [["--label=vol"], ["-gsnapshot"], ["--label=x", "-gsnapshot"]])
def test_volume_labels_and_dumpdirs(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(90):
        (tmp_path / "a" / f"file-with-a-name-{number}").write_bytes(b"%d" % number)
    command = ["tar", "--format=gnu", *options, "-c", "a"]
    made = subprocess.run(command, check=True, capture_output=True, cwd=tmp_path).stdout
    (tmp_path / "snapshot").unlink(missing_ok=True)
    assert told(made, nanoseconds=False) == seen(str(tmp_path), nanoseconds=False)
    assert any(entry.kind == DIRECTORY for entry, _ in read(made))


def test_the_dumpdir_of_an_empty_directory_is_not_the_end(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "empty").mkdir(parents=True)
    (tree / "a" / "file").write_bytes(b"x")
    command = ["tar", "--format=gnu", f"-g{tmp_path}/snapshot", "-C", tree, "-c", "a"]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    assert bytes(BLOCK) in [made[at : at + BLOCK] for at in range(0, made.rindex(b"a/file"), BLOCK)]
    assert told(made, nanoseconds=False) == seen(str(tree), nanoseconds=False)


def test_the_second_volume_of_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(60_000))
    command = ["tar", "-M", "-L", "40", "-C", tmp_path, "-cf", tmp_path / "1.tar", "-f", tmp_path / "2.tar", "big"]
    subprocess.run(command, check=True)
    with pytest.raises(CorruptLayer, match="continues a file of another volume") as caught:
        read((tmp_path / "2.tar").read_bytes())
    assert caught.value.entry == "big"
    with pytest.raises(CorruptLayer, match="truncated"):
        read((tmp_path / "1.tar").read_bytes())


def test_bsdtars_sparse_files(tmp_path: Path) -> None:
    facts.require("bsdtar")
    with open(tmp_path / "sparse", "wb") as file:
        for number in range(5):
            file.seek(number * 200_000)
            file.write(os.urandom(4096))
        file.truncate(1_000_000)
    command = ["bsdtar", "--format=pax", "--read-sparse", "-C", tmp_path, "-cf", "-", "sparse"]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    [found] = read(made)
    assert found.entry.name == b"sparse"
    assert found.data == (tmp_path / "sparse").read_bytes()


def test_numbers_of_every_form() -> None:
    cases = {
        b"0000644\0": 0o644, b"644     ": 0o644, b"    644\0": 0o644, b"00000644": 0o644, b"\0" * 8: 0,
        b"\x80" + (0o644).to_bytes(7, "big"): 0o644,
    }  # fmt: skip
    for field, value in cases.items():
        assert read(head(b"x", mode=field) + END)[0].entry.mode == value, field
    large, negative = b"\x80" + (5 << 33).to_bytes(11, "big"), (-1_000).to_bytes(12, "big", signed=True)
    assert read(head(b"x", mtime=large) + END)[0].entry.mtime == (5 << 33) * SECOND
    assert read(head(b"x", mtime=negative) + END)[0].entry.mtime == -1_000 * SECOND
    assert read(head(b"x", uid=b"\x80" + (2**31).to_bytes(7, "big")) + END)[0].entry.uid == 2**31
    for field in (b"99999999", b"zz", b"1x"):
        with pytest.raises(CorruptLayer, match="is not a number"):
            read(head(b"x", size_field=field) + END)


def test_names_and_links_that_fill_their_fields() -> None:
    name, link, prefix = b"n" * 100, b"l" * 100, b"p" * 155
    [found] = read(head(name, SYMLINK, link=link, rest=bytes(80) + prefix) + END)
    assert (found.entry.name, found.entry.link) == (prefix + b"/" + name, link)
    [found] = read(head(name, SYMLINK, link=link, magic=b"ustar  \0", rest=bytes(80) + prefix) + END)
    assert found.entry.name == name  # GNU has times there
    [found] = read(head(name, magic=b"", rest=bytes(80) + prefix) + END)
    assert found.entry.name == name
    star = bytes(80) + (b"p" * 131) + b"00000000001 00000000002 "
    [found] = read(head(name, rest=star.ljust(508 - 265, b"\0") + b"tar\0") + END)
    assert found.entry.name == b"p" * 131 + b"/" + name


def test_old_headers() -> None:
    tar = head(b"d/", b"\0", magic=b"") + head(b"d/f", b"\0", 3, magic=b"") + body(b"abc") + head(b"c", b"7", 1)
    found = read(tar + body(b"z") + END)
    assert [(entry.name, entry.kind, data) for entry, data in found] == [
        (b"d/", DIRECTORY, b""), (b"d/f", FILE, b"abc"), (b"c", FILE, b"z"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [LINK, SYMLINK, DIRECTORY, b"D"])
def test_sizes_without_data_and_with_it(kind: bytes) -> None:
    """A size of what has no data is a hint, unless something that is no header follows."""
    after = head(b"after", FILE, 1) + body(b"z") + END
    for data in (b"", body(b"some data\n" * 100)):
        found = read(head(b"x", kind, 1000, link=b"y") + data + after, piece=700)
        names = [(entry.name, entry.size) for entry, _ in found]
        assert names == [(b"x", 0), (b"after", 1)]
        assert found[-1].data == b"z"
    assert [entry.name for entry, _ in read(head(b"x", kind, 1000, link=b"y") + END)] == [b"x"]
    assert [entry.name for entry, _ in read(head(b"x", kind, 1000, link=b"y"))] == [b"x"]


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    content = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        size = next(size for size in range(len(text), len(text) + 9) if size == len(text) + len(str(size)))
        content += b"%d%s" % (size, text)
    return head(b"pax", kind, len(content)) + body(content)


def test_what_pax_says_goes_before_the_header() -> None:
    records = {"path": "long", "size": "3", "uid": "4294967294", "gid": "0", "mtime": "-1.25", "atime": "2.5"}
    [found] = read(pax(records) + head(b"short", FILE, 0) + body(b"abc") + END)
    entry = found.entry
    assert (entry.name, found.data, entry.uid, entry.mtime, entry.atime) == (
        b"long", b"abc", 4294967294, -1_250_000_000, 2_500_000_000,
    )  # fmt: skip


@pytest.mark.parametrize("mtime", [1e-05, 1.5e-07, -2.5e-05, 0.1, 1_500_000_000.25, -1.5, 1e16])
def test_times_as_python_writes_them(mtime: float) -> None:
    """Also short ones, with an exponent, which Python's reader takes and Go's does not."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x")
        info.mtime = mtime
        tar.addfile(info)
    [found] = read(target.getvalue())
    assert found.entry.mtime == int(Decimal(str(mtime)) * SECOND)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1e1", 10 * SECOND), ("12.5e-1", 1_250_000_000), ("1.23456E+3", 1_234_560_000_000), ("1e-9", 1), ("1e-10", 0),
        ("-1e-10", -1), ("0e99", 0), ("+5", 5 * SECOND), ("7.", 7 * SECOND),
    ],
)  # fmt: skip
def test_times_with_exponents_and_signs(text: str, nanoseconds: int) -> None:
    [found] = read(pax({"mtime": text}) + head(b"x") + END)
    assert found.entry.mtime == nanoseconds


@pytest.mark.parametrize(
    "text", ["1e300", "1e9999999999", "nan", "inf", "-", "e5", ".5", "1_0", " 1", "1e", "1e+", "--1", "0x1", "1.5.5"]
)
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(CorruptLayer, match="mtime"):
        read(pax({"mtime": text}) + head(b"x") + END)


def test_empty_values_and_global_headers_change_nothing() -> None:
    tar = pax({"path": "global", "uid": "5"}, b"g") + pax({"path": "", "size": "", "mtime": ""}) + head(b"own", FILE, 1)
    [found] = read(tar + body(b"z") + END)
    assert (found.entry.name, found.entry.uid, found.entry.mtime, found.data) == (b"own", 0, SECOND, b"z")


def test_the_last_record_of_a_key_counts_and_headers_add_up() -> None:
    tar = pax({"path": "a", "mtime": "1"}) + pax({"path": "b"}) + head(b"L", b"L", 2) + body(b"c\0") + head(b"x")
    [found] = read(tar + END)
    assert (found.entry.name, found.entry.mtime) == (b"c", SECOND)


def test_what_follows_the_end_is_ignored() -> None:
    tar = head(b"x", FILE, 1) + body(b"z") + END
    assert len(read(tar + b"garbage" * 1000)) == 1
    assert len(read(tar + tar)) == 1
    assert len(read(tar[: -len(END)])) == 1


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
component = st.text(st.sampled_from("abcü☃ .\\\n'=%"), min_size=1, max_size=12).filter(
    lambda text: text not in {".", ".."}
)
paths = st.lists(component, min_size=1, max_size=4).map("/".join)
kinds = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
long_paths = paths | st.integers(90, 400).map(lambda count: "n" * count) | st.just("d/" * 150 + "f")
members = st.tuples(
    long_paths, kinds, st.binary(max_size=1100), st.integers(0, 0o7777), st.integers(0, 2**32 - 2),
    st.integers(-(2**33), 2**40), long_paths,
)  # fmt: skip


@pytest.mark.property
@settings(max_examples=150)
@given(st.lists(members, max_size=5), st.sampled_from(["gnu", "pax"]), st.sampled_from([1, 100, 513, 1 << 20]))
def test_what_tarfile_writes(written: list[tuple[Any, ...]], form: str, piece: int) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=FORMATS[form], encoding="utf-8") as tar:
        for name, kind, data, mode, owner, mtime, link in written:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, owner, owner, mtime
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = link if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(data))
    found = read(target.getvalue(), piece)
    assert len(found) == len(written)
    for (entry, content), (name, kind, data, mode, owner, mtime, link) in zip(found, written, strict=True):
        assert entry.name == name.encode() + (b"/" if kind == tarfile.DIRTYPE else b"")
        assert (entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime) == (kind, mode, owner, owner, mtime * SECOND)
        assert content == (data if kind == tarfile.REGTYPE else b"")
        assert entry.link == (link.encode() if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else b"")
