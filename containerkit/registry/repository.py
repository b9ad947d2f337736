"""One repository of a registry, as the Distribution specification 1.1 and Docker's Registry HTTP API V2 have it."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import TYPE_CHECKING

from containerkit.errors import (
    BlobUnknown,
    DigestMismatch,
    InvalidDigest,
    InvalidImage,
    ManifestUnknown,
    RegistryError,
    UnexpectedResponse,
    UnsupportedMediaType,
)
from containerkit.image.codec import LARGEST_DOCUMENT, parse_json
from containerkit.image.digest import Digest
from containerkit.image.model import (
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_LAYER,
    Descriptor,
)
from containerkit.image.stream import verify_bytes
from containerkit.registry import failures
from containerkit.registry.bodies import number
from containerkit.registry.ranges import open_blob
from containerkit.registry.streams import Download, Upload
from containerkit.registry.transport import Request
from containerkit.registry.uploads import Uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager
    from typing import BinaryIO, Self

    from requests import Response

    from containerkit.image.reference import Reference
    from containerkit.registry.policy import Policy
    from containerkit.registry.transport import Answer, Transport

DOCUMENT_TYPES = (*INDEX_TYPES, *MANIFEST_TYPES)
VAGUE_TYPES = ("", "application/json", "application/octet-stream", "text/plain", "binary/octet-stream")
MOST_DOCUMENTS = 4
DIGEST_HEADER = "Docker-Content-Digest"


class Repository:
    """A :class:`~containerkit.image.transfer.Remote`; threads may share it.

    Blobs and manifests are both content here: :meth:`open`, :meth:`has` and :meth:`put` look at the descriptor's media
    type to find where the protocol keeps it. Every method raises :class:`~containerkit.errors.RegistryError` for what
    the registry does wrong. Close it, or use it as a context manager, to close its idle connections.
    """

    def __init__(self, registry: str, name: str, transport: Transport) -> None:
        self.registry = registry
        self.name = name
        self.transport = transport
        self.policy: Policy | None = None
        self._uploads = Uploads(transport, name, lambda digest: self.has(Descriptor(OCI_LAYER, digest, 0)))
        self._closed: set[str] = set()  # repositories that nothing can be mounted from
        self._documents: dict[Digest, bytes] = {}  # what was resolved last, and what was read of it, by digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Repository {self.registry}/{self.name}>"

    @property
    def origin(self) -> Self:
        """Itself: what :class:`~containerkit.registry.mirrored.Mirrored` has behind its mirrors."""
        return self

    def close(self) -> None:
        """Close every idle connection."""
        self.transport.close()

    def download(self, digest: Digest) -> BinaryIO:
        """A stream of a blob whose size is not known: as long as the registry says, for the caller to verify.

        Raises :class:`BlobUnknown`.
        """
        subject = f"blob {self.registry}/{self.name}@{digest}"
        url = f"{self.name}/blobs/{digest}"
        head = self.transport.exchange(Request("HEAD", url, subject, missing=BlobUnknown))
        size = number(head.headers.get("Content-Length", ""))
        if size is None:
            raise UnexpectedResponse(
                f"{subject}: the registry does not say how long it is", url=failures.public(head.url)
            )
        return self.open(Descriptor("application/octet-stream", digest, size))

    def approve(self, reference: Reference, digest: Digest) -> None:
        """Ask the policy whether ``reference``, with this digest, may be pulled. Raises :class:`PolicyRefused`."""
        if self.policy is not None:
            self.policy.check(reference, digest, self)

    def tags(self) -> list[str]:
        """Every tag (:func:`~containerkit.registry.discovery.tags`)."""
        from containerkit.registry.discovery import tags

        return tags(self)

    def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """The descriptor and bytes of the manifest or index behind ``reference``.

        The digest is computed from the bytes, and compared with the one asked for and with the one that the registry
        announces. Raises :class:`ManifestUnknown` where there is none, :class:`DigestMismatch` where the content is
        another, :class:`UnsupportedMediaType` for a document of an unknown kind and :class:`InvalidImage` for what is
        not a document.
        """
        answer = self._manifest(reference.target, f"manifest {reference}")
        digest = _verify(answer, reference.digest, f"manifest {reference}")
        self._documents = {digest: answer.body}
        return Descriptor(_media_type(answer, f"manifest {reference}"), digest, len(answer.body)), answer.body

    def manifest(self, descriptor: Descriptor) -> bytes:
        """The bytes of a manifest or index, of exactly this size and digest."""
        if (body := self._documents.get(descriptor.digest)) is not None:
            return verify_bytes(descriptor, body)
        subject = self._subject("manifest", descriptor)
        answer = self._manifest(descriptor.digest, subject)
        _verify(answer, None, subject)
        body = verify_bytes(descriptor, answer.body)
        if len(self._documents) < MOST_DOCUMENTS:
            self._documents[descriptor.digest] = body
        return body

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A stream of the content as it is stored, for the caller to verify and close.

        Raises :class:`BlobUnknown` where it is not there, :class:`SizeMismatch` where the registry already declares
        another size. See :class:`~containerkit.registry.streams.Download` for what reading raises.
        """
        if descriptor.media_type in DOCUMENT_TYPES:
            return io.BytesIO(self.manifest(descriptor))
        return self.open_at(descriptor, 0)

    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        """The rest of a blob from byte ``offset`` on, where an earlier download has ended; as :meth:`open`."""
        subject = self._subject("blob", descriptor)

        def part(start: int, end: int | None) -> Download:
            return Download(
                descriptor, lambda at, length: self.fetch(descriptor, at, length), subject, offset=start, end=end
            )

        return open_blob(descriptor, part, self.transport.lanes, offset)

    def fetch(self, descriptor: Descriptor, offset: int, length: int = 0) -> Response:
        """The registry's answer with a blob from ``offset`` on, or all of it where it knows no ranges; to be closed.

        ``length`` bytes are asked for, or all that follow where it is 0.
        """
        partial = bool(offset or length)
        headers = {"Range": f"bytes={offset}-{offset + length - 1 if length else ''}"} if partial else {}
        accept = (200, 206) if partial else (200,)
        subject = self._subject("blob", descriptor)
        return self.transport.stream(Request("GET", self._url(descriptor), subject, headers, None, accept, BlobUnknown))

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the registry says that the content is there."""
        subject = self._subject("content", descriptor)
        headers = {"Accept": ", ".join(DOCUMENT_TYPES)} if descriptor.media_type in DOCUMENT_TYPES else {}
        request = Request("HEAD", self._url(descriptor), subject, headers, None, (200, 404))
        return self.transport.exchange(request).status != 404  # noqa: PLR2004

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        """Send the content of ``stream`` as it is read. It is sent even if it is there: ask :meth:`has` first.

        Raises :class:`SizeMismatch` or :class:`DigestMismatch` where ``stream`` is not what ``descriptor`` says; the
        registry then keeps nothing.
        """
        if descriptor.media_type in DOCUMENT_TYPES:
            self._put_manifest(descriptor.digest, descriptor.media_type, b"".join(Upload(descriptor, stream)))
        else:
            self._put_blob(descriptor, lambda: nullcontext(stream))

    def put_manifest(self, reference: Reference, media_type: str, body: bytes) -> Digest:
        """Store a manifest or index under the tag or digest of ``reference``; all that it names must be there already.

        Raises :class:`DigestMismatch` where ``reference`` has a digest that ``body`` has not.
        """
        actual = _hash(body, reference.digest)
        if reference.digest not in (None, actual):
            message = f"manifest {reference}: the content hashes to {actual}"
            raise DigestMismatch(message, expected=str(reference.digest), actual=actual)
        return self._put_manifest(reference.tag or actual, media_type, body)

    def _put_manifest(self, target: str, media_type: str, body: bytes) -> Digest:
        subject = f"manifest {self.registry}/{self.name} {target}"
        url = f"{self.name}/manifests/{target}"
        request = Request("PUT", url, subject, {"Content-Type": media_type}, body, (201, 200, 202))
        answer = self.transport.exchange(request, repeat=True)
        return _verify(answer._replace(body=body), None, subject)

    def mount(self, descriptor: Descriptor, source: str) -> bool:
        """Have the registry take a blob from another of its repositories; False where it does not.

        ``source`` is that repository's name there.
        """
        subject = self._subject("blob", descriptor)
        location = self._uploads.mount(descriptor, source, subject)
        if location:
            self._uploads.cancel(location, subject)
        return not location

    def send(self, descriptor: Descriptor, content: Callable[[], BinaryIO], repositories: Sequence[str] = ()) -> bool:
        """Mount a blob from the first of ``repositories`` that has it, or send what ``content()`` opens.

        They are names at the same registry. What the registry answers to a mount that it does not do is where the blob
        is then sent. False where it was mounted and ``content`` not called. Raises as :meth:`put`.
        """
        subject = self._subject("blob", descriptor)
        location = ""
        for source in repositories:
            if source in self._closed or source == self.name:
                continue
            try:
                opened = self._uploads.mount(descriptor, source, subject)
            except RegistryError as error:
                if not error.status:
                    raise
                self._closed.add(source)  # not ours to read, or mounting is unknown there
                continue
            if location:
                self._uploads.cancel(location, subject)
            if not opened:
                return False
            location = opened
        self._put_blob(descriptor, content, location)
        return True

    def put_pieces(self, pieces: Iterable[bytes]) -> tuple[Digest, int]:
        """Send a blob whose digest is known only at its end, in chunks: its digest and size (bytes).

        Raises what ``pieces`` raises; the registry then keeps nothing.
        """
        return self._uploads.send_pieces(pieces, f"new blob {self.registry}/{self.name}")

    def _put_blob(
        self, descriptor: Descriptor, content: Callable[[], AbstractContextManager[BinaryIO]], location: str = ""
    ) -> None:
        """Send a blob to an upload that is open already, or a new one; it closes what it opens."""
        subject = self._subject("blob", descriptor)
        location = location or self._uploads.start(subject)
        upload: Upload | None = None
        try:
            with content() as stream:
                upload = Upload(descriptor, stream)
                self._uploads.send(location, descriptor, upload, subject)
        except Exception as error:
            # Not after a broken connection or silence: waiting for the server once was enough.
            failure = error if upload is None else upload.failure
            if failure is not None or (isinstance(error, RegistryError) and error.status):
                self._uploads.cancel(location, subject)
            if failure is not None and failure is not error:
                raise failure from None
            raise

    def _manifest(self, target: str, subject: str) -> Answer:
        headers = {"Accept": ", ".join(DOCUMENT_TYPES)}
        url = f"{self.name}/manifests/{target}"
        request = Request("GET", url, subject, headers, missing=ManifestUnknown, document=True)
        return self.transport.exchange(request, limit=LARGEST_DOCUMENT)

    def _url(self, descriptor: Descriptor) -> str:
        kind = "manifests" if descriptor.media_type in DOCUMENT_TYPES else "blobs"
        return f"{self.name}/{kind}/{descriptor.digest}"

    def _subject(self, kind: str, descriptor: Descriptor) -> str:
        return f"{kind} {self.registry}/{self.name}@{descriptor.digest}"


def _hash(body: bytes, like: Digest | None) -> Digest:
    if like is None:
        return Digest.of(body)
    hasher = like.hasher()
    hasher.update(body)
    return Digest.from_hash(hasher)


def _verify(answer: Answer, wanted: Digest | None, subject: str) -> Digest:
    """The digest of the body, once it is the one wanted and the one that the registry announces."""
    announced = answer.headers.get(DIGEST_HEADER)
    try:
        claims = (wanted, Digest(announced) if announced else None)
    except InvalidDigest as error:
        message = f"{subject}: {DIGEST_HEADER} is not a digest: {failures.printable(announced)}"
        raise UnexpectedResponse(message, url=failures.public(answer.url), status=answer.status) from error
    for claim in filter(None, claims):
        actual = _hash(answer.body, claim)
        if actual != claim:
            who = "wanted" if claim is wanted else "announced"
            raise DigestMismatch(
                f"{subject}: {who} {claim}, but the content hashes to {actual}", expected=claim, actual=actual
            )
    return claims[0] or claims[1] or Digest.of(answer.body)


def _media_type(answer: Answer, subject: str) -> str:
    """What kind of document the body is, by the header and by its own ``mediaType``, which must agree."""
    served = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if served in (DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED):
        hint = "Docker's schema 1 is of 2015: push the image again with any newer tool"
        raise UnsupportedMediaType(f"{subject} is of schema 1", media_type=served, hint=hint)
    if served not in DOCUMENT_TYPES and served not in VAGUE_TYPES:
        if served.startswith("application/"):
            raise UnsupportedMediaType(f"{subject} is of an unknown type: {served}", media_type=served)
        message = f"{subject}: the answer is {failures.printable(served)}, not a manifest"
        hint = "is this the address of a registry?"
        raise UnexpectedResponse(message, url=failures.public(answer.url), status=answer.status, hint=hint)
    stated = parse_json(answer.body, subject).text("mediaType")
    if served in DOCUMENT_TYPES and stated in ("", served):
        return served
    if stated not in DOCUMENT_TYPES:
        what = failures.printable(stated) or "no media type"
        raise UnsupportedMediaType(f"{subject} is of an unknown type: {what}", media_type=stated)
    if served in DOCUMENT_TYPES:
        raise InvalidImage(f"{subject} was served as {served} and says that it is {stated}")
    return stated
