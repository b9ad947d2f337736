"""How far a transfer has come, as values for whoever wants to show it."""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor

    Watcher = Callable[["Progress"], object]

MOVING, DONE, PRESENT = "moving", "done", "present"


class Progress(NamedTuple):
    """One event. ``phase`` of the blob ``digest``: ``moving``, ``done``, or ``present`` where it was there before.

    ``done`` of ``size`` are the blob's bytes, ``total_done`` of ``total`` those of all blobs together; ``total`` is
    known from the first event on.
    """

    phase: str
    digest: Digest
    done: int
    size: int
    total_done: int
    total: int


class Meterer:
    """Counts the bytes of several blobs, and tells ``watcher`` of each step; threads may share it.

    ``watcher`` is called in the threads that move the bytes, one at a time. What it raises ends the transfer.
    """

    def __init__(self, watcher: Watcher | None, blobs: Iterable[Descriptor]) -> None:
        self._watcher = watcher
        self._total = sum({blob.digest: blob.size for blob in blobs}.values())
        self._done: dict[Digest, int] = {}
        self._lock = threading.Lock()

    def moved(self, blob: Descriptor, count: int) -> None:
        """``count`` more bytes of a blob have come, or gone."""
        self._tell(blob, self._done.get(blob.digest, 0) + count, MOVING)

    def again(self, blob: Descriptor) -> None:
        """A blob begins anew."""
        self._done[blob.digest] = 0

    def done(self, blob: Descriptor, *, present: bool = False) -> None:
        """All of a blob is there."""
        self._tell(blob, blob.size, PRESENT if present else DONE)

    def _tell(self, blob: Descriptor, done: int, phase: str) -> None:
        if self._watcher is None:
            return
        with self._lock:
            self._done[blob.digest] = done
            total = sum(self._done.values())
            self._watcher(Progress(phase, blob.digest, done, blob.size, total, self._total))


class Bar:
    """A watcher that keeps a tqdm bar: ``pull(name, progress=Bar())``. Needs the package tqdm."""

    def __init__(self, description: str = "") -> None:
        """Raises :class:`~containerkit.errors.Unsupported` where tqdm is not installed."""
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ImportError as error:
            from containerkit.errors import Unsupported

            raise Unsupported("there is no progress bar without tqdm", remedy="pip install tqdm") from error
        self._bar = tqdm(desc=description or None, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __call__(self, event: Progress) -> None:
        """Show one event; the bar goes with the last."""
        self._bar.total = event.total
        self._bar.n = event.total_done
        self._bar.refresh()
        if event.total_done >= event.total and event.phase != MOVING:
            self._bar.close()
