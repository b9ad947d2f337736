"""Blobs that are made here, before they go anywhere: in memory while they are small, then in unnamed files."""

from __future__ import annotations

import io
import tempfile
from typing import TYPE_CHECKING, Any, cast

from containerkit.errors import BlobNotFound
from containerkit.image.digest import Digest
from containerkit.image.model import Descriptor
from containerkit.image.pack import Packed, pack

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO, Self

    from containerkit.image.store.blobs import BlobStore
    from containerkit.image.transfer import BlobSource

IN_MEMORY = 8 << 20


class Scratch:
    """A source of what was made here, and then of everything that ``below`` have, in their order.

    Large blobs lie in ``directory``, by default the system's for temporary files, until :meth:`close`.
    """

    def __init__(self, *below: BlobSource, directory: str | None = None) -> None:
        self._below = below
        self._directory = directory
        self._made: dict[Digest, Any] = {}
        #: As :attr:`.BlobStore.accepted`, also of ``below``.
        self.accepted: set[Digest] = set().union(*(getattr(source, "accepted", ()) for source in below))

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A blob. Raises :class:`BlobNotFound`."""
        made = self._made.get(descriptor.digest)
        if isinstance(made, bytes):
            return io.BytesIO(made)
        if made is not None:
            return open(f"/proc/self/fd/{made.fileno()}", "rb", buffering=0)
        for source in self._below[:-1]:
            try:
                return source.open(descriptor)
            except BlobNotFound:
                continue
        if not self._below:
            raise BlobNotFound(f"there is no {descriptor.digest}")
        return self._below[-1].open(descriptor)

    def put_bytes(self, content: bytes, media_type: str) -> Descriptor:
        """Keep a document."""
        digest = Digest.of(content)
        self._made[digest] = content
        return Descriptor(media_type, digest, len(content))

    def pack(self, pieces: Iterable[bytes], compression: str) -> Packed:
        """Keep a layer of the plain tar ``pieces``, as :func:`~containerkit.image.pack.pack` packs it."""
        return pack(pieces, cast("BlobStore", self), compression)

    def ingest(self) -> ScratchIngest:
        """A new blob that is still being written."""
        return ScratchIngest(self._made, self._directory)

    def close(self) -> None:
        """Let go of what was made; streams that are open can still be read."""
        for made in self._made.values():
            if not isinstance(made, bytes):
                made.close()
        self._made.clear()


class ScratchIngest:
    """A blob that is being written; gone at the end of the ``with`` block unless it was committed."""

    def __init__(self, made: dict[Digest, Any], directory: str | None = None) -> None:
        self._made = made
        self._file: Any = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, content: bytes | memoryview) -> None:
        """Append."""
        self._file.write(content)

    def commit(self, digest: Digest) -> None:
        """Make it the blob ``digest``."""
        if self._file.tell() <= IN_MEMORY:
            self._file.seek(0)
            self._made[digest] = self._file.read()
        else:
            self._file.flush()
            self._made[digest], self._file = self._file, None
