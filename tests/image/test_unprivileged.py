"""Images need no privileges: every verb as an ordinary user, and layers unpacked by one as umoci does it."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import tarfile
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.image.layers.layer import FIFO, SYMLINK, TarReader
from support import facts, unprivileged
from support.images import MadeImage, digest, hardlink, make_tar, member, symlink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.image.layers.layer import Entry
    from support.registry import Registry

pytestmark = pytest.mark.kernel


def device(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=b"3", devmajor=1, devminor=3, mode=0o666)


LAYERS = [
    make_tar([member("d/"), member("d/a", b"1", uid=0), member("d/u", b"2", uid=1000, gid=1000), device("null")]),
    make_tar([member("d/"), member("d/.wh.a", b""), member("b", b"hello\n", uid=1)]),
]
VERBS = """
import json, os, sys
from containerkit import Host, errors

root, layout, registry = sys.argv[1:]
host = Host(root=root)
images = host.images
kept = Host(root=root + "/kept").images
seen = {"kept": [kept.load(layout, tag="app:1", unpack=False).unpacked, os.path.exists(root + "/kept/driver")]}
loaded = images.load(layout, tag="app:1")
seen |= {"euid": os.geteuid(), "id": loaded.id, "unpacked": loaded.unpacked, "all": len(images.load_all(layout))}
seen["listed"] = sorted(name for image in images.list() for name in image.names)
seen["got"] = [images.get(name).id == loaded.id for name in ("app:1", loaded.id, loaded.id.short)]
images.tag("app:1", registry + "/unprivileged:1")
seen["history"] = len(images.history("app:1"))
seen["tree"] = [file.path for file in images.tree("app:1").files]
seen["read"] = images.read_file("app:1", "/b").decode()
edit = images.edit("app:1").configure(env={"A": "b"}).append(layout + "/blobs", created_by="copy blobs")
seen["edited"] = edit.commit("app:2").run.env
seen["flat"] = len(images.edit("app:2").flatten().commit("app:flat").layers)
seen["diff"] = [change.kind for change in images.diff("app:2", "app:flat")]
images.save(root + "/saved.tar", "app:1", "app:2")
images.save(root + "/saved.oci", "app:2", format="oci-archive")
seen["saved"] = [image.id for image in images.load_all(root + "/saved.tar")] == [images.get("app:1").id,
                                                                              images.get("app:2").id]
seen["pushed"] = images.push(registry + "/unprivileged:1")
seen["copied"] = [images.copy("docker://" + registry + "/unprivileged:1", target)
                  for target in ("oci:" + root + "/copied", "containerkit:copied:1")]
seen["imported"] = images.import_rootfs(layout, "imported:1", changes=["ENV X=y"]).run.env[-1]
images.remove(registry + "/unprivileged:1")
seen["pulled"] = images.pull(registry + "/unprivileged:1").digest
with images.lease():
    pass
seen["df"], seen["verify"] = images.df().layers > 0, list(images.verify())
try:
    with images.mount("app:1"):
        seen["mount"] = "mounted"
except (errors.KernelError, errors.Unsupported) as error:
    seen["mount"] = [error.hint != "", isinstance(error, errors.LayerError)]
images.remove("app:flat")
images.gc()
seen["left"] = images.read_file("app:2", "/b").decode()
images.prune(all=True)
seen["empty"] = [*(os.listdir(root + place) for place in ("/blobs/sha256", "/layers", "/ingest")), images.list()]
print(json.dumps(seen))
"""


CAPABILITY = bytes.fromhex("0100000202000000000000000000000000000000").decode()
ACL = bytes.fromhex("0200000001000700ffffffff020007000500000004000500ffffffff10000500ffffffff20000500ffffffff").decode(
    "utf-8", "surrogateescape"
)
#: Read-only and unreadable things, owners of all kinds, attributes of all namespaces, devices; then deletions in them.
OWNED = [
    make_tar([
        member("./", mode=0o555), member("b/", mode=0o555, uid=5, gid=6), member("b/w/", uid=5, gid=6),
        member("b/f", b"x", mode=0o444, uid=7, gid=300_000, xattrs={"user.a": b"1"}),
        member("w", b"w", uid=7, gid=300_000, xattrs={"user.a": b"1"}), member("zero", b"0", mode=0, uid=3, gid=65534),
        member("group", b"z", mode=0o600, gid=5), member("user", b"z", uid=9), member("root", b"r", mode=0o111),
        member("own", b"o", uid=65534, gid=65534), member("su", b"s", mode=0o6755, gid=3), hardlink("hard", "w"),
        member("cap", b"c", uid=1, xattrs={"security.capability": CAPABILITY.encode(), "trusted.x": b"1"}),
        member("marked", b"c", uid=1, xattrs={"user.rootlesscontainers": b"\x08\x63"}),
        member("acl", b"1", mode=0o755, xattrs={"system.posix_acl_access": ACL.encode("utf-8", "surrogateescape")}),
        member("twin/", uid=5, gid=6), member("twin/zero", b"0", uid=3, gid=65534),
        device("null"), member("loop", type=tarfile.BLKTYPE, devmajor=7, devminor=3, mode=0o660, uid=8, gid=9),
        member("fifo", type=tarfile.FIFOTYPE, mode=0o640, uid=4), symlink("link", "w", uid=4),
        member("shut/", mode=0, uid=3), member("shut/deep/", mode=0o300), member("shut/deep/in", b"1", uid=3),
        member("made/x", b"1", uid=11), member("dense/", mode=0o1777), member("dense/a", b"1"),
    ]),
    make_tar([
        member("b/.wh.f", b""), member("b/g", b"g", uid=65534, gid=65534), member("shut/deep/more", b"2", uid=12),
        member("b/w/", mode=0o500, uid=13), member(".wh.root", b""), member("dense", b"now a file", mode=0o400),
    ]),
    make_tar([
        member("b/.wh..wh..opq", b""), member("b/h", b"h"), member(".wh.shut", b""), member("dense/", mode=0o500)
    ]),
]  # fmt: skip
UNPACK = """
import json, os, sys
from containerkit import Host
from containerkit.image.layers.difflayer import tree_layer

root, layout, out = sys.argv[1:]
host = Host(root=root)
images = host.images
image = images.load(layout, tag="app:1")
trees = [f"{root}/layers/{layer.chain_id.hex}" for layer in image.layers]
empty = out + "/empty"
os.mkdir(empty, 0o700)
os.utime(empty, ns=(0, 0))
for number, (old, new) in enumerate(zip((empty, *trees), trees)):
    with open(f"{out}/{number}.tar", "wb") as file:
        file.writelines(tree_layer(old, new, leave_out=[b"shut"]))
seen = {"driver": open(root + "/driver").read().strip(), "trees": trees, "verify": images.verify()}
os.setxattr(trees[0] + "/w", "user.rootlesscontainers", b"\\x08\\x01")
seen["damaged"] = [(problem.kind, problem.repaired) for problem in images.verify(repair=True)]
seen["again"] = images.verify()
print(json.dumps(seen))
"""
REMOVE = """
import json, os, sys
from containerkit import Host

root, layout = sys.argv[1:]
images = Host(root=root).images
images.load(layout, tag="app:2")
seen = []
for verb in (lambda: images.remove("app:1"), lambda: images.remove("app:2"), images.gc):
    try:
        verb()
    except PermissionError as error:
        seen.append(os.path.basename(error.filename))
left = [os.listdir(root + place) for place in ("/layers", "/blobs/sha256", "/ingest")]
print(json.dumps([seen, images.list(), *left]))
"""


@pytest.fixture(scope="module")
def library() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ck-library-") as directory:
        yield unprivileged.copy_library(directory)


def test_every_verb(library: str, registry: Registry) -> None:
    made = MadeImage(LAYERS)
    with tempfile.TemporaryDirectory(prefix="ck-user-") as directory:
        layout = made.write_layout(os.path.join(directory, "layout"), "example.org/made:1")
        root = os.path.join(directory, "root")
        os.mkdir(root)
        for path in (directory, root):
            os.chown(path, unprivileged.NOBODY, unprivileged.NOBODY)
        seen = json.loads(unprivileged.run(library, VERBS, root, layout, registry.host))
    assert (seen["euid"], seen["id"], seen["unpacked"], seen["all"]) == (65534, digest(made.config), True, 1)
    assert seen["kept"] == [False, False]
    assert seen["listed"] == ["app:1", "example.org/made:1"]
    assert seen["got"] == [True] * 3
    assert seen["history"] == 2
    assert seen["tree"] == ["/b", "/d", "/d/u", "/null"]
    assert seen["read"] == seen["left"] == "hello\n"
    assert (seen["edited"], seen["flat"], seen["diff"], seen["saved"]) == (["A=b"], 1, [], True)
    assert seen["copied"] == [seen["pushed"], seen["pulled"]] == [digest(made.manifest)] * 2
    assert seen["imported"] == "X=y"
    assert (seen["df"], seen["verify"]) == (True, [])
    assert seen["mount"] == [True, False]
    assert seen["empty"] == [[], [], [], []]


@pytest.fixture
def place() -> Iterator[str]:
    """A directory of the ordinary user's, with the layout of :data:`OWNED`."""
    with tempfile.TemporaryDirectory(prefix="ck-user-") as directory:
        MadeImage(OWNED).write_layout(f"{directory}/layout", "latest")
        for name in ("", "root", "out"):
            os.makedirs(f"{directory}/{name}", exist_ok=True)
            os.chown(f"{directory}/{name}", unprivileged.NOBODY, unprivileged.NOBODY)
        yield directory


def files(root: str) -> dict[str, dict[str, Any]]:
    """All that a tree has, read by root."""
    found = {}
    for head, directories, names in os.walk(root):
        for path in (head, *(f"{head}/{name}" for name in (*directories, *names))):
            status = os.lstat(path)
            keys = os.listxattr(path, follow_symlinks=False)
            found[os.path.relpath(path, root)] = {
                "mode": oct(status.st_mode), "owner": (status.st_uid, status.st_gid), "mtime": status.st_mtime_ns,
                "links": 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink, "device": status.st_rdev,
                "link": os.readlink(path) if stat.S_ISLNK(status.st_mode) else "",
                "content": content(path) if stat.S_ISREG(status.st_mode) else b"",
                "xattrs": {key: os.getxattr(path, key, follow_symlinks=False) for key in keys},
            }  # fmt: skip
    return found


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def entries(tar: bytes) -> dict[bytes, Entry]:
    stream, found = io.BytesIO(tar), {}
    reader = TarReader(lambda: stream.read(1 << 16))
    while entry := reader.next():
        found[entry.name.rstrip(b"/")] = entry
    return found


def test_layers_unpacked_by_an_ordinary_user_are_as_umoci_has_them(library: str, place: str) -> None:
    seen = json.loads(unprivileged.run(library, UNPACK, f"{place}/root", f"{place}/layout", f"{place}/out"))
    assert seen["driver"] == "copy"
    for name, mode in (("shut", 0), ("shut/deep", 0o300), ("zero", 0), ("b", 0o555)):
        for tree in seen["trees"][:2]:  # copied, compared and read since
            assert stat.S_IMODE(os.lstat(f"{tree}/{name}").st_mode) == mode
    assert (seen["verify"], seen["again"]) == ([], [])
    assert seen["damaged"] == [["layer-damaged", True]], "a changed owner is damage"
    facts.require("umoci")
    subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", f"{place}/layout:latest", f"{place}/out/umoci"],
        env={"PATH": os.environ["PATH"], "HOME": place}, user=unprivileged.NOBODY, group=unprivileged.NOBODY,
        extra_groups=[], cwd="/", capture_output=True, check=True,
    )  # fmt: skip
    ours, theirs = files(seen["trees"][-1]), files(f"{place}/out/umoci/rootfs")
    assert ours.keys() == theirs.keys()
    for name, twin in (("b", "twin"), ("zero", "twin/zero")):  # umoci sets the mode first, and may no more write then
        assert theirs[name].pop("xattrs") == {}
        assert ours[name].pop("xattrs") == theirs[twin]["xattrs"] != {}
    for tree in (ours, theirs):
        for name in (".", "made"):  # without an entry, or with one that umoci forgets
            del tree[name]["mtime"]
    assert ours == theirs


def test_a_layer_of_an_unpacked_tree_states_the_owners_again(library: str, place: str) -> None:
    """What a user's commit and diff are made of; only links, FIFOs and devices are not what they were."""
    unprivileged.run(library, UNPACK, f"{place}/root", f"{place}/layout", f"{place}/out")
    for number, layer in enumerate(OWNED[:2]):
        made = entries(content(f"{place}/out/{number}.tar"))
        wanted = entries(layer)
        assert {b".wh.root", b"b/.wh.f"} <= made.keys() or not number
        others = {b"null", b"loop", b"hard", b"w", b"b/.wh.f", b".wh.root"}
        for name in {name for name in wanted if not name.startswith(b"shut")} - others:
            left_out = (b"security.", b"trusted.", b"user.rootless")
            kept = tuple(pair for pair in wanted[name].xattrs if not pair[0].startswith(left_out))
            expected = wanted[name]._replace(name=made[name].name, xattrs=kept)
            if expected.kind in {FIFO, SYMLINK}:
                expected = expected._replace(uid=0, gid=0)
            assert made[name] == expected


def test_a_tree_that_cannot_be_removed_keeps_no_other_one(library: str, place: str) -> None:
    """Read-only and shut directories go; one that root has made stays, and is in nobody's way."""
    unprivileged.run(library, UNPACK, f"{place}/root", f"{place}/layout", f"{place}/out")
    os.makedirs(f"{place}/root/ingest/gone-a/of-root")
    seen = json.loads(unprivileged.run(library, REMOVE, f"{place}/root", f"{place}/layout"))
    assert seen == [["of-root"] * 2, [], [], [], ["gone-a"]]
