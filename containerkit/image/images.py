"""Images by name: what is here, and bringing it in and out.

:meth:`Images.get` and :class:`Image`'s plain attributes are on the path of every container start: one row of the
database and no further import. Everything else loads what it needs when it is called.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from containerkit.errors import AmbiguousImage, ImageInUse, ImageNotFound, InvalidReference
from containerkit.image.digest import HEX, Digest
from containerkit.image.reference import Reference
from containerkit.image.runconfig import RunConfig
from containerkit.image.workbench import Workbench
from containerkit.state import WHOLE, driver_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from containerkit.image.archive import Archive
    from containerkit.image.install import Installed
    from containerkit.image.layout import Stored
    from containerkit.image.limits import ImageLimits
    from containerkit.image.model import Descriptor, ImageConfig, Layer, Manifest, Platform
    from containerkit.image.progress import Watcher
    from containerkit.image.transfer import BlobSource, Connect
    from containerkit.state import State

COLUMNS = "id, manifest, media_type, run, layers, size, created_ns"
SHORTEST_PREFIX = 2


class Image:
    """An image that is here. ``size`` is what config and layers weigh as they travel (bytes).

    ``id`` is the digest of its config, ``digest`` that of its manifest; ``names`` are in Docker's familiar form.
    """

    __slots__ = ("_layers", "_root", "created_ns", "digest", "id", "media_type", "names", "run", "size")

    def __init__(self, root: str, row: tuple[str, str, str, str, str, int, int], names: tuple[str, ...]) -> None:
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

    @property
    def lowers(self) -> tuple[str, ...]:
        """Directories that together are its files, top layer first; one alone where the driver keeps whole trees."""
        chain = json.loads(self._layers)[::-1]
        if driver_of(self._root) in WHOLE:
            del chain[1:]
        return tuple(os.path.join(self._root, "layers", chain_id.partition(":")[2]) for chain_id in chain)

    @property
    def manifest(self) -> Manifest:
        """The manifest, read from the content store."""
        from containerkit.image.blobs import BlobStore
        from containerkit.image.codec import parse_document

        return cast("Manifest", parse_document(BlobStore(self._root).read(self.digest), self.media_type))

    @property
    def config(self) -> ImageConfig:
        """The config, read from the content store."""
        from containerkit.image.blobs import BlobStore
        from containerkit.image.codec import parse_config

        return parse_config(BlobStore(self._root).read(self.id))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, lowest first."""
        from containerkit.image.install import match_layers

        return match_layers(self.manifest, self.config)

    @property
    def descriptor(self) -> Descriptor:
        """The manifest by media type, digest and size."""
        from containerkit.image.blobs import BlobStore
        from containerkit.image.model import Descriptor

        return Descriptor(self.media_type, self.digest, os.stat(BlobStore(self._root).path(self.digest)).st_size)

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


class Images(Workbench):
    """The images of one state root. ``connect`` gives the registry's repository of a reference."""

    def __init__(self, state: State, connect: Connect) -> None:
        self._state = state
        self._connect = connect
        #: How much an image may ask for; None means the standard limits.
        self.limits: ImageLimits | None = None
        #: Whether unpacked layers are synced to the disk before an image is there.
        self.durable = False

    @property
    def root(self) -> str:
        """The state root."""
        return self._state.root

    def get(self, name: str) -> Image:
        """The image of a name, an id or the beginning of an id.

        Raises :class:`ImageNotFound` and, where several ids begin so, :class:`AmbiguousImage`.
        """
        return self._image(self._find(name))

    def list(self) -> list[Image]:
        """Every image, newest first."""
        database = self._state.database
        rows = database.execute(f"SELECT {COLUMNS} FROM images ORDER BY created_ns DESC, id").fetchall()  # noqa: S608
        names: dict[str, list[str]] = {}
        for name, image in database.execute("SELECT name, image FROM names ORDER BY name"):
            names.setdefault(image, []).append(Reference.parse(name).familiar)
        return [Image(self._state.root, row, tuple(names.get(row[0], ()))) for row in rows]

    def tag(self, image: Image | str, name: str) -> Image:
        """Give an image one more name, taken from whatever had it. Raises :class:`ImageNotFound`."""
        reference = Reference.parse(name)
        if reference.digest:
            raise InvalidReference(f"cannot tag as {name!r}", hint="a digest is not given, it follows from the content")
        identity = image.id if isinstance(image, Image) else self._find(image)
        with self._state.transaction() as database:
            if not database.execute("SELECT 1 FROM images WHERE id = ?", (identity,)).fetchone():
                raise ImageNotFound(f"image {identity} is no longer here")
            database.execute("INSERT OR REPLACE INTO names VALUES (?, ?)", (str(reference), identity))
        return self._image(identity)

    def remove(self, image: Image | str) -> None:
        """Take away a name, and with the last one the image; an :class:`Image` or an id takes all its names.

        Raises :class:`ImageNotFound`, and :class:`ImageInUse` where a container needs what would go.
        """
        with self._state.transaction() as database:
            identity = image.id if isinstance(image, Image) else self._find(image)
            name = None if isinstance(image, Image) else self._name_of(image)
            if name is not None:
                database.execute("DELETE FROM names WHERE name = ?", (name,))
                if database.execute("SELECT 1 FROM names WHERE image = ?", (identity,)).fetchone():
                    return
            users = database.execute("SELECT name FROM containers WHERE image = ?", (identity,)).fetchall()
            if users:
                raise ImageInUse(
                    f"image {name or identity} is needed by {', '.join(user for (user,) in users)}",
                    hint="remove the containers first",
                )
            if not database.execute("DELETE FROM images WHERE id = ?", (identity,)).changes:
                raise ImageNotFound(f"image {identity} is no longer here")
        from containerkit.image.gc import gc as sweep

        sweep(self._state)

    def pull(self, name: str, *, platform: Platform | str | None = None, progress: Watcher | None = None) -> Image:
        """Bring an image in from its registry; what is here already is not fetched again.

        ``platform`` (``linux/arm64/v8``) is another than this machine's. ``progress`` is called with a
        :class:`~containerkit.image.progress.Progress` at every step; ``progress.Bar()`` is one that shows a bar.
        Raises :class:`ImageNotFound`, :class:`PlatformMismatch`, :class:`InvalidImage`, :class:`ContentMismatch`,
        :class:`LayerError` and :class:`RegistryError`, and then leaves nothing of the image.
        """
        from containerkit.image.gc import bringing_in

        reference = Reference.parse(name)
        remote = self._connect(reference, push=False)
        try:
            with bringing_in(self._state):
                descriptor, body = remote.resolve(reference)
                remote.approve(reference, descriptor.digest)
                stored = (_stored_name(reference),)
                return self._install(remote, descriptor, body, reference.familiar, stored, platform, progress)
        finally:
            remote.close()

    def push(self, name: str) -> Digest:
        """Send the image of this name to the registry that the name says; gives the manifest's digest there.

        Raises :class:`ImageNotFound` and :class:`RegistryError`.
        """
        from containerkit.image.blobs import BlobStore
        from containerkit.image.leases import lease, touch
        from containerkit.image.transfer import copy_image

        reference = Reference.parse(name)
        with lease(self._state):
            image = self.get(name)
            touch(self._state, image.id)
            remote = self._connect(reference, push=True)
            try:
                body = copy_image(image.descriptor, BlobStore(self._state.root), remote)
                return remote.put_manifest(reference, image.media_type, body)
            finally:
                remote.close()

    def load(self, path: str | os.PathLike[str] | BinaryIO, tag: str | None = None) -> Image:
        """Bring an image in from an OCI layout (directory or tar) or a docker archive (tar, also compressed).

        ``path`` may be a binary file or pipe. ``tag`` says which, where the archive has several, by its full name or
        its name in the layout. One image alone is loaded whatever its name, and is given the name ``tag``.
        Raises :class:`InvalidArchive`, :class:`AmbiguousImage`, :class:`ImageNotFound` and what :meth:`pull` raises.
        """
        with self._archive(path) as archive:
            return self._load(archive, archive.choose(tag))

    def load_all(self, path: str | os.PathLike[str] | BinaryIO) -> tuple[Image, ...]:
        """Bring in every image of an archive or layout; else as :meth:`load`."""
        with self._archive(path) as archive:
            return tuple(self._load(archive, stored) for stored in archive.images())

    @contextmanager
    def _archive(self, path: str | os.PathLike[str] | BinaryIO) -> Iterator[Archive]:
        from containerkit.image.archive import open_archive
        from containerkit.image.gc import bringing_in

        place = os.fspath(path) if isinstance(path, str | os.PathLike) else path
        with bringing_in(self._state), open_archive(place, self._state.path("ingest")) as archive:
            yield archive

    def _load(self, archive: Archive, stored: Stored) -> Image:
        return self._install(archive, stored.descriptor, archive.manifest(stored), stored.label, stored.names)

    def import_rootfs(self, path: str | os.PathLike[str], tag: str) -> Image:
        """Make a one-layer image of a root file system, a directory or a tar (also compressed), and name it ``tag``.

        Raises :class:`InvalidReference`, :class:`LayerError` and ``FileNotFoundError``.
        """
        from containerkit.image.gc import bringing_in
        from containerkit.image.rootfs import make_image

        reference = Reference.parse(tag)
        with bringing_in(self._state):
            blobs, descriptor, body = make_image(os.fspath(path), self._state.root)
            return self._install(blobs, descriptor, body, tag, (_stored_name(reference),))

    def install(self, source: BlobSource, descriptor: Descriptor, name: str | None = None) -> Image:
        """Bring in the image of a manifest or index that ``source`` has, and give it a name, if there is one.

        Raises what :meth:`pull` raises.
        """
        from containerkit.image.codec import LARGEST_DOCUMENT
        from containerkit.image.gc import bringing_in
        from containerkit.image.stream import read_verified

        names = (_stored_name(Reference.parse(name)),) if name else ()
        with bringing_in(self._state):
            with source.open(descriptor) as stream:
                body = read_verified(stream, descriptor, LARGEST_DOCUMENT)
            return self._install(source, descriptor, body, name or descriptor.digest, names)

    def _install(
        self,
        source: BlobSource,
        descriptor: Descriptor,
        body: bytes,
        label: str,
        names: tuple[str, ...],
        platform: Platform | str | None = None,
        progress: Watcher | None = None,
    ) -> Image:
        from containerkit.image.install import Installer
        from containerkit.image.limits import STANDARD
        from containerkit.image.platform import parse

        wanted = parse(platform) if isinstance(platform, str) else platform
        limits = self.limits or STANDARD
        root = self._state.root
        installer = Installer(
            root, source, label, platform=wanted, limits=limits, progress=progress, durable=self.durable
        )
        installed = installer.install(descriptor, body)
        return self.register(installed, names)

    def register(self, installed: Installed, names: tuple[str, ...]) -> Image:
        """The last step: what is all here gets its row and its (canonical) names at once."""
        from containerkit.image.record import record_image

        record_image(self._state, installed, names)
        return self._image(installed.id)

    def _image(self, identity: str) -> Image:
        database = self._state.database
        row = database.execute(f"SELECT {COLUMNS} FROM images WHERE id = ?", (identity,)).fetchone()  # noqa: S608
        if row is None:
            raise ImageNotFound(f"image {identity} is no longer here")
        names = database.execute("SELECT name FROM names WHERE image = ? ORDER BY name", (identity,)).fetchall()
        return Image(self._state.root, row, tuple(Reference.parse(name).familiar for (name,) in names))

    def _find(self, name: str) -> str:
        """The id behind a name, an id or a prefix of one."""
        database = self._state.database
        if (stored := self._name_of(name)) is not None:
            return str(database.execute("SELECT image FROM names WHERE name = ?", (stored,)).fetchone()[0])
        if (identity := self._by_manifest(name)) is not None:
            return identity
        prefix = name.removeprefix("sha256:")
        if len(prefix) >= SHORTEST_PREFIX and HEX.issuperset(prefix):
            found = database.execute("SELECT id FROM images WHERE id LIKE ? LIMIT 2", (f"sha256:{prefix}%",)).fetchall()
            if len(found) > 1:
                raise AmbiguousImage(f"several images have ids that begin with {prefix}", hint="give more digits")
            if found:
                return str(found[0][0])
        raise ImageNotFound(f"there is no image {name}", hint="pull it first")

    def _name_of(self, name: str) -> str | None:
        """The stored form of a name that an image has."""
        try:
            stored = _stored_name(Reference.parse(name))
        except InvalidReference:
            return None
        found = self._state.database.execute("SELECT 1 FROM names WHERE name = ?", (stored,)).fetchone()
        return stored if found else None

    def _by_manifest(self, name: str) -> str | None:
        """``repository@digest`` of an image that came by another name of the same repository."""
        try:
            reference = Reference.parse(name)
        except InvalidReference:
            return None
        if reference.digest is None:
            return None
        found = self._state.database.execute(
            "SELECT id FROM images JOIN names ON image = id WHERE manifest = ? AND substr(name, 1, ?) IN (?, ?)",
            (reference.digest, len(reference.name) + 1, reference.name + ":", reference.name + "@"),
        ).fetchone()
        return str(found[0]) if found else None


def _stored_name(reference: Reference) -> str:
    """A name as the database has it: with a digest, the tag says nothing more."""
    return str(reference.with_digest(reference.digest) if reference.digest else reference)
