"""Pure changes of indexes, and of all images in one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from containerkit.errors import ImageNotFound, InvalidImage
from containerkit.image.codec import (
    LARGEST_CONFIG,
    LARGEST_DOCUMENT,
    descriptor_json,
    encode,
    parse_config,
    parse_document,
    platform_json,
)
from containerkit.image.edit import Editor, annotate_document, deliver, read_document, read_manifest
from containerkit.image.limits import STANDARD
from containerkit.image.model import INDEX_TYPES, OCI_INDEX, Descriptor, Index, Platform, is_attestation
from containerkit.image.rewrite import redescribed, rewritten
from containerkit.image.scratch import Scratch
from containerkit.image.transfer import check_index

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from containerkit.image.digest import Digest
    from containerkit.image.transfer import BlobSink, BlobSource


class IndexEditor:
    """One index under change; without ``root`` a new one, of the type ``media_type``.

    Images are said by their digest. :meth:`finish` writes to ``sink`` what ``source`` and the images' own sources have.
    """

    def __init__(
        self,
        source: BlobSource,
        root: Descriptor | None = None,
        sink: BlobSink | None = None,
        *,
        media_type: str = OCI_INDEX,
    ) -> None:
        self._sources = [source]
        self._sink = sink
        self._root = root
        self._index: dict[str, Any] = {"schemaVersion": 2, "mediaType": media_type, "manifests": []}
        self._media_type = media_type
        if root is not None:
            document = parse_document(read_document(source, root, LARGEST_DOCUMENT), root.media_type)
            if not isinstance(document, Index):
                raise InvalidImage(f"{root.digest} is one image, not an index of several")
            self._index = json.loads(document.raw)
            self._media_type = document.media_type
        self._old = json.dumps(self._index)

    @property
    def manifests(self) -> tuple[Descriptor, ...]:
        """What is in it now."""
        document = parse_document(encode(self._index), self._media_type)
        return document.manifests if isinstance(document, Index) else ()

    def add(
        self,
        image: Descriptor,
        *,
        platform: Platform | None = None,
        annotations: Mapping[str, str] | None = None,
        source: BlobSource | None = None,
    ) -> Self:
        """Add an image or a further index, which ``source`` has where the index's own source has not.

        Without ``platform`` it has the one of its descriptor, else that of its config. One that is there already moves
        to the end.
        """
        if source is not None:
            self._sources.append(source)
        row = descriptor_json(image)
        chosen = platform or image.platform or self._platform_of(image)
        if chosen is not None:
            row["platform"] = platform_json(chosen)
        if notes := {**image.annotations, **(annotations or {})}:
            row["annotations"] = notes
        self._index["manifests"] = [*(old for old in self._index["manifests"] if old["digest"] != image.digest), row]
        return self

    def remove(self, digest: str) -> Self:
        """Take an image out. Raises :class:`ImageNotFound`."""
        self._index["manifests"].remove(self._row(digest))
        return self

    def replace(self, digest: str, image: Descriptor, *, source: BlobSource | None = None) -> Self:
        """Put ``image`` in another's place; platform and annotations stay.

        Raises :class:`ImageNotFound`.
        """
        row = self._row(digest)
        if source is not None:
            self._sources.append(source)
        row.pop("data", None)
        row.update(mediaType=image.media_type, digest=image.digest, size=image.size)
        return self

    def annotate(self, annotations: Mapping[str, str | None], digest: str | None = None) -> Self:
        """Set annotations of the index, or of one image in it; None takes one away. Raises :class:`ImageNotFound`."""
        annotate_document(self._index if digest is None else self._row(digest), annotations)
        return self

    def set_platform(self, digest: str, platform: Platform) -> Self:
        """Say what an image runs on; ``os.version`` and the like stay. Raises :class:`ImageNotFound`."""
        row = self._row(digest)
        old = {key: value for key, value in (row.get("platform") or {}).items() if key.startswith("os.")}
        row["platform"] = {**old, **platform_json(platform)}
        return self

    def finish(self) -> Descriptor:
        """Write index and images to the sink, with whatever that lacks of them, and give the index."""
        blobs = Scratch(*self._sources)
        if self._root is not None and json.dumps(self._index) == self._old:
            root = self._root
        else:
            root = blobs.put_bytes(encode(self._index), self._media_type)
        if self._sink is not None:
            deliver(root, blobs, self._sink)
        return root

    def _row(self, digest: str) -> dict[str, Any]:
        for row in self._index["manifests"]:
            if row["digest"] == digest:
                found: dict[str, Any] = row
                return found
        raise ImageNotFound(f"the index has no image {digest}")

    def _platform_of(self, image: Descriptor) -> Platform | None:
        if image.media_type in INDEX_TYPES:
            return None
        blobs = Scratch(*self._sources[::-1])
        manifest = read_manifest(blobs, image)
        return parse_config(read_document(blobs, manifest.config, LARGEST_CONFIG)).platform


def repack(source: BlobSource, root: Descriptor, compression: str) -> tuple[BlobSource, Descriptor]:
    """A source of ``root``, image or index, with every layer compressed anew, and its descriptor there.

    Raises as :class:`Editor` does, and :class:`ImageTooLarge` for indexes with too many manifests or indexes.
    """
    repacking = _Repacking(source, compression)
    made = repacking.document(root, STANDARD.index_depth)
    return repacking.source, made


class _Repacking:
    """What an index names, each image and each layer of them once."""

    def __init__(self, source: BlobSource, compression: str) -> None:
        self.source = source
        self._compression = compression
        self._reads = 0
        self._made: dict[Digest, Descriptor] = {}
        self._layers: dict[tuple[Digest, Digest, str], Descriptor] = {}

    def document(self, root: Descriptor, depth: int) -> Descriptor:
        """What ``root`` has become, with everything below it."""
        if root.media_type not in INDEX_TYPES:
            editor = _OneOfSeveral(self.source, root, self._layers).repack(self._compression)
            self.source = editor.source  # which has what came before, too
            return editor.finish()
        index = parse_document(read_document(self.source, root, LARGEST_DOCUMENT), root.media_type)
        images = [child for child in cast("Index", index).manifests if not is_attestation(child)]
        for child in images:
            if child.digest not in self._made:
                self._reads += 1
                check_index(root, depth, self._reads)
                self._made[child.digest] = self.document(child, depth - 1)
        made = {child.digest: self._made[child.digest] for child in images}
        body = rewritten(index.raw, {digest: new for digest, new in made.items() if new.digest != digest})
        self.source = blobs = Scratch(self.source)
        blobs.put_bytes(body, root.media_type)
        return redescribed(root, body)


class _OneOfSeveral(Editor):
    """An editor that packs no layer which another one has packed."""

    def __init__(
        self, source: BlobSource, root: Descriptor, layers: dict[tuple[Digest, Digest, str], Descriptor]
    ) -> None:
        super().__init__(source, root)
        self._repacked = layers
