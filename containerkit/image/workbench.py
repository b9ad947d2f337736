"""What one does with images that are here: look into them, change, save, copy, count and collect them.

Thin verbs over the modules that do it; nothing of those loads before it is asked for.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from containerkit.errors import ImageInUse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from containerkit.image.changes import Change
    from containerkit.image.digest import Digest
    from containerkit.image.edit import Editor
    from containerkit.image.gc import Collected
    from containerkit.image.images import Image
    from containerkit.image.inspect import Step, Tree
    from containerkit.image.model import Descriptor, Platform
    from containerkit.image.transfer import BlobSource, Connect
    from containerkit.image.usage import Usage
    from containerkit.image.verify import Problem
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

        def install(self, source: BlobSource, descriptor: Descriptor, name: str | None = None) -> Image:
            """In :class:`Images`."""

    def _of(self, image: Image | str) -> Image:
        return self.get(image) if isinstance(image, str) else image

    def _source(self) -> BlobSource:
        from containerkit.image.blobs import BlobStore

        return BlobStore(self._state.root)

    # --- looking

    def history(self, image: Image | str) -> tuple[Step, ...]:
        """How it was built, oldest step first, each with its layer's compressed size (bytes)."""
        from containerkit.image.inspect import history

        found = self._of(image)
        return history(found.config, found.manifest)

    def tree(self, image: Image | str) -> Tree:
        """Every file with the layer that it came from, and what each layer adds and wastes."""
        from containerkit.image.inspect import tree

        found = self._of(image)
        return tree(self._source(), found.manifest, found.config)

    def read_file(self, image: Image | str, path: str) -> bytes:
        """One file's content, read from the layers as they travel. Links are followed inside the image.

        Raises ``FileNotFoundError``, ``IsADirectoryError`` and :class:`LimitExceeded` for one of more than 64 MiB.
        """
        from containerkit.image.inspect import read_file

        return read_file(self._source(), self._of(image).manifest, path)

    def open_file(self, image: Image | str, path: str) -> BinaryIO:
        """One file as a stream, to be closed; else as :meth:`read_file`."""
        from containerkit.image.inspect import open_file

        return open_file(self._source(), self._of(image).manifest, path)

    def diff(self, old: Image | str, new: Image | str) -> tuple[Change, ...]:
        """What differs between two images, file by file: ``A``, ``C`` or ``D`` and the path, sorted."""
        from containerkit.image.image_diff import Side, diff_images

        sides = [Side(self._source(), image.manifest) for image in (self._of(old), self._of(new))]
        return tuple(diff_images(*sides))

    @contextmanager
    def mount(self, image: Image | str) -> Iterator[int]:
        """The merged tree, read-only, as a directory's descriptor, for the ``with`` block.

        It is mounted nowhere: use it with ``dir_fd=`` or as ``/proc/self/fd/N``. Raises :class:`Unsupported` for users
        who may not mount.
        """
        from containerkit.image.drivers import choose
        from containerkit.image.leases import lease

        with lease(self._state):
            found = self._of(image)
            fd = choose(self._state.root).view(found.lowers)
            try:
                yield fd
            finally:
                os.close(fd)

    # --- changing

    def edit(self, image: Image | str) -> Edit:
        """An :class:`Edit` of the image: changes that need neither a container nor privileges."""
        found = self._of(image)
        return Edit(self, _editor(self._source(), found))

    def copy(
        self,
        source: str,
        target: str,
        *,
        all_platforms: bool = False,
        platform: Platform | str | None = None,
        compression: str | None = None,
    ) -> Digest:
        """Copy an image between any two of ``docker://NAME``, ``oci:PATH[:TAG]``, ``oci-archive:PATH[:TAG]``,
        ``docker-archive:PATH[:NAME]`` and ``containerkit:NAME``, without unpacking: :func:`.copies.copy`.
        """  # noqa: D205 - the list is one
        from containerkit.image.copies import copy
        from containerkit.image.leases import lease

        def register(blobs: BlobSource, descriptor: Descriptor, name: str) -> Digest:
            return self.install(blobs, descriptor, name).digest

        with lease(self._state):
            return copy(
                source,
                target,
                all_platforms=all_platforms,
                platform=platform,
                state=self._state,
                connect=self._connect,
                register=register,
                compression=compression,
            )

    def save(
        self,
        target: str | os.PathLike[str] | BinaryIO,
        *images: Image | str,
        format: str = "docker-archive",  # noqa: A002 - as podman calls it
    ) -> None:
        """Write images to a path or binary file: a ``docker-archive``, an ``oci-archive``, or a directory ``oci``.

        An image that is given by a name keeps only that name. Blobs that images share are written once, and the same
        images give the same bytes. Raises :class:`ImageNotFound`, ``OSError``.
        """
        from containerkit.image.copies import Outgoing, save
        from containerkit.image.leases import lease
        from containerkit.image.reference import Reference

        with lease(self._state):
            outgoing = []
            for image in images:
                found = self._of(image)
                names = [image] if isinstance(image, str) and found.has_name(image) else found.names
                canonical = tuple(str(Reference.parse(name)) for name in names)
                outgoing.append(Outgoing(self._source(), found.descriptor, canonical))
            save(target, outgoing, format)

    # --- keeping house

    def prune(self, *, all: bool = False, labels: Iterable[str] = (), max_age: float | None = None) -> Collected:  # noqa: A002
        """Remove images without a name, or with ``all`` every image that no container has; and what nobody needs then.

        Only those with all of ``labels`` (``key`` or ``key=value``), and only those created here more than ``max_age``
        seconds ago.
        """
        import time

        from containerkit.image.gc import gc

        latest = time.time_ns() - int((max_age or 0) * 1e9)
        wanted = tuple(labels)
        gone = []
        for image in self.list():
            if (image.names and not all) or image.created_ns > latest or not _labelled(image, wanted):
                continue
            try:
                self._drop(image)
            except ImageInUse:
                continue
            gone.append(image.id)
        return gc(self._state)._replace(images=tuple(gone))

    def _drop(self, image: Image) -> None:
        with self._state.transaction() as database:
            if database.execute("SELECT 1 FROM containers WHERE image = ?", (image.id,)).fetchone():
                raise ImageInUse(f"image {image.id} is needed by a container")
            database.execute("DELETE FROM images WHERE id = ?", (image.id,))

    def gc(
        self,
        *,
        max_bytes: int | None = None,
        max_age: float | None = None,
        keep: Sequence[str] = (),
        dry_run: bool = False,
    ) -> Collected:
        """Remove what no image, container or lease needs; with a budget also images, by last use: :func:`.gc.gc`."""
        from containerkit.image.gc import gc

        return gc(self._state, max_bytes=max_bytes, max_age=max_age, keep=keep, dry_run=dry_run)

    def df(self) -> Usage:
        """What images, layers and containers take of the disk, shared and alone: :func:`.usage.df`."""
        from containerkit.image.usage import df

        return df(self._state)

    def verify(self, *, repair: bool = False, deep: bool = True) -> tuple[Problem, ...]:
        """Hash everything again and tell what is damaged or missing: :func:`.verify.verify`."""
        from containerkit.image.verify import verify

        return tuple(verify(self._state, repair, deep=deep))

    @contextmanager
    def lease(self, name: str | None = None) -> Iterator[None]:
        """Nothing that this process brings in or reads meanwhile is collected; with a name, until :meth:`end_lease`."""
        from containerkit.image.leases import lease

        with lease(self._state, name):
            yield

    def end_lease(self, name: str) -> bool:
        """End a lease with a name; False where there is none."""
        from containerkit.image.leases import end_lease

        return end_lease(self._state, name)


class Edit:
    """An image of a host under change; :meth:`commit` keeps it.

    The verbs are those of :class:`~containerkit.image.edit.Editor`, and so are their errors.
    """

    def __init__(self, bench: Workbench, editor: Editor) -> None:
        self._bench = bench
        self.editor = editor

    def append(self, layer: str | os.PathLike[str] | Iterable[bytes], **options: Any) -> Edit:
        """Put one more layer on top: a directory, a tar, or the pieces of one. Options as :meth:`.Editor.append`'s."""
        self.editor.append(layer, **options)
        return self

    def configure(self, **fields: Any) -> Edit:
        """Set fields of the config: ``cmd``, ``env``, ``labels``, ``user`` and so on; :meth:`.Editor.configure`."""
        self.editor.configure(**fields)
        return self

    def remove(self, **fields: Any) -> Edit:
        """Take out variables, labels, ports or volumes by name; :meth:`.Editor.remove`."""
        self.editor.remove(**fields)
        return self

    def annotate(self, annotations: Mapping[str, str | None]) -> Edit:
        """Set annotations of the manifest; None takes one out."""
        self.editor.annotate(annotations)
        return self

    def flatten(self, **options: Any) -> Edit:
        """Make all layers one; :meth:`.Editor.flatten`."""
        self.editor.flatten(**options)
        return self

    def squash(self, count: int, **options: Any) -> Edit:
        """Make the last ``count`` layers one; :meth:`.Editor.squash`."""
        self.editor.squash(count, **options)
        return self

    def repack(self, compression: str) -> Edit:
        """Compress every layer anew: ``gzip``, ``zstd`` or ``none``."""
        self.editor.repack(compression)
        return self

    def rebase(self, old: Image | str, new: Image | str) -> Edit:
        """Put what the image has on top of the base ``old`` on top of ``new``, which are here both."""
        bench = self._bench
        old, new = bench._of(old), bench._of(new)  # noqa: SLF001 - the other half of one thing
        self.editor.rebase(old.manifest, new.manifest, bases=bench._source())  # noqa: SLF001
        return self

    def commit(self, name: str | None = None) -> Image:
        """Keep it as an image of its own, with a name if there is one."""
        descriptor = self.editor.finish()
        return self._bench.install(self.editor.source, descriptor, name)


def _editor(source: BlobSource, image: Image) -> Editor:
    from containerkit.image.edit import Editor

    return Editor(source, image.descriptor)


def _labelled(image: Image, wanted: Sequence[str]) -> bool:
    if not wanted:
        return True
    labels = image.run.labels
    for label in wanted:
        key, equals, value = label.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True
