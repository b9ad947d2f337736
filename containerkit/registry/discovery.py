"""The rest of the protocol: what a registry has, who refers to what, and deletion.

Source: OCI distribution specification 1.1, "Content Discovery" and "Content Management".
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from containerkit.errors import (
    BlobUnknown,
    ContentMismatch,
    InvalidImage,
    ManifestUnknown,
    RegistryNotFound,
    RegistryRejected,
    UnexpectedResponse,
    Unsupported,
)
from containerkit.image.codec import LARGEST_DOCUMENT, encode, parse_descriptor, parse_json
from containerkit.image.model import OCI_INDEX
from containerkit.image.reference import Reference
from containerkit.registry import failures
from containerkit.registry.addresses import absolute, origin
from containerkit.registry.transport import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor
    from containerkit.registry.repository import Repository
    from containerkit.registry.transport import Answer, Transport

MOST_PAGES = 10_000
MOST_BYTES = 64 << 20  # of all pages together, with their addresses
PAGE = 1000
NEXT = re.compile(r'<([^<>]*)>\s*;[^,<]*\brel\s*=\s*"?next"?', re.IGNORECASE)


def tags(repository: Repository) -> list[str]:
    """Every tag of a repository, page by page, in the registry's order.

    Raises :class:`RegistryNotFound` where there is no such repository.
    """
    subject = f"tags of {repository.registry}/{repository.name}"
    return list(_pages(repository.transport, f"{repository.name}/tags/list?n={PAGE}", "tags", subject))


def catalog(transport: Transport) -> list[str]:
    """Every repository that the registry lists. Raises :class:`RegistryError`: many public ones do not list any."""
    subject = "catalog"
    return list(_pages(transport, f"_catalog?n={PAGE}", "repositories", subject, ("registry:catalog:*",)))


def delete_manifest(repository: Repository, target: str) -> None:
    """Delete a manifest by its digest, or a tag alone.

    Raises :class:`ManifestUnknown`, and :class:`Unsupported` where the registry does not delete.
    """
    _delete(repository, f"{repository.name}/manifests/{target}", f"{repository.name} {target}", ManifestUnknown)


def delete_blob(repository: Repository, digest: Digest) -> None:
    """Delete a blob. Raises :class:`BlobUnknown`, :class:`Unsupported`."""
    _delete(repository, f"{repository.name}/blobs/{digest}", f"{repository.name}@{digest}", BlobUnknown)


def referrers(repository: Repository, digest: Digest, artifact_type: str = "") -> tuple[Descriptor, ...]:
    """The manifests whose ``subject`` is ``digest``, of one ``artifact_type`` if wanted.

    A registry without the referrers API is asked for the tag ``ALGORITHM-HEX`` that stands in for it. Each descriptor's
    annotations hold those of its manifest; the artifact type is the descriptor's ``artifact_type``.
    """
    found = {each.digest: each for each in _referrers(repository, digest, artifact_type)}
    return tuple(each for each in found.values() if not artifact_type or each.artifact_type == artifact_type)


def knows_referrers(repository: Repository, digest: Digest) -> bool:
    """Whether the registry has the referrers API."""
    subject = f"referrers of {repository.registry}/{repository.name}@{digest}"
    request = Request("GET", f"{repository.name}/referrers/{digest}", subject, accept=(200, 400, 404, 405))
    return repository.transport.exchange(request, limit=LARGEST_DOCUMENT).status == 200  # noqa: PLR2004


def add_referrer(repository: Repository, subject: Digest, row: dict[str, Any]) -> None:
    """Enter a manifest in the tag that stands in for the referrers API; ``row`` is its descriptor as JSON."""
    rows = _stand_in_rows(repository, subject)
    if all(known.get("digest") != row["digest"] for known in rows):
        _put_stand_in(repository, subject, [*rows, row])


def remove_referrer(repository: Repository, subject: Digest, digest: Digest) -> None:
    """Take a manifest out of that tag, where it is there: for one that has been deleted."""
    rows = _stand_in_rows(repository, subject)
    left = [row for row in rows if row.get("digest") != digest]
    if left != rows:
        _put_stand_in(repository, subject, left)


def _stand_in_rows(repository: Repository, subject: Digest) -> list[dict[str, Any]]:
    try:
        _, body = repository.resolve(_stand_in(repository, subject))
    except ManifestUnknown:
        return []
    return [row.fields for row in parse_json(body, "referrers").children("manifests", needed=False)]


def _put_stand_in(repository: Repository, subject: Digest, rows: list[dict[str, Any]]) -> None:
    index = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": rows})
    repository.put_manifest(_stand_in(repository, subject), OCI_INDEX, index)


def _stand_in(repository: Repository, digest: Digest) -> Reference:
    """The "Referrers Tag Schema": the algorithm cut to 32 characters, the digits to 64."""
    return Reference(repository.registry, repository.name, f"{digest.algorithm[:32]}-{digest.hex[:64]}")


def _referrers(repository: Repository, digest: Digest, artifact_type: str) -> list[Descriptor]:
    subject = f"referrers of {repository.registry}/{repository.name}@{digest}"
    query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
    url = f"{repository.name}/referrers/{digest}{query}"
    try:
        answers = list(_answers(repository.transport, url, subject))
    except (RegistryNotFound, RegistryRejected):
        try:
            _, body = repository.resolve(_stand_in(repository, digest))
        except ManifestUnknown:
            return []
        return _descriptors(body)
    with _protocol(subject):
        return [descriptor for answer in answers for descriptor in _descriptors(answer.body)]


def _descriptors(body: bytes) -> list[Descriptor]:
    return [parse_descriptor(row) for row in parse_json(body, "referrers").children("manifests", needed=False)]


@contextmanager
def _protocol(subject: str) -> Iterator[None]:
    """What does not parse here is no image that is wrong, but an answer."""
    try:
        yield
    except (InvalidImage, ContentMismatch) as error:
        raise UnexpectedResponse(f"{subject}: {error.message}", hint="is this the address of a registry?") from error


def _pages(transport: Transport, url: str, key: str, subject: str, scopes: tuple[str, ...] = ()) -> Iterator[str]:
    for answer in _answers(transport, url, subject, scopes):
        with _protocol(subject):
            values = parse_json(answer.body, subject).texts(key)
        yield from values


def _answers(transport: Transport, url: str, subject: str, scopes: tuple[str, ...] = ()) -> Iterator[Answer]:
    """An answer, and those that its ``Link`` leads to (RFC 8288)."""
    seen, size = set(), 0
    for _ in range(MOST_PAGES):
        answer = transport.exchange(Request("GET", url, subject, scopes=scopes), limit=LARGEST_DOCUMENT)
        seen.add(answer.url)
        size += len(answer.body) + len(answer.url)
        if size > MOST_BYTES:
            message = f"{subject}: the pages are more than {MOST_BYTES} bytes"
            raise UnexpectedResponse(message, url=failures.public(answer.url), status=answer.status)
        yield answer
        link = NEXT.search(answer.headers.get("Link", ""))
        if link is None:
            return
        following = absolute(answer.url, link[1])
        if origin(following) != origin(answer.url) or following in seen:
            raise UnexpectedResponse(
                f"{subject}: the next page is elsewhere or has been seen", url=failures.public(following)
            )
        url = following
    raise UnexpectedResponse(f"{subject}: the pages do not end")


def _delete(repository: Repository, url: str, subject: str, missing: type[RegistryNotFound]) -> None:
    scope = f"repository:{repository.name}:delete"
    request = Request("DELETE", url, f"delete {subject}", accept=(200, 202, 204), missing=missing, scopes=(scope,))
    try:
        repository.transport.exchange(request)
    except RegistryRejected as error:
        no_tags = ":" not in url.rpartition("/")[2] and error.code == "DIGEST_INVALID"  # docker-registry 2's words
        if error.status == 405 or error.code == "UNSUPPORTED" or no_tags:  # noqa: PLR2004 - the protocol's numbers
            remedy = "a registry has to be configured to allow it (Docker's: storage.delete.enabled)"
            raise Unsupported(
                f"{repository.registry} does not delete {'tags' if no_tags else 'anything'}: {error.message}",
                remedy="delete the manifest by its digest" if no_tags else remedy,
            ) from error
        raise
