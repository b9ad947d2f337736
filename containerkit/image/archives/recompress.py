"""Layers packed with bzip2 or xz, for which neither OCI nor Docker has a media type: they become gzip when read.

Other engines take them in a docker archive, where no type is written, and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.errors import ImageError, LayerError
from containerkit.image.layers.compression import decompressed
from containerkit.image.limits import STANDARD, check_document
from containerkit.image.model import DOCKER_LAYER, INDEX_TYPES, MANIFEST_TYPES, OCI_LAYER
from containerkit.image.stream import Verified, read_verified, wrong_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor
    from containerkit.image.pack import Packed
    from containerkit.image.scratch import Scratch
    from containerkit.image.transfer import BlobSource

UNNAMED = frozenset({"bzip2", "xz"})
#: What some tools call such layers all the same.
UNNAMED_TYPES = frozenset(
    f"{layer}{sign}{kind}" for layer in (OCI_LAYER, DOCKER_LAYER) for sign in ".+" for kind in UNNAMED
)


def as_gzip(read: Callable[[], bytes], scratch: Scratch) -> Packed:
    """Put the packed layer behind ``read`` into ``scratch`` as gzip, and say what it is there.

    Raises :class:`LayerError`.
    """
    return scratch.pack(iter(decompressed(read), b""), "gzip")


def check_unpacked(packed: Packed, diff_id: Digest) -> Descriptor:
    """What such a layer is now. Raises :class:`DigestMismatch` where it does not unpack to ``diff_id``."""
    if diff_id.algorithm == packed.diff_id.algorithm and packed.diff_id != diff_id:
        raise wrong_digest(diff_id, packed.diff_id, "unpacked layer")
    return packed.descriptor


class NamedLayers:
    """Images of ``source`` with such layers as gzip, each packed once; new documents and layers are in ``scratch``."""

    def __init__(self, source: BlobSource, scratch: Scratch) -> None:
        self._source = source
        self._scratch = scratch
        self._reads = 0
        self._packed: dict[Digest, Descriptor] = {}

    def of(self, root: Descriptor) -> Descriptor:
        """What the manifest or index ``root`` is then.

        It comes back as it is where it has none, or cannot be read: whoever reads it next tells why. Raises what
        :func:`as_gzip` raises, and :class:`ContentMismatch`.
        """
        self._reads = 0
        return self._document(root, STANDARD.index_depth)

    def _document(self, root: Descriptor, depth: int) -> Descriptor:
        from containerkit.image.transfer import children

        self._reads += 1
        if not depth or self._reads > STANDARD.index_reads or root.media_type not in (*MANIFEST_TYPES, *INDEX_TYPES):
            return root
        try:
            check_document(root.size, "manifest")
            with self._source.open(root) as stream:
                body = read_verified(stream, root, root.size)
            below = children(body, root.media_type)
        except (ImageError, OSError):
            return root
        made = {child.digest: self._child(child, depth) for child in below}
        changes = {child.digest: made[child.digest] for child in below if made[child.digest] != child}
        return self._rewritten(root, body, changes) if changes else root

    def _child(self, child: Descriptor, depth: int) -> Descriptor:
        if child.media_type not in UNNAMED_TYPES:
            return self._document(child, depth - 1)
        if child.digest not in self._packed:
            try:
                with self._source.open(child) as stream:
                    verified = Verified(stream, child)
                    packed = as_gzip(verified.piece, self._scratch)
                    verified.drain()
            except LayerError as error:
                error.layer = child.digest
                raise
            self._packed[child.digest] = packed.descriptor
        return self._packed[child.digest]

    def _rewritten(self, root: Descriptor, body: bytes, changes: dict[Digest, Descriptor]) -> Descriptor:
        from containerkit.image.rewrite import redescribed, rewritten

        new = rewritten(body, changes)
        made = redescribed(root, new)
        self._scratch.put_bytes(new, made.media_type)
        return made
