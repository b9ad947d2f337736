"""The content store: files named by the digest of what is in them, shared by any number of processes."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from containerkit.errors import BlobNotFound, ContentMismatch, InvalidDigest
from containerkit.image.digest import Digest
from containerkit.image.store.ingest import Ingest, Resumed, another_place
from containerkit.image.store.leases import BLOB, hold
from containerkit.image.stream import PIECE, Verified, wrong_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from containerkit.image.model import Descriptor
    from containerkit.image.transfer import BlobSource

__all__ = ["BlobStore", "Ingest", "pieces_of"]


class BlobStore:
    """Blobs below the state root ``root``; a source and a sink.

    What is there is whole: content is written to ``ROOT/ingest``, verified, synced and renamed. A second put of the
    same content changes nothing, and two processes that put it at once both succeed. Whatever is looked for, opened or
    put under a :func:`~containerkit.image.store.leases.lease` is not collected while that lasts. Writing raises
    :class:`~containerkit.errors.KernelError` (``ENOSPC``) with the path where the disk is full.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        #: Layers that were packed here, or that the caller has had unpacked: how well they are packed is no question.
        self.accepted: set[Digest] = set()

    def path(self, digest: Digest) -> str:
        """Where the blob is, or would be."""
        return os.path.join(self._root, "blobs", digest.algorithm, digest.hex)

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there in its full size."""
        hold(self._root, BLOB, descriptor.digest)
        return _size(self.path(descriptor.digest)) == descriptor.size

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """The blob's content. Raises :class:`BlobNotFound`."""
        hold(self._root, BLOB, descriptor.digest)
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

    def put_bytes(self, content: bytes, digest: Digest | None = None) -> Digest:
        """Keep ``content``, and give its digest; or under ``digest``, which the caller has verified."""
        digest = digest or Digest.of(content)
        hold(self._root, BLOB, digest)
        if _size(self.path(digest)) == len(content):
            return digest
        with self.ingest() as ingest:
            ingest.write(content)
            ingest.commit(digest)
        return digest

    def fetch(self, descriptor: Descriptor, source: BlobSource) -> None:
        """Bring a blob in from ``source``.

        A source with a method ``open_at(descriptor, offset)`` is asked only for what an earlier attempt has not left
        here. Raises what ``source`` raises, :class:`SizeMismatch` and :class:`DigestMismatch`.
        """
        if self.has(descriptor):
            return
        with self.ingest(descriptor, source) as ingest:
            while True:
                try:
                    with Resumed(ingest, source, descriptor) as stream:
                        Verified(stream, descriptor).drain()
                    break
                except ContentMismatch:  # what was left behind was damaged, or a mirror lies
                    if not ingest.offset and not another_place(source, descriptor):
                        raise
                    ingest.restart()
            ingest.commit(descriptor.digest)

    def ingest(self, descriptor: Descriptor | None = None, source: BlobSource | None = None) -> Ingest:
        """A blob that is still being written; where it is known which, and whence, it may go on where it ended."""
        return Ingest(self._root, descriptor, source)

    def digests(self) -> Iterator[Digest]:
        """Every blob; files with other names are none."""
        for algorithm in os.listdir(os.path.join(self._root, "blobs")):
            for encoded in os.listdir(os.path.join(self._root, "blobs", algorithm)):
                with suppress(InvalidDigest):
                    yield Digest(f"{algorithm}:{encoded}")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def pieces_of(stream: BinaryIO) -> Iterator[bytes]:
    """The content of a stream in large pieces."""
    while piece := stream.read(PIECE):
        yield piece
