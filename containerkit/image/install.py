"""Bringing one image from a source into the state root: config first, layers side by side, the name last.

Each layer is read once: source -> verify -> blob file, and at once decompress -> hash -> unpack.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import InvalidImage, LayerError
from containerkit.image import platform
from containerkit.image.blobs import BlobStore
from containerkit.image.codec import LARGEST_CONFIG, LARGEST_DOCUMENT, parse_config, parse_document
from containerkit.image.compression import decompressed
from containerkit.image.extract import Extractor, LowersNeeded
from containerkit.image.layer import TarReader
from containerkit.image.model import Index, Layer
from containerkit.image.runconfig import RunConfig
from containerkit.image.snapshots import LayerStore
from containerkit.image.stream import PIECE, Cancelled, ReadAhead, Verified, read_verified, wrong_digest
from containerkit.linux.paths import private_umask

if TYPE_CHECKING:
    from collections.abc import Callable
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
        self._ingest = os.path.join(root, "ingest")
        self._source = source
        self._name = name
        self._blobs = BlobStore(root)
        self._layers = LayerStore(root)
        self._cancelled = threading.Event()

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
        """Install them side by side. What fails first is raised; what it made pointless is cancelled."""
        done: list[Future[None]] = []
        with ThreadPoolExecutor(LAYERS_AT_ONCE, "containerkit-layer", initializer=private_umask) as pool:
            try:
                for number in range(len(layers)):
                    done.append(pool.submit(self._install_layer, layers, number, done[-1] if done else None))
                for future in done:
                    future.result()
            except BaseException:
                self._cancelled.set()
                pool.shutdown(cancel_futures=True)
                raise _cause(done)  # noqa: B904 - the first failure in time, not in order

    def _install_layer(self, layers: tuple[Layer, ...], number: int, below: Future[None] | None) -> None:
        try:
            task = LayerTask(self, layers, number, below)
            task.run()
        except BaseException:
            self._cancelled.set()
            raise
