"""What goes wrong at registries."""

from __future__ import annotations

from containerkit.errors.base import ContainerkitError
from containerkit.errors.image import BlobNotFound, ImageNotFound


class RegistryError(ContainerkitError):
    """A registry did not do what was asked.

    ``url`` carries no user name, password or query. ``status`` is the HTTP status, 0 where none came; ``code`` the
    Distribution protocol's error code (``MANIFEST_INVALID``), or empty. ``retryable`` says whether trying again may
    help, ``retry_after`` how many seconds the server asks to wait before.
    """

    retryable = False
    retry_after = 0.0

    def __init__(self, message: str, *, url: str = "", status: int = 0, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.url = url
        self.status = status
        self.code = code


class RegistryWarning(UserWarning):
    """What a registry warns of (a ``Warning`` header): no error, unless Python's warning filters make it one."""


class RegistryUnavailable(RegistryError, ConnectionError):
    """Nobody answers there (``status`` 0), or the server is failing (a 5xx)."""

    retryable = True


class TlsFailed(RegistryUnavailable):
    """Client and server did not agree on TLS; one of them may not be speaking it at all."""

    retryable = False


class CertificateRejected(TlsFailed):
    """The server's certificate is not signed by anybody trusted, has expired, or is for another host."""


class RegistryDisconnected(RegistryError, ConnectionError):
    """The connection broke before the whole body came."""

    retryable = True


class RegistryTimeout(RegistryError, TimeoutError):
    """The registry did not answer in time."""

    retryable = True


class RegistryUnauthorized(RegistryError, PermissionError):
    """401 or 403."""


class TokenRejected(RegistryUnauthorized):
    """The registry refuses the token that its own token service has just given: expired, or for something else."""


class RegistryNotFound(RegistryError, LookupError):
    """404: no such repository, tag, manifest or blob."""


class ManifestUnknown(RegistryNotFound, ImageNotFound):
    """The registry has no such tag or manifest."""


class BlobUnknown(RegistryNotFound, BlobNotFound):
    """The repository has no such blob."""


class RegistryRejected(RegistryError):
    """The registry understood and refused: a 4xx, with its reason in ``code``."""


class RateLimited(RegistryRejected):
    """429: too many requests. ``retry_after`` says how long (seconds) the registry asks to wait, where it does."""

    retryable = True


class CredentialsError(RegistryError, ValueError):
    """A file or a helper program that should give credentials, and cannot; or credentials that no request can carry."""


class TokenError(RegistryError, PermissionError):
    """The token service that the registry names refuses, or answers with something else than a token."""


class RegistryConfigError(RegistryError, ValueError):
    """A configuration of registries (certificates, mirrors, proxies) that does not parse or does not fit."""


class RegistryBlocked(RegistryError, PermissionError):
    """The configuration of registries blocks this name."""


class InvalidKey(RegistryError, ValueError):
    """A key for signatures that cannot be read, or is of another kind."""


class PolicyRefused(RegistryError, PermissionError):
    """The policy forbids to pull this; nothing was unpacked."""


class SignatureMissing(PolicyRefused):
    """The image has no signature."""


class SignatureInvalid(PolicyRefused):
    """The image has signatures, and none of them holds."""


class UnexpectedResponse(RegistryError):
    """An answer that is not what the Distribution protocol says."""


class RedirectRefused(UnexpectedResponse):
    """A redirect that is not followed: without end, to nowhere, or from https to http, uploads too."""
