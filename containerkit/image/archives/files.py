"""The files of an archive or layout, read from and written to a directory or a tar."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import tempfile
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from containerkit.errors import CorruptLayer, InvalidArchive
from containerkit.image.archives.tarindex import places
from containerkit.image.layers.layer import BLOCK, FILE
from containerkit.image.limits import STANDARD
from containerkit.image.stream import PIECE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from containerkit.image.limits import ImageLimits

RECORD = 20 * BLOCK


class Files(Protocol):
    """The files of an archive."""

    def open(self, name: str) -> BinaryIO:
        """One file. Raises ``FileNotFoundError``."""

    def size(self, name: str) -> int:
        """Its size in bytes. Raises ``FileNotFoundError``."""

    def place(self, name: str) -> tuple[int, int]:
        """The same for all names that one file has. Raises ``FileNotFoundError``."""


class DirectoryFiles:
    """Those of a directory; a name that would lead out of it is not there."""

    def __init__(self, path: str) -> None:
        self._path = path

    def open(self, name: str) -> BinaryIO:
        """One file."""
        return open(self._full(name), "rb", buffering=0)

    def size(self, name: str) -> int:
        """Its size."""
        return os.stat(self._full(name)).st_size

    def place(self, name: str) -> tuple[int, int]:
        """Device and inode."""
        found = os.stat(self._full(name))
        return found.st_dev, found.st_ino

    def _full(self, name: str) -> str:
        clean = os.path.normpath(name)
        if os.path.isabs(clean) or clean.split("/")[0] == "..":
            raise FileNotFoundError(name)
        return os.path.join(self._path, clean)


class TarFiles:
    """Those of a plain tar; any number of threads may read at once."""

    def __init__(self, path: str, shown: str = "", limits: ImageLimits = STANDARD) -> None:
        self._path = path
        shown = shown or path
        try:
            with open(path, "rb", buffering=0) as file:
                self._places = places(file.fileno(), limits)
                end = os.fstat(file.fileno()).st_size
        except CorruptLayer as error:
            raise InvalidArchive(f"{shown} is not a tar, or a damaged one: {error.message}") from error
        if any(offset + size > end for offset, size in self._places.values()):
            raise InvalidArchive(f"{shown} is truncated")

    def open(self, name: str) -> BinaryIO:
        """One file."""
        offset, size = self.place(name)
        return io.BufferedReader(Window(self._path, offset, size), PIECE)

    def size(self, name: str) -> int:
        """Its size."""
        return self.place(name)[1]

    def place(self, name: str) -> tuple[int, int]:
        """Where it begins, and its size."""
        try:
            return self._places[os.path.normpath(name)]
        except KeyError:
            raise FileNotFoundError(name) from None


class Window(io.RawIOBase):
    """A part of a file, with a descriptor of its own."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._position = offset
        self._end = offset + size

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read the next bytes."""
        count = os.preadv(self._fd, [memoryview(buffer)[: self._end - self._position]], self._position)
        self._position += count
        return count

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._fd)
        super().close()


class Target(Protocol):
    """Where the files of an archive are written, each once and as a whole."""

    def write(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Write one file of ``size`` bytes. What ``pieces`` raises is raised, and the file is not there."""


class DirectoryTarget:
    """A directory; each file appears by a rename."""

    def __init__(self, path: str) -> None:
        self.path = path
        os.makedirs(path, exist_ok=True)

    def write(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Write one file."""
        path = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _replacing(path) as file:
            _write_exactly(file, name, size, pieces)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep out everybody else who changes this layout's index (umoci takes the same lock)."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


class TarTarget:
    """A tar, written front to back, with the same bytes for the same files; nothing in it tells of this machine."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0

    def write(self, name: str, size: int, pieces: Iterable[bytes]) -> None:
        """Append one file."""
        from containerkit.image.layers.attributes import Attributes
        from containerkit.image.layers.write import header

        head = header(os.fsencode(name), FILE, Attributes(0o644), size=size)
        self._file.write(head)
        _write_exactly(self._file, name, size, pieces)
        self._file.write(bytes(-size % BLOCK))
        self._size += len(head) + size + -size % BLOCK

    def finish(self) -> None:
        """Write the end, padded to tar's record."""
        self._file.write(bytes(2 * BLOCK + -(self._size + 2 * BLOCK) % RECORD))
        self._file.flush()


@contextmanager
def writing(target: str | BinaryIO) -> Iterator[BinaryIO]:
    """``target`` for writing: a path gets its new content by a rename once all went well, a file object as it comes.

    A path that is there and no regular file (``/dev/stdout``, a FIFO) is written directly.
    """
    if not isinstance(target, str):
        yield target
    elif os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
        with open(target, "wb") as file:
            yield file
    else:
        with _replacing(os.path.realpath(target)) as file:
            yield file


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    directory, name = os.path.split(path)
    fd, temporary = tempfile.mkstemp(prefix=f".{name[:64]}.", dir=directory or ".")
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fchmod(fd, 0o666 & ~_umask())
        os.rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """Read from /proc, for umask(2) can only be read by changing it, which other threads would see."""
    with open("/proc/self/status", "rb") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith(b"Umask:")), 0o022)


def _write_exactly(file: BinaryIO, name: str, size: int, pieces: Iterable[bytes]) -> None:
    left = size
    for piece in pieces:
        left -= len(piece)
        file.write(piece)
    if left:
        raise InvalidArchive(f"{name} should have {size} bytes and has {size - left}")
