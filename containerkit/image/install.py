"""Bringing one image from a source into the state root: config first, layers side by side, the name last.

Each layer is read once: source -> verify -> blob file, and at once decompress -> hash -> unpack.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import ContentMismatch, ImageTooLarge, InvalidImage, LayerTooLarge, PlatformMismatch
from containerkit.image import platform as platforms
from containerkit.image.codec import parse_config, parse_document, require_image
from containerkit.image.layers.filewriters import writers
from containerkit.image.limits import STANDARD, Meter, check_document, check_layer_size, check_layers
from containerkit.image.model import Index, Layer
from containerkit.image.progress import Meterer
from containerkit.image.runconfig import RunConfig
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.ingest import another_place
from containerkit.image.stream import read_verified
from containerkit.image.together import together
from containerkit.image.unpack import Below, LayerInstaller
from containerkit.linux.paths import private_umask
from containerkit.linux.sync import syncfs

if TYPE_CHECKING:
    from containerkit.image.digest import Digest
    from containerkit.image.limits import ImageLimits
    from containerkit.image.model import Descriptor, ImageConfig, Manifest, Platform
    from containerkit.image.progress import Watcher
    from containerkit.image.transfer import BlobSource

LAYERS_AT_ONCE = 4


class Installed(NamedTuple):
    """An image whose content is all here, ready to be named: a row of the table ``images``."""

    id: Digest
    manifest: Digest
    media_type: str
    run: str
    layers: tuple[Digest, ...]
    size: int
    created_ns: int


class Installer:
    """Installs one image of a source below ``root``, under a lease that the caller holds (:func:`.leases.lease`).

    ``platform`` says which image of an index is wanted, by default the one that fits this machine best; ``progress``
    is told how the layers come. With ``durable`` all is on the disk before the image gets its row. Without ``unpack``
    the layers stay as they travel, unpacked later by :meth:`unpack`, which compares their diff ids then.
    """

    def __init__(
        self,
        root: str,
        source: BlobSource,
        name: str,
        *,
        platform: Platform | None = None,
        limits: ImageLimits = STANDARD,
        progress: Watcher | None = None,
        durable: bool = False,
        unpack: bool = True,
    ) -> None:
        self._source = source
        self._name = name
        self._platform = platform
        self._limits = limits
        self._watcher = progress
        self._durable = durable
        self._reads = 0
        self._blobs = BlobStore(root)
        self._cancelled = threading.Event()
        self._installer = LayerInstaller(root, source, self._cancelled, Meter(limits))
        self._installer.unpack = unpack

    def install(self, root: Descriptor, body: bytes) -> Installed:
        """Install the image of the manifest or index ``body``, whose digest has been verified.

        Raises :class:`PlatformMismatch`, :class:`NotAnImage`, :class:`InvalidImage`, :class:`ContentMismatch`,
        :class:`LayerError`, :class:`LimitExceeded` and what the source raises.
        """
        descriptor, manifest = self._choose(root, body, self._limits.index_depth)
        require_image(manifest, self._name)
        self._check_sizes(manifest)
        config = self._config(manifest)
        layers = match_layers(manifest, config)
        run = RunConfig.from_config(config)
        self._installer.progress = Meterer(self._watcher, manifest.layers)
        self.unpack(layers)
        self._blobs.put_bytes(config.raw, manifest.config.digest)
        self._blobs.put_bytes(manifest.raw, descriptor.digest)
        size = manifest.config.size + sum(layer.size for layer in manifest.layers)
        chain = tuple(layer.chain_id for layer in layers)
        identity = manifest.config.digest
        return Installed(identity, descriptor.digest, manifest.media_type, run.to_json(), chain, size, time.time_ns())

    def unpack(self, layers: tuple[Layer, ...]) -> None:
        """Bring in and unpack what is not there yet of an image's layers, lowest first.

        Raises :class:`ContentMismatch`, :class:`LayerError`, :class:`LimitExceeded`, :class:`KernelError` and what the
        source raises.
        """
        chain = tuple(layer.chain_id for layer in layers)
        with (
            writers(self._installer.missing(layers)) as self._installer.writers,
            together(LAYERS_AT_ONCE, "containerkit-layer", self._cancelled, prepare=private_umask) as begin,
        ):
            below = Below()
            for number, layer in enumerate(layers):
                work = begin(self._installer.install, layer, below)
                below = Below(chain[: number + 1][::-1], work)
        if self._durable and self._installer.unpacked:
            syncfs(self._installer.directory)  # once an image: what gets a row is whole, also after a power failure

    def _check_sizes(self, manifest: Manifest) -> None:
        """Before anything of it is fetched: how many layers there are, and how large they say they are."""
        check_layers(len(manifest.layers), self._limits)
        for layer in manifest.layers:
            try:
                check_layer_size(layer.size, self._limits, "declares")
            except LayerTooLarge as error:
                error.layer = layer.digest
                raise

    def _choose(self, descriptor: Descriptor, body: bytes, depth: int) -> tuple[Descriptor, Manifest]:
        document = parse_document(body, descriptor.media_type)
        if not isinstance(document, Index):
            return descriptor, document
        if not depth:
            raise self._too_deep("index_depth", self._limits.index_depth)
        there = [str(item.platform) for item in document.manifests if item.platform is not None]
        for candidate in platforms.candidates(document.manifests, self._platform):
            try:
                return self._choose(candidate, self._read_document(candidate), depth - 1)
            except PlatformMismatch as error:  # of an index within
                there += error.available
        raise platforms.mismatch(self._name, there, self._platform)

    def _read_document(self, descriptor: Descriptor) -> bytes:
        self._reads += 1
        if self._reads > self._limits.index_reads:
            raise self._too_deep("index_reads", self._limits.index_reads)
        return self._document(descriptor, "manifest")

    def _too_deep(self, limit: str, allowed: int) -> ImageTooLarge:
        message = f"{self._name} has indexes within indexes without end: more than {allowed} {limit[6:]}"
        return ImageTooLarge(message, limit=limit, allowed=allowed, found=allowed + 1)

    def _document(self, descriptor: Descriptor, kind: str) -> bytes:
        check_document(descriptor.size, kind, self._limits)
        if descriptor.data is not None:
            return descriptor.data
        source = self._blobs if self._blobs.has(descriptor) else self._source
        while True:
            try:
                with source.open(descriptor) as stream:
                    return read_verified(stream, descriptor, descriptor.size)
            except ContentMismatch:
                if not another_place(source, descriptor):
                    raise

    def _config(self, manifest: Manifest) -> ImageConfig:
        config = parse_config(self._document(manifest.config, "config"))
        platforms.check(config.platform, self._name, self._platform)
        return config


def match_layers(manifest: Manifest, config: ImageConfig) -> tuple[Layer, ...]:
    """The layers of a manifest with what the config says of each, lowest first."""
    if len(manifest.layers) != len(config.diff_ids):
        raise InvalidImage(
            f"the manifest has {len(manifest.layers)} layers, the config {len(config.diff_ids)} diff ids"
        )
    rows = zip(manifest.layers, config.diff_ids, config.chain_ids, strict=True)
    return tuple(Layer(descriptor, diff_id, chain_id) for descriptor, diff_id, chain_id in rows)
