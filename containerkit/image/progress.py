"""How far a transfer has come, as values for whoever wants to show it, and ready bars by tqdm or rich.

Whatever moves images takes one argument ``progress``: a callable that gets a :class:`Progress` at every step; or
``True`` for a bar on the standard error, by tqdm where that is installed, else by rich; or ``"tqdm"`` or ``"rich"``.
"""

from __future__ import annotations

import importlib
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Literal, Self

    from containerkit.image.digest import Digest
    from containerkit.image.model import Descriptor

    Watcher = Callable[["Progress"], object]
    Show = Watcher | bool | Literal["tqdm", "rich"] | None

MOVING, DONE, PRESENT = "moving", "done", "present"
WIDTH = 32  # of a bar's description


class Progress(NamedTuple):
    """One event. ``phase`` of the blob ``digest``: ``moving``, ``done``, or ``present`` where nothing had to move.

    ``present`` is what was there before, and what a registry took from another of its repositories. ``done`` of
    ``size`` are the blob's bytes, ``total_done`` of ``total`` those of all blobs together; ``total`` is known from the
    first event on. Of a layer that is compressed on its way, the bytes before that count.
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
        with self._lock:
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


@contextmanager
def shown(progress: Show, description: str = "") -> Iterator[Watcher | None]:
    """What ``progress`` says, as a watcher; a bar goes with the end of the block, however that comes.

    Raises :class:`~containerkit.errors.Unsupported` where the package for the bar is not installed, and ``ValueError``
    for an unknown word.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True or isinstance(progress, str):
        with Bar(description, "" if progress is True else progress) as bar:
            yield bar
    else:
        yield progress


class Bar:
    """A watcher that keeps a bar, by tqdm or rich: what ``progress=True`` makes; it goes with the last event."""

    def __init__(self, description: str = "", by: str = "") -> None:
        """``by`` is ``tqdm`` or ``rich``; without it, the first of them that is installed.

        Raises :class:`~containerkit.errors.Unsupported` where it is not, or where there is neither.
        """
        if by and by not in _BARS:
            raise ValueError(f"progress cannot be {by!r}: a callable, True, or one of {', '.join(_BARS)}")
        self._make = _found((by,) if by else tuple(_BARS))
        self._description = description if len(description) <= WIDTH else f"…{description[1 - WIDTH :]}"
        self._bar: _Drawn | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, event: Progress) -> None:
        """Show one event."""
        if self._bar is None:
            if event.total_done >= event.total:
                return
            self._bar = self._make(self._description, event.total)
        self._bar.show(event.total_done)
        if event.total_done >= event.total and event.phase != MOVING:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Drawn(Protocol):
    """A bar that is to be seen."""

    def show(self, done: int) -> None:
        """So many bytes of the total are done."""

    def close(self) -> None:
        """Take it away."""


class _Tqdm:
    def __init__(self, module: Any, description: str, total: int) -> None:
        # Without its monitor: a thread that would stay in the caller's process.
        kind = type("Bar", (module.tqdm,), {"monitor_interval": 0})
        self._bar = kind(
            desc=description or None, total=total, unit="B", unit_scale=True, unit_divisor=1024, leave=False
        )

    def show(self, done: int) -> None:
        self._bar.update(done - self._bar.n)  # it draws ten times a second at most

    def close(self) -> None:
        self._bar.close()


class _Rich:
    def __init__(self, module: Any, description: str, total: int) -> None:
        columns = (
            module.TextColumn("{task.description}"),
            module.BarColumn(),
            module.DownloadColumn(binary_units=True),
            module.TransferSpeedColumn(),
            module.TimeRemainingColumn(),
        )
        console = importlib.import_module("rich.console").Console(stderr=True)
        self._bars = module.Progress(*columns, console=console, transient=True)
        self._task = self._bars.add_task(description.replace("[", r"\["), total=total)
        self._bars.start()

    def show(self, done: int) -> None:
        self._bars.update(self._task, completed=done)

    def close(self) -> None:
        self._bars.stop()


_BARS: dict[str, tuple[str, Callable[[Any, str, int], _Drawn]]] = {
    "tqdm": ("tqdm", _Tqdm),
    "rich": ("rich.progress", _Rich),
}


def _found(names: tuple[str, ...]) -> Callable[[str, int], _Drawn]:
    """What makes a bar, by the first of these packages that is installed."""
    for name in names:
        module_name, make = _BARS[name]
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        return lambda description, total: make(module, description, total)
    from containerkit.errors import Unsupported

    remedy = f"pip install {names[0]}, or containerkit[progress]"
    raise Unsupported(f"there is no progress bar without {' or '.join(names)}", remedy=remedy)
