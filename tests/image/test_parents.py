"""Directories held open: how many, and until when."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

from containerkit.image.layers.parents import MOST, SHARE, Parents

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def root(session_directory: str) -> Iterator[int]:
    fd = os.open(session_directory, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize(("allowed", "most"), [(1 << 12, MOST), (SHARE * 10, 10)])
def test_as_many_as_there_is_room_for(root: int, allowed: int, most: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        parents = Parents(root)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    held = [os.dup(root) for _ in range(most)]
    for number, fd in enumerate(held):
        assert not parents.full
        parents.hold(b"%d" % number, fd, b"%d" % number)
    assert parents.full
    parents.forget()
    assert not any(map(is_open, held))
    assert parents.get(b"") == (root, b"")


def test_until_something_on_a_links_way_changes(root: int) -> None:
    parents = Parents(root)
    true, through, below = (os.dup(root) for _ in range(3))
    parents.hold(b"x", true, b"x")
    parents.hold(b"s", through, b"x", {b"s", b"x"})
    parents.changed(b"other")
    assert parents.get(b"s") == (through, b"x")
    parents.changed(b"s")
    assert (parents.get(b"s"), is_open(through)) == (None, False)
    assert parents.get(b"x") == (true, b"x")
    parents.hold(b"x/y", below, b"x/y")
    parents.forget_tree(b"x")
    assert (parents.get(b"x"), parents.get(b"x/y"), is_open(true), is_open(below)) == (None, None, False, False)
