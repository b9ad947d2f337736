"""Everything that moves images: sources, sinks and :func:`copy_image` between any two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from containerkit.errors import BlobNotFound, ImageTooLarge, PlatformMismatch
from containerkit.image.limits import STANDARD, check_document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor, Platform
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

    def approve(self, reference: Reference, digest: Digest) -> None:
        """Do nothing where ``reference``, with this digest, may be pulled: before anything of it is fetched.

        Raises :class:`~containerkit.errors.PolicyRefused`.
        """

    def put_manifest(self, reference: Reference, media_type: str, body: bytes) -> Digest:
        """Store a manifest or index under ``reference``; all that it names must be there already."""

    def close(self) -> None:
        """Let go of connections."""


class Connect(Protocol):
    """How a registry is reached: the repository that a reference names, to pull from or to push to."""

    def __call__(self, reference: Reference, /, *, push: bool) -> Remote:
        """Nothing is sent yet."""


def copy_image(root: Descriptor, source: BlobSource, sink: BlobSink) -> bytes:
    """Copy all that the manifest or index ``root`` names, and give the bytes of ``root`` itself, which stay to be put.

    What the sink has is not read. What is no container image, as the attestations in an index, is copied like one; a
    layer that may only be had from its own addresses (``urls``) is left out where the source has not got it.
    Raises what source and sink raise, and :class:`~containerkit.errors.InvalidImage` for documents that do not parse.
    """
    return _copy(root, source, sink, STANDARD.index_depth, set())


def _copy(root: Descriptor, source: BlobSource, sink: BlobSink, depth: int, done: set[Digest]) -> bytes:
    from containerkit.image.model import INDEX_TYPES, MANIFEST_TYPES

    body = _document(root, source)
    for child in children(body, root.media_type):
        if child.digest in done:
            continue
        if child.media_type in (*MANIFEST_TYPES, *INDEX_TYPES):
            if not depth:
                raise _too_deep(root)
            _copy(child, source, sink, depth - 1, done)
        _copy_blob(child, source, sink)
        done.add(child.digest)
    return body


def _document(descriptor: Descriptor, source: BlobSource) -> bytes:
    from containerkit.image.stream import read_verified

    check_document(descriptor.size, "manifest")
    with source.open(descriptor) as stream:
        return read_verified(stream, descriptor, descriptor.size)


def _too_deep(root: Descriptor) -> ImageTooLarge:
    allowed = STANDARD.index_depth
    message = f"{root.digest} has indexes within indexes without end: more than {allowed} deep"
    return ImageTooLarge(message, limit="index_depth", allowed=allowed, found=allowed + 1)


def children(body: bytes, media_type: str) -> tuple[Descriptor, ...]:
    """What a manifest or index names, in the order in which it must be put: layers, config, or manifests.

    Its layers and config may be of any type. Raises :class:`~containerkit.errors.InvalidImage`.
    """
    from containerkit.image.codec import parse_descriptor, parse_json
    from containerkit.image.model import INDEX_TYPES

    document = parse_json(body, f"the document of type {media_type}")
    if media_type in INDEX_TYPES:
        rows = document.children("manifests", needed=False)
    else:
        rows = (*document.children("layers", needed=False), document.child("config"))
    return tuple({child.digest: child for child in map(parse_descriptor, rows)}.values())


def resolve_manifest(source: BlobSource, root: Descriptor, wanted: Platform | None = None) -> tuple[Descriptor, bytes]:
    """The manifest for one platform, by default this machine's, and its bytes: ``root`` itself, or one of its index.

    Raises :class:`~containerkit.errors.PlatformMismatch`, which says what there is, and what :func:`copy_image` raises.
    """
    reads = iter(range(STANDARD.index_reads))
    return _resolve(source, root, wanted, STANDARD.index_depth, reads)


def _resolve(
    source: BlobSource, root: Descriptor, wanted: Platform | None, depth: int, reads: Iterator[int]
) -> tuple[Descriptor, bytes]:
    from containerkit.image import platform
    from containerkit.image.codec import parse_document
    from containerkit.image.model import Index

    if depth < 0 or next(reads, None) is None:
        raise _too_deep(root)
    body = _document(root, source)
    document = parse_document(body, root.media_type)
    if not isinstance(document, Index):
        return root, body
    there = [item.platform for item in document.manifests if item.platform is not None]
    failure = platform.mismatch(root.digest, there, wanted)
    for candidate in platform.candidates(document.manifests, wanted):
        try:
            return _resolve(source, candidate, wanted, depth - 1, reads)
        except PlatformMismatch as error:  # of an index that named no platform
            failure = error
    raise failure


def _copy_blob(descriptor: Descriptor, source: BlobSource, sink: BlobSink) -> None:
    if sink.has(descriptor):
        return
    try:
        stream = source.open(descriptor)
    except BlobNotFound:
        if descriptor.urls:
            return
        raise
    with stream:
        sink.put(descriptor, stream)
