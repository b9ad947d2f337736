"""Everything that moves images: sources, sinks and :func:`copy_image` between any two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing import BinaryIO

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor
    from containerkit.image.reference import Reference


class BlobSource(Protocol):
    """Where content comes from."""

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A stream of the content, to be verified and closed by the caller.

        Raises :class:`~containerkit.errors.BlobNotFound` where it is not there.
        """


class BlobSink(Protocol):
    """Where content goes."""

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the content is there already."""

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        """Take the content from ``stream``, verify it, and keep it; a second put of the same changes nothing.

        Raises :class:`~containerkit.errors.ContentMismatch`, and then keeps nothing.
        """


class Remote(BlobSource, BlobSink, Protocol):
    """A repository of a registry."""

    def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """The descriptor and bytes of the manifest or index behind a tag or digest, verified.

        Raises :class:`~containerkit.errors.ImageNotFound` where there is none.
        """

    def put_manifest(self, reference: Reference, media_type: str, body: bytes) -> Digest:
        """Store a manifest or index under ``reference``; all that it names must be there already."""

    def close(self) -> None:
        """Let go of connections."""


def copy_image(root: Descriptor, source: BlobSource, sink: BlobSink) -> bytes:
    """Copy all that the manifest or index ``root`` names, and give the bytes of ``root`` itself, which stay to be put.

    What the sink has is not read. Raises what source and sink raise, and
    :class:`~containerkit.errors.InvalidImage` for documents that do not parse.
    """
    from containerkit.image.codec import LARGEST_DOCUMENT, parse_document
    from containerkit.image.model import Index
    from containerkit.image.stream import read_verified

    with source.open(root) as stream:
        body = read_verified(stream, root, LARGEST_DOCUMENT)
    document = parse_document(body, root.media_type)
    if isinstance(document, Index):
        for child in document.manifests:
            copy_image(child, source, sink)
            _copy_blob(child, source, sink)
    else:
        for blob in (*document.layers, document.config):
            _copy_blob(blob, source, sink)
    return body


def _copy_blob(descriptor: Descriptor, source: BlobSource, sink: BlobSink) -> None:
    if not sink.has(descriptor):
        with source.open(descriptor) as stream:
            sink.put(descriptor, stream)
