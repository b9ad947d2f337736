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
     │    ├── ImageNotFound (LookupError)
     │    ├── AmbiguousImage (LookupError)        a prefix or archive names several
     │    ├── BlobNotFound (LookupError)
     │    ├── ImageInUse
     │    ├── PlatformMismatch
     │    ├── ContentMismatch (ValueError)        content differs from its descriptor
     │    │    ├── DigestMismatch
     │    │    └── SizeMismatch
     │    ├── LayerError (ValueError)             names the entry
     │    │    ├── CorruptLayer                   truncated or not a tar
     │    │    └── UnsafeEntry                    an entry that would leave the root
     │    └── InvalidArchive (ValueError)
     ├── RegistryError                            url, status, code, retryable
     │    ├── RegistryUnavailable (ConnectionError)   nobody answers there, or only with a 5xx
     │    ├── RegistryDisconnected (ConnectionError)  the connection broke in the middle
     │    ├── RegistryTimeout (TimeoutError)
     │    ├── RegistryUnauthorized (PermissionError)
     │    ├── RegistryNotFound (LookupError)
     │    │    ├── ManifestUnknown (ImageNotFound)
     │    │    └── BlobUnknown (BlobNotFound)
     │    ├── RegistryRejected                    understood and refused: any other 4xx
     │    └── UnexpectedResponse                  not what the protocol says
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


class ImageNotFound(ImageError, LookupError):
    """No image of that name or id."""


class AmbiguousImage(ImageError, LookupError):
    """A prefix or an archive that stands for several images: say which."""


class BlobNotFound(ImageError, LookupError):
    """A descriptor whose content is not there."""


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
    """A layer that cannot be unpacked; ``entry`` names the tar entry."""

    def __init__(self, message: str, *, entry: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.entry = entry


class CorruptLayer(LayerError):
    """Truncated, damaged or not a tar."""


class UnsafeEntry(LayerError):
    """An entry that would reach outside the root."""


class InvalidArchive(ImageError, ValueError):
    """Neither an OCI layout nor a docker archive, or a damaged one."""


class RegistryError(ContainerkitError):
    """A registry did not do what was asked.

    ``url`` carries no user name, password or query. ``status`` is the HTTP status, 0 where none came; ``code`` the
    Distribution protocol's error code (``MANIFEST_INVALID``), or empty. ``retryable`` says whether trying again may
    help.
    """

    retryable = False

    def __init__(self, message: str, *, url: str = "", status: int = 0, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.url = url
        self.status = status
        self.code = code


class RegistryUnavailable(RegistryError, ConnectionError):
    """Nobody answers there (``status`` 0), or the server is failing (a 5xx)."""

    retryable = True


class RegistryDisconnected(RegistryError, ConnectionError):
    """The connection broke before the whole body came."""

    retryable = True


class RegistryTimeout(RegistryError, TimeoutError):
    """The registry did not answer in time."""

    retryable = True


class RegistryUnauthorized(RegistryError, PermissionError):
    """401 or 403."""


class RegistryNotFound(RegistryError, LookupError):
    """404: no such repository, tag, manifest or blob."""


class ManifestUnknown(RegistryNotFound, ImageNotFound):
    """The registry has no such tag or manifest."""


class BlobUnknown(RegistryNotFound, BlobNotFound):
    """The repository has no such blob."""


class RegistryRejected(RegistryError):
    """The registry understood and refused: a 4xx, with its reason in ``code``."""


class UnexpectedResponse(RegistryError):
    """An answer that is not what the Distribution protocol says."""


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
