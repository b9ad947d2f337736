"""One layer: from a source into the content store and the layer store, in one pass."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import ContentMismatch, DigestMismatch, LayerError
from containerkit.image.drivers import choose
from containerkit.image.layers.compression import decompressed
from containerkit.image.layers.extract import LowersNeeded
from containerkit.image.layers.layer import TarReader
from containerkit.image.limits import Meter, limits_of
from containerkit.image.progress import Meterer
from containerkit.image.store.blobs import BlobStore
from containerkit.image.store.ingest import Resumed, another_place, named
from containerkit.image.store.snapshots import LayerStore
from containerkit.image.stream import PIECE, ReadAhead, Verified, wrong_digest

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from containerkit.image.digest import Digest
    from containerkit.image.drivers import Driver
    from containerkit.image.layers.filewriters import FileWriters
    from containerkit.image.model import Layer
    from containerkit.image.store.ingest import Ingest
    from containerkit.image.transfer import BlobSource


class Below(NamedTuple):
    """What lies below a layer: chain ids, top first, and the work that is making the topmost, if any is."""

    lowers: tuple[Digest, ...] = ()
    work: Future[None] | None = None

    def ready(self) -> bool:
        """Whether all of it is unpacked."""
        return self.work is None or self.work.done()

    def wait(self) -> None:
        """Return when it is; raises what kept it from becoming so."""
        if self.work is not None:
            self.work.result()


class LayerInstaller:
    """Installs layers of one source below ``root``. The calling thread must have the umask 0."""

    def __init__(self, root: str, source: BlobSource, cancelled: threading.Event, meter: Meter | None = None) -> None:
        self._meter = meter or Meter()
        #: Processes that write files, where they are worth their start.
        self.writers: FileWriters | None = None
        #: Told of every byte that comes.
        self.progress = Meterer(None, ())
        self._ingest = os.path.join(root, "ingest")
        self._source = source
        self._cancelled = cancelled
        self._blobs = BlobStore(root)
        self._layers = LayerStore(root)
        self._root = root
        self._found: Driver | None = None
        self.directory = os.path.join(root, "layers")
        #: Whether layers are unpacked at all, and not only their blobs kept.
        self.unpack = True
        #: Whether any layer was unpacked.
        self.unpacked = False

    @property
    def _driver(self) -> Driver:
        """Chosen when there is something to unpack, for a state root keeps its first one."""
        if self._found is None:
            self._found = choose(self._root)
        return self._found

    def missing(self, layers: Iterable[Layer]) -> int:
        """Bytes of the layers, as they come, that are not unpacked yet."""
        if not self.unpack:
            return 0
        left = [layer.descriptor.size for layer in layers if not self._layers.has(layer.chain_id)]
        if left:
            _ = self._driver  # chosen here, in the caller's thread, whose umask is its own
        return sum(left)

    def install(self, layer: Layer, below: Below) -> None:
        """Bring in ``layer``. Nothing is done twice: what is here already, blob or unpacked layer, is left as it is."""
        try:
            self._install(layer, below)
        except LayerError as error:
            error.layer = error.layer or layer.descriptor.digest
            raise

    def _install(self, layer: Layer, below: Below) -> None:
        unpacked = not self.unpack or self._layers.has(layer.chain_id)
        if self._blobs.has(layer.descriptor):
            if not unpacked:
                self._unpack_stored(layer, below)
            self.progress.done(layer.descriptor, present=True)
            return
        with self._blobs.ingest(layer.descriptor, self._source) as ingest:
            while True:
                try:
                    again = self._fetch(ingest, layer, below, unpacked=unpacked)
                    break
                except ContentMismatch as error:  # what an earlier attempt has left was damaged, or a mirror lies
                    if not ingest.offset and not (_of_blob(error, layer) and self._another_place(layer)):
                        raise
                    ingest.restart()
            ingest.commit(layer.descriptor.digest)
        self.progress.done(layer.descriptor)
        if again:
            self._unpack_stored(layer, below)

    def _fetch(self, ingest: Ingest, layer: Layer, below: Below, *, unpacked: bool) -> bool:
        """Write the blob and unpack it on its way; whether it must be unpacked again, once the lowers are there."""
        with Resumed(ingest, self._source, layer.descriptor) as stream:
            self.progress.again(layer.descriptor)

            def count(piece: bytes) -> None:
                self.progress.moved(layer.descriptor, len(piece))

            verified = Verified(stream, layer.descriptor, count, self._cancelled)
            again = False
            if not unpacked:
                try:
                    self._unpack(verified.piece, layer, below, knows_lowers=below.ready())
                except LowersNeeded:
                    again = True
                except (LayerError, DigestMismatch):
                    # A damaged blob breaks the layer too; its digest says which of the two it was.
                    verified.drain()
                    raise
            verified.drain()
        return again

    def _another_place(self, layer: Layer) -> bool:
        return another_place(self._source, layer.descriptor)

    def _unpack_stored(self, layer: Layer, below: Below) -> None:
        below.wait()
        with self._blobs.open(layer.descriptor) as stream:
            self._unpack(lambda: stream.read(PIECE), layer, below, knows_lowers=True)

    def _unpack(self, read: Callable[[], bytes], layer: Layer, below: Below, *, knows_lowers: bool) -> None:
        """Unpack into ``ROOT/ingest``, compare the diff id, wait for the layers below, rename."""
        if self._driver.whole and not knows_lowers:
            raise LowersNeeded
        lowers = [self._layers.path(chain_id) for chain_id in below.lowers]
        with named(self._ingest):
            temporary = tempfile.mkdtemp(prefix="layer-", dir=self._ingest)
        tree = os.path.join(temporary, "tree")
        try:
            self._driver.start(tree, lowers[0] if lowers else None)
            with self._driver.extractor(tree, lowers if knows_lowers else None) as extractor:
                if self.writers is not None and self.writers.ready():
                    extractor.hand_files_to(self.writers)
                limits = limits_of(self._source, layer.descriptor, self._meter.limits)
                plain = decompressed(read, limits, lambda size: self._meter.set(layer.chain_id, size))
                with ReadAhead(plain, layer.diff_id.hasher()) as ahead:
                    extractor.unpack(TarReader(ahead.piece, self._meter.limits))
                _check(layer, ahead.digest())
                try:
                    below.wait()
                except BaseException as error:  # a layer below has failed: this one's blob is right all the same
                    raise LowersNeeded from error
                extractor.finish(lowers)
            self.unpacked = True
            if not self._layers.commit(tree, layer.chain_id):
                self._driver.remove(tree)
        except BaseException:
            with suppress(OSError):  # what remains, a collection removes; the cause is what matters
                self._driver.remove(tree)
                os.rmdir(temporary)
            raise
        os.rmdir(temporary)


def _of_blob(error: ContentMismatch, layer: Layer) -> bool:
    """Whether the blob itself is wrong, not what its image says of it."""
    return not isinstance(error, DigestMismatch) or error.expected == layer.descriptor.digest


def _check(layer: Layer, actual: Digest) -> None:
    if actual != layer.diff_id:
        raise wrong_digest(layer.diff_id, actual, f"unpacked layer {layer.descriptor.digest}")
