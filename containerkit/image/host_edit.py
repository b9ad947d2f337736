"""An image of a host under change: the editor, with the store's names for what it reads and makes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from containerkit.errors import BlobNotFound, ImageNotFound
from containerkit.image.copies import own_platform
from containerkit.image.edit import Editor
from containerkit.image.model import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Self

    from containerkit.image.images import Image
    from containerkit.image.pack import Packed
    from containerkit.image.transfer import BlobSource
    from containerkit.image.workbench import Workbench


class Edit(Editor):
    """An :class:`~containerkit.image.edit.Editor` of an image in the store; :meth:`commit` keeps what it has become."""

    def __init__(self, images: Workbench, source: BlobSource, image: Image) -> None:
        self._images = images
        self._image = image
        self._store = source
        super().__init__(source, image.descriptor)

    def rebase(
        self, old: Manifest | Image | str, new: Manifest | Image | str, *, bases: BlobSource | None = None
    ) -> Self:
        """As :meth:`.Editor.rebase`; images of the store and their names will do for both bases.

        Raises :class:`ImageNotFound` too.
        """
        return super().rebase(self._manifest_of(old), self._manifest_of(new), bases=bases)

    def commit(self, name: str | None = None, *, unpack: bool | None = None) -> Image:
        """Keep it as an image of its own, with a name if there is one; other names keep what they have.

        ``unpack`` is as for :meth:`.Images.pull`. Raises as :meth:`.Images.install` does, and :class:`ImageNotFound`
        where the image that it was made of has been removed.
        """
        with self._images.lease(), self._still_there():
            made = self.finish()
            platform = own_platform(self.source, made)
            return self._images.install(self.source, made, name, platform=platform, unpack=unpack)

    def _pack(self, pieces: Iterable[bytes], compression: str) -> Packed:
        with self._still_there():
            return super()._pack(pieces, compression)

    @contextmanager
    def _still_there(self) -> Iterator[None]:
        """What is missing belongs to an image that has been removed, if it has: also where it is here again."""
        try:
            yield
        except BlobNotFound as error:
            image = self._images.hold(self._image)
            if not self._is_whole(image):
                raise
            message = f"what image {image.id} is to become is made of images that were removed: {error.message}"
            raise ImageNotFound(message, hint="edit it anew") from error

    def _is_whole(self, image: Image) -> bool:
        try:
            for layer in image.layers:
                self._store.open(layer.descriptor).close()
        except BlobNotFound:
            return False
        return True

    def _manifest_of(self, base: Manifest | Image | str) -> Manifest:
        found = self._images.get(base) if isinstance(base, str) else base
        return found if isinstance(found, Manifest) else found.manifest
