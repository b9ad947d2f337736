"""Blobs that are being written: new ones without a name, and downloads that go on where the last attempt ended.

A download whose source can be asked for the rest of it (``open_at``: a registry) is written to
``ROOT/ingest/partial-ALGORITHM-HEX``, under an exclusive lock (flock(2)) that ends with its writer. What a failed
connection or a killed process leaves there, the next attempt reads again from the disk, hashes, and asks its source
only for the rest. Somebody else who wants the same blob meanwhile does not wait: a writer may itself have to wait for
lower layers, and two could wait for each other. It writes a nameless copy; the last one to finish replaces equal
content.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, cast

from containerkit.errors import ImageError, KernelError
from containerkit.image.store.leases import BLOB, bring
from containerkit.linux.locks import locked, same_file
from containerkit.linux.paths import write_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, Self

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor
    from containerkit.image.transfer import BlobSource

PARTIAL = "partial-"
#: Less than this is not worth a file: asking again costs about as much as going on.
SMALLEST_PARTIAL = 256 << 10
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Resumable(Protocol):
    """A source that can be asked for the rest of a blob."""

    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        """Its content from ``offset`` on."""


class Ingest:
    """A blob that is being written; a context manager.

    At the end of the block it is gone unless it was committed, or unless it is a download that is worth going on with:
    its ``source`` can be asked for the rest, and neither its content nor a full disk was the reason why it failed.
    Raises :class:`KernelError` with ``path`` and ``errno`` where the disk is full or fails.
    """

    def __init__(self, root: str, descriptor: Descriptor | None = None, source: BlobSource | None = None) -> None:
        self._root = root
        descriptor = descriptor if hasattr(source, "open_at") else None
        with named(os.path.join(root, "ingest")):
            opened = _open_partial(root, descriptor) if descriptor is not None else None
            self.resumable = opened is not None
            self._fd, self._path = opened or _open_new(os.path.join(root, "ingest"))
        #: How many bytes an earlier attempt has left; :meth:`write` appends to them.
        self.offset = os.fstat(self._fd).st_size
        if descriptor is not None and self.offset > descriptor.size:
            self.restart()
        os.lseek(self._fd, 0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if self._path and not (self.resumable and self._worth_keeping(error)):
                with suppress(FileNotFoundError):
                    os.unlink(self._path)
        finally:
            os.close(self._fd)

    def write(self, content: bytes | memoryview) -> None:
        """Append."""
        with named(self._path):
            write_all(self._fd, content)

    def stored(self, size: int, position: int) -> bytes:
        """At most ``size`` of the bytes that an earlier attempt has left, from ``position`` on."""
        return os.pread(self._fd, min(size, self.offset - position), position)

    def restart(self) -> None:
        """Forget what an earlier attempt has left."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.offset = 0

    def commit(self, digest: Digest) -> None:
        """Make it the blob ``digest``, which the caller has verified. It is on the disk when this returns."""
        bring(self._root, BLOB, digest)
        path = os.path.join(self._root, "blobs", digest.algorithm, digest.hex)
        with named(path):
            os.fchmod(self._fd, 0o644)
            os.fsync(self._fd)
            os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
            os.rename(self._path, path)
            self._path = ""
            sync_directory(os.path.dirname(path))

    def _worth_keeping(self, error: BaseException | None) -> bool:
        if error is None or isinstance(error, ImageError) or is_full(error):
            return False
        return os.fstat(self._fd).st_size >= SMALLEST_PARTIAL


class Resumed:
    """The content of ``descriptor``: what ``ingest`` has of it already, then the rest from ``source``, kept on its way.

    A stream for one reader, which verifies and closes it. The source is not asked before it is needed.
    """

    def __init__(self, ingest: Ingest, source: BlobSource, descriptor: Descriptor) -> None:
        self._ingest = ingest
        self._source = source
        self._descriptor = descriptor
        self._position = 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> Self:
        if not self._ingest.offset:
            self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most ``size``; empty at the end."""
        if self._position < self._ingest.offset:
            data = self._ingest.stored(size, self._position)
        else:
            data = self._rest(size)
            self._ingest.write(data)
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the source's stream."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _rest(self, size: int) -> bytes:
        if self._stream is None:
            if self._position == self._descriptor.size:
                return b""
            self._open()
        assert self._stream is not None  # noqa: S101 - for the type checker
        return self._stream.read(size)

    def _open(self) -> None:
        if self._ingest.offset:
            self._stream = cast("Resumable", self._source).open_at(self._descriptor, self._ingest.offset)
        else:
            self._stream = self._source.open(self._descriptor)


def is_full(error: BaseException) -> bool:
    """Whether it says that there is no room for more on the disk."""
    return getattr(error, "errno", None) in _FULL


def another_place(source: BlobSource, descriptor: Descriptor) -> bool:
    """After content of ``source`` that was wrong: whether opening it again asks somebody else, as behind mirrors.

    A source with several places has a method ``discredit(descriptor)`` that says so.
    """
    discredit = getattr(source, "discredit", None)
    return discredit is not None and bool(discredit(descriptor))


def sync_directory(path: str) -> None:
    """``fsync`` of a directory: the names in it are on the disk when this returns."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def partial_path(root: str, digest: Digest) -> str:
    """Where an unfinished download of ``digest`` is kept."""
    return os.path.join(root, "ingest", f"{PARTIAL}{digest.algorithm}-{digest.hex}")


def _open_partial(root: str, descriptor: Descriptor) -> tuple[int, str] | None:
    """The partial file of a blob, locked; None while another is writing it."""
    path = partial_path(root, descriptor.digest)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not locked(fd):
            os.close(fd)
            return None
        if same_file(fd, path):  # else it was committed or collected between the two calls
            return fd, path
        os.close(fd)


def _open_new(directory: str) -> tuple[int, str]:
    while True:
        fd, path = tempfile.mkstemp(prefix="blob-", dir=directory)
        if locked(fd) and same_file(fd, path):
            return fd, path
        os.close(fd)


@contextmanager
def named(path: str) -> Iterator[None]:
    """Errors of the disk as errors of this library, with the path."""
    try:
        yield
    except KernelError:
        raise
    except OSError as error:
        hint = "free some space; what is half there is not visible" if error.errno == errno.ENOSPC else ""
        raise KernelError("write", error.errno or errno.EIO, path, hint=hint) from error
