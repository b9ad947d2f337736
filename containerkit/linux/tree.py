"""Directory trees: making parents and removing whole trees without ever following a link out of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self, TypeVar

    Result = TypeVar("Result")

MOST_OPEN = 100
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Descent:
    """A way down a tree and up again, by descriptors; a context manager, which closes them.

    However deep it leads, about :data:`MOST_OPEN` are open: one that is farther above is closed and found again by
    ``..``, and no path is ever longer than a name.
    """

    __slots__ = ("_above", "fd")

    def __init__(self, fd: int) -> None:
        #: Of the directory that is reached.
        self.fd = fd
        self._above: list[int | tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        for above in self._above:
            if isinstance(above, int):
                os.close(above)

    def enter(self, fd: int) -> None:
        """Go down to ``fd``, a directory in the one that is reached."""
        self._above.append(self.fd)
        self.fd = fd
        if len(self._above) > MOST_OPEN and isinstance(far := self._above[-MOST_OPEN], int):
            status = os.fstat(far)
            self._above[-MOST_OPEN] = (status.st_dev, status.st_ino)
            os.close(far)

    def leave(self) -> None:
        """Go up again. Raises ``OSError`` where a directory was moved meanwhile."""
        above = self._above[-1]
        if not isinstance(above, int):
            above = _directory_above(self.fd, above)
        self._above.pop()
        os.close(self.fd)
        self.fd = above


def _directory_above(fd: int, identity: tuple[int, int]) -> int:
    above = os.open("..", OPEN_DIRECTORY, dir_fd=fd)
    status = os.fstat(above)
    if (status.st_dev, status.st_ino) != identity:
        os.close(above)
        raise OSError("a directory was moved while its tree was walked")
    return above


def remove_tree(path: str, dir_fd: int | None = None) -> None:
    """Remove a file or a whole tree of any depth; silent where it is gone already. Links are removed, never followed.

    Directories are entered by fd (``O_NOFOLLOW``), so a tree that somebody changes meanwhile cannot lead elsewhere.
    Several processes may remove the same tree at once. What the modes of directories forbid their owner is no obstacle.
    """
    fd = _opened(path, dir_fd)
    if fd < 0:
        return
    with Descent(fd) as way:
        names: list[str] = []
        waiting = [_emptied(fd)]
        while True:
            if waiting[-1]:
                name = waiting[-1].pop()
                if (fd := _allowed(_opened, name, way.fd)) >= 0:
                    way.enter(fd)
                    names.append(name)
                    waiting.append(_emptied(fd))
            elif names:
                waiting.pop()
                way.leave()
                _allowed(_rmdir, names.pop(), way.fd)
            else:
                break
    _rmdir(path, dir_fd)


def _allowed(call: Callable[[str, int], Result], name: str, fd: int) -> Result:
    """A call on ``name`` in a directory that goes as a whole: where that forbids it to its owner, it is let do it."""
    try:
        return call(name, fd)
    except PermissionError as refused:
        try:
            os.fchmod(fd, 0o700)
        except PermissionError:  # another's: the first failure has a name
            raise refused from None
        return call(name, fd)


def _opened(name: str, dir_fd: int | None) -> int:
    """A directory; -1 where there is none, any more: something else is removed."""
    try:
        return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    except FileNotFoundError:
        return -1
    except PermissionError:
        return _opened_anyway(name, dir_fd)
    except OSError:  # a link (ELOOP) or no directory (ENOTDIR)
        _unlink(name, dir_fd)
        return -1


def _opened_anyway(name: str, dir_fd: int | None) -> int:
    """A directory that its owner may not read."""
    found = os.open(name, os.O_PATH | OPEN_DIRECTORY, dir_fd=dir_fd)
    try:
        if os.fstat(found).st_uid == os.geteuid():
            os.chmod(f"/proc/self/fd/{found}", 0o700)
        return os.open(name, OPEN_DIRECTORY, dir_fd=dir_fd)
    finally:
        os.close(found)


def _emptied(fd: int) -> list[str]:
    """Remove all from a directory but the directories in it: their names."""
    directories: list[str] = []
    files: list[str] = []
    with os.scandir(fd) as entries:
        for entry in entries:
            (directories if entry.is_dir(follow_symlinks=False) else files).append(entry.name)
    for name in files:
        _allowed(_unlink, name, fd)
    return directories


def _rmdir(name: str, dir_fd: int | None) -> None:
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return


def make_directory(path: str, mode: int = 0o755) -> None:
    """``mkdir -p``. Raises :class:`OSError`, ``ENOENT`` where a parent is a link that leads nowhere."""
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        make_directory(os.path.dirname(path))
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            return  # another process was faster


def _unlink(name: str, dir_fd: int | None) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return
