"""SQLite, as a library in other people's processes must use it: from any thread, and across ``fork``.

SQLite keeps process-wide mutexes, and tables of the locks that this process holds on each file. A fork while another
thread is inside leaves the child with locks that nobody will release, and believing in others that it has not got
(sqlite.org, "How To Corrupt An SQLite Database File", 2.6 and 2.2). So every call and every transaction goes through
:class:`Gate`: a fork waits until no thread is inside, and closes every connection. Both sides open theirs again when
they need them.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BUSY_SECONDS = 30.0


class Gate:
    """Counts the threads inside SQLite; holds back a fork while there are any, and those that come during one."""

    def __init__(self) -> None:
        self.connections: WeakSet[Database] = WeakSet()
        self._open()

    def _open(self) -> None:
        self._changed = threading.Condition()
        self._inside: list[int] = []  # threads, once for each call or transaction
        self._forking = 0
        self._forker = 0

    def __enter__(self) -> Self:
        me = threading.get_ident()
        with self._changed:
            while self._forking and me not in (*self._inside, self._forker):
                self._changed.wait()
            self._inside.append(me)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside.remove(threading.get_ident())
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Let nobody in any more, wait until nobody is inside, close every connection."""
        me = threading.get_ident()
        self._changed.acquire()
        self._forking += 1
        while any(thread != me for thread in self._inside):
            self._changed.wait()
        self._forker = me  # the collector may come to close a connection now
        for database in list(self.connections):
            database.rest()

    def after_fork_in_parent(self) -> None:
        """Open again."""
        self._forker = 0
        self._forking -= 1
        self._changed.notify_all()
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """Open again; the threads that waited are the parent's."""
        self._open()


_gate = Gate()
os.register_at_fork(
    before=_gate.before_fork, after_in_parent=_gate.after_fork_in_parent, after_in_child=_gate.after_fork_in_child
)


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Execute; a change of the journal mode answers "locked" at once where another process is at it, too."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute(statement).close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)
        else:
            return


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

    def __init__(self, path: str, *settings: str, frozen: bool = False) -> None:
        """Open ``path``; ``settings`` are pragmas for every connection. Raises :class:`sqlite3.Error`.

        ``frozen`` reads a file in WAL mode, without a WAL, where nothing can be written beside it. It is opened anew
        for every statement: elsewhere it may be writable.
        """
        if frozen:
            from urllib.parse import quote

            path = f"file:{quote(path)}?immutable=1"
        self._path = path
        self._frozen = frozen
        self._settings = settings
        self._connection: sqlite3.Connection | None = None
        with _gate:
            _gate.connections.add(self)
            self._connected()

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> Rows:
        """Run one statement to its end. Raises :class:`sqlite3.Error`."""
        with _gate:
            cursor = self._connected().execute(statement, parameters)
            try:
                return Rows(cursor.fetchall(), cursor.rowcount)
            finally:
                cursor.close()
                if self._frozen:
                    self.rest()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """``BEGIN IMMEDIATE``, then ``COMMIT``, or ``ROLLBACK`` after an exception. No fork happens meanwhile."""
        with _gate:
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self._connection is not None and self._connection.in_transaction:  # a full disk has done it already
            self.execute("ROLLBACK")

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(
                self._path,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
                uri=self._frozen,
            )
            for setting in self._settings:
                _patiently(self._connection, f"PRAGMA {setting}")
        return self._connection

    def rest(self) -> None:
        """Close the connection until it is needed again; not in the middle of a transaction."""
        if self._connection is not None and not self._connection.in_transaction:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        """Close the connection; the next statement would open it again."""
        with _gate:
            self.rest()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()
