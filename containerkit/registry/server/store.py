"""The images of a host as a registry's content, read-only: nothing is copied."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from containerkit.errors import BlobUnknown, ImageNotFound, ManifestUnknown, RegistryNotFound
from containerkit.image.reference import OFFICIAL, Reference
from containerkit.image.store.blobs import BlobStore
from containerkit.registry.server.storage import Directory, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.image.digest import Digest
    from containerkit.image.images import Image, Images


class Store(Directory):
    """Every name of an image here is one there, without its registry: ``debian:12`` and ``library/debian:12``.

    ``root`` is for what a server writes besides: its certificate.
    """

    def __init__(self, images: Images, root: str) -> None:
        super().__init__(root)
        self._images = images
        self._blobs = BlobStore(images.root)

    def _named(self, name: str) -> dict[str, Image]:
        """The images of a repository by tag."""
        found = {}
        for image in self._images.list():
            for text in image.names:
                reference = Reference.parse(text)
                if name in (reference.repository, reference.repository.removeprefix(OFFICIAL)):
                    with suppress(ImageNotFound):  # just removed
                        named = self._images.get(text)  # each name has a manifest of its own
                        found[reference.tag or named.digest] = named
        return found

    def manifest(self, name: str, target: str) -> Manifest:
        """The manifest of a tag or digest. Raises :class:`ManifestUnknown`."""
        images = self._named(name)
        image = images.get(target) or next((image for image in images.values() if image.digest == target), None)
        if image is None:
            raise ManifestUnknown(f"{name} has no manifest {target}")
        return Manifest(self._blobs.read(image.digest), image.media_type, image.digest)

    def blob(self, name: str, digest: Digest) -> str:
        """The file of a repository's blob. Raises :class:`BlobUnknown`."""
        for image in self._named(name).values():
            manifest = image.manifest
            if digest in {manifest.config.digest, *(layer.digest for layer in manifest.layers)}:
                return self._blobs.path(digest)
        raise BlobUnknown(f"{name} has no blob {digest}")

    def tags(self, name: str) -> list[str]:
        """The tags of a repository, sorted. Raises :class:`RegistryNotFound`."""
        if not (images := self._named(name)):
            raise RegistryNotFound(f"there is no repository {name}")
        return sorted(tag for tag in images if ":" not in tag)

    def referrers(self, name: str, digest: Digest) -> Iterator[Manifest]:
        """None: a host keeps images."""
        del name, digest
        return iter(())

    def repositories(self, *, everything: bool = False) -> list[str]:
        """The names of all repositories, sorted."""
        del everything
        names = (Reference.parse(name).repository for image in self._images.list() for name in image.names)
        return sorted({name.removeprefix(OFFICIAL) for name in names})
