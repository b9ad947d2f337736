"""Docker archives (``docker save``): a tar with ``manifest.json``, which names configs, layers and tags.

Source: Docker's "image specification v1.2", "Combined Image JSON + Filesystem Changeset Format". There is no manifest
in one: an image's identity is the digest of its config, and an OCI manifest is made of that when it is read. Layers
that are packed with bzip2 or xz, for which no media type has a name, become gzip.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import InvalidImage
from containerkit.image.archives.files import TarTarget, writing
from containerkit.image.archives.layout import Stored, canonical, docker_tag
from containerkit.image.archives.recompress import UNNAMED, as_gzip, check_unpacked
from containerkit.image.codec import (
    LARGEST_CONFIG,
    LARGEST_DOCUMENT,
    Document,
    encode,
    make_manifest,
    parse_config,
    parse_json,
)
from containerkit.image.digest import Digest, new_hash
from containerkit.image.layers.compression import LONGEST_MAGIC, compression_of
from containerkit.image.limits import STANDARD, check_configs, check_images
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.pack import Packed
from containerkit.image.scratch import Scratch
from containerkit.image.stream import PIECE, Verified, read_verified, wrong_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from containerkit.image.archives.files import Files
    from containerkit.image.limits import ImageLimits
    from containerkit.image.model import Manifest
    from containerkit.image.transfer import BlobSource


class Contents:
    """What an archive holds: its images, which file each layer's blob is, and what had to be made for reading it."""

    def __init__(self, scratch: str | None = None) -> None:
        self.images: list[Stored] = []
        self.blobs: dict[Digest, str] = {}
        self.made = Scratch(directory=scratch)


def read_docker_archive(
    raw: bytes, files: Files, scratch: str | None = None, limits: ImageLimits = STANDARD
) -> Contents:
    """Everything that the ``manifest.json`` in ``raw`` names; what must be packed anew lies in ``scratch`` meanwhile.

    Raises :class:`InvalidImage`, ``FileNotFoundError``, :class:`ImageTooLarge` for more images than ``limits`` allow,
    or configs of too many bytes, and :class:`LayerError` for a layer that cannot be packed anew.
    """
    rows = parse_json(b'{"images":' + raw + b"}", "manifest.json").children("images")
    check_images(len(rows), limits)
    reading = _Reading(files, Contents(scratch), limits)
    reading.contents.images += map(reading.image, rows)
    return reading.contents


class _Config(NamedTuple):
    descriptor: Descriptor
    diff_ids: tuple[Digest, ...]


class _Reading:
    """What is read of an archive: each file once, whatever names it has and however many images it is of."""

    def __init__(self, files: Files, contents: Contents, limits: ImageLimits) -> None:
        self.contents = contents
        self._files = files
        self._limits = limits
        self._config_bytes = 0
        self._configs: dict[tuple[int, int], _Config] = {}
        self._layers: dict[tuple[int, int], Packed | Descriptor | None] = {}
        self._made: dict[tuple[Digest, tuple[str, ...]], Descriptor] = {}

    def image(self, row: Document) -> Stored:
        """The image of one row."""
        config, names = self._config(row), row.texts("Layers")
        if len(names) != len(config.diff_ids):
            raise InvalidImage(f"manifest.json has {len(names)} layers, the config {len(config.diff_ids)} diff ids")
        key = (config.descriptor.digest, names)
        if key not in self._made:
            layers = [self._layer(*pair) for pair in zip(names, config.diff_ids, strict=True)]
            self._made[key], manifest = make_manifest(OCI_MANIFEST, config.descriptor, layers)
            self.contents.made.put_bytes(manifest, OCI_MANIFEST)
        tags = row.texts("RepoTags")
        return Stored(self._made[key], tuple(name for tag in tags if (name := canonical(tag))), tags)

    def _config(self, row: Document) -> _Config:
        name = row.text("Config", needed=True)
        try:
            place, size = self._files.place(name), self._files.size(name)
        except FileNotFoundError:
            raise row.invalid("Config", "a file of the archive") from None
        if place not in self._configs:
            self._config_bytes += size
            check_configs(self._config_bytes, self._limits)
            raw = read_file(self._files, name, LARGEST_CONFIG) or b""
            self._configs[place] = _Config(self.contents.made.put_bytes(raw, OCI_CONFIG), parse_config(raw).diff_ids)
        return self._configs[place]

    def _layer(self, name: str, diff_id: Digest) -> Descriptor:
        """A plain layer's digest is its diff id; a compressed one's must be computed."""
        place = self._files.place(name)
        if place not in self._layers:
            self._layers[place] = self._read_layer(name)
        found = self._layers[place]
        if isinstance(found, Packed):
            return check_unpacked(found, diff_id)
        layer = found or Descriptor(OCI_LAYER, diff_id, self._files.size(name))
        self.contents.blobs[layer.digest] = name
        return layer

    def _read_layer(self, name: str) -> Packed | Descriptor | None:
        """What a layer is by itself: one that was packed anew, or compressed; None where it is plain."""
        with self._files.open(name) as stream:
            head = stream.read(LONGEST_MAGIC)
            compression = compression_of(head)
            if compression in UNNAMED:
                return as_gzip(_chain(head, stream.read), self.contents.made)
            if not compression:
                return None
            state = new_hash("sha256", head)
            while piece := stream.read(PIECE):
                state.update(piece)
        return Descriptor(_media_type(compression), Digest.from_hash(state), self._files.size(name))


def _made(config: bytes, layers: Sequence[Descriptor]) -> tuple[Descriptor, bytes]:
    """The manifest of an image that came without one."""
    return make_manifest(OCI_MANIFEST, Descriptor(OCI_CONFIG, Digest.of(config), len(config)), layers)


def _media_type(compression: str) -> str:
    return OCI_LAYER + (compression and f"+{compression}")


def read_file(files: Files, name: str, limit: int = LARGEST_DOCUMENT) -> bytes | None:
    """A small file of an archive; None where there is none. Raises :class:`InvalidImage` for one that is too large."""
    try:
        if files.size(name) > limit:
            raise InvalidImage(f"{name} is larger than the {limit} bytes that it may have")
        with files.open(name) as stream:
            return stream.read(limit)
    except FileNotFoundError:
        return None


class DockerTar:
    """A docker archive that is written front to back; layers stay compressed as they are, and shared ones come once.

    Those that are packed with bzip2 or xz are written as gzip.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._tar = TarTarget(file)
        self._written: set[str] = set()
        self._layers: dict[Digest, tuple[str, Descriptor]] = {}
        self._rows: dict[str, list[str]] = {}
        self._tags: dict[str, dict[str, None]] = {}

    def add(self, manifest: Manifest, source: BlobSource, names: Sequence[str] = ()) -> Descriptor:
        """Write one image, and give the manifest that a reader will make of it.

        ``names`` are references; one with a digest alone cannot be said here and is left out. Raises
        :class:`InvalidImage`, :class:`ContentMismatch` and what the source raises.
        """
        with source.open(manifest.config) as stream:
            config = read_verified(stream, manifest.config, LARGEST_CONFIG)
        diff_ids = parse_config(config).diff_ids
        if len(diff_ids) != len(manifest.layers):
            raise InvalidImage(f"the manifest has {len(manifest.layers)} layers, the config {len(diff_ids)} diff ids")
        layers = [
            self._add_layer(layer, diff_id, source) for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
        ]
        config_name = f"{manifest.config.digest.hex}.json"
        self._write(config_name, len(config), iter([config]))
        self._rows[config_name] = [name for name, _ in layers]
        self._tags.setdefault(config_name, {}).update((tag, None) for name in names if (tag := docker_tag(name)))
        return _made(config, [layer for _, layer in layers])[0]

    def finish(self) -> None:
        """Write ``manifest.json`` and the end."""
        rows = [
            {"Config": config, "RepoTags": list(self._tags[config]) or None, "Layers": layers}
            for config, layers in self._rows.items()
        ]
        document = b"[" + b",".join(encode(row) for row in rows) + b"]"
        self._tar.write("manifest.json", len(document), [document])
        self._tar.finish()

    def _add_layer(self, layer: Descriptor, diff_id: Digest, source: BlobSource) -> tuple[str, Descriptor]:
        """The file of a layer, and what a reader will find there: a plain one must be what the config says."""
        if layer.digest not in self._layers:
            with source.open(layer) as stream:
                self._layers[layer.digest] = self._new_layer(layer, diff_id, Verified(stream, layer))
        name, there = self._layers[layer.digest]
        if there.media_type == OCI_LAYER and there.digest != diff_id:
            raise wrong_digest(diff_id, there.digest, f"unpacked layer {layer.digest}")
        return name, there

    def _new_layer(self, layer: Descriptor, diff_id: Digest, verified: Verified) -> tuple[str, Descriptor]:
        head = verified.piece()
        while head and len(head) < LONGEST_MAGIC and (more := verified.piece()):
            head += more
        kind = compression_of(head[:LONGEST_MAGIC])
        pieces = iter(_chain(head, lambda _: verified.piece()), b"")
        if kind in UNNAMED:
            return self._packed_anew(pieces, diff_id)
        name = f"{layer.digest.hex}.tar{'.' + kind if kind else ''}"
        state = new_hash(diff_id.algorithm if not kind else "sha256")
        self._write(name, layer.size, _hashed(pieces, state.update))
        return name, Descriptor(_media_type(kind), Digest.from_hash(state), layer.size)

    def _packed_anew(self, pieces: Iterator[bytes], diff_id: Digest) -> tuple[str, Descriptor]:
        scratch = Scratch()
        try:
            packed = check_unpacked(as_gzip(lambda: next(pieces, b""), scratch), diff_id)
            name = f"{packed.digest.hex}.tar.gzip"
            with scratch.open(packed) as stream:
                self._write(name, packed.size, iter(lambda: stream.read(PIECE), b""))
        finally:
            scratch.close()
        return name, packed

    def _write(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        if name not in self._written:
            self._tar.write(name, size, pieces)
            self._written.add(name)


@contextmanager
def docker_tar(target: str | BinaryIO) -> Iterator[DockerTar]:
    """A docker archive to put images into; a path appears at the end, and not at all after an error."""
    with writing(target) as file:
        archive = DockerTar(file)
        yield archive
        archive.finish()


def _chain(head: bytes, read: Callable[[int], bytes]) -> Callable[[], bytes]:
    """A reader of ``head`` and then of what ``read`` gives."""
    ready = [head] if head else []
    return lambda: ready.pop() if ready else read(PIECE)


def _hashed(pieces: Iterator[bytes], update: Callable[[bytes], object]) -> Iterator[bytes]:
    for piece in pieces:
        update(piece)
        yield piece
