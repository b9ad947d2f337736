"""Images in files: OCI layouts (a directory or a tar) and docker archives (``docker save``), as sources of blobs.

Layers that are packed with bzip2 or xz are seen as gzip (:mod:`.recompress`).

Sources: the OCI image layout specification 1.1 and Docker's "image specification v1.2", ``manifest.json``.
"""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from containerkit.errors import (
    AmbiguousImage,
    BlobNotFound,
    CorruptLayer,
    ImageNotFound,
    InvalidArchive,
    InvalidImage,
)
from containerkit.image import platform
from containerkit.image.archives.docker_archive import Contents, read_docker_archive, read_file
from containerkit.image.archives.files import DirectoryFiles, TarFiles
from containerkit.image.archives.layout import Stored, canonical, layout_images
from containerkit.image.archives.recompress import NamedLayers
from containerkit.image.codec import LARGEST_DOCUMENT
from containerkit.image.layers.compression import LONGEST_MAGIC, compression_of, decompressed
from containerkit.image.limits import STANDARD
from containerkit.image.reference import Reference
from containerkit.image.stream import PIECE, read_verified
from containerkit.linux.paths import write_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from containerkit.image.archives.files import Files
    from containerkit.image.limits import ImageLimits
    from containerkit.image.model import Descriptor

SKOPEO_DIRECTORY = b"Directory Transport Version:"


class Archive:
    """The images in ``files``, and their blobs (a :class:`~containerkit.image.transfer.BlobSource`)."""

    def __init__(self, path: str, contents: Contents, files: Files) -> None:
        self._path = path
        self._contents = contents
        self._files = files
        self._named = NamedLayers(self, contents.made)

    def images(self) -> tuple[Stored, ...]:
        """Every image, in the archive's order. A descriptor may be of an index, with an image for each platform."""
        return tuple(map(self._readable, self._contents.images))

    def choose(self, tag: str | None) -> Stored:
        """The image that ``tag`` means, or the only one; of several that differ by platform alone, this machine's.

        Raises :class:`AmbiguousImage`, :class:`ImageNotFound`, :class:`InvalidArchive` where there is none at all.
        """
        chosen = self._choose(tag)
        if tag is not None and not chosen.names and (name := canonical(tag)):  # what it is called inside is no name
            chosen = chosen._replace(names=(name,))
        return self._readable(chosen)

    def _choose(self, tag: str | None) -> Stored:
        images = self._contents.images
        if not images:
            raise InvalidArchive(f"{self._path} has no image")
        labels = ", ".join(image.label for image in images)
        wanted = canonical(tag) if tag is not None else None
        matching = [image for image in images if tag in image.labels or (wanted and wanted in image.names)]
        if len(images) == 1 and not matching:
            only = images[0]
            return only._replace(names=(str(Reference.parse(tag)),)) if tag is not None else only
        if tag is not None and not matching:
            raise ImageNotFound(f"{self._path} has no image {tag}; it has {labels}")
        matching = matching or images
        if len(matching) > 1 and _one_name(matching):
            best = platform.choose([image.descriptor for image in matching], self._path)
            return next(image for image in matching if image.descriptor is best)
        if len(matching) > 1:
            raise AmbiguousImage(f"{self._path} has several images: {labels}", hint="say which with tag=")
        return matching[0]

    def manifest(self, image: Stored) -> bytes:
        """The bytes of its manifest or index, verified."""
        with self.open(image.descriptor) as stream:
            return read_verified(stream, image.descriptor, LARGEST_DOCUMENT)

    def open(self, descriptor: Descriptor) -> BinaryIO:
        """A blob. Raises :class:`BlobNotFound`."""
        digest = descriptor.digest
        with suppress(BlobNotFound):
            return self._contents.made.open(descriptor)
        try:
            return self._files.open(self._contents.blobs.get(digest) or f"blobs/{digest.algorithm}/{digest.hex}")
        except FileNotFoundError as error:
            raise BlobNotFound(f"{self._path} lacks the blob {digest}") from error

    def close(self) -> None:
        """Let go of what was packed anew."""
        self._contents.made.close()

    def _readable(self, stored: Stored) -> Stored:
        """An image whose layers any engine can read."""
        return stored._replace(descriptor=self._named.of(stored.descriptor))


@contextmanager
def open_archive(path: str | BinaryIO, scratch: str | None = None, limits: ImageLimits = STANDARD) -> Iterator[Archive]:
    """The archive at ``path``, or in a binary file object, which is read from where it stands.

    A compressed one (gzip, zstd, bzip2, xz) and one that cannot be read twice, as a pipe, first goes into an unnamed
    place in the directory ``scratch`` (by default the system's for temporary files).
    Raises :class:`InvalidArchive`, ``FileNotFoundError``, :class:`ImageTooLarge` for a tar of more members, or a docker
    archive of more images, than ``limits`` allow, and :class:`LayerError` for layers that cannot be packed anew.
    """
    with _opened(path, scratch, limits) as (shown, files):
        archive = read_archive(shown, files, scratch, limits)
        try:
            yield archive
        finally:
            archive.close()


@contextmanager
def _opened(path: str | BinaryIO, scratch: str | None, limits: ImageLimits) -> Iterator[tuple[str, Files]]:
    """What to call it, and its files."""
    if isinstance(path, str) and os.path.isdir(path):
        yield path, DirectoryFiles(path)
        return
    with open(path, "rb", buffering=0) if isinstance(path, str) else _Borrowed(path) as file:
        shown = path if isinstance(path, str) else str(getattr(path, "name", "the stream"))
        head = _head(file)
        direct = _reopenable(file, len(head)) if not compression_of(head) else ""
        if direct:
            yield shown, TarFiles(direct, shown, limits)
            return
        with tempfile.NamedTemporaryFile(prefix="archive-", dir=scratch) as plain:
            _spool(head, file, plain.fileno(), shown)
            yield shown, TarFiles(plain.name, shown, limits)


class _Borrowed:
    """A caller's file object, which stays open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __enter__(self) -> BinaryIO:
        return self._file

    def __exit__(self, *_: object) -> None:
        pass


def read_archive(path: str, files: Files, scratch: str | None = None, limits: ImageLimits = STANDARD) -> Archive:
    """What is in ``files``. An OCI layout that is a docker archive as well, as Docker's are, is read as a layout."""
    try:
        if (index := read_file(files, "index.json")) is not None and read_file(files, "oci-layout") is not None:
            contents = Contents(scratch)
            contents.images = layout_images(index)
            return Archive(path, contents, files)
        if (manifest := read_file(files, "manifest.json")) is not None and not _skopeo_directory(files):
            return Archive(path, read_docker_archive(manifest, files, scratch, limits), files)
    except (InvalidImage, FileNotFoundError) as error:
        raise InvalidArchive(f"{path}: {error}") from error
    if _skopeo_directory(files):
        hint = f"skopeo copy dir:{path} oci:LAYOUT makes a layout of it"
        raise InvalidArchive(f"{path} is a directory of skopeo's dir: transport (podman's docker-dir)", hint=hint)
    raise InvalidArchive(f"{path} is neither an OCI layout nor a docker archive")


def _skopeo_directory(files: Files) -> bool:
    try:
        with files.open("version") as stream:
            return stream.read(len(SKOPEO_DIRECTORY)) == SKOPEO_DIRECTORY
    except OSError:
        return False


def _one_name(images: list[Stored]) -> bool:
    """Whether they have one name among them, or none, and a platform each."""
    names = {(image.names, image.labels) for image in images}
    return len(names) == 1 and all(image.descriptor.platform is not None for image in images)


def _head(file: BinaryIO) -> bytes:
    head = b""
    while len(head) < LONGEST_MAGIC and (piece := file.read(LONGEST_MAGIC - len(head))):
        head += piece
    return head


def _reopenable(file: BinaryIO, behind: int) -> str:
    """A path by which a regular file that stands at its beginning can be read again, or nothing."""
    try:
        fd = file.fileno()
        regular = stat.S_ISREG(os.fstat(fd).st_mode) and file.tell() == behind
    except (OSError, ValueError):
        return ""
    return f"/proc/self/fd/{fd}" if regular else ""


def _spool(head: bytes, file: BinaryIO, target: int, shown: str) -> None:
    ready = [head]
    read = decompressed(lambda: ready.pop() if ready else file.read(PIECE))
    try:
        while piece := read():
            write_all(target, piece)
    except CorruptLayer as error:
        raise InvalidArchive(f"{shown} is damaged: {error}") from error
