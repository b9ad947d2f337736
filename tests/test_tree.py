"""Removing trees: as their owner, whatever their modes say; and what the mode of a file keeps from its owner."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING

import pytest

from containerkit.linux.tree import remove_tree
from support import unprivileged

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel

MODES = (0o555, 0o500, 0o400, 0o300, 0o200, 0o100, 0o000)
REMOVED = """
import os, sys
from containerkit.linux.tree import remove_tree

top = sys.argv[1]
for outer in MODES:
    for inner in MODES:
        for name in ("file", "directory", "link"):
            deep = f"{top}/{outer:o}/{inner:o}-{name}"
            os.makedirs(deep)
            if name == "file":
                open(deep + "/file", "w").close()
            elif name == "directory":
                os.mkdir(deep + "/directory", inner)
            else:
                os.symlink("/", deep + "/link")
            os.chmod(deep, inner)
    os.chmod(f"{top}/{outer:o}", outer)
for name in os.listdir(top):
    remove_tree(f"{top}/{name}")
print(os.listdir(top))
""".replace("MODES", repr(MODES))
DEEP = """
import os, sys
from containerkit.linux.tree import remove_tree

os.chdir(sys.argv[1])
os.mkdir("top")
os.chdir("top")
for number in range(250):
    os.mkdir("d")
    open("f", "w").close()
    os.chdir("d")
for number in range(250):
    os.chmod(".", 0o500 if number % 2 else 0o300)
    os.chdir("..")
os.chdir("..")
remove_tree("top")
print(os.listdir("."))
"""
FOREIGN = """
import os, sys
from containerkit.linux.owned import open_owned
from containerkit.linux.tree import remove_tree

for name in ("foreign", "shut"):
    try:
        remove_tree(sys.argv[1] + "/" + name)
    except PermissionError as error:
        print(error.errno, error.filename.replace(sys.argv[1], ""))
try:
    open_owned(sys.argv[1] + "/shut", os.O_RDONLY)
except PermissionError as error:
    print(error.errno, error.filename.replace(sys.argv[1], ""))
"""
OWNED = """
import os, sys
from containerkit.linux.owned import enterable, get_xattr, open_owned, set_xattr

path = sys.argv[1] + "/file"
with open(path, "w") as file:
    file.write("1")
os.chmod(path, 0)
set_xattr(path.encode(), b"user.a", b"2")
fd = open_owned(path, os.O_RDONLY)
set_xattr(fd, b"user.b", b"3")
mode = os.stat(path).st_mode & 0o7777
directory = sys.argv[1] + "/directory"
os.mkdir(directory, 0o200)
inside = open_owned(directory, os.O_RDONLY | os.O_DIRECTORY)
print(os.read(fd, 9), get_xattr(fd, b"user.a"), get_xattr(path.encode(), b"user.b"), mode, enterable(inside),
      enterable(inside), os.listdir(directory))
"""


@pytest.fixture(scope="module")
def library() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ck-library-") as directory:
        yield unprivileged.copy_library(directory)


@pytest.fixture
def own() -> Iterator[str]:
    """A directory of the ordinary user's."""
    with tempfile.TemporaryDirectory(prefix="ck-user-") as directory:
        os.chown(directory, unprivileged.NOBODY, unprivileged.NOBODY)
        yield directory


@pytest.mark.parametrize("script", [REMOVED, DEEP])
def test_modes_do_not_keep_a_tree_from_its_owner(library: str, own: str, script: str) -> None:
    assert unprivileged.run(library, script, own) == "[]\n"


def test_what_is_anothers_stays(library: str, own: str) -> None:
    os.makedirs(f"{own}/foreign/inner")
    os.makedirs(f"{own}/shut/inner")
    os.chmod(f"{own}/shut", 0o700)
    assert unprivileged.run(library, FOREIGN, own) == "13 inner\n13 /shut\n13 /shut\n"
    assert os.listdir(f"{own}/foreign") == os.listdir(f"{own}/shut") == ["inner"]


def test_no_link_is_followed_to_what_is_made_writable(own: str) -> None:
    os.mkdir(f"{own}/outside", 0o500)
    os.mkdir(f"{own}/tree", 0o500)
    os.symlink(f"{own}/outside", f"{own}/tree/link")
    remove_tree(f"{own}/tree")
    assert os.stat(f"{own}/outside").st_mode & 0o777 == 0o500
    shutil.rmtree(f"{own}/outside")


def test_what_a_mode_keeps_from_its_owner(library: str, own: str) -> None:
    assert unprivileged.run(library, OWNED, own) == f"b'1' b'2' b'3' 0 {0o200} None []\n"
