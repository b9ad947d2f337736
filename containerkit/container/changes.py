"""A container's files, seen from outside: what it has changed, all of them as a tar, an image of it."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from containerkit.container.container import Container
    from containerkit.container.containers import Containers
    from containerkit.image.images import Image
    from containerkit.image.layers.changes import Change


class ContainerChanges:
    """The part of :class:`~containerkit.container.container.Container` that makes images and tars of it."""

    _containers: Containers

    def diff(self) -> list[Change]:
        """What it has changed in its image's files, as ``docker diff`` tells it: ``A``, ``C`` or ``D`` and the path.

        Raises :class:`Unsupported` where its writable layer is in memory, :class:`ContainerNotFound`.
        """
        from containerkit.container.commit import diff

        return diff(cast("Container", self))

    def export(self, target: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write its root file system as one tar to a path or a binary file, without what is mounted in it.

        Raises the errors of :meth:`diff`.
        """
        from containerkit.container.commit import export

        export(cast("Container", self), target)

    def commit(
        self,
        name: str | None = None,
        *,
        author: str = "",
        message: str = "",
        changes: Iterable[str] = (),
        pause: bool = True,
        compression: str = "gzip",
        epoch: int | None = None,
    ) -> Image:
        """Make an image of it: its image's layers, and one more of what it has changed.

        ``changes`` are instructions as a Dockerfile has them (``ENV A=b``, ``CMD ["sh"]``). A running container is
        frozen meanwhile, unless ``pause`` is False. ``compression`` is ``gzip``, ``zstd`` or ``none``. ``epoch``
        (seconds; else SOURCE_DATE_EPOCH) makes the same changes give the same digest.

        Raises :class:`InvalidReference`, :class:`InvalidOption`, and the errors of :meth:`diff`.
        """
        from containerkit.container.commit import commit

        return commit(
            cast("Container", self),
            self._containers.state,
            self._containers.images,
            name,
            author=author,
            message=message,
            changes=changes,
            pause=pause,
            compression=compression,
            epoch=epoch,
        )
