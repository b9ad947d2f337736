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
     │    ├── DaemonUnavailable (ConnectionError) no Docker Engine answers
     │    ├── DaemonFailed                        the Docker Engine refuses, or does not take an image
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
     │    │    ├── ImageTooLarge                  all layers, their number, archive members, nested indexes
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

Each module loads when one of its classes is first asked for: the helper processes need only the first.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost every helper process 0.8 MB
if TYPE_CHECKING:
    from containerkit.errors.base import ContainerkitError as ContainerkitError
    from containerkit.errors.base import KernelError as KernelError
    from containerkit.errors.base import StateError as StateError
    from containerkit.errors.base import Unsupported as Unsupported
    from containerkit.errors.container import AmbiguousContainer as AmbiguousContainer
    from containerkit.errors.container import CommandNotExecutable as CommandNotExecutable
    from containerkit.errors.container import CommandNotFound as CommandNotFound
    from containerkit.errors.container import ContainerError as ContainerError
    from containerkit.errors.container import ContainerNotFound as ContainerNotFound
    from containerkit.errors.container import ContainerNotRunning as ContainerNotRunning
    from containerkit.errors.container import ContainerRunning as ContainerRunning
    from containerkit.errors.container import InvalidOption as InvalidOption
    from containerkit.errors.container import InvalidState as InvalidState
    from containerkit.errors.container import InvalidWorkdir as InvalidWorkdir
    from containerkit.errors.container import LauncherLost as LauncherLost
    from containerkit.errors.container import NameInUse as NameInUse
    from containerkit.errors.container import ProcessError as ProcessError
    from containerkit.errors.container import ProcessFailed as ProcessFailed
    from containerkit.errors.container import ProcessTimeout as ProcessTimeout
    from containerkit.errors.container import StartError as StartError
    from containerkit.errors.container import UserNotFound as UserNotFound
    from containerkit.errors.image import AmbiguousImage as AmbiguousImage
    from containerkit.errors.image import BlobNotFound as BlobNotFound
    from containerkit.errors.image import CompressionBomb as CompressionBomb
    from containerkit.errors.image import ContentMismatch as ContentMismatch
    from containerkit.errors.image import CorruptLayer as CorruptLayer
    from containerkit.errors.image import DaemonFailed as DaemonFailed
    from containerkit.errors.image import DaemonUnavailable as DaemonUnavailable
    from containerkit.errors.image import DigestMismatch as DigestMismatch
    from containerkit.errors.image import DocumentTooLarge as DocumentTooLarge
    from containerkit.errors.image import FileTooLarge as FileTooLarge
    from containerkit.errors.image import ImageError as ImageError
    from containerkit.errors.image import ImageInUse as ImageInUse
    from containerkit.errors.image import ImageNotFound as ImageNotFound
    from containerkit.errors.image import ImageTooLarge as ImageTooLarge
    from containerkit.errors.image import InvalidArchive as InvalidArchive
    from containerkit.errors.image import InvalidDigest as InvalidDigest
    from containerkit.errors.image import InvalidImage as InvalidImage
    from containerkit.errors.image import InvalidPlatform as InvalidPlatform
    from containerkit.errors.image import InvalidReference as InvalidReference
    from containerkit.errors.image import LayerError as LayerError
    from containerkit.errors.image import LayerTooLarge as LayerTooLarge
    from containerkit.errors.image import LimitExceeded as LimitExceeded
    from containerkit.errors.image import NotAnImage as NotAnImage
    from containerkit.errors.image import NotConformant as NotConformant
    from containerkit.errors.image import PathNotInImage as PathNotInImage
    from containerkit.errors.image import PathTooLong as PathTooLong
    from containerkit.errors.image import PlatformMismatch as PlatformMismatch
    from containerkit.errors.image import SizeMismatch as SizeMismatch
    from containerkit.errors.image import TooManyEntries as TooManyEntries
    from containerkit.errors.image import UnsafeEntry as UnsafeEntry
    from containerkit.errors.image import UnsupportedMediaType as UnsupportedMediaType
    from containerkit.errors.registry import BlobUnknown as BlobUnknown
    from containerkit.errors.registry import CertificateRejected as CertificateRejected
    from containerkit.errors.registry import CredentialsError as CredentialsError
    from containerkit.errors.registry import InvalidKey as InvalidKey
    from containerkit.errors.registry import ManifestUnknown as ManifestUnknown
    from containerkit.errors.registry import PolicyRefused as PolicyRefused
    from containerkit.errors.registry import RateLimited as RateLimited
    from containerkit.errors.registry import RedirectRefused as RedirectRefused
    from containerkit.errors.registry import RegistryBlocked as RegistryBlocked
    from containerkit.errors.registry import RegistryConfigError as RegistryConfigError
    from containerkit.errors.registry import RegistryDisconnected as RegistryDisconnected
    from containerkit.errors.registry import RegistryError as RegistryError
    from containerkit.errors.registry import RegistryNotFound as RegistryNotFound
    from containerkit.errors.registry import RegistryRejected as RegistryRejected
    from containerkit.errors.registry import RegistryTimeout as RegistryTimeout
    from containerkit.errors.registry import RegistryUnauthorized as RegistryUnauthorized
    from containerkit.errors.registry import RegistryUnavailable as RegistryUnavailable
    from containerkit.errors.registry import RegistryWarning as RegistryWarning
    from containerkit.errors.registry import SignatureInvalid as SignatureInvalid
    from containerkit.errors.registry import SignatureMissing as SignatureMissing
    from containerkit.errors.registry import TlsFailed as TlsFailed
    from containerkit.errors.registry import TokenError as TokenError
    from containerkit.errors.registry import TokenRejected as TokenRejected
    from containerkit.errors.registry import UnexpectedResponse as UnexpectedResponse

_NAMES = {
    "base": (
        "ContainerkitError",
        "KernelError",
        "StateError",
        "Unsupported",
    ),
    "container": (
        "AmbiguousContainer",
        "CommandNotExecutable",
        "CommandNotFound",
        "ContainerError",
        "ContainerNotFound",
        "ContainerNotRunning",
        "ContainerRunning",
        "InvalidOption",
        "InvalidState",
        "InvalidWorkdir",
        "LauncherLost",
        "NameInUse",
        "ProcessError",
        "ProcessFailed",
        "ProcessTimeout",
        "StartError",
        "UserNotFound",
    ),
    "image": (
        "AmbiguousImage",
        "BlobNotFound",
        "CompressionBomb",
        "ContentMismatch",
        "CorruptLayer",
        "DigestMismatch",
        "DocumentTooLarge",
        "FileTooLarge",
        "ImageError",
        "ImageInUse",
        "ImageNotFound",
        "ImageTooLarge",
        "InvalidArchive",
        "InvalidDigest",
        "InvalidImage",
        "InvalidPlatform",
        "InvalidReference",
        "LayerError",
        "LayerTooLarge",
        "LimitExceeded",
        "NotAnImage",
        "NotConformant",
        "DaemonFailed",
        "DaemonUnavailable",
        "PathNotInImage",
        "PathTooLong",
        "PlatformMismatch",
        "SizeMismatch",
        "TooManyEntries",
        "UnsafeEntry",
        "UnsupportedMediaType",
    ),
    "registry": (
        "BlobUnknown",
        "CertificateRejected",
        "CredentialsError",
        "InvalidKey",
        "ManifestUnknown",
        "PolicyRefused",
        "RateLimited",
        "RedirectRefused",
        "RegistryBlocked",
        "RegistryConfigError",
        "RegistryDisconnected",
        "RegistryError",
        "RegistryNotFound",
        "RegistryRejected",
        "RegistryTimeout",
        "RegistryUnauthorized",
        "RegistryUnavailable",
        "RegistryWarning",
        "SignatureInvalid",
        "SignatureMissing",
        "TlsFailed",
        "TokenError",
        "TokenRejected",
        "UnexpectedResponse",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605 - strings, all of them


def __getattr__(name: str) -> type[Exception]:
    """Load a class on first use."""
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: type[Exception] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
