"""What one does with images that are here: look into them, change, save, copy, count and collect them.

Thin verbs over the modules that do it; nothing of those loads before it is asked for.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, cast

from containerkit.errors import ImageInUse, ImageNotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from io import BufferedReader
    from typing import BinaryIO

    from containerkit.image.copies import Outgoing
    from containerkit.image.digest import Digest
    from containerkit.image.host_edit import Edit
    from containerkit.image.images import Image
    from containerkit.image.inspect import Step, Tree
    from containerkit.image.layers.changes import Change
    from containerkit.image.model import Descriptor, Platform
    from containerkit.image.progress import Show, Watcher
    from containerkit.image.store.gc import Collected
    from containerkit.image.store.usage import Usage
    from containerkit.image.store.verify import Problem
    from containerkit.image.transfer import BlobSource, Connect
    from containerkit.state import State


class Workbench:
    """The part of :class:`~containerkit.image.images.Images` that works on images which are here."""

    _state: State
    _connect: Connect

    if TYPE_CHECKING:

        def get(self, name: str) -> Image:
            """In :class:`Images`."""

        def list(self) -> list[Image]:
            """In :class:`Images`."""

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
            """In :class:`Images`."""

        def unpack(self, image: Image | str) -> Image:
            """In :class:`Images`."""

    def _of(self, image: Image | str) -> Image:
        return self.get(image) if isinstance(image, str) else image

    @contextmanager
    def _holding(self, *images: Image | str) -> Iterator[tuple[Image, ...]]:
        from containerkit.image.store.leases import lease

        with lease(self._state):
            yield tuple(map(self.hold, images))

    def _source(self, *images: Image) -> BlobSource:
        """Where the blobs of ``images`` are. What has been unpacked was accepted then."""
        from containerkit.image.store.blobs import BlobStore

        blobs = BlobStore(self._state.root)
        for image in images:
            if image.unpacked:
                blobs.accepted.update(layer.digest for layer in image.manifest.layers)
        return blobs

    # --- looking

    def history(self, image: Image | str) -> tuple[Step, ...]:
        """How it was built, oldest step first, each with its layer's compressed size (bytes)."""
        from containerkit.image.inspect import history

        found = self._of(image)
        return history(found.config, found.manifest)

    def tree(self, image: Image | str) -> Tree:
        """Every file with the layer that it came from, and what each layer adds and wastes."""
        from containerkit.image.inspect import tree

        with self._holding(image) as (found,):
            return tree(self._source(found), found.manifest, found.config)

    def read_file(self, image: Image | str, path: str) -> bytes:
        """One file's content, read from the layers as they travel. Links are followed inside the image.

        Raises :class:`PathNotInImage` (a ``FileNotFoundError``) for what is not there, and for a directory or anything
        else without content, which it then names; :class:`FileTooLarge` for more than 64 MiB.
        """
        from containerkit.image.inspect import read_file

        with self._holding(image) as (found,):
            return read_file(self._source(found), found.manifest, path)

    def open_file(self, image: Image | str, path: str) -> BinaryIO:
        """One file as a stream, to be closed; else as :meth:`read_file`."""
        from containerkit.image.inspect import open_file

        with self._holding(image) as (found,):
            stream = cast("BufferedReader", open_file(self._source(found), found.manifest, path))
            try:
                stream.peek(1)  # opens the layer, which from then on may be removed
            except BaseException:
                stream.close()
                raise
            return stream

    def diff(self, old: Image | str, new: Image | str) -> tuple[Change, ...]:
        """What differs between two images, file by file: ``A``, ``C`` or ``D`` and the path, sorted."""
        from containerkit.image.image_diff import Side, diff_images

        with self._holding(old, new) as both:
            return tuple(diff_images(*(Side(self._source(image), image.manifest) for image in both)))

    @contextmanager
    def mount(self, image: Image | str) -> Iterator[int]:
        """The merged tree, read-only, as a directory's descriptor, for the ``with`` block; it stays as long, whatever
        becomes of the image. Layers that are not unpacked yet are.

        It is mounted nowhere: use it with ``os.listdir``, ``dir_fd=`` or as ``/proc/self/fd/N``. Raises
        :class:`KernelError` for users who may not mount.
        """  # noqa: D205 - the summary is one
        from containerkit.image.drivers import choose

        with self._holding(image) as (found,), ExitStack() as stack:
            self.unpack(found)
            view = choose(self._state.root).view(found.lowers)
            stack.callback(os.close, view)
            # What a view gives is O_PATH, which cannot be listed.
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=view)
            stack.callback(os.close, fd)
            yield fd

    # --- changing

    def edit(self, image: Image | str) -> Edit:
        """An :class:`.Edit` of the image: changes that need neither a container nor privileges."""
        from containerkit.image.host_edit import Edit

        with self._holding(image) as (found,):
            return Edit(self, self._source(found), found)

    def copy(
        self,
        source: str,
        target: str,
        *,
        all_platforms: bool = False,
        platform: Platform | str | None = None,
        compression: str | None = None,
        progress: Show = None,
    ) -> Digest:
        """Copy an image between any two of ``docker://NAME``, ``oci:PATH[:TAG]``, ``oci-archive:PATH[:TAG]``,
        ``docker-archive:PATH[:NAME]``, ``docker-daemon:NAME`` (a Docker Engine) and ``containerkit:NAME``, without
        unpacking: :func:`.copies.copy`.
        """  # noqa: D205 - the list is one
        from containerkit.image.copies import copy, own_platform
        from containerkit.image.progress import shown
        from containerkit.image.store.leases import lease

        def register(blobs: BlobSource, descriptor: Descriptor, name: str) -> Digest:
            wanted = platform or own_platform(blobs, descriptor)
            return self.install(blobs, descriptor, name, platform=wanted, progress=watcher).digest

        with lease(self._state), shown(progress, target) as watcher:
            return copy(
                source,
                target,
                all_platforms=all_platforms,
                platform=platform,
                state=self._state,
                connect=self._connect,
                register=register,
                compression=compression,
                progress=watcher,
            )

    def sync(
        self,
        source: str,
        target: str,
        *,
        tags: Iterable[str] | None = None,
        all_platforms: bool = True,
        progress: Show = None,
    ) -> dict[str, Digest]:
        """Copy every tag of a repository ``docker://REPOSITORY`` to another one, or into a layout ``oci:PATH``.

        Gives the digest of each tag there: :func:`.copies.sync`.
        """
        from containerkit.image.copies import sync

        return sync(source, target, connect=self._connect, tags=tags, all_platforms=all_platforms, progress=progress)

    def save(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        *images: Image | str,
        format: str = "docker-archive",  # noqa: A002 - as podman calls it
    ) -> None:
        """Write images to a path or binary file: a ``docker-archive``, an ``oci-archive``, or a directory ``oci``.

        An image that is given by a name keeps only that name. Blobs that images share are written once, and the same
        images give the same bytes. Raises :class:`ImageNotFound`, ``OSError``, and ``ValueError`` without any image.
        """
        from containerkit.image.copies import save
        from containerkit.image.store.leases import lease

        with lease(self._state):
            save(target, [one for image in images for one in self._outgoing(image, format)], format)

    def _outgoing(self, image: Image | str, form: str) -> Iterator[Outgoing]:
        """An image under the name that it was called by; else under all, each with the manifest that it has."""
        from containerkit.image.copies import Outgoing
        from containerkit.image.reference import Reference
        from containerkit.image.rows import manifests_of

        found, source = self.hold(image), self._source()
        if isinstance(image, str) and found.has_name(image):
            yield Outgoing(source, found.descriptor, (str(Reference.parse(image)),))
            return
        names = manifests_of(self._state.database, found.id)
        if form == "docker-archive":  # has no manifests
            yield Outgoing(source, found.descriptor, tuple(sorted(name for each in names.values() for name in each)))
            return
        yield Outgoing(source, found.descriptor, names.pop(found.digest, ()))
        for each in names.values():
            yield Outgoing(source, self.hold(each[0]).descriptor, each)

    # --- keeping house

    def prune(self, *, all: bool = False, labels: Iterable[str] = (), max_age: float | None = None) -> Collected:  # noqa: A002
        """Remove images without a name, or with ``all`` every image that no container has; and what nobody needs then.

        Only those with all of ``labels`` (``key`` or ``key=value``), and only those created here more than ``max_age``
        seconds ago.
        """
        import time

        from containerkit.image.record import forget_image
        from containerkit.image.store.gc import gc

        latest = time.time_ns() - int((max_age or 0) * 1e9)
        wanted = tuple(labels)
        gone = []
        self._state.make_room()
        for image in self.list():
            if (image.names and not all) or image.created_ns > latest or not _labelled(image, wanted):
                continue
            with suppress(ImageInUse, ImageNotFound), self._state.transaction() as database:
                forget_image(database, image.id)
                gone.append(image.id)
        return gc(self._state)._replace(images=tuple(gone))

    def gc(
        self,
        *,
        max_bytes: int | None = None,
        max_age: float | None = None,
        keep: Sequence[str] = (),
        dry_run: bool = False,
        partial_age: float = 86_400.0,
    ) -> Collected:
        """Remove what no image, container or lease needs; with a budget also images, by last use: :func:`.gc.gc`.

        Downloads that broke off, and could go on, stay for ``partial_age`` seconds, as does what a pull has brought
        whole before it failed.
        """
        from containerkit.image.store.gc import gc

        return gc(
            self._state, max_bytes=max_bytes, max_age=max_age, keep=keep, dry_run=dry_run, partial_age=partial_age
        )

    def df(self) -> Usage:
        """What images, layers and containers take of the disk, shared and alone: :func:`.usage.df`."""
        from containerkit.image.store.usage import df

        return df(self._state)

    def verify(self, *, repair: bool = False, deep: bool = True) -> tuple[Problem, ...]:
        """Hash everything again and tell what is damaged or missing: :func:`.verify.verify`."""
        from containerkit.image.store.verify import verify

        return tuple(verify(self._state, repair, deep=deep))

    @contextmanager
    def lease(self, name: str | None = None) -> Iterator[None]:
        """Nothing that this process brings in or reads meanwhile is collected; with a name, until :meth:`end_lease`."""
        from containerkit.image.store.leases import lease

        with lease(self._state, name):
            yield

    def hold(self, image: Image | str) -> Image:
        """The image, all of which stays until the end of the caller's :meth:`lease`. Raises :class:`ImageNotFound`."""
        from containerkit.image.record import require_whole
        from containerkit.image.store.leases import BLOB, LAYER, hold

        found, root = self._of(image), self._state.root
        hold(root, BLOB, found.id)
        hold(root, BLOB, found.digest)
        for layer in found.layers:
            hold(root, BLOB, layer.descriptor.digest)
            hold(root, LAYER, layer.chain_id)
        require_whole(self._state, found.row)  # it may have been removed before all was held
        return found

    def end_lease(self, name: str) -> bool:
        """End a lease with a name; False where there is none."""
        from containerkit.image.store.leases import end_lease

        return end_lease(self._state, name)


def _labelled(image: Image, wanted: Sequence[str]) -> bool:
    if not wanted:
        return True
    labels = image.run.labels
    for label in wanted:
        key, equals, value = label.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True
