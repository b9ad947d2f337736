"""Our own errors as answers: the status and the protocol's code for each."""

from __future__ import annotations

import math

from containerkit.errors import (
    BlobUnknown,
    ContainerkitError,
    ContentMismatch,
    InvalidImage,
    InvalidReference,
    ManifestUnknown,
    RegistryError,
    RegistryNotFound,
    RegistryUnauthorized,
)
from containerkit.registry.server.frame import Refusal

PASSED_ON = (409, 429)
LONGEST_WAIT = 24 * 3600.0  # seconds that a client is told to wait at most


class MissingPart(InvalidImage):
    """A manifest that names a blob or manifest that is not there."""


def refusal(error: ContainerkitError) -> Refusal:
    """The answer that tells of ``error``."""
    status, code = _answer(error)
    wait = math.ceil(min(error.retry_after, LONGEST_WAIT)) if isinstance(error, RegistryError) else 0
    return Refusal(status, code, error.message, **({"Retry_After": str(wait)} if wait else {}))


def _answer(error: ContainerkitError) -> tuple[int, str]:
    code = error.code if isinstance(error, RegistryError) else ""
    if isinstance(error, RegistryNotFound):
        kinds = ((BlobUnknown, "BLOB_UNKNOWN"), (ManifestUnknown, "MANIFEST_UNKNOWN"))
        return 404, code or next((name for kind, name in kinds if isinstance(error, kind)), "NAME_UNKNOWN")
    if isinstance(error, RegistryUnauthorized):  # the upstream's: this server's clients cannot answer its challenge
        return 403, "DENIED"
    if isinstance(error, RegistryError):
        return (error.status, code or "TOOMANYREQUESTS") if error.status in PASSED_ON else (502, "UNKNOWN")
    table = (
        (ContentMismatch, 400, "DIGEST_INVALID"),
        (MissingPart, 400, "MANIFEST_BLOB_UNKNOWN"),
        (InvalidImage, 400, "MANIFEST_INVALID"),
        (InvalidReference, 400, "NAME_INVALID"),
    )
    return next(((status, name) for kind, status, name in table if isinstance(error, kind)), (500, "UNKNOWN"))
