"""Every exception that containerkit raises, as one tree.

::

    ContainerkitError
     ├── Unsupported                    the host cannot do it; says why and what would help
     ├── StateError                     the state root is damaged or not usable
     ├── KernelError (OSError)          a system call failed: operation, errno, path, hint
     ├── ImageError
     │    ├── InvalidReference (ValueError)
     │    ├── InvalidDigest (ValueError)
     │    ├── InvalidImage (ValueError)           a manifest, index or config that does not parse or does not fit
     │    │    └── UnsupportedMediaType
     │    │         └── NotAnImage                an artifact: can be copied, not unpacked or run
     │    ├── InvalidPlatform (ValueError)
     │    ├── ImageNotFound (LookupError)
     │    ├── AmbiguousImage (LookupError)        a prefix or archive names several
     │    ├── BlobNotFound (LookupError)
     │    ├── PathNotInImage (FileNotFoundError)  no such file in the image, or nothing that can be read
     │    ├── ImageInUse
     │    ├── PlatformMismatch
     │    ├── ContentMismatch (ValueError)        content differs from its descriptor
     │    │    ├── DigestMismatch
     │    │    └── SizeMismatch
     │    ├── LayerError (ValueError)             names the entry
     │    │    ├── CorruptLayer                   truncated or not a tar
     │    │    └── UnsafeEntry                    an entry that would leave the root
     │    ├── LimitExceeded (ValueError)          beyond a stated limit: limit, allowed, found
     │    │    ├── DocumentTooLarge (SizeMismatch)  a manifest, index or config
     │    │    ├── ImageTooLarge                  all layers together, their number, indexes in indexes
     │    │    └── LayerTooLarge (LayerError)
     │    │         ├── TooManyEntries
     │    │         ├── PathTooLong
     │    │         ├── FileTooLarge
     │    │         └── CompressionBomb
     │    ├── InvalidArchive (ValueError)
     │    └── NotConformant (AssertionError)      a storage driver does not show what the layers say
     ├── RegistryError                            url, status, code, retryable
     │    ├── RegistryUnavailable (ConnectionError)   nobody answers there, or only with a 5xx
     │    │    └── TlsFailed                          no agreement on TLS: http on a TLS port, or the reverse
     │    │         └── CertificateRejected           not trusted, expired, or of another host
     │    ├── RegistryDisconnected (ConnectionError)  the connection broke in the middle
     │    ├── RegistryTimeout (TimeoutError)
     │    ├── RegistryUnauthorized (PermissionError)
     │    │    └── TokenRejected                      the registry refuses a token that its service has just given
     │    ├── RegistryNotFound (LookupError)
     │    │    ├── ManifestUnknown (ImageNotFound)
     │    │    └── BlobUnknown (BlobNotFound)
     │    ├── RegistryRejected                    understood and refused: any other 4xx
     │    │    └── RateLimited                        429: too many requests
     │    ├── CredentialsError (ValueError)       a file or helper that should give credentials, and cannot
     │    ├── TokenError (PermissionError)        the token service refuses, or gives no token
     │    ├── RegistryConfigError (ValueError)    certs.d, registries.conf, hosts.toml or daemon.json that does not fit
     │    ├── RegistryBlocked (PermissionError)   the configuration says: never from there
     │    ├── InvalidKey (ValueError)             a key for signatures that cannot be read, or is of another kind
     │    ├── PolicyRefused (PermissionError)     the policy forbids to pull it
     │    │    ├── SignatureMissing
     │    │    └── SignatureInvalid
     │    └── UnexpectedResponse                  not what the protocol says
     │         └── RedirectRefused                    a redirect without end, to nowhere, or away from TLS
     ├── ContainerError
     │    ├── InvalidOption (ValueError)
     │    ├── ContainerNotFound (LookupError)
     │    ├── AmbiguousContainer (LookupError)
     │    ├── NameInUse
     │    ├── InvalidState                        the verb does not fit the state the container is in
     │    │    ├── ContainerNotRunning
     │    │    └── ContainerRunning
     │    └── StartError                          the container or process did not come to its exec
     │         ├── CommandNotFound (FileNotFoundError)       Docker's exit code 127
     │         ├── CommandNotExecutable (PermissionError)    Docker's exit code 126
     │         ├── InvalidWorkdir (NotADirectoryError)
     │         └── UserNotFound (LookupError)
     └── ProcessError
          ├── ProcessFailed                       check=True and the exit code is not 0
          ├── ProcessTimeout (TimeoutError)       killed at its timeout; carries the output so far
          └── LauncherLost (ConnectionError)      the helper process is gone

A builtin parent is named in brackets: ``except LookupError`` catches ``ImageNotFound``.
"""

from __future__ import annotations

import os


class ContainerkitError(Exception):
    """The root of the tree. ``hint`` is one sentence on what would help, or empty."""

    hint: str = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        if hint:
            self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Unsupported(ContainerkitError):
    """This host cannot do what was asked. Nothing was dropped in silence: nothing was done."""

    def __init__(self, reason: str, *, remedy: str = "") -> None:
        super().__init__(reason, hint=remedy)
        self.reason = reason
        self.remedy = remedy


class StateError(ContainerkitError):
    """The state root cannot be used: not writable, of a newer version, or damaged."""


class KernelError(ContainerkitError, OSError):
    """A system call failed. Carries ``operation``, ``errno``, ``path`` and a hint."""

    def __init__(self, operation: str, errno: int, path: str = "", *, hint: str = "") -> None:
        where = f" {path}" if path else ""
        ContainerkitError.__init__(self, f"{operation}{where}: {os.strerror(errno)}", hint=hint)
        self.operation = operation
        self.errno = errno
        self.path = path


class ImageError(ContainerkitError):
    """Something about an image, its content or its name."""


class InvalidReference(ImageError, ValueError):
    """Not a valid image reference."""


class InvalidDigest(ImageError, ValueError):
    """Not a valid ``algorithm:hex`` digest."""


class InvalidImage(ImageError, ValueError):
    """A manifest, index or config that does not parse, or whose parts do not fit each other."""


class UnsupportedMediaType(InvalidImage):
    """A document or layer of a type that containerkit does not know, named in ``media_type``."""

    def __init__(self, message: str, *, media_type: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.media_type = media_type


class NotAnImage(UnsupportedMediaType):
    """An OCI artifact (a chart, a signature, an attestation): it can be copied, not unpacked or run."""


class InvalidPlatform(ImageError, ValueError):
    """Not a platform such as ``linux/arm64/v8``."""


class ImageNotFound(ImageError, LookupError):
    """No image of that name or id."""


class AmbiguousImage(ImageError, LookupError):
    """A prefix or an archive that stands for several images: say which."""


class BlobNotFound(ImageError, LookupError):
    """A descriptor whose content is not there."""


class PathNotInImage(ImageError, FileNotFoundError):
    """No file of that path in an image, or one that has no content; ``path`` names it."""

    def __init__(self, message: str, *, path: str = "") -> None:
        ImageError.__init__(self, message)
        self.path = path
        self.filename = path


class ImageInUse(ImageError):
    """A container still needs this image."""


class PlatformMismatch(ImageError):
    """No image for the wanted platform."""


class ContentMismatch(ImageError, ValueError):
    """Content that differs from its descriptor."""


class DigestMismatch(ContentMismatch):
    """The content hashes to another digest."""

    def __init__(self, message: str, *, expected: str = "", actual: str = "") -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class SizeMismatch(ContentMismatch):
    """The content is shorter or longer than its descriptor says (bytes)."""

    def __init__(self, message: str, *, expected: int = -1, actual: int = -1) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class LayerError(ImageError, ValueError):
    """A layer that cannot be unpacked; ``entry`` names the tar entry and ``layer`` the layer's digest, where known."""

    def __init__(self, message: str, *, entry: str = "", layer: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.entry = entry
        self.layer = layer

    def __str__(self) -> str:
        text = self.message
        if self.entry and repr(self.entry) not in text:
            text += f", at entry {self.entry!r}"
        if self.layer and self.layer not in text:
            text += f", in layer {self.layer}"
        return f"{text} ({self.hint})" if self.hint else text


class CorruptLayer(LayerError):
    """Truncated, damaged or not a tar."""


class UnsafeEntry(LayerError):
    """An entry that would reach outside the root."""


class LimitExceeded(ImageError, ValueError):
    """An image that asks for more than it may (:class:`~containerkit.image.limits.ImageLimits`).

    ``limit`` is the name of the limit, ``allowed`` what it is and ``found`` what the image has, or has so far.
    """

    def __init__(self, message: str, *, limit: str, allowed: int, found: int, hint: str = "") -> None:
        ContainerkitError.__init__(self, message, hint=hint)
        self.limit, self.allowed, self.found = limit, allowed, found
        self.expected, self.actual = allowed, found


class DocumentTooLarge(LimitExceeded, SizeMismatch):
    """A manifest, index or config of too many bytes."""


class ImageTooLarge(LimitExceeded):
    """Too many bytes in all layers together, too many layers, or too many indexes within indexes."""


class LayerTooLarge(LimitExceeded, LayerError):
    """A layer beyond a limit; ``entry`` names the tar entry."""

    def __init__(
        self, message: str, *, limit: str, allowed: int, found: int, entry: str = "", layer: str = "", hint: str = ""
    ) -> None:
        LimitExceeded.__init__(self, message, limit=limit, allowed=allowed, found=found, hint=hint)
        self.entry, self.layer = entry, layer


class TooManyEntries(LayerTooLarge):
    """More tar headers than a layer may have."""


class PathTooLong(LayerTooLarge):
    """A path of too many bytes or components, or a link's target of too many bytes."""


class FileTooLarge(LayerTooLarge):
    """A file that declares too many bytes, headers of too many, or a sparse file of too many parts."""


class CompressionBomb(LayerTooLarge):
    """Compressed data that becomes too many times its own size."""


class InvalidArchive(ImageError, ValueError):
    """Neither an OCI layout nor a docker archive, or a damaged one."""


class NotConformant(ImageError, AssertionError):
    """A storage driver shows something else than the layers say; ``path`` is the first one that differs."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


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
    """A file or a helper program that should give credentials, and cannot."""


class TokenError(RegistryError, PermissionError):
    """The token service that the registry names refuses, or answers with something else than a token."""


class RegistryConfigError(RegistryError, ValueError):
    """A configuration of registries (certificates, mirrors) that does not parse or does not fit."""


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
    """A redirect that is not followed: without end, to nowhere, or from https to http."""


class ContainerError(ContainerkitError):
    """Something about a container."""


class InvalidOption(ContainerError, ValueError):
    """An option with a value that cannot be meant; the message names the option."""


class ContainerNotFound(ContainerError, LookupError):
    """No container of that name or id."""


class AmbiguousContainer(ContainerError, LookupError):
    """An id prefix that several containers share."""


class NameInUse(ContainerError):
    """Another container has this name."""


class InvalidState(ContainerError):
    """The verb does not fit the state that the container is in."""


class ContainerNotRunning(InvalidState):
    """It has not been started, or is over."""


class ContainerRunning(InvalidState):
    """It is running, and the verb needs it stopped."""


class StartError(ContainerError):
    """A container or process did not come to its exec.

    ``operation`` is the plan's step that failed, ``errno`` and ``path`` the kernel's answer,
    ``exit_code`` what Docker would have reported.
    """

    exit_code = 125

    def __init__(self, message: str, *, operation: str = "", errno: int = 0, path: str = "", hint: str = "") -> None:
        ContainerError.__init__(self, message, hint=hint)
        self.operation = operation
        self.errno: int | None = errno
        self.path = path


class CommandNotFound(StartError, FileNotFoundError):
    """The command is not there."""

    exit_code = 127


class CommandNotExecutable(StartError, PermissionError):
    """The command is there and cannot be executed."""

    exit_code = 126


class InvalidWorkdir(StartError, NotADirectoryError):
    """The working directory cannot be entered."""

    exit_code = 126


class UserNotFound(StartError, LookupError):
    """The user or group is not in the container's passwd or group file."""

    exit_code = 126


class ProcessError(ContainerkitError):
    """Something about a process in a container."""


class ProcessFailed(ProcessError):
    """``check=True`` and the process did not exit with 0. ``completed`` holds the exit code and output."""

    def __init__(self, message: str, *, exit_code: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class ProcessTimeout(ProcessError, TimeoutError):
    """The process was killed, with all its children, at its timeout (seconds)."""

    def __init__(self, message: str, *, timeout: float, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.timeout = timeout
        self.stdout = stdout
        self.stderr = stderr


class LauncherLost(ProcessError, ConnectionError):
    """The helper process that starts containers is gone."""
