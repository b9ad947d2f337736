"""SQLite, as a library in other people's processes must use it: from any thread, and across ``fork``.

SQLite keeps process-wide mutexes. A fork while another thread holds one leaves it locked in the child for ever, and a
child must not touch a connection of its parent's at all (sqlite.org, "How To Corrupt An SQLite Database File", 2.6). So
every call goes through :class:`Gate`, which a fork closes until no thread is inside, and a connection knows its
process.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BUSY_SECONDS = 30.0


class Gate:
    """Counts the threads inside SQLite; holds back a fork while there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: list[int] = []  # threads; one twice where the collector closes a connection in mid-call
        self._forking = 0

    def __enter__(self) -> Self:
        me = threading.get_ident()
        with self._changed:
            while self._forking and me not in self._inside:
                self._changed.wait()
            self._inside.append(me)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside.remove(threading.get_ident())
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Let nobody in any more, and wait until nobody is inside."""
        self._changed.acquire()
        self._forking += 1
        while self._inside:
            self._changed.wait()

    def after_fork_in_parent(self) -> None:
        """Open again."""
        self._forking -= 1
        self._changed.notify_all()
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """Open again; the threads that waited are the parent's."""
        self._changed = threading.Condition()
        self._inside = []
        self._forking = 0


_gate = Gate()
os.register_at_fork(
    before=_gate.before_fork, after_in_parent=_gate.after_fork_in_parent, after_in_child=_gate.after_fork_in_child
)

_inherited: list[sqlite3.Connection] = []
"""Connections of the parent, kept so that the child never closes one."""


class Rows:
    """The rows of a statement, all of them, read before the gate was left; ``changes``, how many rows it changed."""

    def __init__(self, rows: list[Any], changes: int) -> None:
        self._rows = rows
        self.changes = changes

    def fetchone(self) -> Any:
        """The first row, or None."""
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[Any]:
        """Every row."""
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


class Database:
    """One connection to one file, in autocommit mode. For one thread at a time; closed when it is collected."""

    def __init__(self, path: str) -> None:
        """Open ``path``. Raises :class:`sqlite3.Error`."""
        self.pid = os.getpid()
        with _gate:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> Rows:
        """Run one statement to its end. Raises :class:`sqlite3.Error`."""
        with _gate:
            cursor = self._connection.execute(statement, parameters)
            try:
                return Rows(cursor.fetchall(), cursor.rowcount)
            finally:
                cursor.close()

    def close(self) -> None:
        """Close the connection, unless it is the parent's."""
        if self.pid != os.getpid():
            _inherited.append(self._connection)
            return
        with _gate:
            self._connection.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()
