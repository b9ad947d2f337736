"""What changed between trees, and the layer that it makes: laws over generated trees, and Docker's own words."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import tracemalloc
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from containerkit.errors import LayerError
from containerkit.image.layers.changes import (
    Comparison,
    newly_joined,
    regrouped,
    tree_changes,
    tree_differs,
    upper_changes,
    upper_differs,
)
from containerkit.image.layers.difflayer import tree_layer, upper_layer
from containerkit.image.layers.merged import MergedView
from containerkit.image.layers.walk import Walk
from containerkit.linux.clone import clone_tree
from containerkit.linux.mount import new_mount
from image.test_write import extract
from support import facts
from support.images import MadeImage, snapshot
from support.peers import umoci_unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.image.layers.walk import Visit

pytestmark = pytest.mark.kernel
SECOND = 1_000_000_000
TIME = 4  # where a snapshot has the mtime


@pytest.fixture
def directory(session_directory: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=session_directory) as path:
        yield path


class Vanishing(Walk):
    """A walk of a tree in which a file goes just before it is looked at."""

    gone = b""

    def __iter__(self) -> Iterator[Visit]:
        for visit in super().__iter__():
            if visit.name == self.gone:
                os.unlink(visit.base, dir_fd=visit.dir_fd)
            yield visit


@pytest.mark.parametrize("name", [b"file", b"link", b"fifo"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_vanishes_while_it_is_compared_is_passed_over(directory: str, name: bytes, whole: bool) -> None:
    old, new = f"{directory}/old", f"{directory}/new"
    os.mkdir(old)
    with open(f"{old}/file", "wb") as file:
        file.write(b"1")
    os.symlink("file", f"{old}/link")
    os.mkfifo(f"{old}/fifo")
    with open(f"{old}/last", "wb"):
        pass
    clone_tree(old, new)
    os.chmod(f"{new}/last", 0o400)
    with Vanishing(new) as walk:
        walk.gone = name
        found = [(each.kind, each.name) for each in Comparison(MergedView([old]), whole=whole).run(walk)]
    assert found == [("C", b"last")]


class Node(NamedTuple):
    kind: str  # dir, file, link, fifo, device, hard
    content: bytes = b""
    mode: int = 0o644
    owner: int = 0
    mtime: int = SECOND
    xattr: bytes = b""


NODES = st.builds(
    Node,
    kind=st.sampled_from(["dir", "dir", "dir", "file", "file", "link", "fifo", "device", "hard", "hard"]),
    content=st.sampled_from([b"", b"1", b"2", b"a"]),
    mode=st.sampled_from([0o755, 0o640, 0o4711]),
    owner=st.sampled_from([0, 7]),
    mtime=st.sampled_from([SECOND, SECOND, 5 * SECOND + 25]),
    xattr=st.sampled_from([b"", b"", b"x"]),
)
PATHS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join)
TREES = st.dictionaries(PATHS, NODES, max_size=9)
few = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def build(root: str, tree: dict[str, Node]) -> str:
    """Make it, parents before children; what lies below something else than a directory is left out."""
    os.makedirs(root, exist_ok=True)
    made: dict[str, Node] = {}
    files: list[str] = []
    for path in sorted(tree):
        if _has_parents(root, path):
            made[path] = _make(f"{root}/{path}", tree[path], files)
    for directory, names, _ in os.walk(root):
        for name in names:
            made.setdefault(os.path.relpath(f"{directory}/{name}", root), Node("dir", mode=0o755))
    for path in sorted(made, reverse=True):
        dress(f"{root}/{path}", made[path])
    os.utime(root, ns=(0, 0))
    return root


def _has_parents(root: str, path: str) -> bool:
    """Make the directories above, where nothing else stands in their place."""
    parent = os.path.dirname(path)
    if not parent:
        return True
    if not _has_parents(root, parent):
        return False
    if not os.path.lexists(f"{root}/{parent}"):
        os.mkdir(f"{root}/{parent}")
    return os.path.isdir(f"{root}/{parent}") and not os.path.islink(f"{root}/{parent}")


def _make(path: str, node: Node, files: list[str]) -> Node:
    if node.kind == "dir":
        os.mkdir(path)
    elif node.kind == "link":
        os.symlink(os.fsdecode(node.content) or "nowhere", path)
    elif node.kind == "fifo":
        os.mkfifo(path)
    elif node.kind == "device":
        os.mknod(path, stat.S_IFCHR, os.makedev(5, len(node.content)))
    elif node.kind == "hard" and files:
        os.link(files[-1], path)
        return node._replace(kind="done")
    else:
        with open(path, "wb") as file:
            file.write(node.content)
        files.append(path)
    return node


def dress(path: str, node: Node) -> None:
    if node.kind == "done":
        return
    os.chown(path, node.owner, node.owner, follow_symlinks=False)
    if node.kind != "link":
        os.chmod(path, node.mode)
    if node.xattr:
        os.setxattr(path, "trusted.test", node.xattr, follow_symlinks=False)
    os.utime(path, ns=(0, node.mtime), follow_symlinks=False)


@contextlib.contextmanager
def overlay(*lowers: str, upper: str = "", work: str = "") -> Iterator[str]:
    """A mount that nobody else sees."""
    options = [f"lowerdir+={lower}" for lower in lowers]
    options += [f"upperdir={upper}", f"workdir={work}"] if upper else []
    fd = new_mount("overlay", tuple(options))
    try:
        yield f"/proc/self/fd/{fd}/."
    finally:
        os.close(fd)


def merged(*lowers: str) -> dict[str, tuple[Any, ...]]:
    with overlay(*lowers) as root:
        return snapshot(root)


def joined(pieces: Iterator[bytes]) -> bytes:
    return b"".join(pieces)


@few
@example(old={"a/a": Node("file"), "b": Node("hard")}, new={"a": Node("link", b"a")})
@given(old=TREES, new=TREES)
def test_the_layer_between_two_trees_makes_one_of_the_other(
    session_directory: str, old: dict[str, Node], new: dict[str, Node]
) -> None:
    with tempfile.TemporaryDirectory(dir=session_directory) as top:
        before, after = build(f"{top}/old", old), build(f"{top}/new", new)
        tar = joined(tree_layer(before, after))
        assert tar == joined(tree_layer(before, after))
        layer = extract(tar, f"{top}/layer", (before,))
        assert merged(layer, before) == snapshot(after)
        assert list(tree_changes(before, before)) == []
        assert not tree_differs(before, before)
        assert sum(1 for _ in tarfile.open(fileobj=io.BytesIO(joined(tree_layer(after, after))))) == 0


@few
@example(old={"a": Node("file")}, new={"a": Node("file"), "b": Node("hard")}, again=False)
@given(old=TREES, new=TREES, again=st.booleans())
def test_an_upper_directory_and_its_layer_show_the_same(
    session_directory: str, old: dict[str, Node], new: dict[str, Node], again: bool
) -> None:
    with tempfile.TemporaryDirectory(dir=session_directory) as top:
        before = build(f"{top}/old", old)
        for name in ("upper", "work", "empty"):
            os.mkdir(f"{top}/{name}")
        with overlay(before, f"{top}/empty", upper=f"{top}/upper", work=f"{top}/work") as root:
            change(root, old, new, again=again)
        tar = joined(upper_layer(f"{top}/upper"))
        layer = extract(tar, f"{top}/layer", (before,))
        expected = merged(f"{top}/upper", before)
        assert merged(layer, before) == expected
        changes = list(upper_changes(f"{top}/upper", MergedView([before])))
        with overlay(f"{top}/upper", before) as root:
            subprocess.run(["cp", "-a", ".", f"{top}/merged"], cwd=root, check=True)
        # A copy-up tears links apart: both names change. Whole trees differ where a file has got one more name.
        linked = any(os.path.lexists(os.fsencode(f"{before}/") + name) for name in regrouped(before, f"{top}/merged"))
        if not linked and not any(node.kind == "hard" for node in old.values()):
            assert changes == list(tree_changes(before, f"{top}/merged"))
            assert tree_differs(before, f"{top}/merged") == bool(changes)
        assert upper_differs(f"{top}/upper", MergedView([before])) == bool(changes)


def change(root: str, old: dict[str, Node], new: dict[str, Node], *, again: bool) -> None:
    """Work on a mounted tree as a container would: delete, make anew, write into, link, change attributes."""
    for path in sorted(old.keys() - new.keys()) + (sorted(new) if again else []):
        target = f"{root}/{path}"
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)
        elif os.path.lexists(target):
            os.unlink(target)
    files: list[str] = []
    for path in sorted(new):
        target = f"{root}/{path}"
        if not _has_parents(root, path):
            continue
        node = new[path]
        if not os.path.lexists(target):
            node = _make(target, node, files)
        elif os.path.isfile(target) and not os.path.islink(target):
            with open(target, "wb") as file:
                file.write(node.content)
            files.append(target)
        if not os.path.islink(target):
            os.chmod(target, node.mode)
            os.utime(target, ns=(0, node.mtime))


def upper_of(directory: str, lower: str, script: str) -> str:
    """The upper directory after a shell script has run in the merged root."""
    for name in ("upper", "work", "empty"):
        os.mkdir(f"{directory}/{name}")
    with overlay(lower, f"{directory}/empty", upper=f"{directory}/upper", work=f"{directory}/work") as root:
        subprocess.run(["sh", "-ec", script], cwd=root, check=True)
    return f"{directory}/upper"


BASE = """
mkdir -p d1 d2/s d3 d4 w x/y/z dirtofile/q old/only
for file in d1/a d1/b d2/f d3/old d3/kept d4/m x/y/z/t filetodir old/only/f touched; do echo $file > $file; done
find . -exec touch -h -d '2020-01-01 00:00:00' {} +
"""
WORK = """
echo modified > d1/a
rm d1/b
rm -r d3; mkdir d3; echo n > d3/new; echo other > d3/kept
rm -r d2
mkdir -p n1/n2; echo > n1/n2/f
ln d4/m d4/l
chmod 700 w
echo y >> x/y/z/t
rm filetodir; mkdir filetodir; echo > filetodir/c
rm -r dirtofile; echo > dirtofile
ln -s /nowhere sl; mkfifo ff
touch old
touch touched
chmod 600 touched; chmod 644 touched
"""
EXPECTED = """
C /d1
C /d1/a
D /d1/b
D /d2
C /d3
C /d3/kept
A /d3/new
D /d3/old
C /d4
A /d4/l
C /dirtofile
A /ff
C /filetodir
A /filetodir/c
A /n1
A /n1/n2
A /n1/n2/f
A /sl
C /touched
C /w
C /x
C /x/y
C /x/y/z
C /x/y/z/t
"""


def base(directory: str) -> str:
    os.mkdir(f"{directory}/lower")
    subprocess.run(["sh", "-ec", BASE], cwd=f"{directory}/lower", check=True)
    return f"{directory}/lower"


def test_changes_are_told_as_docker_tells_them(directory: str) -> None:
    lower = base(directory)
    upper = upper_of(directory, lower, WORK)
    assert "\n".join(map(str, upper_changes(upper, MergedView([lower])))) == EXPECTED.strip()


def test_docker_agrees(directory: str) -> None:
    facts.require("docker", "dockerd")
    facts.require("busybox")
    lower = base(directory)
    os.mkdir(f"{lower}/bin")
    for name in ("sh", "rm", "mkdir", "ln", "chmod", "mkfifo", "touch"):
        shutil.copy("/bin/busybox", f"{lower}/bin/{name}")
    with docker(directory) as command:
        tar = subprocess.run(["tar", "-C", lower, "-c", "."], check=True, capture_output=True).stdout
        subprocess.run([*command, "import", "-", "base"], input=tar, check=True, capture_output=True)
        run = [*command, "run", "--network", "none", "--name", "one", "base", "/bin/sh", "-ec", WORK]
        subprocess.run(run, check=True, capture_output=True)
        told = subprocess.run([*command, "diff", "one"], check=True, capture_output=True, text=True).stdout
        subprocess.run([*command, "rm", "one"], check=True, capture_output=True)
    assert sorted(told.splitlines()) == sorted(EXPECTED.strip().splitlines())


@contextlib.contextmanager
def docker(directory: str) -> Iterator[list[str]]:
    """A dockerd with state of its own and no network."""
    from benchmarks.peers import daemon

    os.mkdir(f"{directory}/docker")
    try:
        with daemon(f"{directory}/docker") as address:
            yield ["docker", "-H", address]
    finally:
        shutil.rmtree(f"{directory}/docker", ignore_errors=True)


def test_a_layer_as_docker_writes_it(directory: str) -> None:
    upper = upper_of(directory, base(directory), WORK)
    with tarfile.open(fileobj=io.BytesIO(joined(upper_layer(upper)))) as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert {name for name in members if ".wh." in name} == {
        "d1/.wh.b",
        ".wh.d2",
        "d3/.wh..wh..opq",
        "filetodir/.wh..wh..opq",
        *(name for name in members if name == "n1/.wh..wh..opq"),  # only newer kernels make it opaque
    }
    assert next(iter(members)) == "."
    assert all(members[name].isreg() and members[name].size == 0 for name in members if ".wh." in name)
    assert members["d4/m"].linkname == "d4/l"
    assert not [member for member in members.values() if "trusted.overlay" in str(member.pax_headers)]


def test_umoci_sees_what_overlay_shows(directory: str) -> None:
    lower = base(directory)
    with open(f"{lower}/holes", "wb") as file:
        file.truncate(1 << 20)
    upper = upper_of(directory, lower, WORK + "truncate -s 3M holes; printf x | dd of=holes bs=1 seek=2M conv=notrunc")
    os.chmod(upper, 0o710)  # noqa: S103
    os.utime(upper, ns=(0, SECOND))
    layers = [joined(upper_layer(lower)), joined(upper_layer(upper))]
    layout = MadeImage(layers).write_layout(f"{directory}/layout")
    assert snapshot(umoci_unpack(f"{layout}:latest", f"{directory}/b")) == merged(upper, lower)


def test_names_that_delete_are_refused(directory: str) -> None:
    for place in ("upper", "old"):
        os.mkdir(f"{directory}/{place}")
    with open(f"{directory}/upper/.wh.file", "wb"):
        pass
    with pytest.raises(LayerError, match=r"\.wh\.file"):
        joined(upper_layer(f"{directory}/upper"))
    with pytest.raises(LayerError, match=r"\.wh\.file"):
        joined(tree_layer(f"{directory}/upper", f"{directory}/old"))


def test_a_socket_hides_what_was_there(directory: str) -> None:
    old, new = build(f"{directory}/old", {"a": Node("file"), "b": Node("file")}), f"{directory}/new"
    os.mkdir(new)
    os.mknod(f"{new}/a", stat.S_IFSOCK | 0o600)
    os.mknod(f"{new}/c", stat.S_IFSOCK | 0o600)
    with tarfile.open(fileobj=io.BytesIO(joined(tree_layer(old, new)))) as tar:
        assert sorted(tar.getnames())[1:] == [".wh.a", ".wh.b"]


def test_content_alone_can_tell(directory: str) -> None:
    old = build(f"{directory}/old", {"a": Node("file", b"1"), "b": Node("file", b"1")})
    new = build(f"{directory}/new", {"a": Node("file", b"2"), "b": Node("file", b"1")})
    assert list(map(str, tree_changes(old, new))) == ["C /a"]
    assert tree_differs(old, new)


def test_what_is_left_out_leaves_no_trace(directory: str) -> None:
    lower = base(directory)
    upper = upper_of(directory, lower, "mkdir proc; touch d1/hosts; touch n")
    out = {b"proc", b"d1/hosts"}
    assert list(map(str, upper_changes(upper, MergedView([lower]), leave_out=out))) == ["A /n"]
    assert upper_differs(upper, MergedView([lower]), leave_out=out)
    assert not upper_differs(upper, MergedView([lower]), leave_out=[*out, b"n"])
    with tarfile.open(fileobj=io.BytesIO(joined(upper_layer(upper, leave_out=out)))) as tar:
        assert tar.getnames() == [".", "d1", "n"]


def test_several_lower_layers_are_seen_as_one(directory: str) -> None:
    bottom = base(directory)
    middle = upper_of(directory, bottom, WORK)
    os.rename(middle, f"{directory}/middle")
    top = f"{directory}/second"
    os.mkdir(top)
    for name in ("upper", "work"):
        os.mkdir(f"{top}/{name}")
    with overlay(f"{directory}/middle", bottom, upper=f"{top}/upper", work=f"{top}/work") as root:
        shutil.rmtree(f"{root}/d3")
        os.mkdir(f"{root}/d3")
        os.unlink(f"{root}/sl")
        os.mkdir(f"{root}/d2")
    changes = upper_changes(f"{top}/upper", MergedView([f"{directory}/middle", bottom]))
    assert list(map(str, changes)) == ["A /d2", "C /d3", "D /d3/kept", "D /d3/new", "D /sl"]


def test_directories_of_many_files_are_compared_with_all_below_at_once(directory: str) -> None:
    """Files in the bottom, the middle or both, some of which the middle deletes; an upper one that touches most."""
    bottom, middle, upper = (f"{directory}/{name}/d" for name in ("bottom", "middle", "upper"))
    touched, left = [], []
    for path in (bottom, middle, upper):
        os.makedirs(path)
    for number in range(120):
        name = f"f{number:03}"
        for path, period in ((bottom, 2), (middle, 3), (upper, 5)):
            if number % period == 0:
                with open(f"{path}/{name}", "w", encoding="ascii") as file:
                    file.write(path)
        hidden = number % 3 == 1
        if hidden:
            os.mknod(f"{middle}/{name}", stat.S_IFCHR, 0)
        there = number % 3 == 0 or (number % 2 == 0 and not hidden)
        if number % 5 == 0:
            touched.append(f"{'C' if there else 'A'} /d/{name}")
        elif there:
            left.append(name)
            if number % 5 == 1:
                os.mknod(f"{upper}/{name}", stat.S_IFCHR, 0)
    lowers = [os.path.dirname(path) for path in (middle, bottom)]

    def changes() -> set[str]:
        return {str(change) for change in upper_changes(os.path.dirname(upper), MergedView(lowers))} - {"C /d"}

    assert changes() == {*touched, *(f"D /d/{name}" for name in left if int(name[1:]) % 5 == 1)}
    os.setxattr(upper, "trusted.overlay.opaque", b"y")
    assert changes() == {*touched, *(f"D /d/{name}" for name in left)}


def test_a_file_of_many_names_takes_memory_for_each_once(directory: str) -> None:
    for tree in ("old", "new"):
        build(f"{directory}/{tree}", {"name": Node("file", b"x")})
        for number in range(3000):
            os.link(f"{directory}/{tree}/name", f"{directory}/{tree}/name{number}")
    tracemalloc.start()
    try:
        assert list(tree_changes(f"{directory}/old", f"{directory}/new")) == []
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def groups() -> st.SearchStrategy[list[list[bytes]]]:
    """Files of several names each, among a few names."""
    files = st.lists(st.integers(0, 3), min_size=8, max_size=8)
    return files.map(lambda of: [found for file in range(4) if len(found := _of(of, file)) > 1])


def _of(files: list[int], file: int) -> list[bytes]:
    return [b"%d" % number for number, each in enumerate(files) if each == file]


@given(before=groups(), after=groups(), missing=st.integers(0, 4))
def test_names_have_joined_that_were_not_all_together(
    before: list[list[bytes]], after: list[list[bytes]], missing: int
) -> None:
    before = before[missing:]
    together = {name: set(names) for names in before for name in names}
    expected = {name for names in after for name in names if not set(names) <= together.get(name, set())}
    assert newly_joined(before, after) == expected


def test_what_vanishes_while_it_is_compared_has_not_changed(directory: str) -> None:
    for tree in ("lower", "upper"):
        build(f"{directory}/{tree}", {name: Node("file", tree.encode()) for name in "abc"})
    found = []
    with Walk(f"{directory}/upper") as walk:
        for difference in Comparison(MergedView([f"{directory}/lower"])).run(walk):
            found.append(difference.name)
            if difference.name == b"a":
                os.unlink(f"{directory}/upper/b")
    assert found == [b"a", b"c"]
