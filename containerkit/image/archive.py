"""Images in files: OCI layouts (a directory or a tar) and docker archives (``docker save``), as sources of blobs.

Sources: the OCI image layout specification 1.0 and Docker's "image specification v1.2", ``manifest.json``.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from containerkit.errors import (
    AmbiguousImage,
    BlobNotFound,
    CorruptLayer,
    ImageNotFound,
    InvalidArchive,
    InvalidImage,
    InvalidReference,
)
from containerkit.image.codec import (
    LARGEST_CONFIG,
    LARGEST_DOCUMENT,
    Document,
    descriptor_json,
    encode,
    parse_config,
    parse_document,
    parse_json,
)
from containerkit.image.compression import compression_of, decompressed
from containerkit.image.digest import Digest, new_hash
from containerkit.image.extract import write_all
from containerkit.image.model import DOCKER_CONFIG, DOCKER_LAYER, DOCKER_MANIFEST, Descriptor, Index
from containerkit.image.reference import Reference
from containerkit.image.stream import PIECE, read_verified

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"


class Stored(NamedTuple):
    """One image of an archive: canonical names, and what it is called inside."""

    descriptor: Descriptor
    names: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return next(iter((*self.labels, *self.names)), self.descriptor.digest)


class Files(Protocol):
    """The files of an archive."""

    def open(self, name: str) -> BinaryIO:
        """One file. Raises ``FileNotFoundError``."""

    def size(self, name: str) -> int:
        """Its size in bytes. Raises ``FileNotFoundError``."""


class DirectoryFiles:
    """Those of a directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def open(self, name: str) -> BinaryIO:
        """One file."""
        return open(os.path.join(self._path, name), "rb", buffering=0)

    def size(self, name: str) -> int:
        """Its size."""
        return os.stat(os.path.join(self._path, name)).st_size


class TarFiles:
    """Those of a tar; any number of threads may read at once."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as tar:
                members = tar.getmembers()
                end = os.stat(path).st_size
                self._places = {
                    os.path.normpath(member.name): (found.offset_data, found.size)
                    for member in members
                    if (found := _target(tar, member)) is not None
                }
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise InvalidArchive(f"{path} is not a tar, or a damaged one: {error}") from error
        if any(offset + size > end for offset, size in self._places.values()):
            raise InvalidArchive(f"{path} is truncated")

    def open(self, name: str) -> BinaryIO:
        """One file."""
        offset, size = self._place(name)
        return io.BufferedReader(Window(self._path, offset, size), PIECE)

    def size(self, name: str) -> int:
        """Its size."""
        return self._place(name)[1]

    def _place(self, name: str) -> tuple[int, int]:
        try:
            return self._places[os.path.normpath(name)]
        except KeyError:
            raise FileNotFoundError(name) from None


class Window(io.RawIOBase):
    """A part of a file, with a descriptor of its own."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._position = offset
        self._end = offset + size

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read the next bytes."""
        count = os.preadv(self._fd, [memoryview(buffer)[: self._end - self._position]], self._position)
        self._position += count
        return count

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._fd)
        super().close()


class Archive:
    """The images in ``files``, and their blobs (a :class:`~containerkit.image.transfer.BlobSource`)."""

    def __init__(
        self, path: str, images: list[Stored], blobs: dict[Digest, str], made: dict[Digest, bytes], files: Files
    ) -> None:
        self._path = path
        self._images = images
        self._blobs = blobs
        self._made = made
        self._files = files

    def choose(self, tag: str | None) -> Stored:
        """The image that ``tag`` means, or the only one.

        Raises :class:`AmbiguousImage`, :class:`ImageNotFound`, :class:`InvalidArchive` where there is none at all.
        """
        if not self._images:
            raise InvalidArchive(f"{self._path} has no image")
        labels = ", ".join(image.label for image in self._images)
        wanted = _canonical(tag) if tag is not None else None
        matching = [image for image in self._images if tag in image.labels or (wanted and wanted in image.names)]
        if len(self._images) == 1 and not matching:
            only = self._images[0]
            return only._replace(names=(str(Reference.parse(tag)),)) if tag is not None else only
        if tag is not None and not matching:
            raise ImageNotFound(f"{self._path} has no image {tag}; it has {labels}")
        if len(matching or self._images) > 1:
            raise AmbiguousImage(f"{self._path} has several images: {labels}", hint="say which with tag=")
        return matching[0]

    def manifest(self, image: Stored) -> bytes:
        """The bytes of its manifest or index, verified."""
        with self.open(image.descriptor) as stream:
            return read_verified(stream, image.descriptor, LARGEST_DOCUMENT)

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A blob. Raises :class:`BlobNotFound`."""
        digest = descriptor.digest
        if digest in self._made:
            return io.BytesIO(self._made[digest])
        try:
            return self._files.open(self._blobs.get(digest) or f"blobs/{digest.algorithm}/{digest.hex}")
        except FileNotFoundError as error:
            raise BlobNotFound(f"{self._path} lacks the blob {digest}") from error


@contextmanager
def open_archive(path: str, scratch: str) -> Iterator[Archive]:
    """The archive at ``path``; a compressed one is first unpacked into the directory ``scratch``.

    Raises :class:`InvalidArchive` and ``FileNotFoundError``.
    """
    if os.path.isdir(path):
        yield read_archive(path, DirectoryFiles(path))
        return
    with open(path, "rb") as file:
        compressed = compression_of(file.read(4))
    if not compressed:
        yield read_archive(path, TarFiles(path))
        return
    with tempfile.NamedTemporaryFile(prefix="archive-", dir=scratch) as plain:
        _decompress(path, plain.fileno())
        yield read_archive(path, TarFiles(plain.name))


def read_archive(path: str, files: Files) -> Archive:
    """What is in ``files``."""
    try:
        if (index := _read(files, "index.json")) is not None and _read(files, "oci-layout") is not None:
            return Archive(path, _layout_images(index), {}, {}, files)
        if (manifest := _read(files, "manifest.json")) is not None:
            return _docker_archive(path, manifest, files)
    except (InvalidImage, FileNotFoundError) as error:
        raise InvalidArchive(f"{path}: {error}") from error
    raise InvalidArchive(f"{path} is neither an OCI layout nor a docker archive")


def _layout_images(raw: bytes) -> list[Stored]:
    index = parse_document(raw)
    if not isinstance(index, Index):
        raise InvalidImage("index.json is not an index")
    images: dict[Digest, Stored] = {}
    for descriptor in index.manifests:
        short, full = descriptor.annotations.get(REF_NAME, ""), descriptor.annotations.get(FULL_NAME, "")
        name = full or (short if ":" in short or "/" in short else "")
        old = images.get(descriptor.digest, Stored(descriptor, (), ()))
        names = (*old.names, *filter(None, [_canonical(name)]))
        images[descriptor.digest] = Stored(descriptor, names, (*old.labels, *filter(None, [short])))
    return list(images.values())


def _docker_archive(path: str, raw: bytes, files: Files) -> Archive:
    rows = parse_json(b'{"images":' + raw + b"}", "manifest.json").children("images")
    archive = Archive(path, [], {}, {}, files)
    for row in rows:
        archive._images.append(_docker_image(row, archive._blobs, archive._made, files))  # noqa: SLF001
    return archive


def _docker_image(row: Document, blobs: dict[Digest, str], made: dict[Digest, bytes], files: Files) -> Stored:
    """An image of a docker archive, which has no manifest: one is made of what is there."""
    config = _read(files, row.text("Config", needed=True), LARGEST_CONFIG)
    if config is None:
        raise row.invalid("Config", "a file of the archive")
    names, diff_ids = row.texts("Layers"), parse_config(config).diff_ids
    if len(names) != len(diff_ids):
        raise InvalidImage(f"manifest.json has {len(names)} layers, the config {len(diff_ids)} diff ids")
    layers = [_docker_layer(name, diff_id, files) for name, diff_id in zip(names, diff_ids, strict=True)]
    blobs.update({layer.digest: name for layer, name in zip(layers, names, strict=True)})
    head = Descriptor(DOCKER_CONFIG, Digest.of(config), len(config))
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": descriptor_json(head),
            "layers": [descriptor_json(layer) for layer in layers],
        }
    )
    descriptor = Descriptor(DOCKER_MANIFEST, Digest.of(manifest), len(manifest))
    made.update({head.digest: config, descriptor.digest: manifest})
    tags = row.texts("RepoTags")
    return Stored(descriptor, tuple(name for tag in tags if (name := _canonical(tag))), tags)


def _docker_layer(name: str, diff_id: Digest, files: Files) -> Descriptor:
    """A plain layer's digest is its diff id; a compressed one's must be computed."""
    with files.open(name) as stream:
        head = stream.read(4)
        compression = compression_of(head)
        if not compression:
            return Descriptor(DOCKER_LAYER, diff_id, files.size(name))
        state = new_hash("sha256", head)
        while piece := stream.read(PIECE):
            state.update(piece)
    return Descriptor(f"{DOCKER_LAYER}.{compression}", Digest.from_hash(state), files.size(name))


def _read(files: Files, name: str, limit: int = LARGEST_DOCUMENT) -> bytes | None:
    try:
        if files.size(name) > limit:
            raise InvalidImage(f"{name} is larger than the {limit} bytes that it may have")
        with files.open(name) as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def _canonical(name: str) -> str:
    """A full name, or nothing where it is none."""
    try:
        return str(Reference.parse(name))
    except InvalidReference:
        return ""


def _target(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The file behind a member; early docker archives share layers by links."""
    try:
        found = member
        for _ in range(4):
            if found.isreg():
                return found
            if not (found.issym() or found.islnk()):
                return None
            at = os.path.dirname(found.name) if found.issym() else ""
            found = tar.getmember(os.path.normpath(os.path.join(at, found.linkname)))
    except KeyError:
        pass
    return None


def _decompress(path: str, target: int) -> None:
    with open(path, "rb", buffering=0) as file:
        read = decompressed(lambda: file.read(PIECE))
        try:
            while piece := read():
                write_all(target, piece)
        except CorruptLayer as error:
            raise InvalidArchive(f"{path} is damaged: {error}") from error
