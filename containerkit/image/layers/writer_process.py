"""The process that writes files for :class:`.FileWriters`: a loop, and nothing else.

It has two descriptors: a socket, where each message is a :data:`TASK` and each answer a :data:`REPORT`, and the memory
that it shares with its owner, where the content of a task's files lies and, after it, the rows that describe them. It
ends when its owner does, for then the socket closes.
"""

from __future__ import annotations

import errno
import marshal
import mmap
import os
import struct

from containerkit.linux.paths import CREATE, DIRECTORY, RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, openat2, write_all
from containerkit.linux.process import set_name

SOCKET, MEMORY = 3, 4
#: Number of the slab, bytes of content, bytes of the rows behind it.
TASK = struct.Struct("=III")
#: Number of the slab, errno or 0, and the row that failed.
REPORT = struct.Struct("=III")
#: The number of no slab: said once, by a process that is up.
HELLO = 0xFFFFFFFF
#: Content and rows of one slab.
CONTENT, ROWS = 1 << 20, 256 << 10
SLAB = CONTENT + ROWS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    # Path (below the tree, without symlinks on its way), size, mode, uid, gid, access and modification time in ns.
    Row = tuple[bytes, int, int, int, int, int, int]


def main() -> None:
    """Serve until the socket ends."""
    set_name("ck-writer")
    os.umask(0)
    with mmap.mmap(MEMORY, 0) as memory, memoryview(memory) as view:
        os.close(MEMORY)
        try:
            os.write(SOCKET, REPORT.pack(HELLO, 0, 0))
            while task := os.read(SOCKET, TASK.size):
                os.write(SOCKET, _serve(view, *TASK.unpack(task)))
        except (BrokenPipeError, ConnectionResetError):
            return


def _serve(view: memoryview, slab: int, size: int, length: int) -> bytes:
    start = slab * SLAB
    content = view[start : start + size]
    tree: str
    rows: list[Row]
    tree, rows = marshal.loads(view[start + size : start + size + length])  # noqa: S302 - the owner wrote it
    number = position = 0
    try:
        with _Tree(tree) as place:
            for number, row in enumerate(rows):  # noqa: B007 - a failure has the number
                end = position + row[1]
                place.write(row, content[position:end])
                position = end
    except OSError as error:
        return REPORT.pack(slab, error.errno or errno.EIO, number)
    return REPORT.pack(slab, 0, 0)


class _Tree:
    """A tree that gets files; a context manager."""

    def __init__(self, path: str) -> None:
        self._root = os.open(path, DIRECTORY | os.O_NOFOLLOW)
        status = os.fstat(self._root)
        self._owner = status.st_uid, status.st_gid
        self._parent: bytes | None = None
        self._directory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        os.close(self._root)

    def write(self, row: Row, content: memoryview) -> None:
        """One new file. What a former entry or whiteout of the layer has left there gives way; directories do not."""
        path, _, mode, uid, gid, atime, mtime = row
        parent, _, name = path.rpartition(b"/")
        if parent != self._parent:
            self._enter(parent)
        first = mode & 0o777
        try:
            fd = os.open(name, CREATE, first, dir_fd=self._directory)
        except FileExistsError:
            os.unlink(name, dir_fd=self._directory)
            fd = os.open(name, CREATE, first, dir_fd=self._directory)
        try:
            if content:
                write_all(fd, content)
            if (uid, gid) != self._owner:
                os.fchown(fd, uid, gid)
            if mode != first:
                os.fchmod(fd, mode)
            os.utime(fd, ns=(atime, mtime))
        finally:
            os.close(fd)

    def _enter(self, parent: bytes) -> None:
        self._leave()
        self._directory = openat2(self._root, parent or b".", DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
        self._parent = parent

    def _leave(self) -> None:
        if self._directory >= 0:
            os.close(self._directory)
        self._directory, self._parent = -1, None
