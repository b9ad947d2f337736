"""Everything that moves images: sources, sinks and :func:`copy_image` between any two of them."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Protocol, cast

from containerkit.errors import BlobNotFound, ContentMismatch, ImageTooLarge, PlatformMismatch
from containerkit.image.limits import STANDARD, check_document
from containerkit.image.store.ingest import another_place
from containerkit.image.stream import Cancelled, read_verified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO, Self

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor, Platform
    from containerkit.image.progress import Meterer, Watcher
    from containerkit.image.reference import Reference

    #: In which other repositories of the sink's registry a blob may be.
    Elsewhere = Callable[[Descriptor], Sequence[str]]
    Send = Callable[[Descriptor, Callable[[], BinaryIO], Sequence[str]], bool]

AT_ONCE = 6
MOST_KEPT = 16 << 20


class BlobSource(Protocol):
    """Where content comes from."""

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A stream of the content, to be verified and closed by the caller.

        Raises :class:`~containerkit.errors.BlobNotFound` where it is not there.
        """


class BlobSink(Protocol):
    """Where content goes.

    Threads put different blobs at the same time, unless it has an attribute ``at_once`` of 1: then each in turn, what
    a manifest names right before it. A method ``send(descriptor, content, repositories)``, as
    :meth:`.Repository.send`, is used where content may be had within the sink's own registry.
    """

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

    def tags(self) -> list[str]:
        """Every tag of the repository itself, whatever its mirrors have."""

    def put_manifest(self, reference: Reference, media_type: str, body: bytes) -> Digest:
        """Store a manifest or index under ``reference``; all that it names must be there already."""

    def close(self) -> None:
        """Let go of connections."""


class Connect(Protocol):
    """How a registry is reached: the repository that a reference names, to pull from or to push to."""

    def __call__(self, reference: Reference, /, *, push: bool) -> Remote:
        """Nothing is sent yet."""


class Pack(Protocol):
    """Puts plain layers into a sink in another form; never more than ``at_once`` blobs at a time then."""

    at_once: int

    def known(self, layer: Descriptor) -> Descriptor | None:
        """What a layer is there, where it is there already."""

    def put(self, layer: Descriptor, stream: BinaryIO) -> Descriptor:
        """Put one, verified, and say what it is there."""


def copy_image(
    root: Descriptor,
    source: BlobSource,
    sink: BlobSink,
    *,
    progress: Watcher | None = None,
    elsewhere: Elsewhere | None = None,
    pack: Pack | None = None,
    form: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """Copy all that the manifest or index ``root`` names, and give the bytes of ``root`` itself, which stay to be put.

    Blobs go side by side, then the manifests that name them, then the indexes; a failure cancels the rest, and the
    first one is raised. Nothing is copied twice, and what the sink has is not read. What is no container image, as the
    attestations in an index, is copied like one; a layer that may only be had from its own addresses (``urls``) is left
    out where the source has not got it.

    ``progress`` is told how the blobs come. ``elsewhere`` says which other repositories of the sink's registry have a
    blob, likely. ``pack`` puts the plain layers: then the documents, and what is returned, are rewritten to match.
    ``form`` says each document in another form, of the same content (:func:`.rewrite.as_oci`).
    Raises what source and sink raise, :class:`~containerkit.errors.InvalidImage` for documents that do not parse, and
    :class:`~containerkit.errors.ImageTooLarge` for indexes with too many of them.
    """
    from containerkit.image.progress import Meterer

    tree = _Tree(source)
    body = tree.read(root, STANDARD.index_depth)
    blobs = [step for step in tree.steps if not _is_document(step)]
    copy = _Copy(tree, sink, Meterer(progress, blobs), elsewhere, pack, form)
    copy.run()
    return copy.rewritten(body)


class _Tree:
    """All that an image names, read before any of it is copied: ``steps`` has each thing once, what it needs first."""

    def __init__(self, source: BlobSource) -> None:
        self.source = source
        self.steps: list[Descriptor] = []
        self._seen: set[Digest] = set()
        self._bodies: dict[Digest, bytes] = {}
        self._kept = 0
        self._reads = 0

    def read(self, root: Descriptor, depth: int) -> bytes:
        """The bytes of a document, once everything below it is among the steps."""
        body = _document(root, self.source)
        for child in children(body, root.media_type):
            if child.digest in self._seen:
                continue
            if _is_document(child):
                self._reads += 1
                check_index(root, depth, self._reads)
                self._keep(child, self.read(child, depth - 1))
            self._seen.add(child.digest)
            self.steps.append(child)
        return body

    def body(self, descriptor: Descriptor) -> bytes:
        """The bytes of a document among the steps."""
        return self._bodies.get(descriptor.digest) or _document(descriptor, self.source)

    def _keep(self, descriptor: Descriptor, body: bytes) -> None:
        """So that it need not be fetched again; a hostile index could ask for much more memory than this."""
        if self._kept + len(body) <= MOST_KEPT:
            self._kept += len(body)
            self._bodies[descriptor.digest] = body


class _Copy:
    """The steps of one copy, several at once."""

    def __init__(
        self,
        tree: _Tree,
        sink: BlobSink,
        meterer: Meterer,
        elsewhere: Elsewhere | None,
        pack: Pack | None,
        form: Callable[[bytes], bytes] | None,
    ) -> None:
        self._tree = tree
        self._sink = sink
        self._meterer = meterer
        self._elsewhere = elsewhere
        self._pack = pack
        self._form = form
        self._packed: dict[Digest, Descriptor] = {}
        self._cancelled = threading.Event()
        self._streams: list[Counted] = []  # also those that are closed

    def run(self) -> None:
        """Do them all."""
        from containerkit.image.model import INDEX_TYPES

        steps = self._tree.steps
        at_once: int = getattr(self._sink, "at_once", AT_ONCE)
        if self._pack is not None:
            at_once = min(at_once, self._pack.at_once)
        if at_once == 1:
            groups = [[step] for step in steps]
        else:
            blobs = [step for step in steps if not _is_document(step)]
            manifests = [step for step in steps if _is_document(step) and step.media_type not in INDEX_TYPES]
            groups = [blobs, manifests, *([step] for step in steps if step.media_type in INDEX_TYPES)]
        for group in groups:
            if len(group) == 1:
                self._put(group[0])
            elif group:
                self._put_all(group, at_once)

    def rewritten(self, body: bytes) -> bytes:
        """A document with the descriptors of what was packed, in the wanted form."""
        if self._packed:
            from containerkit.image.rewrite import rewritten

            body = rewritten(body, self._packed)
        return self._form(body) if self._form is not None else body

    def _put_all(self, group: Sequence[Descriptor], at_once: int) -> None:
        from containerkit.image.together import together

        threads = min(at_once, len(group))
        with together(threads, "containerkit-copy", self._cancelled, interrupt=self._interrupt) as begin:
            for step in group:
                begin(self._put, step)

    def _interrupt(self) -> None:
        for stream in tuple(self._streams):
            stream.interrupt()

    def _put(self, step: Descriptor) -> None:
        while True:
            try:
                self._put_document(step) if _is_document(step) else self._put_blob(step)
                break
            except ContentMismatch:
                if not another_place(self._tree.source, step):
                    raise
                self._meterer.again(step)

    def _put_document(self, step: Descriptor) -> None:
        old = self._tree.body(step)
        new = self.rewritten(old)
        if new is not old:
            from containerkit.image.rewrite import redescribed

            self._packed[step.digest] = step = redescribed(step, new)
        if not self._sink.has(step):
            self._sink.put(step, io.BytesIO(new))

    def _put_blob(self, blob: Descriptor) -> None:
        if self._pack is not None and blob.media_type in _plain_layers():
            known = self._pack.known(blob)
            if known is None:
                with self._open(blob) as stream:
                    self._packed[blob.digest] = self._pack.put(blob, stream)
            else:
                self._packed[blob.digest] = known
            self._meterer.done(blob, present=known is not None)
        else:
            self._meterer.done(blob, present=not self._moved(blob))

    def _moved(self, blob: Descriptor) -> bool:
        """Put a blob; False where nothing had to move."""
        if self._sink.has(blob):
            return False
        send: Send | None = getattr(self._sink, "send", None)
        if send is not None and self._elsewhere is not None and not blob.urls:
            return send(blob, lambda: self._open(blob), self._elsewhere(blob))
        try:
            stream = self._open(blob)
        except BlobNotFound:
            if blob.urls:
                return False
            raise
        with stream:
            self._sink.put(blob, stream)
        return True

    def _open(self, blob: Descriptor) -> BinaryIO:
        stream = Counted(self._tree.source.open(blob), blob, self._meterer, self._cancelled)
        self._streams.append(stream)
        return cast("BinaryIO", stream)


class Counted:
    """A stream of ``blob`` whose bytes ``meterer`` is told of; it ends where ``cancelled`` is set."""

    def __init__(
        self, stream: BinaryIO, blob: Descriptor, meterer: Meterer, cancelled: threading.Event | None = None
    ) -> None:
        self._stream = stream
        self._blob = blob
        self._meterer = meterer
        self._cancelled = cancelled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, size: int = -1, /) -> bytes:
        """As the stream's."""
        if self._cancelled is not None and self._cancelled.is_set():
            raise Cancelled
        data = self._stream.read(size)
        self._meterer.moved(self._blob, len(data))
        return data

    def seekable(self) -> bool:
        """Whether it can be read again."""
        seekable = getattr(self._stream, "seekable", None)
        return bool(seekable and seekable())

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Go back to the beginning, and count anew."""
        self._meterer.again(self._blob)
        return self._stream.seek(offset, whence)

    def interrupt(self) -> None:
        """Have a read that waits, in another thread, fail, where the stream can do so."""
        interrupt = getattr(self._stream, "interrupt", None)
        if interrupt is not None:
            interrupt()

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


def _is_document(descriptor: Descriptor) -> bool:
    from containerkit.image.model import INDEX_TYPES, MANIFEST_TYPES

    return descriptor.media_type in MANIFEST_TYPES or descriptor.media_type in INDEX_TYPES


def _plain_layers() -> tuple[str, ...]:
    from containerkit.image.model import DOCKER_LAYER, OCI_LAYER

    return (OCI_LAYER, DOCKER_LAYER)


def _document(descriptor: Descriptor, source: BlobSource) -> bytes:
    check_document(descriptor.size, "manifest")
    with source.open(descriptor) as stream:
        return read_verified(stream, descriptor, descriptor.size)


def _too_deep(root: Descriptor) -> ImageTooLarge:
    allowed = STANDARD.index_depth
    message = f"{root.digest} has indexes within indexes without end: more than {allowed} deep"
    return ImageTooLarge(message, limit="index_depth", allowed=allowed, found=allowed + 1)


def check_index(root: Descriptor, depth: int, reads: int) -> None:
    """Raise :class:`ImageTooLarge` where no ``depth`` is left below ``root``, or too many documents were read."""
    if not depth:
        raise _too_deep(root)
    allowed = STANDARD.index_reads
    if reads > allowed:
        message = f"{root.digest} is of an index with more than {allowed} manifests and indexes"
        raise ImageTooLarge(message, limit="index_reads", allowed=allowed, found=allowed + 1)


def children(body: bytes, media_type: str) -> tuple[Descriptor, ...]:
    """What a manifest or index names, in the order in which it must be put: layers, config, or manifests.

    Its layers and config may be of any type. Raises :class:`~containerkit.errors.InvalidImage`, and for a document of
    an unknown type :class:`~containerkit.errors.UnsupportedMediaType`.
    """
    from containerkit.image.codec import document_type, parse_descriptor, parse_json
    from containerkit.image.model import INDEX_TYPES

    document = parse_json(body, f"the document of type {media_type}")
    if document_type(document, media_type) in INDEX_TYPES:
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
    there = [str(item.platform) for item in document.manifests if item.platform is not None]
    for candidate in platform.candidates(document.manifests, wanted):
        try:
            return _resolve(source, candidate, wanted, depth - 1, reads)
        except PlatformMismatch as error:  # of an index within
            there += error.available
    raise platform.mismatch(root.digest, there, wanted)
