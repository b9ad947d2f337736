"""Docker archives (``docker save``): a tar with ``manifest.json``, which names configs, layers and tags.

Source: Docker's "image specification v1.2", "Combined Image JSON + Filesystem Changeset Format". There is no manifest
in one: an image's identity is the digest of its config, and an OCI manifest is made of that when it is read. Layers
that are packed with bzip2 or xz, for which no media type has a name, become gzip.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.errors import InvalidImage
from containerkit.image.archives.files import TarTarget, writing
from containerkit.image.archives.layout import Stored, canonical, docker_tag
from containerkit.image.archives.recompress import UNNAMED, as_gzip
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
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.scratch import Scratch
from containerkit.image.stream import PIECE, Verified, read_verified, wrong_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from containerkit.image.archives.files import Files
    from containerkit.image.model import Manifest
    from containerkit.image.transfer import BlobSource


class Contents:
    """What an archive holds: its images, which file each layer's blob is, and what had to be made for reading it."""

    def __init__(self, scratch: str | None = None) -> None:
        self.images: list[Stored] = []
        self.blobs: dict[Digest, str] = {}
        self.made = Scratch(directory=scratch)


def read_docker_archive(raw: bytes, files: Files, scratch: str | None = None) -> Contents:
    """Everything that the ``manifest.json`` in ``raw`` names; what must be packed anew lies in ``scratch`` meanwhile.

    Raises :class:`InvalidImage`, ``FileNotFoundError``, and :class:`LayerError` for a layer that cannot be packed anew.
    """
    contents = Contents(scratch)
    layers: dict[tuple[str, Digest], Descriptor] = {}
    for row in parse_json(b'{"images":' + raw + b"}", "manifest.json").children("images"):
        contents.images.append(_image(row, contents, files, layers))
    return contents


def _image(row: Document, contents: Contents, files: Files, known: dict[tuple[str, Digest], Descriptor]) -> Stored:
    config = read_file(files, row.text("Config", needed=True), LARGEST_CONFIG)
    if config is None:
        raise row.invalid("Config", "a file of the archive")
    names, diff_ids = row.texts("Layers"), parse_config(config).diff_ids
    if len(names) != len(diff_ids):
        raise InvalidImage(f"manifest.json has {len(names)} layers, the config {len(diff_ids)} diff ids")
    pairs = list(zip(names, diff_ids, strict=True))
    for pair in pairs:
        if pair not in known:
            known[pair] = _layer(*pair, files, contents)
    descriptor, manifest = _made(config, [known[pair] for pair in pairs])
    contents.made.put_bytes(config, OCI_CONFIG)
    contents.made.put_bytes(manifest, OCI_MANIFEST)
    tags = row.texts("RepoTags")
    return Stored(descriptor, tuple(name for tag in tags if (name := canonical(tag))), tags)


def _made(config: bytes, layers: Sequence[Descriptor]) -> tuple[Descriptor, bytes]:
    """The manifest of an image that came without one."""
    return make_manifest(OCI_MANIFEST, Descriptor(OCI_CONFIG, Digest.of(config), len(config)), layers)


def _layer(name: str, diff_id: Digest, files: Files, contents: Contents) -> Descriptor:
    """A plain layer's digest is its diff id; a compressed one's must be computed."""
    with files.open(name) as stream:
        head = stream.read(LONGEST_MAGIC)
        compression = compression_of(head)
        if compression in UNNAMED:
            return as_gzip(_chain(head, stream.read), contents.made, diff_id)
        digest = diff_id
        if compression:
            state = new_hash("sha256", head)
            while piece := stream.read(PIECE):
                state.update(piece)
            digest = Digest.from_hash(state)
    contents.blobs[digest] = name
    return Descriptor(_media_type(compression), digest, files.size(name))


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
        self._tags: dict[str, list[str]] = {}

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
        tags = self._tags.setdefault(config_name, [])
        tags += [tag for name in names if (tag := docker_tag(name)) and tag not in tags]
        return _made(config, [layer for _, layer in layers])[0]

    def finish(self) -> None:
        """Write ``manifest.json`` and the end."""
        rows = [
            {"Config": config, "RepoTags": self._tags[config] or None, "Layers": layers}
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
            packed = as_gzip(lambda: next(pieces, b""), scratch, diff_id)
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
