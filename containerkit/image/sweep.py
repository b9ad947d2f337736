"""Removing what no image needs, never while another process brings an image in.

Whoever brings one in holds ``ROOT/ingest.lock`` shared; a sweep holds it exclusively or does not take place. So
unreachable content and everything in ``ROOT/ingest`` is rubbish for certain: of removed images, or of dead processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.errors import BlobNotFound, ContentMismatch, InvalidImage
from containerkit.image.blobs import BlobStore
from containerkit.image.codec import parse_document
from containerkit.image.digest import Digest
from containerkit.image.model import Manifest
from containerkit.image.snapshots import LayerStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.state import State


@contextmanager
def bringing_in(state: State) -> Iterator[None]:
    """Hold off sweeps; many at once may. Waits for a sweep that is under way.

    Where the work fails, what it has left is swept afterwards; what a dead process has left, before. Others that are
    still at work put that off.
    """
    if os.listdir(state.path("ingest")):
        sweep(state)
    fd = _open_lock(state)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    except BaseException:
        fcntl.flock(fd, fcntl.LOCK_UN)
        sweep(state)
        raise
    finally:
        os.close(fd)


def sweep(state: State) -> bool:
    """Remove all that no image needs; False where somebody is bringing one in, and nothing was removed."""
    fd = _open_lock(state)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _sweep(state)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _open_lock(state: State) -> int:
    return os.open(state.path("ingest.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _sweep(state: State) -> None:
    blobs, layers = BlobStore(state.root), LayerStore(state.root)
    kept_blobs, kept_layers = _reachable(state, blobs)
    for key in set(layers.keys()) - kept_layers:
        _discard(state, state.path("layers", key))
    for digest in set(blobs.digests()) - kept_blobs:
        blobs.remove(digest)
    for name in os.listdir(state.path("ingest")):
        path = state.path("ingest", name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _reachable(state: State, blobs: BlobStore) -> tuple[set[Digest], set[str]]:
    kept_blobs: set[Digest] = set()
    kept_layers: set[str] = set()
    for identity, manifest, chain in state.database.execute("SELECT id, manifest, layers FROM images").fetchall():
        kept_blobs |= {Digest(identity), Digest(manifest)}
        kept_layers |= {Digest(chain_id).hex for chain_id in json.loads(chain)}
        try:
            document = parse_document(blobs.read(Digest(manifest)))
        except (BlobNotFound, ContentMismatch, InvalidImage):
            continue  # a damaged manifest: its layers are kept, its blobs cannot be told
        if isinstance(document, Manifest):
            kept_blobs |= {layer.digest for layer in document.layers}
    return kept_blobs, kept_layers


def _discard(state: State, path: str) -> None:
    """Move a layer out of sight before it is taken apart, for a layer that is there is whole."""
    gone = state.path("ingest", f"gone-{os.path.basename(path)}")
    os.rename(path, gone)
