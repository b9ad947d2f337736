"""Trees as tars: what other tools read of them, and what comes back."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING

import pytest

from containerkit.errors import LayerError
from containerkit.image.layers.attributes import Attributes
from containerkit.image.layers.extract import Extractor
from containerkit.image.layers.layer import FILE, TarReader
from containerkit.image.layers.walk import MOST_OPEN, Walk
from containerkit.image.layers.write import END, TarWriter, header, tar_of
from containerkit.image.stream import PIECE
from support import facts
from support.images import snapshot
from support.unpacking import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

kernel = pytest.mark.kernel
SECOND = 1_000_000_000
TIME = 1_600_000_000 * SECOND + 123_456_789


@pytest.fixture
def directory(session_directory: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        yield path


def extract(tar: bytes, path: str, lowers: tuple[str, ...] = ()) -> str:
    stream = io.BytesIO(tar)
    os.mkdir(path)

    def work() -> None:
        with Extractor(path, lowers) as extractor:
            extractor.unpack(TarReader(lambda: stream.read(PIECE)))
            extractor.finish(lowers or ())

    in_thread(work)
    return path


def tree(path: str) -> str:
    """One of everything that a tar can hold."""
    os.makedirs(f"{path}/deep/{'d' * 120}/{'e' * 90}")
    files = {
        "plain": b"x" * 1000,
        "empty": b"",
        "block": b"y" * 512,
        "large": os.urandom(3 * PIECE + 17),
        "grüße ✓": b"u",
        f"deep/{'d' * 120}/short": b"prefix",
        f"deep/{'d' * 120}/{'e' * 90}/{'f' * 200}": b"long",
        "setuid": b"s",
    }
    for name, content in files.items():
        with open(f"{path}/{name}", "wb") as file:
            file.write(content)
    with open(os.fsencode(path) + b"/not utf-8 \xff", "wb"):
        pass
    os.chown(f"{path}/plain", 3_000_000, 2_999_999_999)
    os.chmod(f"{path}/setuid", 0o6751)  # noqa: S103
    os.setxattr(f"{path}/setuid", "user.two", b"2\n\x00\xff")
    os.setxattr(f"{path}/setuid", "trusted.one", b"1")
    os.setxattr(f"{path}/deep", "user.dir", b"d")
    os.symlink("plain", f"{path}/link")
    os.symlink("n" * 300, f"{path}/long-link")
    os.setxattr(f"{path}/link", "trusted.link", b"l", follow_symlinks=False)
    os.link(f"{path}/setuid", f"{path}/a-hard-link")
    os.link(f"{path}/link", f"{path}/z-hard-link-of-link")
    os.mkfifo(f"{path}/fifo", 0o620)
    os.mknod(f"{path}/device", stat.S_IFBLK | 0o640, os.makedev(7, 300_000))
    os.mknod(f"{path}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for number, name in enumerate(sorted(os.listdir(path))):
        os.utime(f"{path}/{name}", ns=(TIME, TIME + number), follow_symlinks=False)
    os.utime(f"{path}/plain", ns=(TIME, -5 * SECOND + 1))
    os.utime(f"{path}/empty", ns=(TIME, 0x200000000 * SECOND))
    os.utime(path, ns=(TIME, TIME))
    return path


def joined(pieces: Iterator[bytes]) -> bytes:
    return b"".join(pieces)


@kernel
def test_a_tree_comes_back_whole_and_always_as_the_same_bytes(directory: str) -> None:
    source = tree(f"{directory}/source")
    tar = joined(tar_of(source))
    assert snapshot(extract(tar, f"{directory}/copy")) == snapshot(source)
    assert joined(tar_of(f"{directory}/copy")) == tar


@kernel
def test_gnu_tar_unpacks_the_same_tree(directory: str) -> None:
    facts.require("tar")
    source = tree(f"{directory}/source")
    os.mkdir(f"{directory}/copy")
    command = ["tar", "-C", f"{directory}/copy", "-xp", "--xattrs", "--xattrs-include=*", "--numeric-owner"]
    subprocess.run(command, input=joined(tar_of(source)), check=True, capture_output=True)
    theirs, ours = snapshot(f"{directory}/copy"), snapshot(source)
    for name in ("z-hard-link-of-link", "link"):  # tar sets no attributes on symlinks
        theirs.pop(name), ours.pop(name)
    assert theirs == ours


def test_names_come_in_the_order_of_their_bytes(directory: str) -> None:
    for name in (b"b", b"a-c", b"a/c", b"\xc3\xa9", b"\xff", b"B"):
        os.makedirs(os.path.dirname(os.fsencode(directory) + b"/" + name), exist_ok=True)
        with open(os.fsencode(directory) + b"/" + name, "wb"):
            pass
    with tarfile.open(fileobj=io.BytesIO(joined(tar_of(directory)))) as tar:
        names = [os.fsencode(name) for name in tar.getnames()]
    assert names == [b".", b"B", b"a", b"a/c", b"a-c", b"b", b"\xc3\xa9", b"\xff"]


def test_a_pax_header_only_where_ustar_is_too_small() -> None:
    usual = Attributes(0o644, 2_097_151, 2_097_151, 8_589_934_591 * SECOND)
    fits = ["n" * 100, "d" * 155 + "/" + "n" * 100, "d" * 50 + "/" + "n" * 99, "dir/" * 30 + "x/"]
    assert {len(header(name.encode(), FILE, usual, size=0o77777777777)) for name in fits} == {512}
    needs = [
        header(b"n" * 101, FILE, usual),
        header(b"d" * 156 + b"/" + b"n", FILE, usual),
        header("é".encode(), FILE, usual),
        header(b"n", b"2", usual, link=b"l" * 101),
        header(b"n", FILE, usual._replace(uid=2_097_152)),
        header(b"n", FILE, usual._replace(gid=2_097_152)),
        header(b"n", FILE, usual, size=0o100000000000),
        header(b"n", FILE, usual._replace(mtime=1)),
        header(b"n", FILE, usual._replace(mtime=-SECOND)),
        header(b"n", FILE, usual._replace(mtime=8_589_934_592 * SECOND)),
        header(b"n", FILE, usual._replace(xattrs=((b"user.a", b"b"),))),
    ]
    assert {len(block) for block in needs} == {1536}


@pytest.mark.parametrize("seconds", [0, 9, 999_999_999, 1_000_000_000, 8_589_934_591, 8_589_934_592, -1, -(10**10)])
@pytest.mark.parametrize("nanoseconds", [0, 1, 123_456_789, 999_999_999])
def test_times_keep_their_nanoseconds(seconds: int, nanoseconds: int) -> None:
    time = seconds * SECOND + nanoseconds
    for attributes in (Attributes(mtime=time), Attributes(mtime=time, xattrs=((b"user.a", b"b"),))):
        block = header(b"name", FILE, attributes)
        entry = TarReader(iter([block, b""]).__next__).next()
        assert entry is not None
        assert (entry.mtime, entry.xattrs) == (time, attributes.xattrs)
        with tarfile.open(fileobj=io.BytesIO(block)) as tar:  # it checks the sums, too
            assert tar.next() is not None


@pytest.mark.parametrize("length", [*range(80, 110), *range(980, 1010)])
def test_pax_records_count_their_own_digits(length: int) -> None:
    block = header(b"n" * length + b"/" + b"m" * 101, FILE, Attributes())
    entry = TarReader(iter([block, b""]).__next__).next()
    assert entry is not None
    assert entry.name == b"n" * length + b"/" + b"m" * 101


def test_times_are_clamped_down_to_the_epoch(directory: str) -> None:
    for name, time in (("before", TIME - SECOND), ("after", TIME + SECOND)):
        with open(f"{directory}/{name}", "wb"):
            pass
        os.utime(f"{directory}/{name}", ns=(0, time))
    epoch = TIME // SECOND
    with tarfile.open(fileobj=io.BytesIO(joined(tar_of(directory, epoch=epoch)))) as tar:
        times = {member.name: member.mtime for member in tar.getmembers()}
    assert times == {".": epoch, "after": epoch, "before": pytest.approx((TIME - SECOND) / SECOND)}


SPARSE = {
    "hole at the end": [(0, b"start")],
    "hole at the start": [(5 << 20, b"end")],
    "nothing but a hole": [],
    "several": [(1 << 20, b"a" * 5000), (3 << 20, b"b"), ((9 << 20) - 1, b"c")],
    "more than a piece": [(2 << 20, b"d" * (3 << 20))],
}


def sparse_file(path: str, regions: list[tuple[int, bytes]]) -> str:
    with open(path, "wb") as file:
        file.truncate(9 << 20)
        for offset, content in regions:
            file.seek(offset)
            file.write(content)
    os.utime(path, ns=(TIME, TIME))
    return path


@pytest.mark.parametrize("regions", SPARSE.values(), ids=SPARSE.keys())
def test_sparse_files_stay_sparse(directory: str, regions: list[tuple[int, bytes]]) -> None:
    os.mkdir(f"{directory}/source")
    source = sparse_file(f"{directory}/source/holes", regions)
    tar = joined(tar_of(f"{directory}/source", sparse=True))
    assert len(tar) < (4 << 20)
    assert len(joined(tar_of(f"{directory}/source"))) > (9 << 20)
    copies = [extract(tar, f"{directory}/ours"), f"{directory}/gnu"]
    os.mkdir(copies[1])
    subprocess.run(["tar", "-C", copies[1], "-x"], input=tar, check=True)
    for copy in copies:
        assert snapshot(copy)["holes"] == snapshot(f"{directory}/source")["holes"]
        assert os.stat(f"{copy}/holes").st_blocks <= os.stat(source).st_blocks + 16
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive, open(source, "rb") as file:
        member = archive.extractfile("holes")
        assert member is not None
        assert member.read() == file.read()


def test_what_belongs_to_the_host_stays_there(directory: str) -> None:
    with open(f"{directory}/file", "wb"):
        pass
    for name in ("trusted.overlay.origin", "user.overlay.opaque", "user.kept"):
        os.setxattr(f"{directory}/file", name, b"y")
    entries = TarReader(iter([joined(tar_of(directory)), b""]).__next__)
    entries.next()
    entry = entries.next()
    assert entry is not None
    assert entry.xattrs == ((b"user.kept", b"y"),)


def test_an_attribute_that_a_tar_cannot_hold_is_named(directory: str) -> None:
    with open(f"{directory}/file", "wb"):
        pass
    os.setxattr(f"{directory}/file", "user.a=b", b"y")
    with pytest.raises(LayerError, match=r"'file'.*user\.a=b"):
        joined(tar_of(directory))


@kernel
def test_sockets_and_whiteouts_are_left_out(directory: str) -> None:
    os.mknod(f"{directory}/socket", stat.S_IFSOCK | 0o600)
    os.mknod(f"{directory}/whiteout", stat.S_IFCHR, 0)
    with tarfile.open(fileobj=io.BytesIO(joined(tar_of(directory)))) as tar:
        assert tar.getnames() == ["."]


def _socket(path: str) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize("becomes", [None, "file", "link"])
def test_a_link_that_becomes_something_else_meanwhile_is_passed_over(directory: str, becomes: str | None) -> None:
    os.symlink("somewhere", f"{directory}/a")
    writer = TarWriter()
    with Walk(directory) as walk:
        visits = iter(walk)
        next(visits)
        visit = next(visits)
        os.unlink(f"{directory}/a")
        if becomes == "file":
            with open(f"{directory}/a", "wb"):
                pass
        elif becomes:
            os.symlink("elsewhere", f"{directory}/a")
        list(writer.add(visit))
    with tarfile.open(fileobj=io.BytesIO(writer.end())) as tar:
        assert [member.linkname for member in tar] == (["elsewhere"] if becomes == "link" else [])


def test_files_that_vanish_meanwhile_are_passed_over(directory: str) -> None:
    for name in "abc":
        with open(f"{directory}/{name}", "wb"):
            pass
    writer = TarWriter()
    with Walk(directory) as walk:
        for visit in walk:
            if visit.name == b"a":
                os.unlink(f"{directory}/b")
            list(writer.add(visit))
    with tarfile.open(fileobj=io.BytesIO(writer.end())) as tar:
        assert tar.getnames() == [".", "a", "c"]


@pytest.mark.parametrize("replace", [os.mkdir, os.mkfifo, lambda path: os.symlink("x", path), _socket])
def test_a_file_that_becomes_something_else_meanwhile_is_passed_over(
    directory: str, replace: Callable[[str], None]
) -> None:
    with open(f"{directory}/file", "wb"):
        pass
    writer = TarWriter()
    with Walk(directory) as walk:
        visits = iter(walk)
        next(visits)
        visit = next(visits)
        os.unlink(f"{directory}/file")
        replace(f"{directory}/file")
        assert list(writer.add(visit)) == []
    assert writer.end() == END


def test_a_walk_that_is_left_early_leaves_nothing_open(directory: str) -> None:
    os.makedirs(f"{directory}/a/b")
    before = os.listdir("/proc/self/fd")
    for stop in (b"", b"a", b"a/b"):
        with Walk(directory) as walk:
            for visit in walk:
                if visit.name == stop:
                    break
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("left", [0, PIECE + 1000, 5 * PIECE])
def test_a_file_that_changes_its_length_meanwhile_has_the_one_it_had(directory: str, left: int) -> None:
    with open(f"{directory}/file", "wb") as file, open(f"{directory}/next", "wb") as after:
        file.write(b"x" * (4 * PIECE))
        after.write(b"next")
        after.flush()
        pieces = tar_of(directory)
        first = next(pieces)
        file.truncate(left)
        file.flush()
        content = first + joined(pieces)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == [".", "file", "next"]
        read = [member and tar.extractfile(member) for member in tar.getmembers()[1:]]
        whole, rest = (file.read() for file in read if file)
    assert rest == b"next"
    assert len(whole) == 4 * PIECE
    assert whole.startswith(b"x" * min(left, PIECE))
    assert whole.strip(b"x").strip(b"\0") == b""


def test_a_small_file_cut_off_meanwhile_is_filled_up(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(f"{directory}/file", "wb") as file:
        file.write(b"x" * 1000)
    fstat = os.fstat

    def cut(fd: int) -> os.stat_result:
        status = fstat(fd)
        if stat.S_ISREG(status.st_mode):
            os.truncate(f"{directory}/file", 10)
        return status

    monkeypatch.setattr(os, "fstat", cut)
    content = joined(tar_of(directory))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = tar.extractfile("file")
        assert found is not None
        assert found.read() == b"x" * 10 + bytes(990)


def test_depth_is_bounded_by_nothing_but_the_disk(directory: str) -> None:
    """Deeper than there may be open files, and than a path may be long."""
    depth, here = MOST_OPEN + 1500, os.open(directory, os.O_RDONLY)
    for number in range(depth):
        os.mkdir("d" * 9, dir_fd=here)
        os.mkdir("e", dir_fd=here)
        below = os.open("d" * 9 if number < depth - 1 else ".", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    count = most = 0
    with Walk(directory) as walk:
        for _ in walk:
            count += 1
            most = max(most, count % 97 or len(os.listdir("/proc/self/fd")))
    assert count == 1 + 2 * depth
    assert most < MOST_OPEN + 100
    subprocess.run(["rm", "-rf", f"{directory}/{'d' * 9}"], check=True)
