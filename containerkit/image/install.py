"""Bringing one image from a source into the state root: config first, layers side by side, the name last.

Each layer is read once: source -> verify -> blob file, and at once decompress -> hash -> unpack.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import InvalidImage
from containerkit.image import platform
from containerkit.image.blobs import BlobStore
from containerkit.image.codec import LARGEST_CONFIG, LARGEST_DOCUMENT, parse_config, parse_document
from containerkit.image.model import Index, Layer
from containerkit.image.runconfig import RunConfig
from containerkit.image.stream import read_verified
from containerkit.image.unpack import Below, LayerInstaller
from containerkit.linux.paths import private_umask

if TYPE_CHECKING:
    from concurrent.futures import Future

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor, ImageConfig, Manifest
    from containerkit.image.transfer import BlobSource

LAYERS_AT_ONCE = 3
DEEPEST_INDEX = 4


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
    """Installs images of one source below ``root``, whose lock the caller holds (:func:`.locks.shared`)."""

    def __init__(self, root: str, source: BlobSource, name: str) -> None:
        self._source = source
        self._name = name
        self._blobs = BlobStore(root)
        self._cancelled = threading.Event()
        self._failures: list[BaseException] = []
        self._installer = LayerInstaller(root, source, self._cancelled)

    def install(self, root: Descriptor, body: bytes) -> Installed:
        """Install the image of the manifest or index ``body``, whose digest has been verified.

        Raises :class:`PlatformMismatch`, :class:`InvalidImage`, :class:`ContentMismatch`, :class:`LayerError` and what
        the source raises.
        """
        descriptor, manifest = self._choose(root, body, DEEPEST_INDEX)
        config = self._config(manifest)
        layers = match_layers(manifest, config)
        run = RunConfig.from_config(config)
        self._install_layers(layers)
        self._blobs.put_bytes(config.raw)
        self._blobs.put_bytes(manifest.raw)
        size = manifest.config.size + sum(layer.size for layer in manifest.layers)
        chain = tuple(layer.chain_id for layer in layers)
        identity = manifest.config.digest
        return Installed(identity, descriptor.digest, manifest.media_type, run.to_json(), chain, size, time.time_ns())

    def _choose(self, descriptor: Descriptor, body: bytes, depth: int) -> tuple[Descriptor, Manifest]:
        document = parse_document(body, descriptor.media_type)
        if not isinstance(document, Index):
            return descriptor, document
        if not depth:
            raise InvalidImage(f"{self._name} has indexes within indexes without end")
        chosen = platform.choose(document.manifests, self._name)
        return self._choose(chosen, self._document(chosen, LARGEST_DOCUMENT), depth - 1)

    def _document(self, descriptor: Descriptor, limit: int) -> bytes:
        source = self._blobs if self._blobs.has(descriptor) else self._source
        with source.open(descriptor) as stream:
            return read_verified(stream, descriptor, limit)

    def _config(self, manifest: Manifest) -> ImageConfig:
        config = parse_config(self._document(manifest.config, LARGEST_CONFIG))
        platform.check(config.platform, self._name)
        return config

    def _install_layers(self, layers: tuple[Layer, ...]) -> None:
        """Install them side by side. The failure that came first is raised; what it made pointless is cancelled."""
        work: list[Future[None]] = []
        chain = tuple(layer.chain_id for layer in layers)
        with ThreadPoolExecutor(LAYERS_AT_ONCE, "containerkit-layer", initializer=private_umask) as pool:
            try:
                for number, layer in enumerate(layers):
                    below = Below(chain[:number][::-1], work[-1] if work else None)
                    work.append(pool.submit(self._install_layer, layer, below))
                for future in work:
                    future.result()
            except BaseException as error:
                self._cancelled.set()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, Exception) and self._failures:
                    raise self._failures[0] from None
                raise

    def _install_layer(self, layer: Layer, below: Below) -> None:
        try:
            self._installer.install(layer, below)
        except BaseException as error:
            self._failures.append(error)
            self._cancelled.set()
            raise


def match_layers(manifest: Manifest, config: ImageConfig) -> tuple[Layer, ...]:
    """The layers of a manifest with what the config says of each, lowest first."""
    if len(manifest.layers) != len(config.diff_ids):
        raise InvalidImage(
            f"the manifest has {len(manifest.layers)} layers, the config {len(config.diff_ids)} diff ids"
        )
    rows = zip(manifest.layers, config.diff_ids, config.chain_ids, strict=True)
    return tuple(Layer(descriptor, diff_id, chain_id) for descriptor, diff_id, chain_id in rows)
