"""A one-layer image of a root file system that lies in a directory or a tar."""

from __future__ import annotations

import os
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

from containerkit.image.codec import encode, make_manifest, parse_document
from containerkit.image.contents import read_contents
from containerkit.image.digest import Digest, new_hash
from containerkit.image.epoch import timestamp
from containerkit.image.instructions import apply_changes
from containerkit.image.layers.compression import LONGEST_MAGIC, compression_of, decompressed
from containerkit.image.layers.difflayer import directory_layer
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor, Manifest
from containerkit.image.pack import pack
from containerkit.image.platform import host_platform
from containerkit.image.store.blobs import BlobStore, pieces_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from containerkit.image.model import Platform
    from containerkit.image.store.ingest import Ingest

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def make_image(
    source: str | BinaryIO,
    root: str,
    *,
    changes: Iterable[str] = (),
    message: str = "",
    platform: Platform | None = None,
    epoch: int | None = None,
) -> tuple[BlobStore, Descriptor, bytes]:
    """Put layer, config and manifest into the content store below ``root``: the store, and the manifest.

    Times in a directory later than ``epoch`` (seconds) become it, and it is the time of creation; without one, there is
    none. ``changes`` are as for :func:`.apply_changes`. Raises :class:`~containerkit.errors.InvalidOption`, and
    :class:`~containerkit.errors.LayerError` for a directory with names that begin with ``.wh.``.
    """
    run = apply_changes({"Cmd": ["/bin/sh"], "Env": [PATH]}, changes)
    blobs = BlobStore(root)
    layer, diff_id = _store_layer(blobs, source, epoch)
    config = _config(diff_id, run, message or "imported root file system", platform or host_platform(), epoch)
    head = Descriptor(OCI_CONFIG, blobs.put_bytes(config), len(config))
    return blobs, *make_manifest(OCI_MANIFEST, head, [layer])


def check_layers(blobs: BlobStore, descriptor: Descriptor, body: bytes) -> None:
    """Read the layers of a manifest as tars, for those that nobody unpacks now. Raises :class:`LayerError`."""
    document = parse_document(body, descriptor.media_type)
    if isinstance(document, Manifest):
        read_contents(blobs, document.layers)


def _config(diff_id: Digest, run: dict[str, Any], message: str, platform: Platform, epoch: int | None) -> bytes:
    created = {} if epoch is None else {"created": timestamp(epoch)}
    variant = {"variant": platform.variant} if platform.variant else {}
    return encode(
        {
            **created,
            "architecture": platform.architecture,
            "os": platform.os,
            **variant,
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{**created, "created_by": "containerkit import", "comment": message}],
        }
    )


def _store_layer(blobs: BlobStore, source: str | BinaryIO, epoch: int | None) -> tuple[Descriptor, Digest]:
    """The layer's blob and diff id; a tar is kept as it is, compressed or not."""
    if isinstance(source, str) and os.path.isdir(source):
        return pack(directory_layer(source, epoch=epoch), blobs, "none")
    with open(source, "rb", buffering=0) if isinstance(source, str) else nullcontext(source) as stream:
        head = b""
        while len(head) < LONGEST_MAGIC and (more := stream.read(LONGEST_MAGIC - len(head))):
            head += more
        kind = compression_of(head)
        pieces = chain((head,) if head else (), pieces_of(stream))
        if kind in {"bzip2", "xz"}:  # no media type says so
            return pack(iter(decompressed(lambda: next(pieces, b"")), b""), blobs, "gzip")
        with blobs.ingest() as ingest:
            return _store_tar(pieces, kind, ingest)


def _store_tar(pieces: Iterator[bytes], kind: str, ingest: Ingest) -> tuple[Descriptor, Digest]:
    copy = Copy(pieces, ingest)
    plain, read = new_hash(), decompressed(copy.piece)
    while piece := read():
        plain.update(piece)
    copy.finish()
    ingest.commit(copy.digest())
    return Descriptor(OCI_LAYER + (f"+{kind}" if kind else ""), copy.digest(), copy.size), Digest.from_hash(plain)


class Copy:
    """Pieces that are written to a new blob and hashed while they pass."""

    def __init__(self, pieces: Iterator[bytes], ingest: Ingest) -> None:
        self._pieces = pieces
        self._ingest = ingest
        self._hash = new_hash()
        self.size = 0

    def piece(self) -> bytes:
        """The next piece, empty at the end."""
        piece = next(self._pieces, b"")
        self._ingest.write(piece)
        self._hash.update(piece)
        self.size += len(piece)
        return piece

    def finish(self) -> None:
        """Take all that is left."""
        while self.piece():
            pass

    def digest(self) -> Digest:
        """Of what has passed."""
        return Digest.from_hash(self._hash)
