"""A one-layer image of a root file system that lies in a directory or a tar."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.image.blobs import BlobStore, pieces_of
from containerkit.image.codec import descriptor_json, encode
from containerkit.image.compression import LONGEST_MAGIC, compression_of, decompressed
from containerkit.image.digest import Digest, new_hash
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.pack import pack
from containerkit.image.platform import host_platform
from containerkit.image.stream import PIECE
from containerkit.image.write import tar_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from containerkit.image.ingest import Ingest


def make_image(path: str, root: str) -> tuple[BlobStore, Descriptor, bytes]:
    """Put layer, config and manifest into the content store below ``root``: the store, and the manifest."""
    blobs = BlobStore(root)
    layer, diff_id = _store_layer(blobs, path)
    config = _config(diff_id)
    head = Descriptor(OCI_CONFIG, blobs.put_bytes(config), len(config))
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor_json(head),
            "layers": [descriptor_json(layer)],
        }
    )
    return blobs, Descriptor(OCI_MANIFEST, Digest.of(manifest), len(manifest)), manifest


def _config(diff_id: Digest) -> bytes:
    platform = host_platform()
    variant = {"variant": platform.variant} if platform.variant else {}
    return encode(
        {
            "architecture": platform.architecture,
            "os": platform.os,
            **variant,
            "config": {
                "Cmd": ["/bin/sh"],
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            },
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created_by": "containerkit import", "comment": "imported root file system"}],
        }
    )


def _store_layer(blobs: BlobStore, path: str) -> tuple[Descriptor, Digest]:
    """The layer's blob and diff id; a tar is kept as it is, compressed or not."""
    if os.path.isdir(path):
        return pack(tar_of(path), blobs, "none")
    with open(path, "rb", buffering=0) as stream:
        kind = compression_of(stream.read(LONGEST_MAGIC))
        stream.seek(0)
        if kind in {"bzip2", "xz"}:  # no media type says so
            read = decompressed(lambda: stream.read(PIECE))
            return pack(iter(read, b""), blobs, "gzip")
        with blobs.ingest() as ingest:
            return _store_tar(stream, kind, ingest)


def _store_tar(stream: BinaryIO, kind: str, ingest: Ingest) -> tuple[Descriptor, Digest]:
    copy = Copy(pieces_of(stream), ingest)
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
