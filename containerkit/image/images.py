"""Images by name: what is here, and bringing it in and out.

:meth:`Images.get` and :class:`Image`'s plain attributes are on the path of every container start: one row of the
database and no further import. Everything else loads what it needs when it is called.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from containerkit.errors import ImageNotFound, InvalidReference
from containerkit.image.image import Image
from containerkit.image.reference import Reference
from containerkit.image.rows import COLUMNS, Found, by_id, find, manifests_of, names_of, stored_name
from containerkit.image.workbench import Workbench

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from containerkit.image.archives.archive import Archive
    from containerkit.image.archives.layout import Stored
    from containerkit.image.digest import Digest
    from containerkit.image.install import Installer
    from containerkit.image.limits import ImageLimits
    from containerkit.image.model import Descriptor, Platform
    from containerkit.image.progress import Show, Watcher
    from containerkit.image.transfer import BlobSource, Connect
    from containerkit.state import State

__all__ = ["Image", "Images"]


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
        database = self._state.database
        row = find(database, name).row
        return Image(self._state.root, row, names_of(database, row[0]))

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
        from containerkit.image.record import give_name, require_whole

        with self._state.transaction() as database:
            row = image.row if isinstance(image, Image) else find(database, image).row
            require_whole(self._state, row)
            give_name(database, str(reference), row)
            return Image(self._state.root, row, names_of(database, row[0]))

    def remove(self, image: Image | str) -> None:
        """Take away a name, and with the last one the image; an :class:`Image` or an id takes all its names.

        Raises :class:`ImageNotFound`, and :class:`ImageInUse` where a container needs what would go.
        """
        from containerkit.image.record import forget_image, take_name
        from containerkit.image.rows import is_known
        from containerkit.image.store.gc import gc as sweep

        self._state.make_room()
        with self._state.transaction() as database:
            found = Found(image.row) if isinstance(image, Image) else find(database, image)
            if found.name is not None and take_name(database, found.name, found.row):
                if is_known(database, *found.row[:2]):
                    return
            else:
                forget_image(database, found.row[0], found.name or "")
        sweep(self._state)

    def pull(
        self,
        name: str,
        *,
        platform: Platform | str | None = None,
        progress: Show = None,
        unpack: bool | None = None,
    ) -> Image:
        """Bring an image in from its registry; what is here already is not fetched again.

        ``platform`` (``linux/arm64/v8``) is another than this machine's. ``unpack`` says whether its layers are
        unpacked at once; else the first container or mount does it. None is yes for root, and no for others.
        ``progress`` is called with a :class:`~containerkit.image.progress.Progress` at every step; ``True`` shows a
        bar, by tqdm or else rich, ``"tqdm"`` or ``"rich"`` by that one (:class:`Unsupported` where it is not
        installed).
        Raises :class:`ImageNotFound`, :class:`PlatformMismatch`, :class:`InvalidImage`, :class:`ContentMismatch`,
        :class:`LayerError` and :class:`RegistryError`. There is no image then; what was downloaded and verified stays
        for the next attempt, for a day (:meth:`gc`).
        """
        from containerkit.image.progress import shown
        from containerkit.image.store.gc import bringing_in

        reference = Reference.parse(name)
        remote = self._connect(reference, push=False)
        try:
            with bringing_in(self._state, remote), shown(progress, reference.familiar) as watcher:
                descriptor, body = remote.resolve(reference)
                remote.approve(reference, descriptor.digest)
                stored = (stored_name(reference),)
                return self.bring_in(remote, descriptor, body, reference.familiar, stored, platform, watcher, unpack)
        finally:
            remote.close()

    def push(
        self, name: str | Image, *, tags: Iterable[str] = (), progress: Show = None, compression: str | None = None
    ) -> Digest:
        """Send the image of this name to the registry that the name says; gives the manifest's digest there.

        An :class:`Image` will do where its manifest has one name. ``tags`` are more tags that it gets in the same
        repository. What the registry has is not sent again, also where it is known to have it in another repository.
        ``progress`` is as for :meth:`pull`. With ``compression`` (``gzip`` or ``zstd``), layers that are here
        uncompressed are compressed on their way, and the digest is not the image's here.
        Raises :class:`ImageNotFound`, :class:`InvalidReference`, also for an :class:`Image` with no name or several,
        and :class:`RegistryError`.
        """
        from containerkit.image.progress import shown
        from containerkit.image.pushing import known_places, push_image
        from containerkit.image.store.blobs import BlobStore
        from containerkit.image.store.leases import lease, touch

        reference = Reference.parse(self._only_name(name) if isinstance(name, Image) else name)
        also = [Reference.parse(f"{reference.registry}/{reference.repository}:{tag}") for tag in tags]
        with lease(self._state), shown(progress, reference.familiar) as watcher:
            image = self.hold(name)  # of an Image, the very manifest that it has
            touch(self._state, image.id)
            remote = self._connect(reference, push=True)
            try:
                return push_image(
                    image.descriptor,
                    BlobStore(self._state.root),
                    remote,
                    reference,
                    also=also,
                    progress=watcher,
                    elsewhere=known_places(reference, remote, state=self._state),
                    compression=compression,
                )
            finally:
                remote.close()

    def _only_name(self, image: Image) -> str:
        names = manifests_of(self._state.database, image.id).get(image.digest, ())
        if len(names) == 1 and "@" not in names[0]:
            return names[0]
        known = f"the names {', '.join(names)}" if names else "no name"
        raise InvalidReference(
            f"image {image.id} has {known}: which one is to be pushed?", hint="tag it, and push it by that name"
        )

    def load(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        tag: str | None = None,
        *,
        platform: Platform | str | None = None,
        unpack: bool | None = None,
    ) -> Image:
        """Bring an image in from an OCI layout (directory or tar) or a docker archive (tar, also compressed).

        ``path`` may be a binary file or pipe. ``tag`` says which, where the archive has several, by its full name or
        its name in the layout. One image alone is loaded whatever its name, and is given the name ``tag``; so is one
        that has no full name, which without ``tag`` has none here. ``platform`` and ``unpack`` are as for :meth:`pull`.
        Raises :class:`InvalidArchive`, :class:`AmbiguousImage`, :class:`ImageNotFound` and what :meth:`pull` raises.
        """
        with self._archive(path) as archive:
            return self._load(archive, archive.choose(tag), platform, unpack)

    def load_all(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        platform: Platform | str | None = None,
        unpack: bool | None = None,
    ) -> tuple[Image, ...]:
        """Bring in every image of an archive or layout; else as :meth:`load`."""
        with self._archive(path) as archive:
            return tuple(self._load(archive, stored, platform, unpack) for stored in archive.images())

    @contextmanager
    def _archive(self, path: str | os.PathLike[str] | BinaryIO) -> Iterator[Archive]:
        from containerkit.image.archives.archive import open_archive
        from containerkit.image.limits import STANDARD
        from containerkit.image.store.gc import bringing_in

        place = os.fspath(path) if isinstance(path, str | os.PathLike) else path
        with (
            bringing_in(self._state),
            open_archive(place, self._state.path("ingest"), self.limits or STANDARD) as archive,
        ):
            yield archive

    def _load(self, archive: Archive, stored: Stored, platform: Platform | str | None, unpack: bool | None) -> Image:
        body = archive.manifest(stored)
        return self.bring_in(archive, stored.descriptor, body, stored.label, stored.names, platform, unpack=unpack)

    def import_rootfs(
        self,
        path: str | os.PathLike[str] | BinaryIO,
        tag: str,
        *,
        changes: Iterable[str] = (),
        message: str = "",
        platform: Platform | str | None = None,
        epoch: int | None = None,
        unpack: bool | None = None,
    ) -> Image:
        """Make a one-layer image of a root file system, a directory or a tar (also compressed), and name it ``tag``.

        ``path`` may be a binary file or pipe. ``changes`` are Docker's instructions
        (:func:`~containerkit.image.instructions.apply_changes`), ``message`` the comment of the step, ``platform``
        another than this machine's. ``epoch`` (seconds; else the environment's SOURCE_DATE_EPOCH) is the time of
        creation, and the latest that a file of a directory has: the same files then give the same digest. ``unpack`` is
        as for :meth:`pull`.
        Raises :class:`InvalidReference`, :class:`InvalidPlatform`, :class:`InvalidOption`, :class:`LayerError` and
        ``FileNotFoundError``.
        """
        from containerkit.image.epoch import source_date
        from containerkit.image.platform import parse
        from containerkit.image.rootfs import check_layers, make_image
        from containerkit.image.store.gc import bringing_in

        reference = Reference.parse(tag)
        wanted = parse(platform) if isinstance(platform, str) else platform
        with bringing_in(self._state):
            blobs, descriptor, body = make_image(
                os.fspath(path) if isinstance(path, str | os.PathLike) else path,
                self._state.root,
                changes=changes,
                message=message,
                platform=wanted,
                epoch=source_date(epoch),
            )
            if not self._at_once(unpack):
                check_layers(blobs, descriptor, body)
            return self.bring_in(blobs, descriptor, body, tag, (stored_name(reference),), wanted, unpack=unpack)

    def install(
        self,
        source: BlobSource,
        descriptor: Descriptor,
        name: str | None = None,
        *,
        platform: Platform | str | None = None,
        progress: Watcher | None = None,
        unpack: bool | None = None,
    ) -> Image:
        """Bring in the image of a manifest or index that ``source`` has, and give it a name, if there is one.

        ``platform`` and ``unpack`` are as for :meth:`pull`. Raises what :meth:`pull` raises.
        """
        from containerkit.image.codec import LARGEST_DOCUMENT
        from containerkit.image.store.gc import bringing_in
        from containerkit.image.stream import read_verified

        names = (stored_name(Reference.parse(name)),) if name else ()
        with bringing_in(self._state, source):
            with source.open(descriptor) as stream:
                body = read_verified(stream, descriptor, LARGEST_DOCUMENT)
            return self.bring_in(source, descriptor, body, name or descriptor.digest, names, platform, progress, unpack)

    def bring_in(
        self,
        source: BlobSource,
        descriptor: Descriptor,
        body: bytes,
        label: str,
        names: tuple[str, ...],
        platform: Platform | str | None = None,
        progress: Watcher | None = None,
        unpack: bool | None = None,
    ) -> Image:
        """Bring in the image of the manifest or index ``body``, whose digest has been verified, under the limits.

        ``label`` is what errors call it, ``names`` are canonical. The caller holds the lease
        (:func:`~containerkit.image.store.gc.bringing_in`). Raises what :meth:`pull` raises.
        """
        from containerkit.image.platform import parse
        from containerkit.image.record import record_image, row_of

        wanted = parse(platform) if isinstance(platform, str) else platform
        installer = self._installer(source, label, platform=wanted, progress=progress, unpack=self._at_once(unpack))
        installed = installer.install(descriptor, body)
        record_image(self._state, installed, names)
        database = self._state.database
        try:
            row = by_id(database, installed.id)
        except ImageNotFound:  # somebody has removed it again
            row = row_of(installed)
        meant = (*row[:1], installed.manifest, installed.media_type, *row[3:5], installed.size, row[6])
        return Image(self._state.root, meant, names_of(database, installed.id))

    def unpack(self, image: Image | str) -> Image:
        """Unpack the layers of an image that are not unpacked yet, as its first container or mount would.

        Raises :class:`ImageNotFound`, :class:`ContentMismatch`, :class:`LayerError`, :class:`LimitExceeded`, and
        :class:`KernelError` for users who may not make what is in it: files of other owners, devices.
        """
        with self._holding(image) as (found,):
            if not found.unpacked:
                label = next(iter(found.names), found.id)
                self._installer(self._source(), label).unpack(found.layers)
        return found

    def _installer(self, source: BlobSource, label: str, **options: Any) -> Installer:
        from containerkit.image.install import Installer
        from containerkit.image.limits import STANDARD

        limits = self.limits or STANDARD
        return Installer(self._state.root, source, label, limits=limits, durable=self.durable, **options)

    def _at_once(self, unpack: bool | None) -> bool:
        """Whether layers are unpacked as they come: by default where this user can. An ordinary one can by copying."""
        from containerkit.image.drivers import choose

        if unpack is not None:
            return unpack
        return os.geteuid() == 0 or choose(self._state.root).name == "copy"
