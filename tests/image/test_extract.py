"""Reading and unpacking single layers."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import stat
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import CorruptLayer, LayerError, LayerTooLarge, UnsafeEntry
from containerkit.image.layers import merged, parents
from containerkit.image.layers.attributes import Attributes
from containerkit.image.layers.extract import Extractor, LowersNeeded
from containerkit.image.layers.filewriters import FileWriters
from containerkit.image.layers.layer import FILE, TarReader
from containerkit.image.layers.merged import level
from containerkit.image.layers.pax import parse_pax, pax_time
from containerkit.image.layers.write import header, tar_of
from support.images import MTIME, hardlink, make_tar, member, snapshot, symlink
from support.unpacking import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

kernel = pytest.mark.kernel


@pytest.fixture
def directory(session_directory: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        yield path


@pytest.fixture(scope="module")
def processes() -> Iterator[FileWriters]:
    with FileWriters(2) as writers:
        yield writers


class Setting:
    helpers: FileWriters | None = None


@pytest.fixture(autouse=True, params=[False, True], ids=["alone", "with helpers"])
def helpers(request: pytest.FixtureRequest, processes: FileWriters) -> Iterator[None]:
    """Every test runs twice: the files written by the same process, and by others."""
    Setting.helpers = processes if request.param else None
    yield
    Setting.helpers = None


def unpack(tar: bytes, path: str, lowers: Sequence[str] | None = (), *, piece: int = 1 << 20) -> str:
    stream = io.BytesIO(tar)
    os.mkdir(path)

    def work() -> None:
        with Extractor(path, lowers) as extractor:
            if Setting.helpers is not None:
                extractor.hand_files_to(Setting.helpers)
            extractor.unpack(TarReader(lambda: stream.read(piece)))
            extractor.finish(lowers or ())

    in_thread(work)
    return path


OUTSIDE = "/tmp/containerkit-test-outside"

UNSAFE = {
    "dotdot": [member("../escaped", b"x")],
    "deep dotdot": [member("a/b/../../../escaped", b"x")],
    "dotdot directory": [member("..", mode=0o777)],
    "absolute and up": [member("/../escaped", b"x")],
    "absolute, down and up": [member("/a/../../escaped", b"x")],
    "through an absolute symlink": [symlink("door", OUTSIDE), member("door/escaped", b"x")],
    "through a symlink that climbs": [symlink("door", "../../.."), member("door/escaped", b"x")],
    "through two symlinks": [symlink("a", "b"), symlink("b", "/tmp"), member("a/escaped", b"x")],
    "through a loop": [symlink("a", "b"), symlink("b", "a"), member("a/escaped", b"x")],
    "through a symlink, directory": [symlink("door", "/tmp"), member("door/escaped/")],
    "through a symlink, whiteout": [symlink("door", "/tmp"), member("door/.wh.x", b"")],
    "hard link out": [hardlink("copy", "../../etc/passwd")],
    "hard link to an absolute path": [hardlink("copy", "/etc/passwd")],
    "hard link through a symlink": [symlink("door", "/etc"), hardlink("copy", "door/passwd")],
    "hard link through a climbing symlink": [symlink("door", "../../../../etc"), hardlink("copy", "door/passwd")],
    "whiteout of the directory itself": [member("a/"), member("a/.wh..", b"")],
    "whiteout of the parent": [member("a/"), member("a/.wh...", b"")],
    "the root as a symlink": [symlink("./", "/tmp")],
}


def outside() -> object:
    """What an entry of :data:`UNSAFE` would change."""
    return snapshot(OUTSIDE), os.path.lexists("/tmp/escaped"), os.stat("/etc/passwd").st_nlink


@kernel
@pytest.mark.parametrize("members", UNSAFE.values(), ids=UNSAFE.keys())
def test_no_entry_leaves_the_root(directory: str, members: list[Any]) -> None:
    os.makedirs(OUTSIDE)
    before = outside()
    try:
        with pytest.raises(UnsafeEntry) as caught:
            unpack(make_tar([member("first", b"x"), *members]), f"{directory}/layer")
        assert caught.value.entry
        assert outside() == before
    finally:
        os.rmdir(OUTSIDE)
    assert os.listdir(directory) == ["layer"]


@kernel
def test_absolute_names_land_inside_the_root(directory: str) -> None:
    """As the builder ko writes them; umoci, Docker and podman leave the slash out."""
    os.makedirs(OUTSIDE)
    before = outside()
    members = [
        member("/"), member("/ko-app/"), member("/ko-app/tool", b"x"), hardlink("/hard", "/ko-app/tool"),
        member(OUTSIDE, b"x"), member("//etc/passwd", b"y"), symlink("/l", "/ko-app"), member("/l/through", b"z"),
        member("/.wh.gone", b""),
    ]  # fmt: skip
    try:
        root = unpack(make_tar(members), f"{directory}/layer")
        assert outside() == before
    finally:
        os.rmdir(OUTSIDE)
    found = {path: status[-1] for path, status in snapshot(root).items() if os.path.isfile(f"{root}/{path}")}
    assert found == {
        "hard": ("hard", "ko-app/tool"), "ko-app/tool": ("hard", "ko-app/tool"), OUTSIDE[1:]: (OUTSIDE[1:],),
        "etc/passwd": ("etc/passwd",), "ko-app/through": ("ko-app/through",),
    }  # fmt: skip


@kernel
def test_dotdot_inside_and_repeated_slashes_are_harmless(directory: str) -> None:
    members = [member("./a/./b//c/../d", b"x"), member(".hidden", b"y"), member("..dots/...", b"z")]
    root = unpack(make_tar(members), f"{directory}/layer")
    assert {path for path in snapshot(root) if os.path.isfile(f"{root}/{path}")} == {"a/b/d", ".hidden", "..dots/..."}


@kernel
def test_symlinks_are_replaced_not_followed(directory: str) -> None:
    victim = f"{directory}/victim"
    with open(victim, "w", encoding="ascii") as file:
        file.write("safe")
    members = [symlink("a", victim), member("a", b"new"), symlink("d", directory), member("d/", mode=0o700)]
    root = unpack(make_tar(members), f"{directory}/layer")
    with open(victim, encoding="ascii") as file:
        assert file.read() == "safe"
    assert stat.S_ISREG(os.lstat(f"{root}/a").st_mode)
    assert stat.S_ISDIR(os.lstat(f"{root}/d").st_mode)


@kernel
def test_later_entries_win(directory: str) -> None:
    members = [
        member("d/"), member("d/sub/"), member("d/sub/x", b"1"), member("d", b"file"),
        member("f", b"2"), member("f/"), member("f/y", b"3"),
        member("l", b"4"), hardlink("m", "l"), member("l", b"5"), hardlink("m", "m"),
    ]  # fmt: skip
    root = unpack(make_tar(members), f"{directory}/layer")
    contents = {}
    for name in ("d", "f/y", "l", "m"):
        with open(f"{root}/{name}", "rb") as file:
            contents[name] = file.read()
    assert contents == {"d": b"file", "f/y": b"3", "l": b"5", "m": b"4"}


def lower(directory: str) -> str:
    """A layer to lie upon: ``f``, ``g``, ``o/f``, and ``p/q/f`` and ``twin``, which are one file."""
    names = [member("f", b"1"), member("g", b"2"), member("o/"), member("o/f", b"3")]
    return unpack(
        make_tar([*names, member("p/"), member("p/q/"), member("p/q/f", b"4"), hardlink("twin", "p/q/f")]), directory
    )


def marks(root: str) -> tuple[list[str], list[str]]:
    """The whiteouts and the opaque directories of a tree."""
    whiteouts = [path for path, seen in snapshot(root).items() if seen[0] == "0o20000" and seen[3] == 0]
    opaque = [path for path, seen in snapshot(root).items() if ("trusted.overlay.opaque", b"y") in seen[7]]
    return sorted(whiteouts), sorted(opaque)


@kernel
def test_overlay_form_of_deletions(directory: str) -> None:
    members = [member(".wh.f", b""), member("o/"), member("o/.wh..wh..opq", b""), member("o/.wh..wh.plnk/", None)]
    members += [member("g", type=tarfile.CHRTYPE), member("p/q/.wh.f", b"")]
    root = unpack(make_tar(members), f"{directory}/layer", (lower(f"{directory}/lower"),))
    assert marks(root) == (["f", "g", "p/q/f"], ["o"])
    assert os.listdir(f"{root}/o") == []


@kernel
def test_marks_that_hide_nothing_are_left_out(directory: str) -> None:
    """A mark in a directory that does not merge is listed by the kernel, as a name that cannot be opened."""
    members = [
        member(".wh.missing", b""), member("new/"), member("new/.wh.x", b""), member("new/.wh..wh..opq", b""),
        member("o/"), member("o/.wh.f", b""), member("o/.wh..wh..opq", b""), member("f", b"own"), member(".wh.f", b""),
        member(".wh.g", b""), member("no/such/.wh.x", b""), member("f/.wh.x", b""), member("p/x", type=tarfile.CHRTYPE),
    ]  # fmt: skip
    root = unpack(make_tar(members), f"{directory}/layer", (lower(f"{directory}/lower"),))
    assert marks(root) == (["g"], ["o"])
    assert sorted(os.listdir(root)) == ["f", "g", "new", "o", "p"]
    alone = unpack(make_tar(members), f"{directory}/alone")
    assert marks(alone) == ([], [])
    assert sorted(os.listdir(alone)) == ["f", "new", "o"]


@kernel
def test_a_mark_behind_what_became_a_symlink_is_not_followed(directory: str) -> None:
    outside = f"{directory}/outside"
    os.mkdir(outside)
    os.mknod(f"{outside}/f", stat.S_IFCHR, 0)
    members = [member("o/"), member("o/.wh.f", b""), symlink("o", outside)]
    unpack(make_tar(members), f"{directory}/layer", (lower(f"{directory}/lower"),))
    assert os.listdir(outside) == ["f"]


@kernel
def test_a_hard_link_brings_all_names_of_a_lower_file_along(directory: str) -> None:
    below = lower(f"{directory}/lower")
    root = unpack(make_tar([hardlink("new", "twin")]), f"{directory}/layer", (below,))
    assert snapshot(root)["new"][-1] == ("new", "p/q/f", "twin")
    assert snapshot(root)["p/q"][:7] == snapshot(below)["p/q"][:7]
    hidden = unpack(make_tar([member(".wh.p", b""), hardlink("new", "twin")]), f"{directory}/hidden", (below,))
    assert snapshot(hidden)["new"][-1] == ("new", "twin")
    own = unpack(make_tar([member("twin", b"own"), hardlink("new", "p/q/f")]), f"{directory}/own", (below,))
    assert snapshot(own)["new"][-1] == ("new", "p/q/f")
    late = [hardlink("new", "p/q/f"), member("twin", b"own"), member("p/q/.wh.f", b"")]
    assert snapshot(unpack(make_tar(late), f"{directory}/late", (below,)))["new"][-1] == ("new",)


@kernel
def test_a_hard_link_cannot_take_the_place_of_its_targets_directory(directory: str) -> None:
    below = lower(f"{directory}/lower")
    for number, first in enumerate(([member("p/q/f", b"own")], [])):
        with pytest.raises(CorruptLayer, match="below itself"):
            unpack(make_tar([*first, hardlink("p", "p/q/f")]), f"{directory}/{number}", (below,))


@kernel
@pytest.mark.parametrize("target", ["p", "p/q", "own", "new", "/p"])
def test_a_hard_link_to_a_directory_is_none(directory: str, target: str) -> None:
    below = lower(f"{directory}/lower")
    tar = make_tar([member("own/"), *([member("new/")] if target == "new" else []), hardlink("new", target)])
    with pytest.raises(LayerError, match="no file of the image") as caught:
        unpack(tar, f"{directory}/layer", (below,))
    assert (type(caught.value), caught.value.entry) == (UnsafeEntry if target == "/p" else CorruptLayer, "new")


@kernel
def test_what_a_hard_link_brought_along_is_taken_back(directory: str) -> None:
    below = lower(f"{directory}/lower")
    gone = unpack(make_tar([hardlink("x", "p/q/f"), member(".wh.p", b"")]), f"{directory}/gone", (below,))
    assert (sorted(os.listdir(gone)), marks(gone)) == (["p", "twin", "x"], (["p"], []))
    opaque = unpack(make_tar([hardlink("x", "p/q/f"), member("p/.wh..wh..opq", b"")]), f"{directory}/opaque", (below,))
    assert (os.listdir(f"{opaque}/p"), marks(opaque)) == ([], ([], ["p"]))
    kept = [hardlink("x", "p/q/f"), member("p/own", b""), member(".wh.p", b"")]
    root = unpack(make_tar(kept), f"{directory}/kept", (below,))
    assert (os.listdir(f"{root}/p"), marks(root)) == (["own"], ([], ["p"]))
    everything = [hardlink("x", "p/q/f"), member(".wh..wh..opq", b"")]
    root = unpack(make_tar(everything), f"{directory}/everything", (below,))
    assert (snapshot(root)["x"][-1], marks(root)[0]) == (("x",), ["f", "g", "o", "p", "twin"])
    with pytest.raises(CorruptLayer, match="no file of the image"):
        unpack(make_tar([member(".wh..wh..opq", b""), hardlink("x", "f")]), f"{directory}/none", (below,))


@kernel
def test_a_layer_cannot_steer_the_overlay(directory: str) -> None:
    xattrs = {"trusted.overlay.redirect": b"/etc", "user.kept": b"1"}
    root = unpack(make_tar([member("d/", xattrs=xattrs), member("f", b"", xattrs=xattrs)]), f"{directory}/layer")
    assert os.listxattr(f"{root}/d") == os.listxattr(f"{root}/f") == ["user.kept"]


@kernel
def test_the_callers_umask_and_a_setgid_parent_do_not_show(directory: str) -> None:
    os.chown(directory, -1, 12345)
    os.chmod(directory, 0o2755)  # noqa: S103 - that is the case
    old = os.umask(0o077)
    try:
        root = unpack(make_tar([member("d/", mode=0o777), member("d/f", b"", mode=0o666)]), f"{directory}/layer")
    finally:
        assert os.umask(old) == 0o077
    found = {name: os.lstat(f"{root}/{name}") for name in ("", "d", "d/f")}
    assert [oct(stat.S_IMODE(status.st_mode)) for status in found.values()] == ["0o755", "0o777", "0o666"]
    assert {status.st_gid for status in found.values()} == {0}


@kernel
def test_lower_layers_are_asked_for_when_they_are_needed(directory: str) -> None:
    upper = make_tar([member("usr/bin/tool", b"x")])
    with pytest.raises(LowersNeeded):
        unpack(upper, f"{directory}/first", None)
    assert unpack(upper, f"{directory}/bottom", ())
    complete = make_tar([member("usr/"), member("usr/tool", b"x"), member("x", b""), hardlink("y", "usr/tool")])
    assert unpack(complete, f"{directory}/second", None)


@kernel
def test_deep_directories_without_entries_are_looked_for_once_each(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes of gzip name hundreds of them: what each costs must not grow with its depth."""
    looked = 0

    def counted(directories: Sequence[bytes], name: bytes) -> object:
        nonlocal looked
        looked += 1
        return level(directories, name)

    monkeypatch.setattr(merged, "level", counted)
    deep = "/".join(["d"] * 500)
    below = unpack(make_tar([member("d/"), member("d/d/", mode=0o700)]), f"{directory}/lower")
    root = unpack(make_tar([member(f"{deep}/f", b"1"), member(f"{deep}/g/h", b"2")]), f"{directory}/layer", (below,))
    assert looked < 2 * 502
    assert os.path.exists(f"{root}/{deep}/g/h")
    assert [oct(os.stat(f"{root}/{path}").st_mode) for path in ("d/d", "d/d/d")] == ["0o40700", "0o40755"]


@kernel
def test_few_descriptors_are_kept_where_few_are_allowed(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [member(f"{top}/{number}/f", b"1") for top in "ab" for number in range(30)]
    links = [hardlink(f"l/{number}/x", f"a/{number}/f") for number in range(30)]
    below = unpack(make_tar(members), f"{directory}/lower")
    expected = snapshot(unpack(make_tar(links), f"{directory}/all", (below,)), times=False)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(12)]
    most = free[-1] + 1
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, allowed[1]))
    try:
        assert snapshot(unpack(make_tar(links), f"{directory}/few", (below,)), times=False) == expected
        monkeypatch.setattr(parents, "SHARE", 1)  # as if others had opened the rest in the meantime
        assert snapshot(unpack(make_tar(links), f"{directory}/crowded", (below,)), times=False) == expected
        crowded = unpack(make_tar(members), f"{directory}/crowded files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    assert snapshot(crowded, times=False) == snapshot(below, times=False)


@kernel
def test_times_before_1970_and_after_2262(directory: str) -> None:
    times = {"old": -1_000_000_000.5, "new": 10_000_000_000, "far": 13_000_000_000.25}
    root = unpack(make_tar([member(name, b"", mtime=time) for name, time in times.items()]), f"{directory}/layer")
    assert {name: os.lstat(f"{root}/{name}").st_mtime for name in times} == times


@kernel
@pytest.mark.parametrize(
    "form", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix --sparse-version=1.0"]
)
@pytest.mark.parametrize("regions", [1, 3, 40])
def test_sparse_files_of_gnu_tar(directory: str, form: str, regions: int) -> None:
    source = f"{directory}/source"
    os.mkdir(source)
    with open(f"{source}/sparse", "wb") as file:
        for number in range(regions):
            file.seek(number * 300_000)
            file.write(os.urandom(5000))
        file.truncate(regions * 300_000 + 1)
    os.utime(f"{source}/sparse", (MTIME, MTIME))
    kind, *options = form.split()
    command = ["tar", "-C", source, f"--format={kind}", *options, "--sparse", "-cf", f"{directory}/tar", "sparse"]
    subprocess.run(command, check=True)
    with open(f"{directory}/tar", "rb") as tar:
        root = unpack(tar.read(), f"{directory}/layer", piece=1000)
    assert snapshot(root)["sparse"] == snapshot(source)["sparse"]
    assert os.stat(f"{root}/sparse").st_blocks <= os.stat(f"{source}/sparse").st_blocks + 8


@kernel
def test_a_written_tree_unpacks_to_itself(directory: str) -> None:
    members = [
        member("./", mode=0o750, uid=3), member("d/", mode=0o1777, mtime=1.5), member("d/f", b"x" * 3000, uid=2**31),
        hardlink("d/l", "d/f"), symlink("s", "d/" + "t" * 150), member("n" * 200, b"", xattrs={"user.a": b"\0=\n\xff"}),
        member("dev", type=tarfile.CHRTYPE, devmajor=5, devminor=1, mode=0o620, gid=5), member("ü", b""),
        member("p", type=tarfile.FIFOTYPE, mode=0o600), member("old", b"", mtime=-5.25), member("e/", mtime=MTIME),
    ]  # fmt: skip
    first = unpack(make_tar(members), f"{directory}/first")
    tar = b"".join(tar_of(first))
    assert tar == b"".join(tar_of(first))
    second = unpack(tar, f"{directory}/second", piece=700)
    assert snapshot(second) == snapshot(first)
    subprocess.run(["tar", "-tf", "-"], input=tar, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(tar)) as peer:
        assert len(peer.getnames()) == len(members)


def read_all(tar: bytes, piece: int = 1 << 20) -> list[tuple[bytes, bytes]]:
    stream = io.BytesIO(tar)
    reader = TarReader(lambda: stream.read(piece))
    found = []
    while entry := reader.next():
        found.append((entry.name, b"".join(reader.pieces())))
    return found


PLAIN = make_tar([member("a", b"1" * 700), member("b" * 150, b"2" * 512), member("c", b"")])


@pytest.mark.parametrize("piece", [1, 100, 511, 512, 513, 4096])
def test_pieces_of_any_size(piece: int) -> None:
    assert read_all(PLAIN, piece) == [(b"a", b"1" * 700), (b"b" * 150, b"2" * 512), (b"c", b"")]


def test_the_end_of_a_tar() -> None:
    end = len(PLAIN.rstrip(b"\0")) // 512 * 512 + 512
    assert len(read_all(PLAIN[:end])) == 3
    assert len(read_all(PLAIN[: end + 512])) == 3
    assert read_all(b"") == []
    with pytest.raises(CorruptLayer, match="lone zero block"):
        read_all(PLAIN[: end + 512] + PLAIN)


def test_a_tar_may_end_behind_its_last_byte_of_data() -> None:
    for length in (512 + 700, 1300, 1535, 1536):
        assert read_all(PLAIN[:length]) == [(b"a", b"1" * 700)]


def test_every_truncation_is_noticed() -> None:
    end = len(PLAIN.rstrip(b"\0")) // 512 * 512 + 512
    padding = range(512 + 700, 1536)  # without it and the end blocks nothing is lost, and some writers leave it out
    for length in range(1, end, 37):
        if (length % 512 and length not in padding) or length in {512, 1024, 2048, 2560, 3072}:
            with pytest.raises(CorruptLayer, match=r"truncated|extended header"):
                read_all(PLAIN[:length])


def test_every_changed_header_byte_is_noticed() -> None:
    for at in {*range(512)} - {155}:  # what follows the checksum's own NUL says nothing
        damaged = bytearray(PLAIN)
        damaged[at] ^= 0x01
        with pytest.raises(CorruptLayer):
            read_all(bytes(damaged))


@pytest.mark.parametrize(
    "tar",
    [
        b"not a tar at all" * 64,
        header(b"", FILE, Attributes()) + bytes(1024),
        header(b"x", b"M", Attributes()) + bytes(1024),
        header(b"x", b"x", Attributes(), size=1 << 30) + bytes(1024),
        header(b"x", b"x", Attributes(), size=20) + b"999 path=x\n".ljust(512, b"\0") + bytes(1024),
        header(b"x", b"x", Attributes(), size=14)
        + b"14 path=a\0b\n\n".ljust(512, b"\0")
        + header(b"y", FILE, Attributes()),
    ],
    ids=["text", "no name", "unknown type", "huge pax", "pax length", "nul in name"],
)
def test_damaged_tars(tar: bytes) -> None:
    with pytest.raises((CorruptLayer, LayerTooLarge)):
        read_all(tar)


@pytest.mark.property
@given(st.binary(max_size=1200), st.integers(0, 700))
def test_any_bytes_read_or_are_refused(noise: bytes, at: int) -> None:
    for tar in (noise, PLAIN[:at] + noise + PLAIN[at + len(noise) :]):
        with contextlib.suppress(LayerError):
            read_all(tar)


@pytest.mark.property
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=9).filter(lambda key: b"=" not in key), st.binary(max_size=120)))
)
def test_pax_records(records: list[tuple[bytes, bytes]]) -> None:
    content = b"".join(_record(key, value) for key, value in records)
    assert list(parse_pax(content)) == records


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = next(size for size in range(len(rest), len(rest) + 9) if size == len(rest) + len(str(size)))
    return str(length).encode() + rest


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1.5", 1_500_000_000), (b"1", 1_000_000_000), (b"0.000000001", 1), (b"1.9999999999", 1_999_999_999),
        (b"-1.5", -1_500_000_000), (b"-0.0000000001", -1), (b"99999999999", 99_999_999_999 * 10**9),
    ],
)  # fmt: skip
def test_pax_times(text: bytes, nanoseconds: int) -> None:
    assert pax_time({b"mtime": text}, b"mtime", 7) == nanoseconds
