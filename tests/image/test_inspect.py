"""Looking into images: the merged tree against what umoci unpacks, one file's content, differences file by file."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import os
import stat
import subprocess
import tarfile
import tracemalloc
from typing import TYPE_CHECKING, Any

import hypothesis
import hypothesis.strategies as st
import pytest

from containerkit.errors import (
    CompressionBomb,
    CorruptLayer,
    DigestMismatch,
    FileTooLarge,
    LayerError,
    LayerTooLarge,
    PathNotInImage,
    PathTooLong,
    UnsafeEntry,
)
from containerkit.image import contents, edit, lookup
from containerkit.image.contents import open_layer, read_contents
from containerkit.image.flatten import flattened
from containerkit.image.headers import Headers
from containerkit.image.image_diff import Side, diff_images
from containerkit.image.inspect import history, open_file, read_file, tree
from containerkit.image.layers.changes import Change, tree_changes
from containerkit.image.layers.layer import DIRECTORY, FILE, SYMLINK
from containerkit.image.layers.merged import MOST_STEPS
from containerkit.image.limits import STANDARD
from containerkit.image.lookup import find_file
from containerkit.image.scratch import Scratch
from support import edited
from support.images import MadeImage, digest, hardlink, make_tar, member, symlink

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import containerkit as ck
    from containerkit.image.model import Manifest

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "character device",
}


def manifest(made: MadeImage) -> Manifest:
    return edited.manifest(made, edited.root(made))


def side(made: MadeImage) -> Side:
    return Side(made, manifest(made))


def from_layers(*layers: list[Any]) -> MadeImage:
    return edited.image([make_tar(layer) for layer in layers], history=[])


@pytest.mark.kernel
def test_the_tree_is_what_umoci_unpacks(tmp_path: Path) -> None:
    made = edited.image()
    root = edited.unpacked(made, edited.root(made), str(tmp_path))
    expected = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            kind = KINDS[stat.S_IFMT(status.st_mode)]
            expected["/" + os.path.relpath(path, root)] = (
                kind,
                status.st_size if kind == "file" else 0,
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_nlink if kind == "file" else 1,
                os.readlink(path) if kind == "symlink" else "",
            )
    found = {
        file.path: (file.kind, file.size, file.mode, file.uid, file.gid, file.mtime, file.names, file.link)
        for file in tree(made, manifest(made), edited.config(made, edited.root(made))).files
    }
    assert found.keys() == expected.keys()
    assert {path: (found[path], expected[path]) for path in found if found[path] != expected[path]} == {}


@pytest.mark.kernel
def test_every_file_reads_as_umoci_unpacks_it(tmp_path: Path) -> None:
    made = edited.image()
    root = edited.unpacked(made, edited.root(made), str(tmp_path))
    files = [file for file in tree(made, manifest(made)).files if file.kind == "file"]
    assert len(files) > 10
    for file in files:
        with open(root + file.path, "rb") as expected:
            assert read_file(made, manifest(made), file.path) == expected.read()


def test_the_layer_of_each_path_and_what_layers_waste() -> None:
    made = from_layers(
        [member("a", b"1" * 100), member("b", b"2" * 50), member("d/"), member("d/x", b"3" * 10)],
        [member("a", b"4" * 30), member(".wh.b", b""), member("c", b"5" * 7), hardlink("d/y", "d/x")],
        [member(".wh.d", b"")],
    )
    found = tree(made, manifest(made))
    assert [(file.path, file.layer) for file in found.files] == [("/a", 1), ("/c", 1)]
    assert [(use.stored, use.added, use.replaced, use.removed, use.entries) for use in found.layers] == [
        (160, 160, 0, 0, 4),
        (37, 7, 100, 50, 4),
        (0, 0, 0, 10, 1),
    ]
    assert (found.size, found.stored, found.wasted) == (37, 197, 160)
    assert found.efficiency == pytest.approx(37 / 197)
    assert [layer.digest for layer in found.layers] == [layer.digest for layer in manifest(made).layers]


def test_links_are_followed_inside_the_image() -> None:
    made = from_layers(
        [member("usr/"), member("usr/bin/"), member("usr/bin/tool", b"lower"), symlink("bin", "usr/bin")],
        [
            symlink("absolute", "/bin/tool"),
            symlink("relative", "./bin/../bin/tool"),
            symlink("outside", "../../../../bin/tool"),
            hardlink("hard", "usr/bin/tool"),
            symlink("loop", "loop2"),
            symlink("loop2", "loop"),
            symlink("dangling", "/etc/passwd"),
        ],
    )
    for path in ("/bin/tool", "bin/tool", "absolute", "/relative", "outside", "hard", "/usr//bin/./tool", b"hard"):
        assert read_file(made, manifest(made), path) == b"lower"
    for path in ("loop", "dangling", "missing", "bin/tool/x", "bin", "", "/", "usr"):
        with pytest.raises(PathNotInImage) as caught:
            read_file(made, manifest(made), path)
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.path == path


def test_the_topmost_content_counts_and_whiteouts_hide() -> None:
    made = from_layers(
        [member("a", b"1"), member("b", b"1"), member("d/"), member("d/x", b"1")],
        [member("a", b"2"), member(".wh.b", b""), member("d/"), member("d/.wh..wh..opq", b""), member("d/y", b"2")],
        [member("b", b"3")],
    )
    assert [read_file(made, manifest(made), path) for path in ("a", "b", "d/y")] == [b"2", b"3", b"2"]
    with pytest.raises(PathNotInImage):
        read_file(made, manifest(made), "d/x")


def test_a_hard_link_before_its_namesake_is_to_the_lower_one() -> None:
    made = from_layers([member("a", b"lower")], [hardlink("b", "a"), member("a", b"upper")])
    assert [read_file(made, manifest(made), path) for path in ("a", "b")] == [b"upper", b"lower"]


def test_a_limit_and_a_stream() -> None:
    content = bytes(range(256)) * 10_000
    made = from_layers([member("big", content)])
    with pytest.raises(FileTooLarge):
        read_file(made, manifest(made), "big", limit=len(content) - 1)
    assert read_file(made, manifest(made), "big", limit=len(content)) == content
    with open_file(made, manifest(made), "big") as stream:
        assert stream.read(10) == content[:10]
        assert stream.read() == content[10:]
    with open_file(made, manifest(made), "big") as stream:
        stream.read(1)


def test_sparse_files_read_with_their_holes(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.seek(3 << 20)
        file.write(b"middle")
        file.truncate(5 << 20)
    for form in ("gnu", "posix"):
        command = ["tar", "-C", tmp_path, "-cS", f"--format={form}", "sparse"]
        made = edited.image([subprocess.run(command, check=True, capture_output=True).stdout], history=[])
        content = read_file(made, manifest(made), "sparse")
        assert content == (tmp_path / "sparse").read_bytes()
        assert tree(made, manifest(made)).files[0].size == 5 << 20


def test_damaged_content_is_noticed() -> None:
    made = from_layers([member("a", b"1")], [member("b", b"2")])
    layer = made.layers[0]
    made.blobs[digest(layer)] = layer[:-1] + bytes([layer[-1] ^ 1])
    for look in (lambda: tree(made, manifest(made)), lambda: read_file(made, manifest(made), "a")):
        with pytest.raises((DigestMismatch, CorruptLayer)):
            look()


@pytest.mark.parametrize(
    "entries",
    [
        [member("../x", b"")],
        [member("/../x", b"")],
        [symlink("up", "../.."), member("up/x", b"")],
        [member("a", b""), hardlink("b", "../a")],
        [member(".wh...", b"")],
        [symlink("l", "/nowhere"), member("l/x", b"")],
    ],
)
def test_what_would_leave_the_root_is_refused(entries: list[Any]) -> None:
    made = from_layers(entries)
    with pytest.raises(UnsafeEntry):
        tree(made, manifest(made))


def test_absolute_names_are_inside_the_image() -> None:
    made = from_layers(
        [member("/app/", uid=3), member("/app/x", b"x"), hardlink("/y", "/app/x")], [member("/app/.wh.x", b"")]
    )
    assert [(file.path, file.uid, file.names) for file in tree(made, manifest(made)).files] == [
        ("/app", 3, 1),
        ("/y", 0, 1),
    ]
    assert read_file(made, manifest(made), "/y") == b"x"


def test_a_whiteout_before_its_directorys_new_content_takes_the_old_attributes_away() -> None:
    below = [member("d/", mode=0o700, uid=7), member("d/old", b"o")]
    first, last = [member(".wh.d", b""), member("d/new", b"n")], [member("d/new", b"n"), member(".wh.d", b"")]
    for layer, attributes in ((first, (0o755, 0)), (last, (0o700, 7))):
        made = from_layers(below, layer)
        files = tree(made, manifest(made)).files
        assert [(file.path, file.mode, file.uid) for file in files if file.path == "/d"] == [("/d", *attributes)]
        assert [file.path for file in files] == ["/d", "/d/new"]


def test_a_device_of_number_zero_deletes_what_lies_below() -> None:
    mark = {"type": tarfile.CHRTYPE, "devmajor": 0, "devminor": 0}
    made = from_layers(
        [member("a", b"1"), member("b", b"2"), member("only", **mark)],
        [member("a", **mark), member("b", b"new"), member("b", **mark), member("dev", **mark | {"devmajor": 1})],
    )
    assert [file.path for file in tree(made, manifest(made)).files] == ["/b", "/dev"]
    assert read_file(made, manifest(made), "/b") == b"new"
    with pytest.raises(PathNotInImage):
        read_file(made, manifest(made), "/a")


def test_the_deepest_trees_go_and_come() -> None:
    deep = "/".join(["d"] * 505)
    made = from_layers(
        [member(deep + "/f", b"x")], [member(".wh.d", b""), member("x", b"")], [member("x/", mode=0o700)]
    )
    assert [file.path for file in tree(made, manifest(made)).files] == ["/x"]


READERS: dict[str, Callable[[MadeImage], object]] = {
    "tree": lambda made: tree(made, manifest(made)),
    "read_file": lambda made: read_file(made, manifest(made), "a"),
    "diff": lambda made: diff_images(Side(made, manifest(made)), Side(made, manifest(made))),
    "flatten": lambda made: b"".join(flattened(made, manifest(made).layers)),
}


@pytest.mark.parametrize("reader", READERS)
def test_errors_name_the_layer(reader: str) -> None:
    good, bad = make_tar([member("b", b"2")]), make_tar([member("a", b"1" * 9000)])[:5000]
    for layer, packed in ((bad, gzip.compress(bad)), (good, gzip.compress(good)[:-12]), (good, b"\x1f\x8bnonsense")):
        made = MadeImage([make_tar([member("c", b"0")]), layer])
        made.layers[1] = made.add(packed)
        made.document["layers"][1] |= {"digest": digest(packed), "size": len(packed)}
        made.add(made.manifest)
        with pytest.raises(CorruptLayer) as caught:
            READERS[reader](made)
        assert caught.value.layer == digest(packed)
    made = MadeImage([make_tar([member("a", b"0")])], compress=False)
    made.add(made.manifest)
    made.blobs[digest(made.layers[0])] = made.layers[0][:-1] + b"x"
    with pytest.raises(DigestMismatch) as mismatch:
        READERS[reader](made)
    assert mismatch.value.layer == digest(made.layers[0])


@pytest.mark.parametrize("reader", [name for name in READERS if name != "flatten"])
def test_a_layer_that_is_not_what_its_diff_id_says_is_noticed(reader: str) -> None:
    layers, wrong = [make_tar([member(name, b"x")]) for name in "ba"], "sha256:" + "2" * 64
    made = MadeImage(layers, diff_ids=[digest(layers[0]), wrong])
    made.add(made.manifest)
    with pytest.raises(DigestMismatch) as caught:
        READERS[reader](made)
    assert (caught.value.expected, caught.value.actual) == (wrong, digest(layers[1]))
    assert caught.value.layer == digest(made.layers[1])


def test_a_hard_link_cannot_take_the_place_of_its_targets_directory() -> None:
    made = from_layers([member("d/"), member("d/f", b"x")], [hardlink("d", "d/f")])
    with pytest.raises(CorruptLayer, match="below itself"):
        tree(made, manifest(made))


def test_what_was_unpacked_is_no_bomb_when_it_is_looked_into(
    host: ck.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be one large hole."""
    made = from_layers([member("hole", bytes(1 << 20)), member("small", b"content")])
    layout = made.write_layout(str(tmp_path / "layout"))
    host.images.load(layout, tag="hole:1")
    for module in (contents, edit):
        monkeypatch.setattr(module, "STANDARD", STANDARD._replace(ratio_free=1000))
    assert [file.size for file in host.images.tree("hole:1").files] == [1 << 20, 7]
    assert host.images.read_file("hole:1", "/small") == b"content"
    assert host.images.diff("hole:1", "hole:1") == ()
    assert host.images.edit("hole:1").flatten().commit("flat:1").layers
    with pytest.raises(CompressionBomb):
        READERS["tree"](made)


def test_history_with_its_layers() -> None:
    made = edited.image()
    steps = history(edited.config(made, edited.root(made)), manifest(made))
    assert [(step.created_by, step.empty_layer, step.size) for step in steps] == [
        ("ADD lowest", False, len(made.layers[0])),
        ("ENV A=1", True, 0),
        ("RUN middle", False, len(made.layers[1])),
        ("RUN top", False, len(made.layers[2])),
        ("CMD sh", True, 0),
    ]
    silent = edited.image(history=[])
    assert [step.size for step in history(edited.config(silent, edited.root(silent)), manifest(silent))] == [
        len(layer) for layer in silent.layers
    ]


CHANGED = make_tar(
    [
        member("etc/", mode=0o700),
        member("etc/base", b"BASE", mode=0o640, uid=1000, gid=1001),
        member("etc/replaced", b"new", mode=0o600),
        member("new/"),
        member("new/deep/"),
        member("new/deep/file", b"n"),
        member(".wh.dir-to-file", b""),
        member("dir-to-file/"),
        member("dir-to-file/inside", b"i"),
        member("opaque/"),
        member("opaque/.wh..wh..opq", b""),
        member("again/"),
        member("again/again", b"x"),
        hardlink("su-link-2", "usr/bin/su"),
        member(".wh.big", b""),
    ]
)


def test_layers_below_the_one_that_decides_are_not_read() -> None:
    made = from_layers(
        [member("etc/"), member("etc/old", b"o"), member("gone", b"g")],
        [member("etc/"), member("etc/name", b"n"), symlink("link", "etc/name"), hardlink("hard", "etc/name")],
        [member(".wh.gone", b""), member("top", b"t"), member("etc/"), member("etc/.wh..wh..opq", b"")],
    )
    decided = {"top": 1, "gone": 1, "etc/old": 1, "etc/name": 1, "link": 2, "hard": 2, "missing": 3}
    image = manifest(made)
    for path, count in decided.items():
        made.opened.clear()
        with contextlib.suppress(PathNotInImage):
            read_file(made, image, path)
        assert len({digest(layer) for layer in made.layers} & set(made.opened)) == count, path


def names() -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join)


def entries() -> st.SearchStrategy[list[Any]]:
    """The entries of a layer in any order, parents or not, through links or not."""
    one = st.one_of(
        st.builds(member, names(), st.binary(min_size=1, max_size=3)),
        st.builds(lambda name: member(name + "/"), names()),
        st.builds(symlink, names(), names() | st.sampled_from(["/a", "..", "/b/c", "."])),
        st.builds(hardlink, names(), names()),
        st.builds(
            lambda name: member(os.path.join(os.path.dirname(name), ".wh." + os.path.basename(name)), b""), names()
        ),
        st.builds(lambda name: member(name + "/.wh..wh..opq", b""), names()),
    )
    return st.lists(one, max_size=6)


@pytest.mark.property
@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(layers=st.lists(entries(), min_size=1, max_size=4), path=names())
def test_looking_from_the_top_finds_what_the_whole_tree_has(layers: list[list[Any]], path: str) -> None:
    made = from_layers(*layers)
    descriptors = manifest(made).layers
    try:
        contents = read_contents(made, descriptors)
    except LayerError:
        return  # what cannot be unpacked may still have a file on top
    try:
        node = contents.find(path.encode())
    except UnsafeEntry:
        with pytest.raises(UnsafeEntry):
            find_file(made, descriptors, path.encode())
        return
    found = find_file(made, descriptors, path.encode())
    if node is None:
        assert found is None
    elif node.inode.kind == DIRECTORY:
        assert found is not None
        assert found.kind == DIRECTORY
    else:
        assert found is not None
        assert (found.layer, found.number) == (node.inode.layer, node.inode.number)


@pytest.mark.property
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(layers=st.lists(entries(), min_size=2, max_size=4), data=st.data())
def test_squashing_any_layers_changes_nothing(layers: list[list[Any]], data: st.DataObject) -> None:
    made = from_layers(*layers)
    descriptors = manifest(made).layers
    below = data.draw(st.integers(0, len(layers) - 1))
    try:
        before = picture(made, descriptors)
    except LayerError:
        return
    scratch = Scratch(made)
    squashed = scratch.pack(flattened(made, descriptors, below), "none").descriptor
    assert picture(scratch, (*descriptors[:below], squashed)) == before


def picture(source: Any, descriptors: Any) -> dict[bytes, Any]:
    """Names, kinds and content of the merged tree, and the first name of each file."""
    contents = read_contents(source, descriptors)
    found: dict[bytes, Any] = {}
    first: dict[int, bytes] = {}
    for name, node in contents.walk():
        content = b""
        if node.inode.kind == FILE:
            number = 0
            with open_layer(source, descriptors[node.inode.layer]) as reader:
                while entry := reader.next():
                    if number == node.inode.number:
                        content = b"".join(map(bytes, reader.pieces()))
                        assert entry.size == len(content)
                    number += 1
        link = node.inode.entry.link if node.inode.entry is not None and node.inode.kind == SYMLINK else b""
        found[name] = (node.inode.kind, content, link, first.setdefault(id(node.inode), name))
    return found


@pytest.mark.kernel
def test_differences_are_those_of_the_unpacked_trees(tmp_path: Path) -> None:
    old = edited.image()
    for number, layers in enumerate(([*edited.LAYERS, CHANGED], [edited.LOWEST, CHANGED], [edited.MIDDLE])):
        new = edited.image(layers, history=[])
        trees = [
            edited.unpacked(made, edited.root(made), str(tmp_path / f"{number}-{name}"))
            for name, made in (("old", old), ("new", new))
        ]
        expected = list(tree_changes(*trees))
        assert diff_images(side(old), side(new)) == expected
        assert len(expected) > 5


def test_equal_content_in_other_layers_is_no_difference() -> None:
    one = from_layers([member("a", b"1"), member("b", b"2")])
    two = from_layers([member("b", b"2")], [member("a", b"1")])
    three = from_layers([member("b", b"2")], [member("a", b"x")])
    assert diff_images(side(one), side(two)) == []
    assert diff_images(side(one), side(three)) == [Change("C", "/a")]


def test_a_file_of_many_names_takes_memory_for_each_once() -> None:
    names = [member("name", b"x"), *(hardlink(f"name{number}", "name") for number in range(3000))]
    one, two = from_layers(names), from_layers(names, [member("more", b"m")])
    tracemalloc.start()
    try:
        assert diff_images(side(one), side(two)) == [Change("A", "/more")]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def sparse(name: str, size: int, *regions: tuple[int, bytes]) -> tuple[tarfile.TarInfo, bytes]:
    """A file with holes, its map in the form of pax 0.1."""
    numbers = ",".join(f"{offset},{len(data)}" for offset, data in regions)
    fields = {"GNU.sparse.major": "0", "GNU.sparse.size": str(size), "GNU.sparse.map": numbers}
    return member(name, b"".join(data for _, data in regions), pax_headers=fields)


def test_holes_are_compared_without_reading_them() -> None:
    """Their zeros alone would take hours."""
    size = STANDARD.file_size
    one = from_layers([sparse("f", size, (0, b"start"), (size - 3, b"end"))])
    same = from_layers([sparse("f", size, (0, b"start" + bytes(9000)), (size // 2, b"\0"), (size - 5, b"\0\0end"))])
    for regions in (
        ((0, b"start"), (size - 4, b"end\0")),
        ((1, b"start"), (size - 3, b"end")),
        ((0, b"start"), (size // 2, b"end")),
        ((0, b"start"),),
    ):
        other = from_layers([sparse("f", size, *regions)])
        assert diff_images(side(one), side(other)) == [Change("C", "/f")]
    assert diff_images(side(one), side(same)) == []


@hypothesis.given(data=st.data())
def test_content_is_the_same_whatever_of_it_is_a_hole(data: st.DataObject) -> None:
    part = st.integers(1, 9000).flatmap(lambda length: st.sampled_from([bytes(length), b"x" * length]))
    content = b"".join(data.draw(st.lists(part, max_size=6)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)), max_size=6)) | {0, len(content)})
    regions = [
        (start, content[start:end])
        for start, end in itertools.pairwise(cuts)
        if content[start:end].strip(b"\0") or data.draw(st.booleans())
    ]
    dense, holes = from_layers([member("f", content)]), from_layers([sparse("f", len(content), *regions)])
    assert diff_images(side(dense), side(holes)) == []
    assert read_file(holes, manifest(holes), "f") == content


def deep_links(layers: int, depth: int, rounds: int) -> tuple[MadeImage, str]:
    """A file behind links that go up and down again, all far down in the lowest layer."""
    deep = "/".join(["a"] * depth)
    up_and_down = "../a/" * rounds
    lowest = [member("a/" * number) for number in range(1, depth + 1)]
    lowest += [symlink(f"{deep}/l{number}", f"{up_and_down}l{number + 1}") for number in range(39)]
    lowest += [symlink(f"{deep}/l39", f"{up_and_down}f"), member(f"{deep}/f", b"content")]
    return from_layers(lowest, *([member(f"z{number}", b"")] for number in range(layers))), f"{deep}/l0"


def test_a_file_behind_long_links_in_many_layers_is_found_in_one_go() -> None:
    """Whoever asks all layers for each directory above, at every step, and again after every layer, never ends."""
    made, path = deep_links(400, 500, 40)
    assert read_file(made, manifest(made), path) == b"content"


def test_links_of_too_many_steps_lead_nowhere() -> None:
    made, path = deep_links(1, 3, MOST_STEPS // 80 + 1)
    with pytest.raises(PathNotInImage, match="never ends"):
        read_file(made, manifest(made), path)


def both(made: MadeImage, path: bytes) -> list[Any]:
    """The entry of a path as the whole tree has it, and as the search from the top has it."""
    layers = manifest(made).layers
    node, inode = read_contents(made, layers).find(path), find_file(made, layers, path)
    assert node is not None
    assert inode is not None
    return [node.inode.entry, inode.entry]


def test_the_map_of_a_sparse_file_is_not_kept() -> None:
    made = from_layers([sparse("f", 1 << 20, *((number << 10, b"x") for number in range(1000)))])
    assert [(entry.sparse.size, entry.sparse.regions) for entry in both(made, b"f")] == [(1 << 20, ())] * 2
    assert len(read_file(made, manifest(made), "f")) == 1 << 20


def test_equal_attributes_are_kept_once() -> None:
    made = from_layers(*([member(name, b"", xattrs={"user.x": b"x" * 1000})] for name in "ab"))
    a, b = (node.inode.entry for _, node in read_contents(made, manifest(made).layers).walk())
    assert a is not None
    assert b is not None
    assert a.xattrs == ((b"user.x", b"x" * 1000),)
    assert a.xattrs is b.xattrs


LONG = "/".join(["n" * 250] * 3)
MUCH: dict[str, list[Any]] = {
    "attributes": [member(f"f{number}", b"", xattrs={f"user.{number}": b"x" * 1000}) for number in range(20)],
    "small attributes": [
        member(f"f{number}", b"", xattrs={f"user.{number}.{each}": b"" for each in range(10)}) for number in range(20)
    ],
    "names": [member(f"{LONG}{number}", b"") for number in range(20)],
    "made directories": [member("d/" * 250 + "f", b"")],
    "links": [symlink(f"l{number}", LONG) for number in range(20)],
    "names behind links": [
        member(LONG + "/"),
        symlink("l", LONG),
        *(member(f"l/{number}", b"") for number in range(20)),
    ],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("much", MUCH.values(), ids=MUCH.keys())
def test_what_is_kept_of_an_images_headers_is_bounded(
    reader: str, much: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = from_layers([member("a", b"x")], much)
    READERS[reader](made)
    is_kept_within(6000, made, reader, monkeypatch)


def test_what_is_kept_of_whiteouts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = from_layers([member("a", b"x")], [member(f"{LONG}/.wh.{number}", b"") for number in range(20)])
    READERS["read_file"](made)
    is_kept_within(6000, made, "read_file", monkeypatch)


def is_kept_within(allowed: int, made: MadeImage, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (contents, lookup):
        monkeypatch.setattr(module, "Headers", functools.partial(Headers, STANDARD._replace(kept=allowed)))
    with pytest.raises(LayerTooLarge) as caught:
        READERS[reader](made)
    assert (caught.value.limit, caught.value.allowed, bool(caught.value.entry)) == ("kept", allowed, True)
    assert caught.value.layer == digest(made.layers[1])


@pytest.mark.parametrize(("part", "count", "limit"), [("n" * 250, 10, "path"), ("d", 300, "depth")])
def test_links_do_not_lead_to_longer_paths_than_may_be_written(part: str, count: int, limit: str) -> None:
    deep = "/".join([part] * count)
    made = from_layers([member(deep + "/"), symlink("l", deep), member(f"l/{deep}/f", b"")])
    for reader in ("tree", "diff", "flatten"):
        with pytest.raises(PathTooLong) as caught:
            READERS[reader](made)
        assert (caught.value.limit, caught.value.entry) == (limit, f"l/{deep}/f")
