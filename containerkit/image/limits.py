"""How much an image may ask for: stated limits, each with its own error, checked before the harm is done.

The defaults let every image pass that real builders make, and stop what is made to fill a disk, a memory or a day.
Whoever knows better gives other ones: ``ImageLimits(entries=10_000)``, or ``STANDARD._replace(ratio=2000)``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import CompressionBomb, DocumentTooLarge, ImageTooLarge, LayerTooLarge

if TYPE_CHECKING:
    from containerkit.image.model import Descriptor

GIB = 1 << 30


class ImageLimits(NamedTuple):
    """What one image may ask for. Sizes in bytes.

    A breach raises :class:`~containerkit.errors.LimitExceeded`, whose ``limit`` is the name of the field here.
    """

    entries: int = 2_000_000  # tar headers of one layer, extended ones too
    depth: int = 512  # components of a path
    path: int = 4095  # length of a path, and of a link's target: the kernel's PATH_MAX
    metadata: int = 1 << 20  # extended headers of one entry, together
    xattrs: int = 64 << 20  # extended attributes of all directories of a layer: they are set last, and kept until then
    regions: int = 1 << 18  # parts of a sparse file
    kept: int = 128 << 20  # extended attributes and long paths of one image, together, while it is looked into
    file_size: int = 1024 * GIB  # of one file, holes included, as its header declares it
    layer_size: int = 256 * GIB  # of one layer: declared, as it travels, and as it really comes out
    image_size: int = 1024 * GIB  # of all layers of one image together, unpacked
    ratio: int = 200  # how many bytes may come out of one, once more than ratio_free came out
    ratio_free: int = GIB
    layers: int = 500  # the most that overlay puts together
    manifest: int = 4 << 20  # a manifest or an index: what registries allow
    config: int = 8 << 20
    index_depth: int = 4  # indexes within indexes
    index_reads: int = 64  # documents read in search of one platform's manifest
    members: int = 100_000  # of the tar of a whole archive, its extended headers too
    images: int = 1_000  # of a docker archive
    configs: int = 32 << 20  # of all of them together
    devices: bool = True  # whether a layer may have device nodes; False refuses them as UnsafeEntry


STANDARD = ImageLimits()
#: For what has been accepted already, and is read again.
UNLIMITED = ImageLimits._make((*[1 << 62] * (len(ImageLimits._fields) - 1), True))


def limits_of(source: object, layer: Descriptor, limits: ImageLimits) -> ImageLimits:
    """What ``layer`` of ``source`` may ask for.

    One that the source has ``accepted`` is no bomb, however well it was packed: a file may be one large hole.
    """
    accepted = layer.digest in getattr(source, "accepted", ())
    return limits._replace(ratio=UNLIMITED.ratio) if accepted else limits


class Meter:
    """Adds up what the layers of one image unpack to, from any thread."""

    def __init__(self, limits: ImageLimits = STANDARD) -> None:
        self.limits = limits
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def set(self, layer: str, size: int) -> None:
        """So far ``layer`` has come to ``size`` bytes. Raises :class:`ImageTooLarge`."""
        with self._lock:
            self._sizes[layer] = size
            total = sum(self._sizes.values())
        if total > self.limits.image_size:
            raise ImageTooLarge(
                f"the image unpacks to more than {self.limits.image_size} bytes",
                limit="image_size",
                allowed=self.limits.image_size,
                found=total,
            )


def check_layer_size(found: int, limits: ImageLimits, what: str = "unpacks to", entry: str = "") -> None:
    """Raise :class:`LayerTooLarge` for a layer of more than ``layer_size`` bytes."""
    if found > limits.layer_size:
        raise LayerTooLarge(
            f"the layer {what} more than {limits.layer_size} bytes",
            limit="layer_size",
            allowed=limits.layer_size,
            found=found,
            entry=entry,
        )


def check_ratio(given: int, taken: int, limits: ImageLimits) -> None:
    """Raise :class:`CompressionBomb` where ``taken`` bytes have become ``given``, and that is too many."""
    if given > limits.ratio_free and given > limits.ratio * taken:
        raise CompressionBomb(
            f"{taken} compressed bytes became {given} and more: over {limits.ratio} times as many",
            limit="ratio",
            allowed=limits.ratio,
            found=-(-given // max(taken, 1)),  # rounded up
            hint="trust its maker? then give limits with a higher ratio",
        )


def check_document(size: int, limit: str, limits: ImageLimits = STANDARD) -> None:
    """Raise :class:`DocumentTooLarge` for a ``manifest`` or ``config`` of more bytes than it may have."""
    allowed = getattr(limits, limit)
    if size > allowed:
        raise DocumentTooLarge(
            f"a {limit} may have {allowed} bytes, and this one has {size}", limit=limit, allowed=allowed, found=size
        )


def check_members(count: int, limits: ImageLimits = STANDARD) -> None:
    """Raise :class:`ImageTooLarge` for an archive of too many members."""
    _check_count("archive", "members", count, limits)


def check_images(count: int, limits: ImageLimits = STANDARD) -> None:
    """Raise :class:`ImageTooLarge` for a docker archive of too many images."""
    _check_count("archive", "images", count, limits)


def check_configs(found: int, limits: ImageLimits = STANDARD) -> None:
    """Raise :class:`ImageTooLarge` for a docker archive whose configs have too many bytes together."""
    if found > limits.configs:
        message = f"the configs of the archive have {found} bytes and more, and {limits.configs} are allowed"
        raise ImageTooLarge(message, limit="configs", allowed=limits.configs, found=found)


def check_layers(count: int, limits: ImageLimits = STANDARD) -> None:
    """Raise :class:`ImageTooLarge` for too many layers."""
    _check_count("image", "layers", count, limits)


def _check_count(whole: str, limit: str, found: int, limits: ImageLimits) -> None:
    allowed = getattr(limits, limit)
    if found > allowed:
        message = f"the {whole} has {found} {limit}, and {allowed} are allowed"
        raise ImageTooLarge(message, limit=limit, allowed=allowed, found=found)
