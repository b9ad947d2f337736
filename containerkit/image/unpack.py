"""One layer: from a source into the content store and the layer store, in one pass."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import LayerError
from containerkit.image.blobs import BlobStore
from containerkit.image.compression import decompressed
from containerkit.image.extract import Extractor, LowersNeeded
from containerkit.image.layer import TarReader
from containerkit.image.snapshots import LayerStore
from containerkit.image.stream import PIECE, ReadAhead, Verified, wrong_digest

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from concurrent.futures import Future

    from containerkit.image.digest import Digest
    from containerkit.image.model import Layer
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

    def __init__(self, root: str, source: BlobSource, cancelled: threading.Event) -> None:
        self._ingest = os.path.join(root, "ingest")
        self._source = source
        self._cancelled = cancelled
        self._blobs = BlobStore(root)
        self._layers = LayerStore(root)

    def install(self, layer: Layer, below: Below) -> None:
        """Bring in ``layer``. Nothing is done twice: what is here already, blob or unpacked layer, is left as it is."""
        unpacked = self._layers.has(layer.chain_id)
        if self._blobs.has(layer.descriptor):
            if not unpacked:
                self._unpack_stored(layer, below)
            return
        with self._source.open(layer.descriptor) as stream, self._blobs.ingest() as ingest:
            verified = Verified(stream, layer.descriptor, ingest.write, self._cancelled)
            again = False
            if not unpacked:
                try:
                    self._unpack(verified.piece, layer, below, knows_lowers=below.ready())
                except LowersNeeded:
                    again = True
                except LayerError:
                    # A damaged blob breaks the layer too; its digest says which of the two it was.
                    verified.drain()
                    raise
            verified.drain()
            ingest.commit(layer.descriptor.digest)
        if again:
            self._unpack_stored(layer, below)

    def _unpack_stored(self, layer: Layer, below: Below) -> None:
        below.wait()
        with self._blobs.open(layer.descriptor) as stream:
            self._unpack(lambda: stream.read(PIECE), layer, below, knows_lowers=True)

    def _unpack(self, read: Callable[[], bytes], layer: Layer, below: Below, *, knows_lowers: bool) -> None:
        """Unpack into ``ROOT/ingest``, compare the diff id, wait for the layers below, rename."""
        lowers = [self._layers.path(chain_id) for chain_id in below.lowers]
        temporary = tempfile.mkdtemp(prefix="layer-", dir=self._ingest)
        try:
            with Extractor(temporary, lowers if knows_lowers else None) as extractor:
                with ReadAhead(decompressed(read), layer.diff_id.hasher()) as ahead:
                    extractor.unpack(TarReader(ahead.piece))
                if ahead.digest() != layer.diff_id:
                    raise wrong_digest(layer.diff_id, ahead.digest(), f"unpacked layer {layer.descriptor.digest}")
                below.wait()
                extractor.finish(lowers[0] if lowers else None)
            if self._layers.commit(temporary, layer.chain_id):
                temporary = ""
        finally:
            if temporary:
                shutil.rmtree(temporary)
