"""One repository behind its mirrors: each request goes to the first that can answer it, the registry itself last.

What is fetched by digest is the same wherever it comes from. A tag is taken from the first that knows it, and from then
on everything is by digest. A mirror that fails is passed over from then on.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from containerkit.errors import DigestMismatch, ImageError, RegistryError, SizeMismatch
from containerkit.registry.bodies import content_length
from containerkit.registry.repository import DOCUMENT_TYPES
from containerkit.registry.streams import PARTIAL_CONTENT, Download, end_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO, Self, TypeVar

    from requests import Response

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor
    from containerkit.image.reference import Reference
    from containerkit.registry.mirrors import Endpoint
    from containerkit.registry.repository import Repository

    T = TypeVar("T")


class Mirrored:
    """A :class:`~containerkit.image.transfer.Remote` of several; threads may share it.

    ``failures`` has what went wrong at mirrors, in words; ``report`` is told which one is given up.
    """

    def __init__(
        self,
        mirrors: Sequence[tuple[Endpoint, Repository]],
        origin: Repository,
        report: Callable[[Endpoint], None] | None = None,
    ) -> None:
        self.origin = origin
        self._report = report
        self._all = [repository for _, repository in mirrors]
        self.failures: list[str] = []
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

    def resolve(self, reference: Reference) -> tuple[Descriptor, bytes]:
        """As :meth:`Repository.resolve`, of the first that knows the tag or digest."""
        return self._first(
            lambda repository: repository.resolve(_at(reference, repository)), reference.digest is not None
        )

    def manifest(self, descriptor: Descriptor) -> bytes:
        """As :meth:`Repository.manifest`."""
        return self._first(lambda repository: repository.manifest(descriptor), pinned=True)

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """As :meth:`Repository.open`; where a mirror breaks off in the middle, the next goes on from there."""
        if descriptor.media_type in DOCUMENT_TYPES:
            return io.BytesIO(self.manifest(descriptor))
        return self.open_at(descriptor, 0)

    def open_at(self, descriptor: Descriptor, offset: int) -> BinaryIO:
        """As :meth:`Repository.open_at`."""
        tried: list[Repository] = []
        due = 0  # where the answer of the last one should end

        def fetch(at: int, length: int) -> Response:
            if tried and at < due:  # being asked again too early, it has broken off or fallen silent
                self._drop(tried.pop(), f"broke off at byte {at} of {descriptor.digest}")

            def ask(repository: Repository) -> Response:
                nonlocal due
                response = repository.fetch(descriptor, at, length)
                due = end_of_range(response, descriptor.size)
                if _other_length(response, descriptor.size):
                    response.close()
                    message = f"{repository.transport.root} has {descriptor.digest} in another size"
                    raise SizeMismatch(message, expected=descriptor.size)
                tried[:] = [repository]
                return response

            return self._first(ask, pinned=True)

        subject = f"blob {self.registry}/{self.name}@{descriptor.digest}"
        return Download(descriptor, fetch, subject, offset=offset)  # type: ignore[return-value] # reads like a file

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
        for endpoint, repository in self._usable(pinned=pinned):
            try:
                return ask(repository)
            except (RegistryError, ImageError) as error:
                self.failures.append(f"{endpoint.host}: {error}")
                broken = not isinstance(error, LookupError) or isinstance(error, DigestMismatch)
                if broken:
                    self._drop(repository)
        return ask(self.origin)

    def _drop(self, repository: Repository, why: str = "") -> None:
        """Ask a mirror no more. The registry itself is never given up."""
        for endpoint, mirror in self._mirrors:
            if mirror is repository:
                if why:
                    self.failures.append(f"{endpoint.host}: {why}")
                if self._report is not None:
                    self._report(endpoint)
        self._mirrors = [pair for pair in self._mirrors if pair[1] is not repository]

    def _usable(self, *, pinned: bool) -> Iterator[tuple[Endpoint, Repository]]:
        for endpoint, repository in tuple(self._mirrors):
            if pinned or not endpoint.by_digest_only:
                yield endpoint, repository


def _at(reference: Reference, repository: Repository) -> Reference:
    """The same tag or digest, under the name that the repository has there."""
    return reference._replace(registry=repository.registry, repository=repository.name)


def _other_length(response: Response, size: int) -> bool:
    """Whether a mirror declares another length for a blob of ``size`` bytes."""
    if response.status_code == PARTIAL_CONTENT:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        return total.isdigit() and int(total) != size
    return content_length(response) not in (None, size)
