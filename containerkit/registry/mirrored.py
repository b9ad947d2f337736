"""One repository behind its mirrors: each request goes to the first that can answer it, the registry itself last.

What is fetched by digest is the same wherever it comes from. A tag is taken from the first that knows it, and from then
on everything is by digest. A mirror that fails is passed over from then on.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from containerkit.errors import (
    ContainerkitError,
    ContentMismatch,
    ImageError,
    RegistryError,
    SizeMismatch,
    UnexpectedResponse,
)
from containerkit.image.digest import Digest
from containerkit.image.stream import read_verified
from containerkit.registry import failures
from containerkit.registry.bodies import content_length, number
from containerkit.registry.ranges import open_blob
from containerkit.registry.repository import DOCUMENT_TYPES
from containerkit.registry.streams import PARTIAL_CONTENT, Download, end_of_range, starts_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO, Self, TypeVar

    from requests import Response

    from containerkit.image.model import Descriptor
    from containerkit.image.reference import Reference
    from containerkit.registry.mirrors import Endpoint
    from containerkit.registry.repository import Repository

    T = TypeVar("T")

SMALL = 2 << 20  # bytes


class Mirrored:
    """A :class:`~containerkit.image.transfer.Remote` of several; threads may share it.

    ``failures`` has what went wrong at mirrors, in words; ``report`` is told which one is given up, and why. ``target``
    is the tag that the registry itself is asked for, where the configuration puts another in place of the one meant.
    """

    def __init__(
        self,
        mirrors: Sequence[tuple[Endpoint, Repository]],
        origin: Repository,
        report: Callable[[Endpoint, str], None] | None = None,
        target: str = "",
    ) -> None:
        self.origin = origin
        self._report = report
        self._all = [repository for _, repository in mirrors]
        self.failures: list[str] = []
        self._targets = {repository: endpoint.target for endpoint, repository in mirrors} | {origin: target}
        self._gave: dict[Digest, set[Repository]] = {}  # the mirrors that the bytes of a blob came from
        self._mirrors = list(mirrors)

    @property
    def registry(self) -> str:
        """The registry that is meant."""
        return self.origin.registry

    @property
    def name(self) -> str:
        """The repository's name at the registry."""
        return self.origin.name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every idle connection."""
        for repository in self._all:
            repository.close()
        self.origin.close()

    def approve(self, reference: Reference, digest: Digest) -> None:
        """As :meth:`Repository.approve`; signatures are the registry's own."""
        self.origin.approve(reference, digest)

    def tags(self) -> list[str]:
        """As :meth:`Repository.tags`, of the registry itself."""
        return self.origin.tags()

    def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """As :meth:`Repository.resolve`, of the first that knows the tag or digest."""
        return self._first(
            lambda repository: repository.resolve(self._at(reference, repository)), reference.digest is not None
        )

    def manifest(self, descriptor: Descriptor) -> bytes:
        """As :meth:`Repository.manifest`."""
        return self._first(lambda repository: repository.manifest(descriptor), pinned=True)

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """As :meth:`Repository.open`; where a mirror breaks off in the middle, the next goes on from there.

        What is small is verified before its first byte is given, and fetched from the next one where it is wrong. For
        the rest there is :meth:`discredit`.
        """
        if descriptor.media_type in DOCUMENT_TYPES:
            return io.BytesIO(self.manifest(descriptor))
        if descriptor.size > SMALL:
            return self.open_at(descriptor, 0)
        while True:
            try:
                with self.open_at(descriptor, 0) as stream:
                    return io.BytesIO(read_verified(stream, descriptor, SMALL))
            except ContentMismatch:
                if not self.discredit(descriptor):
                    raise

    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        """As :meth:`Repository.open_at`."""
        gave: set[Repository] = set()
        self._gave[descriptor.digest] = gave

        def part(start: int, end: int | None) -> Download:
            subject = f"blob {self.registry}/{self.name}@{descriptor.digest}"
            return Download(descriptor, self._fetcher(descriptor, gave), subject, offset=start, end=end)

        return open_blob(descriptor, part, self.origin.transport.lanes, offset)

    def discredit(self, descriptor: Descriptor) -> bool:
        """After content that was wrong: whether a mirror gave any of it. It is asked no more; opening again helps."""
        gave = self._gave.pop(descriptor.digest, set())
        for repository in gave:
            self._drop(repository, f"gave something else for {descriptor.digest}")
        return bool(gave)

    def _fetcher(self, descriptor: Descriptor, gave: set[Repository]) -> Callable[[int, int], Response]:
        """What fetches one part of a blob; the mirrors that gave some of it are added to ``gave``."""
        tried: list[Repository] = []
        due = 0  # where the answer of the last one should end

        def ask(repository: Repository, at: int, length: int) -> Response:
            nonlocal due
            response = repository.fetch(descriptor, at, length)
            due = end_of_range(response, descriptor.size)
            if response.status_code == PARTIAL_CONTENT and not (starts_at(response, at) and due > at):
                response.close()
                message = f"{repository.transport.root} gives another part of {descriptor.digest} than asked for"
                raise UnexpectedResponse(message, url=failures.public(response.url), status=PARTIAL_CONTENT)
            if _other_length(response, descriptor.size):
                response.close()
                message = f"{repository.transport.root} has {descriptor.digest} in another size"
                raise SizeMismatch(message, expected=descriptor.size)
            tried[:] = [repository]
            if repository is not self.origin:
                gave.add(repository)
            return response

        def fetch(at: int, length: int) -> Response:
            if tried and at < due:  # being asked again too early, it has broken off or fallen silent
                self._drop(tried.pop(), f"broke off at byte {at} of {descriptor.digest}")
            return self._first(lambda repository: ask(repository, at, length), pinned=True)

        return fetch

    def has(self, descriptor: Descriptor) -> bool:
        """Whether the registry itself has the content."""
        return self.origin.has(descriptor)

    def put(self, descriptor: Descriptor, stream: BinaryIO) -> None:
        """Send content to the registry itself."""
        self.origin.put(descriptor, stream)

    def put_manifest(self, reference: Reference, media_type: str, body: bytes) -> Digest:
        """Store a manifest at the registry itself."""
        return self.origin.put_manifest(reference, media_type, body)

    def _first(self, ask: Callable[[Repository], T], pinned: bool) -> T:
        noted: list[str] = []
        for endpoint, repository in self._usable(pinned=pinned):
            try:
                return ask(repository)
            except (RegistryError, ImageError) as error:
                noted.append(f"{endpoint.host}: {error}")
                if isinstance(error, LookupError):  # it has not got this; it may have other things
                    self.failures.append(noted[-1])
                else:
                    self._drop(repository, str(error))
        try:
            return ask(self.origin)
        except ContainerkitError as error:
            for note in noted:
                error.add_note(f"before that, at a mirror: {note}")
            raise

    def _drop(self, repository: Repository, why: str) -> None:
        """Ask a mirror no more. The registry itself is never given up."""
        for endpoint, mirror in self._mirrors:
            if mirror is repository:
                self.failures.append(f"{endpoint.host}: {why}")
                if self._report is not None:
                    self._report(endpoint, why)
        self._mirrors = [pair for pair in self._mirrors if pair[1] is not repository]

    def _at(self, reference: Reference, repository: Repository) -> Reference:
        """The same tag or digest, under the names that repository and tag have there."""
        there = reference._replace(registry=repository.registry, repository=repository.name)
        other = self._targets[repository]
        if not other or reference.digest is not None:
            return there
        return there._replace(tag="", digest=Digest(other)) if ":" in other else there._replace(tag=other)

    def _usable(self, *, pinned: bool) -> Iterator[tuple[Endpoint, Repository]]:
        for endpoint, repository in tuple(self._mirrors):
            if pinned or not endpoint.by_digest_only:
                yield endpoint, repository


def _other_length(response: Response, size: int) -> bool:
    """Whether a mirror declares another length for a blob of ``size`` bytes."""
    if response.status_code == PARTIAL_CONTENT:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return number(total) not in (None, size)
    return content_length(response) not in (None, size)
