"""The content store: files named by the digest of what is in them, shared by any number of processes."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

from containerkit.errors import BlobNotFound
from containerkit.image.digest import Digest
from containerkit.image.extract import write_all
from containerkit.image.stream import PIECE, Verified, wrong_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, Self

    from containerkit.image.model import Descriptor


class BlobStore:
    """Blobs below the state root ``root``; a source and a sink.

    What is there is whole: content is written to ``ROOT/ingest``, verified, synced and renamed. A second put of the
    same content changes nothing, and two processes that put it at once both succeed.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def path(self, digest: Digest) -> str:
        """Where the blob is, or would be."""
        return os.path.join(self._root, "blobs", digest.algorithm, digest.hex)

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there in its full size."""
        try:
            return os.stat(self.path(descriptor.digest)).st_size == descriptor.size
        except FileNotFoundError:
            return False

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """The blob's content. Raises :class:`BlobNotFound`."""
        try:
            return open(self.path(descriptor.digest), "rb", buffering=0)
        except FileNotFoundError as error:
            raise BlobNotFound(f"{descriptor.digest} is not in the content store") from error

    def read(self, digest: Digest) -> bytes:
        """A small blob, verified. Raises :class:`BlobNotFound`, :class:`DigestMismatch`."""
        try:
            with open(self.path(digest), "rb") as file:
                content = file.read()
        except FileNotFoundError as error:
            raise BlobNotFound(f"{digest} is not in the content store") from error
        state = digest.hasher()
        state.update(content)
        if Digest.from_hash(state) != digest:
            raise wrong_digest(digest, Digest.from_hash(state), "stored blob")
        return content

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        """Keep the content of ``stream`` once it has proved to be what ``descriptor`` says.

        Raises :class:`SizeMismatch` or :class:`DigestMismatch`, and then keeps nothing.
        """
        if self.has(descriptor):
            return
        with self.ingest() as ingest:
            Verified(stream, descriptor, ingest.write).drain()
            ingest.commit(descriptor.digest)

    def put_bytes(self, content: bytes) -> Digest:
        """Keep ``content``, and give its digest."""
        digest = Digest.of(content)
        with self.ingest() as ingest:
            ingest.write(content)
            ingest.commit(digest)
        return digest

    def ingest(self) -> Ingest:
        """A new blob that is still being written."""
        return Ingest(self, os.path.join(self._root, "ingest"))

    def remove(self, digest: Digest) -> None:
        """Remove the blob, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(self.path(digest))

    def digests(self) -> Iterator[Digest]:
        """Every blob."""
        for algorithm in os.listdir(os.path.join(self._root, "blobs")):
            for encoded in os.listdir(os.path.join(self._root, "blobs", algorithm)):
                yield Digest(f"{algorithm}:{encoded}")


class Ingest:
    """A blob that is being written; gone at the end of the ``with`` block unless it was committed."""

    def __init__(self, store: BlobStore, directory: str) -> None:
        self._store = store
        self._fd, self._temporary = tempfile.mkstemp(prefix="blob-", dir=directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._temporary:
            os.unlink(self._temporary)

    def write(self, content: bytes | memoryview) -> None:
        """Append."""
        write_all(self._fd, content)

    def commit(self, digest: Digest) -> None:
        """Make it the blob ``digest``, which the caller has verified."""
        os.fchmod(self._fd, 0o644)
        os.fsync(self._fd)
        path = self._store.path(digest)
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
        os.rename(self._temporary, path)
        self._temporary = ""
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def pieces_of(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a stream in large pieces."""
    while piece := stream.read(PIECE):
        yield piece
