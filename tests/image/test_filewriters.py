"""Files of a layer written by other processes: the same tree, the same errors, and nothing left of them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import containerkit as ck
from containerkit.errors import CorruptLayer, KernelError, LayerError
from containerkit.image.layers import filewriters
from containerkit.image.layers.extract import Extractor, LowersNeeded
from containerkit.image.layers.filewriters import MOST_PENDING, FileWriters, writers
from containerkit.image.layers.layer import TarReader
from containerkit.image.layers.writer_process import CONTENT
from support.images import hardlink, make_tar, member, snapshot, symlink
from support.unpacking import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.kernel

NAMES = ("a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "l/a", "/d/a")
LOWER = (
    member("d/", mode=0o700), member("d/a", b"1"), hardlink("a", "d/a"), member("d/e/"), member("d/e/b", b"2"),
    hardlink("c", "d/e/b"), symlink("l", "d"),
)  # fmt: skip
KINDS: tuple[Callable[[str, int], tuple[tarfile.TarInfo, bytes]], ...] = (
    lambda name, number: member(name, b"%d" % number * number, mode=0o4711, uid=number),
    lambda name, number: member(name, b"", mtime=number),
    lambda name, number: member(f"{name}/", mode=0o700 + number % 8),
    lambda name, number: symlink(name, NAMES[number % len(NAMES)]),
    lambda name, number: hardlink(name, NAMES[number % len(NAMES)]),
    lambda name, _: member(os.path.join(os.path.dirname(name), f".wh.{os.path.basename(name)}"), b""),
    lambda name, _: member(f"{name}/.wh..wh..opq", b""),
    lambda name, number: member(name, bytes([number]) * (CONTENT + number)),
    lambda name, _: member(name, type=tarfile.CHRTYPE),
)


@pytest.fixture(scope="module")
def helpers() -> Iterator[FileWriters]:
    with FileWriters(2) as made:
        yield made


@pytest.fixture(scope="module")
def lower(session_directory: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        unpack(make_tar(LOWER), f"{path}/lower", None)
        yield f"{path}/lower"


@pytest.fixture
def directory(session_directory: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        yield path


def unpack(tar: bytes, path: str, helpers: FileWriters | None, lowers: tuple[str, ...] = ()) -> None:
    """In a thread with the umask 0; raises what it raises."""
    os.mkdir(path)

    def work() -> None:
        with Extractor(path, lowers) as extractor:
            if helpers is not None:
                extractor.hand_files_to(helpers)
            extractor.unpack(TarReader(io.BytesIO(tar).read1))
            extractor.finish(lowers)

    in_thread(work)


def outcome(tar: bytes, path: str, helpers: FileWriters | None, lowers: tuple[str, ...] = ()) -> object:
    try:
        unpack(tar, path, helpers, lowers)
    except LayerError as error:
        return type(error), error.entry, str(error)
    except LowersNeeded:
        return LowersNeeded
    return {name: seen if seen[0] != "0o20000" else "whiteout" for name, seen in snapshot(path).items()}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, len(KINDS) - 1), st.integers(0, 99)), max_size=14),
    st.booleans(),
)
def test_whatever_comes_in_whatever_order_gives_the_same(
    helpers: FileWriters, lower: str, session_directory: str, entries: list[tuple[str, int, int]], above: bool
) -> None:
    tar = make_tar([KINDS[kind](name, number) for name, kind, number in entries])
    lowers = (lower,) if above else ()
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        assert outcome(tar, f"{path}/theirs", helpers, lowers) == outcome(tar, f"{path}/ours", None, lowers)


def test_many_files_of_all_sizes_arrive_whole(helpers: FileWriters, directory: str) -> None:
    sizes = [0, 1, CONTENT - 1, CONTENT, CONTENT + 1, 3 * CONTENT, *range(0, 60_000, 997)]
    files = [member(f"f{number}", os.urandom(size)) for number, size in enumerate(sizes)]
    files += [member(f"many/{number}", b"%d" % number) for number in range(2 * MOST_PENDING)]
    unpack(make_tar(files), f"{directory}/layer", helpers)
    seen = {os.path.join(place, name) for place, _, names in os.walk(f"{directory}/layer") for name in names}
    assert len(seen) == len(files)
    for info, content in files:
        with open(f"{directory}/layer/{info.name}", "rb") as file:
            assert file.read() == content, info.name


def test_a_file_that_cannot_be_written_is_named(helpers: FileWriters, directory: str) -> None:
    long = "n" * 300
    tar = make_tar([member("first", b"1"), member(long, b"2"), *(member(f"f{number}", b"3") for number in range(500))])
    with pytest.raises(CorruptLayer, match="File name too long") as caught:
        unpack(tar, f"{directory}/layer", helpers)
    assert caught.value.entry == long
    unpack(make_tar([member("fine", b"1")]), f"{directory}/next", helpers)
    assert os.listdir(f"{directory}/next") == ["fine"]


def test_a_full_disk_is_an_error_with_its_number(helpers: FileWriters, directory: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=True)
    try:
        with pytest.raises(KernelError, match="No space left") as caught:
            unpack(make_tar([member(f"f{n}", os.urandom(100_000)) for n in range(30)]), f"{directory}/layer", helpers)
        assert caught.value.path.startswith("f")
    finally:
        subprocess.run(["umount", directory], check=True)


def expect_lost(helpers: FileWriters, path: str, pieces: Iterator[bytes]) -> None:
    """Unpack what comes in these pieces, one of which has a process killed."""
    os.mkdir(path)
    with Extractor(path) as extractor:
        extractor.hand_files_to(helpers)
        with pytest.raises(KernelError, match="helper process"):
            extractor.unpack(TarReader(lambda: next(pieces, b"")))


def test_a_lost_process_is_an_error_and_no_standstill(directory: str) -> None:
    with FileWriters(2) as helpers:
        killed = helpers.pids[0]

        def pieces() -> Iterator[bytes]:
            tar = make_tar([member(f"{number}", os.urandom(50_000)) for number in range(2000)])
            for start in range(0, len(tar), 1 << 20):
                if start == 10 << 20:
                    os.kill(killed, signal.SIGKILL)
                yield tar[start : start + (1 << 20)]

        expect_lost(helpers, f"{directory}/layer", pieces())


def test_processes_that_die_together_are_an_error_too(directory: str) -> None:
    with FileWriters(2) as helpers:
        assert helpers.ready()
        for pid in helpers.pids:
            os.kill(pid, signal.SIGSTOP)

        def pieces() -> Iterator[bytes]:
            tar = make_tar([member(f"{number}", os.urandom(50_000)) for number in range(100)])
            yield tar
            for pid in helpers.pids:
                os.kill(pid, signal.SIGKILL)

        expect_lost(helpers, f"{directory}/layer", pieces())


def test_a_process_that_cannot_be_made_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def spawn(*fds: int) -> tuple[int, int]:
        if made:
            raise BlockingIOError
        made.append(real(*fds))
        return made[0]

    real = filewriters._spawn
    monkeypatch.setattr(filewriters, "_spawn", spawn)
    with writers(1 << 30) as helpers:
        assert helpers is None
    assert not os.path.exists(f"/proc/{made[0][0]}")


@pytest.mark.parametrize("executable", ["", "/bin/true", "/bin/cat"])
def test_what_runs_here_may_be_no_interpreter(monkeypatch: pytest.MonkeyPatch, directory: str, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(filewriters, "SMALLEST", 0)
    os.makedirs(f"{directory}/root/bin")
    with open(f"{directory}/root/bin/file", "wb") as file:
        file.write(b"content")
    host = ck.Host(root=f"{directory}/state")
    image = host.images.import_rootfs(f"{directory}/root", tag="base:1")
    with open(f"{image.lowers[0]}/bin/file", "rb") as file:
        assert file.read() == b"content"


OWNER = """\
import sys, time
sys.path.insert(0, sys.argv[1])
from containerkit.image.layers.filewriters import FileWriters
helpers = FileWriters(2)
print(*helpers.pids, flush=True)
time.sleep(60)
"""


def test_the_processes_end_with_their_owner_however_it_ends() -> None:
    package = os.path.dirname(os.path.dirname(ck.__file__))
    with subprocess.Popen([sys.executable, "-c", OWNER, package], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        owner.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "they outlived their owner"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] != b"Z"
    return False


@pytest.mark.parametrize(
    ("size", "processors", "count"), [(1 << 30, 8, 4), (1 << 30, 2, 2), (1 << 30, 1, 0), (1, 2, 0)]
)
def test_there_are_as_many_as_pay(monkeypatch: pytest.MonkeyPatch, size: int, processors: int, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)))
    with writers(size) as made:
        assert len(made.pids if made else ()) == count


def test_an_image_is_the_same_by_helpers_and_without(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    root = f"{directory}/root"
    made: list[Any] = []
    monkeypatch.setattr(filewriters, "FileWriters", lambda count: made.append(FileWriters(count)) or made[-1])
    subprocess.run(["cp", "-a", "/usr/share/perl5", root], check=True)
    trees = []
    for smallest in (0, 1 << 40):
        monkeypatch.setattr(filewriters, "SMALLEST", smallest)
        host = ck.Host(root=f"{directory}/state-{smallest}")
        image = host.images.import_rootfs(root, tag="perl:1")
        layer = os.listdir(f"{directory}/state-{smallest}/layers")
        trees.append(snapshot(f"{directory}/state-{smallest}/layers/{layer[0]}"))
        assert image.layers
    assert trees[0] == trees[1]
    assert len(trees[0]) > 100
    assert len(made) == 1
