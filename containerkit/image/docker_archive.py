"""Docker archives (``docker save``): a tar with ``manifest.json``, which names configs, layers and tags.

Source: Docker's "image specification v1.2", "Combined Image JSON + Filesystem Changeset Format". There is no manifest
in one: an image's identity is the digest of its config, and a manifest is made of that when it is read.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.errors import InvalidImage
from containerkit.image.codec import (
    LARGEST_CONFIG,
    LARGEST_DOCUMENT,
    Document,
    descriptor_json,
    encode,
    parse_config,
    parse_json,
)
from containerkit.image.compression import LONGEST_MAGIC, compression_of
from containerkit.image.digest import Digest, new_hash
from containerkit.image.files import TarTarget, writing
from containerkit.image.layout import Stored, canonical, docker_tag
from containerkit.image.model import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, Descriptor
from containerkit.image.stream import PIECE, Verified, read_verified

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

    from containerkit.image.files import Files
    from containerkit.image.model import Manifest
    from containerkit.image.transfer import BlobSource


class Contents:
    """What a docker archive holds: its images, which file each layer's blob is, and the documents that were made."""

    def __init__(self) -> None:
        self.images: list[Stored] = []
        self.blobs: dict[Digest, str] = {}
        self.made: dict[Digest, bytes] = {}


def read_docker_archive(raw: bytes, files: Files) -> Contents:
    """Everything that the ``manifest.json`` in ``raw`` names. Raises :class:`InvalidImage`, ``FileNotFoundError``."""
    contents = Contents()
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
            known[pair] = _layer(*pair, files)
            contents.blobs[known[pair].digest] = pair[0]
    manifest = make_manifest(config, [known[pair] for pair in pairs])
    descriptor = Descriptor(DOCKER_MANIFEST, Digest.of(manifest), len(manifest))
    contents.made.update({Digest.of(config): config, descriptor.digest: manifest})
    tags = row.texts("RepoTags")
    return Stored(descriptor, tuple(name for tag in tags if (name := canonical(tag))), tags)


def make_manifest(config: bytes, layers: Sequence[Descriptor]) -> bytes:
    """The manifest of an image that came without one."""
    head = Descriptor(DOCKER_CONFIG, Digest.of(config), len(config))
    document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": descriptor_json(head),
        "layers": [descriptor_json(layer) for layer in layers],
    }
    return encode(document)


def _layer(name: str, diff_id: Digest, files: Files) -> Descriptor:
    """A plain layer's digest is its diff id; a compressed one's must be computed."""
    with files.open(name) as stream:
        head = stream.read(LONGEST_MAGIC)
        compression = compression_of(head)
        if not compression:
            return Descriptor(DOCKER_LAYER, diff_id, files.size(name))
        state = new_hash("sha256", head)
        while piece := stream.read(PIECE):
            state.update(piece)
    return Descriptor(f"{DOCKER_LAYER}.{compression}", Digest.from_hash(state), files.size(name))


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
    """A docker archive that is written front to back; layers stay compressed as they are, and shared ones come once."""

    def __init__(self, file: BinaryIO) -> None:
        self._tar = TarTarget(file)
        self._written: set[str] = set()
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
        made = make_manifest(config, [layer for _, layer in layers])
        return Descriptor(DOCKER_MANIFEST, Digest.of(made), len(made))

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
        with source.open(layer) as stream:
            verified = Verified(stream, layer)
            head = verified.piece()
            while head and len(head) < LONGEST_MAGIC and (more := verified.piece()):
                head += more
            kind = compression_of(head[:LONGEST_MAGIC])
            name = f"{layer.digest.hex}.tar{'.' + kind if kind else ''}"
            if name not in self._written:
                self._write(name, layer.size, _chain(head, verified))
        media_type = DOCKER_LAYER + (f".{kind}" if kind else "")
        return name, Descriptor(media_type, layer.digest if kind else diff_id, layer.size)

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


def _chain(head: bytes, verified: Verified) -> Iterator[bytes]:
    if head:
        yield head
    yield from iter(verified.piece, b"")
