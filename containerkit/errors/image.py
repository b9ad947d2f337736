"""What goes wrong with images."""

from __future__ import annotations

from containerkit.errors.base import ContainerkitError


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


class DaemonUnavailable(ImageError, ConnectionError):
    """No Docker Engine answers where ``DOCKER_HOST`` says, or it broke off."""


class DaemonFailed(ImageError):
    """The Docker Engine refuses, or does not take an image; its reason is in the message."""


class PathNotInImage(ImageError, FileNotFoundError):
    """No file of that path in an image, or one that has no content; ``path`` names it."""

    def __init__(self, message: str, *, path: str = "") -> None:
        ImageError.__init__(self, message)
        self.path = path
        self.filename = path


class ImageInUse(ImageError):
    """A container still needs this image."""


class PlatformMismatch(ImageError):
    """No image for the wanted platform; ``available`` are the platforms that there are, as ``linux/arm64/v8``."""

    def __init__(self, message: str, *, available: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.available = available


class ContentMismatch(ImageError, ValueError):
    """Content that differs from its descriptor; ``layer`` is the digest of the layer that it is of, where known."""

    layer: str = ""


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
    """Too many bytes in all layers together; too many layers, archive members or images, indexes within indexes."""


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
