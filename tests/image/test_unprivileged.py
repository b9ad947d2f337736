"""Whoever only reads, writes or edits images needs no privileges: every such verb as an ordinary user."""

from __future__ import annotations

import json
import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from support import unprivileged
from support.images import MadeImage, digest, make_tar, member

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Iterator

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
loaded = images.load(layout, tag="app:1")
seen = {"euid": os.geteuid(), "id": loaded.id, "unpacked": loaded.unpacked, "all": len(images.load_all(layout))}
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
seen["df"], seen["verify"] = images.df().layers, list(images.verify())
try:
    with images.mount("app:1"):
        seen["mount"] = "mounted"
except (errors.KernelError, errors.Unsupported) as error:
    seen["mount"] = [error.hint != "", isinstance(error, errors.LayerError)]
images.remove("app:flat")
images.gc()
seen["left"] = images.read_file("app:2", "/b").decode()
images.prune(all=True)
seen["empty"] = [os.listdir(root + "/blobs/sha256"), os.listdir(root + "/ingest"), images.list()]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def library() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ck-library-") as directory:
        yield unprivileged.copy_library(directory)


def test_every_verb_that_needs_no_unpacked_layer(library: str, registry: Registry) -> None:
    made = MadeImage(LAYERS)
    with tempfile.TemporaryDirectory(prefix="ck-user-") as directory:
        layout = made.write_layout(os.path.join(directory, "layout"), "example.org/made:1")
        root = os.path.join(directory, "root")
        os.mkdir(root)
        for path in (directory, root):
            os.chown(path, unprivileged.NOBODY, unprivileged.NOBODY)
        seen = json.loads(unprivileged.run(library, VERBS, root, layout, registry.host))
    assert (seen["euid"], seen["id"], seen["unpacked"], seen["all"]) == (65534, digest(made.config), False, 1)
    assert seen["listed"] == ["app:1", "example.org/made:1"]
    assert seen["got"] == [True] * 3
    assert seen["history"] == 2
    assert seen["tree"] == ["/b", "/d", "/d/u", "/null"]
    assert seen["read"] == seen["left"] == "hello\n"
    assert (seen["edited"], seen["flat"], seen["diff"], seen["saved"]) == (["A=b"], 1, [], True)
    assert seen["copied"] == [seen["pushed"], seen["pulled"]] == [digest(made.manifest)] * 2
    assert seen["imported"] == "X=y"
    assert (seen["df"], seen["verify"]) == (0, [])
    assert seen["mount"] == [True, False]
    assert seen["empty"] == [[], [], []]
