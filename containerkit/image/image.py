"""An image that is here. Its plain attributes are on the path of every container start: they load nothing."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, cast

from containerkit.errors import BlobNotFound, ImageNotFound, InvalidReference
from containerkit.image.digest import Digest
from containerkit.image.reference import Reference
from containerkit.image.runconfig import RunConfig
from containerkit.state import WHOLE, driver_of

if TYPE_CHECKING:
    from containerkit.image.model import Descriptor, ImageConfig, Layer, Manifest
    from containerkit.image.rows import Row


class Image:
    """An image that is here. ``size`` is what config and layers weigh as they travel (bytes).

    ``id`` is the digest of its config, ``digest`` that of its manifest: of several with the same config, the one of the
    name that it was asked for by, else the one that came last. ``names`` are all of it, in Docker's familiar form.
    What is read from the content store raises :class:`ImageNotFound` where it has been removed meanwhile.
    """

    __slots__ = (
        "_driver",
        "_layers",
        "_lowers",
        "_root",
        "created_ns",
        "digest",
        "id",
        "media_type",
        "names",
        "run",
        "size",
    )

    def __init__(self, root: str, row: Row, names: tuple[str, ...]) -> None:
        identity, manifest, media_type, run, layers, size, created_ns = row
        self._root = root
        self.id = Digest(identity)
        self.digest = Digest(manifest)
        self.media_type = media_type
        self.run = RunConfig.from_json(run)
        self._layers = layers
        self.size = size
        self.created_ns = created_ns
        self.names = names
        self._driver = ""
        self._lowers: tuple[str, ...] = ()

    @property
    def driver(self) -> str:
        """The storage driver that made its trees; a state root keeps it as long as it has any."""
        self._driver = self._driver or driver_of(self._root)
        return self._driver

    @property
    def lowers(self) -> tuple[str, ...]:
        """Directories that together are its files, top layer first; one alone where the driver keeps whole trees."""
        if not (self._lowers and self._driver):
            chain = json.loads(self._layers)[::-1]
            if self.driver in WHOLE:
                del chain[1:]
            self._lowers = tuple(f"{self._root}/layers/{chain_id.partition(':')[2]}" for chain_id in chain)
        return self._lowers

    @property
    def unpacked(self) -> bool:
        """Whether its files are there, for containers and mounts; where not, the first of these unpacks them."""
        return self.driver != "" and all(map(os.path.isdir, self.lowers))

    @property
    def manifest(self) -> Manifest:
        """The manifest, read from the content store."""
        from containerkit.image.codec import parse_document

        return cast("Manifest", parse_document(self._read(self.digest), self.media_type))

    @property
    def config(self) -> ImageConfig:
        """The config, read from the content store."""
        from containerkit.image.codec import parse_config

        return parse_config(self._read(self.id))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, lowest first."""
        from containerkit.image.install import match_layers

        return match_layers(self.manifest, self.config)

    @property
    def descriptor(self) -> Descriptor:
        """The manifest by media type, digest and size."""
        from containerkit.image.model import Descriptor

        return Descriptor(self.media_type, self.digest, len(self._read(self.digest)))

    @property
    def row(self) -> Row:
        """As the database has it, with this manifest."""
        return (self.id, self.digest, self.media_type, self.run.to_json(), self._layers, self.size, self.created_ns)

    def _read(self, digest: Digest) -> bytes:
        from containerkit.image.store.blobs import BlobStore

        try:
            return BlobStore(self._root).read(digest)
        except BlobNotFound as error:
            label = next(iter(self.names), self.id)
            raise ImageNotFound(f"image {label} is no longer here: {error.message}", hint="pull it again") from error

    def has_name(self, name: str) -> bool:
        """Whether ``name`` is one of its names, in any form."""
        try:
            return Reference.parse(name).familiar in self.names
        except InvalidReference:
            return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and (self.id, self._root) == (other.id, other._root)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Image {self.id.short} {' '.join(self.names)}".rstrip() + ">"
