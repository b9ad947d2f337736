"""One large blob over several connections: ranges that follow each other fetched side by side, given out in order.

It helps where one connection carries less than there is to have: far away, or throttled. The first range comes on one
connection, read as it comes. Only where that proves slow do others fetch what follows.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import RegistryDisconnected, RegistryError, RegistryTimeout, UnexpectedResponse
from containerkit.registry.streams import CHUNK, Bytes, Download

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from containerkit.image.model import Descriptor

    Part = Callable[[int, int | None], Download]

SAMPLE = 1 << 20
LONGEST_SAMPLE = 1.0  # seconds
RANGE_NOT_SATISFIABLE = 416
PATIENCE = 5.0  # seconds that closing waits for connections to end


class Ranges(NamedTuple):
    """When large blobs come in ranges, and how many side by side.

    A blob of ``smallest`` bytes comes in ranges of ``piece`` bytes over as many as ``connections`` connections, where a
    single one carries less than ``fast`` bytes a second. ``total`` is how many all downloads of one repository may use
    together; a blob alone may always be fetched. ``connections=1`` means never.
    """

    connections: int = 4
    total: int = 8
    smallest: int = 64 << 20
    piece: int = 4 << 20
    fast: float = float(32 << 20)


class Lanes:
    """How many downloads of one repository are under way; threads share it."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self._lock = threading.Lock()
        self._used = 0

    def enter(self) -> None:
        """One more, whatever the limit."""
        with self._lock:
            self._used += 1

    def enter_if_free(self) -> bool:
        """One more, if the limit allows it."""
        with self._lock:
            free = self._used < self.ranges.total
            self._used += free
            return free

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self._used -= 1


def open_blob(descriptor: Descriptor, part: Part, lanes: Lanes, offset: int = 0) -> BinaryIO:
    """The blob from ``offset`` on; ``part(start, end)`` gives the download of a part, with ``None`` to its end.

    See :class:`~containerkit.registry.streams.Download` for what this and reading raise.
    """
    ranges = lanes.ranges
    if ranges.connections > 1 and descriptor.size - offset >= max(ranges.smallest, 2 * ranges.piece):
        return SideBySide(descriptor.size, part, lanes, offset)  # type: ignore[return-value] # reads like a file
    lanes.enter()
    try:
        return part(offset, None).then(lanes.leave)  # type: ignore[return-value]
    except BaseException:
        lanes.leave()
        raise


class SideBySide(Bytes):
    """A blob of ``size`` bytes from ``offset`` on, in ranges where those help, else in one piece; for one reader.

    Where the registry gives no ranges, or does not want so many requests, it goes on in one piece.
    """

    def __init__(self, size: int, part: Part, lanes: Lanes, offset: int) -> None:
        super().__init__()
        self._size = size
        self._part = part
        self._lanes = lanes
        self._position = offset
        self._ahead: deque[_Range] = deque()
        self._slow: bool | None = None  # not known yet
        self._waited = 0.0
        self._came = 0
        self._own = True  # the place in ``lanes`` that is always there is held by the present part
        lanes.enter()
        self._next = offset + lanes.ranges.piece
        self._present: Download | None = None
        self._interrupted = False
        try:
            self._present = self._first(offset)
        except BaseException:
            self.close()
            raise
        if self._slow is None and not self._present.in_ranges:
            self._present.stretch()
            self._slow, self._next = False, size

    def _first(self, offset: int) -> Download:
        """The first range; all of it from a server that makes nothing of ranges, or wrong ones."""
        try:
            return self._part(offset, self._next)
        except RegistryError as error:
            if not (isinstance(error, UnexpectedResponse) or error.status == RANGE_NOT_SATISFIABLE):
                raise
        self._slow, self._next = False, self._size
        return self._part(offset, None)

    def _take(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size and (data := self._some(size)):
            parts.append(data)
            size -= len(data)
            self._position += len(data)
        return b"".join(parts)

    def interrupt(self) -> None:
        """Have a read that waits, in another thread, fail."""
        self._interrupted = True
        if (present := self._present) is not None:
            present.interrupt()
        for each in tuple(self._ahead):
            each.stop()

    def close(self) -> None:
        """Break off whatever is on its way."""
        if not self.closed:
            self._drop_ahead()
            if self._present is not None:
                self._present.close()
            self._lanes.leave()
        super().close()

    def _some(self, size: int) -> bytes:
        """At least one byte, unless at the end."""
        while True:
            if self._interrupted:
                raise ValueError("read of an interrupted download")
            if self._present is not None:
                if data := self._read_present(self._present, size):
                    return data
                if self._next >= self._size and not self._ahead:
                    return b""
                self._end_present()
            elif self._ahead:
                if data := self._ahead[0].take(size):
                    return data
                self._end_range(self._ahead.popleft())
            else:
                return b""

    def _read_present(self, present: Download, size: int) -> bytes:
        if self._slow is not None:
            return present.read(size)
        ranges = self._lanes.ranges
        before = time.monotonic()
        data = present.read(min(size, CHUNK, ranges.piece // 4))
        self._waited += time.monotonic() - before
        self._came += len(data)
        if self._came >= min(SAMPLE, ranges.piece // 4) or self._waited >= LONGEST_SAMPLE:
            self._slow = self._came < ranges.fast * self._waited
            if self._slow:
                self._spread()
        return data

    def _end_present(self) -> None:
        """After the first range: further ones, or the whole rest at once."""
        assert self._present is not None  # noqa: S101 - for the type checker
        self._present.close()
        self._present, self._own = None, False
        if self._slow:
            self._spread()
        else:
            self._go_alone()

    def _end_range(self, ended: _Range) -> None:
        self._own = self._own and ended.extra
        if ended.extra:
            self._lanes.leave()
        if (error := ended.error) is None:
            self._spread()
            return
        self._drop_ahead()
        if isinstance(error, (RegistryDisconnected, RegistryTimeout)) or not isinstance(error, (RegistryError, _Whole)):
            raise error
        self._go_alone()  # it does not want as many requests

    def _spread(self) -> None:
        """Start what follows, as far as there is room."""
        ranges = self._lanes.ranges
        while self._next < self._size and len(self._ahead) + (self._present is not None) < ranges.connections:
            extra = self._own
            if extra and not self._lanes.enter_if_free():
                return
            self._own = True
            end = min(self._next + ranges.piece, self._size)
            self._ahead.append(_Range(self._part, self._next, end, extra=extra))
            self._next = end

    def _go_alone(self) -> None:
        self._present, self._own, self._slow = self._part(self._position, None), True, False
        self._next = self._size

    def _drop_ahead(self) -> None:
        for each in self._ahead:
            each.stop()
        deadline = time.monotonic() + PATIENCE
        for each in self._ahead:
            each.join(deadline - time.monotonic())
            if each.extra:
                self._lanes.leave()
        self._ahead.clear()


class _Whole(Exception):
    """A range was asked for, and everything came."""


class _Range:
    """The bytes from ``start`` to ``end``, fetched by a thread of its own and held until they are taken."""

    def __init__(self, part: Part, start: int, end: int, *, extra: bool) -> None:
        self.extra = extra
        self.error: BaseException | None = None
        self._part = part
        self._bounds = (start, end)
        self._held: deque[bytes] = deque()
        self._ended = self._stopped = False
        self._download: Download | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="containerkit-range", daemon=True)
        self._thread.start()

    def take(self, size: int) -> bytes:
        """The next bytes; empty where there will be none, be it for an :attr:`error`."""
        with self._changed:
            self._changed.wait_for(lambda: self._held or self._ended)
            if not self._held:
                return b""
            data = self._held.popleft()
            if len(data) > size:
                self._held.appendleft(data[size:])
            return data[:size]

    def stop(self) -> None:
        """Break off."""
        with self._changed:
            self._stopped = True
            if self._download is not None:
                self._download.interrupt()

    def join(self, patience: float) -> None:
        """Wait for the thread; not for long (seconds), where it waits for a registry to come back."""
        self._thread.join(max(patience, 0.0))

    def _run(self) -> None:
        try:
            with self._part(*self._bounds) as download:
                self._fill(download)
        except BaseException as error:  # noqa: BLE001 - the reader gets it
            self.error = error
        with self._changed:
            self._download, self._ended = None, True
            self._changed.notify_all()

    def _fill(self, download: Download) -> None:
        if not download.in_ranges:
            raise _Whole
        with self._changed:
            self._download = download
        while not self._stopped and (data := download.read(CHUNK)):
            with self._changed:
                self._held.append(data)
                self._changed.notify_all()
        with self._changed:
            self._download = None
