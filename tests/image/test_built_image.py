"""The proof on a large image: on every driver its merged tree is that of ``umoci unpack`` and of ``podman export``.

Allowed differences, each because the peer says something else than the layers:

- umoci: the time of ``srv/opaque-last/sub``. The layer's opaque mark comes behind the directory's entry; umoci deletes
  in it only then, which changes the time that it has set.
- podman: an export has whole seconds and no sockets; ``create`` adds mount points and ``etc`` files of its own
  (:data:`MADE_BY_PODMAN`). A directory without an entry in the layer that adds or deletes in it gets the time of the
  unpacking, and a hard link's entry gives its mode and time to the file (:data:`LINKED`). Its driver vfs is asked: its
  overlay cannot unpack hard links to files of lower layers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from containerkit.image.drivers import NAMES, choose
from containerkit.image.images import Images
from containerkit.state import State
from support import facts
from support.built import TAG, Built
from support.disks import disk
from support.peers import umoci_unpack
from support.trees import Fields, differences, fields

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]

DRIVERS = ("overlay", "btrfs", "fuse-overlayfs", "copy")
TOUCHED_BY_UMOCI = "srv/opaque-last/sub"
LINKED = {"srv/another", "srv/bash", "srv/linked-capable", "usr/bin/bash", "srv/capable"}
MADE_BY_PODMAN = {"etc/hosts", "etc/hostname", "etc/resolv.conf", "run/.containerenv", "etc/mtab", "run", "run/secrets"}


@pytest.fixture(scope="module")
def expected(built_image: Built, session_directory: str) -> dict[str, Fields]:
    """The tree as umoci unpacks it."""
    bundle = os.path.join(session_directory, "umoci-bundle")
    found = fields(umoci_unpack(f"{built_image.gzip}:{TAG}", bundle))
    shutil.rmtree(bundle)
    return found


@pytest.fixture(scope="module")
def places(session_directory: str) -> Iterator[dict[str, str]]:
    """Where each driver is at home: copy where blocks can be shared."""
    found = {"overlay": session_directory, "fuse-overlayfs": session_directory}
    with contextlib.ExitStack() as stack:
        for name, kind in (("btrfs", "btrfs"), ("copy", "xfs")):
            with contextlib.suppress(pytest.skip.Exception):
                found[name] = stack.enter_context(disk(kind))
        yield found


def loaded(layout: str, root: str, name: str) -> dict[str, Fields]:
    """The merged tree of the built image on a driver."""
    with contextlib.closing(State(root)) as state:
        chosen = choose(state.root, name)
        images = Images(state, lambda *_, **__: pytest.fail("no registry is needed"))
        image = images.load(layout)
        assert len(image.layers) == 8
        view = chosen.view(image.lowers)
        try:
            return fields(f"/proc/self/fd/{view}/.")
        finally:
            os.close(view)
            for lower in image.lowers:
                chosen.remove(lower)
            shutil.rmtree(root)


def against_umoci(ours: dict[str, Fields], expected: dict[str, Fields]) -> list[str]:
    assert ours[TOUCHED_BY_UMOCI].mtime < expected[TOUCHED_BY_UMOCI].mtime
    given = expected[TOUCHED_BY_UMOCI]._replace(mtime=ours[TOUCHED_BY_UMOCI].mtime)
    return differences(ours, expected | {TOUCHED_BY_UMOCI: given})


@pytest.mark.parametrize("name", DRIVERS)
def test_the_tree_equals_umoci(
    built_image: Built, expected: dict[str, Fields], places: dict[str, str], name: str
) -> None:
    if name == "fuse-overlayfs":
        facts.require(name)
    if name not in places:
        facts.skip(f"a file system for the driver {name}")
    assert len(expected) > 8000
    ours = loaded(built_image.gzip, os.path.join(places[name], f"root-{name}"), name)
    assert against_umoci(ours, expected) == []


@pytest.mark.parametrize("variant", ["zstd", "index"])
def test_variants_are_the_same_image(
    built_image: Built, expected: dict[str, Fields], session_directory: str, variant: str
) -> None:
    root = os.path.join(session_directory, f"root-{variant}")
    ours = loaded(getattr(built_image, variant), root, "overlay")
    assert against_umoci(ours, expected) == []


def test_the_tree_equals_podman_export(built_image: Built, expected: dict[str, Fields], session_directory: str) -> None:
    facts.require("podman", "unshare", "crun")
    home = os.path.join(session_directory, "built-podman")
    tree = os.path.join(home, "tree")
    os.makedirs(tree)
    podman = (
        f"podman --root {home}/root --runroot {home}/run --storage-driver vfs --cgroup-manager cgroupfs "
        "--events-backend none --runtime crun"
    )
    script = f"""
        umount /sys/fs/cgroup/unified 2>/dev/null
        set -e
        {podman} pull -q oci:{built_image.gzip}:{TAG} > {home}/id
        {podman} create --network none --name built $(cat {home}/id) true
        {podman} export built | tar -C {tree} --numeric-owner --xattrs --xattrs-include='*' -xpf -
        {podman} rm -f built
        {podman} rmi -f -a
    """
    start = time.time_ns() // 10**9 * 10**9
    try:
        done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
        assert os.listdir(tree), done.stderr
        theirs = fields(tree)
    finally:
        shutil.rmtree(home)
    ours = {path: as_exported(told) for path, told in expected.items()}
    added = {path for path in theirs.keys() - ours.keys() if path in MADE_BY_PODMAN}
    for path in added | {os.path.dirname(path) for path in MADE_BY_PODMAN}:
        theirs.pop(path, None)
        ours.pop(path, None)
    ours[TOUCHED_BY_UMOCI] = ours[TOUCHED_BY_UMOCI]._replace(mtime=theirs[TOUCHED_BY_UMOCI].mtime)
    for path, told in theirs.items():
        if path in ours and (path in LINKED or (stat.S_ISDIR(told.kind) and told.mtime >= start)):
            assert path in LINKED or ours[path].mtime < start
            ours[path] = ours[path]._replace(mtime=told.mtime, mode=told.mode if path in LINKED else ours[path].mode)
    found = differences(ours, theirs)
    assert not found, "\n".join(found)


def as_exported(told: Fields) -> Fields:
    return told._replace(mtime=told.mtime // 10**9 * 10**9)


def test_every_driver_is_proven() -> None:
    assert set(DRIVERS) == set(NAMES)
