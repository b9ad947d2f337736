"""The state root: where everything durable lives, and the database that names it.

One root directory, shared by any number of processes:

::

    ROOT/state.db              SQLite in WAL mode: images, names, containers
    ROOT/blobs/sha256/HEX      content-addressed files
    ROOT/ingest/               partial downloads and unpackings; anything here may vanish
    ROOT/driver                the name of the storage driver, once there was a layer
    ROOT/layers/CHAIN/         unpacked layers: the layer alone, or with all below it where the driver does so
    ROOT/containers/ID/        a container's writable layer or root, log and exit status
    ROOT/cache/                derived data (compiled seccomp programs)
    ROOT/room                  room on the disk, given back where there is none left to remove things

The database answers in memory speed and survives ``kill -9`` at any instruction: WAL with
``synchronous=NORMAL`` never loses an acknowledged commit to a dying process.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from weakref import WeakSet

from containerkit.database import Database
from containerkit.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 3
_PRIVATE = 0o700
_ROOM = 256 << 10
_PLENTY = 16 * _ROOM
_DRIVER_LENGTH = 64

SCHEMA = """
CREATE TABLE images (
    id         TEXT PRIMARY KEY,      -- digest of the config
    manifest   TEXT NOT NULL,         -- digest of the manifest
    media_type TEXT NOT NULL,
    run        TEXT NOT NULL,         -- what the start path reads of the config, as JSON
    layers     TEXT NOT NULL,         -- chain ids, lowest first, as JSON
    size       INTEGER NOT NULL,      -- compressed bytes of config and layers
    created_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE names (
    name     TEXT PRIMARY KEY,        -- canonical reference, domain/path:tag or domain/path@digest
    image    TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE
) STRICT;
CREATE INDEX names_image ON names(image);
CREATE TABLE containers (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    image      TEXT NOT NULL,         -- image id, or the word host
    record     TEXT NOT NULL,         -- everything else, as JSON
    created_ns INTEGER NOT NULL
) STRICT;
CREATE INDEX containers_image ON containers(image);
"""

# What each version added to the one before; a new database gets SCHEMA and then all of these.
MIGRATIONS = {
    2: """
CREATE TABLE uses (                   -- when an image was last used (without a row: when it came)
    image    TEXT PRIMARY KEY REFERENCES images(id) ON DELETE CASCADE,
    used_ns  INTEGER NOT NULL
) STRICT;
CREATE TABLE leases (                 -- what a lease with a name keeps from being collected
    name     TEXT NOT NULL,
    kind     TEXT NOT NULL,           -- blob or layer
    digest   TEXT NOT NULL,           -- of the blob, or the layer's chain id
    PRIMARY KEY (name, kind, digest)
) STRICT;
""",
    3: """
CREATE TABLE names_3 (                -- a name has a manifest, several of which may have one config
    name       TEXT PRIMARY KEY,      -- canonical reference, domain/path:tag or domain/path@digest
    image      TEXT NOT NULL REFERENCES images(id) ON DELETE CASCADE,
    manifest   TEXT NOT NULL,         -- images has the one that came last
    media_type TEXT NOT NULL,
    size       INTEGER NOT NULL       -- compressed bytes of config and layers
) STRICT;
INSERT INTO names_3 SELECT name, image, manifest, media_type, size
    FROM names JOIN images ON id = image ORDER BY names.rowid;
DROP TABLE names;
ALTER TABLE names_3 RENAME TO names;
CREATE INDEX names_image ON names(image);
""",
}


def default_root() -> str:
    """The state root: ``$CONTAINERKIT_ROOT``, else /var/lib/containerkit, or below ``$XDG_DATA_HOME`` without root."""
    if root := os.environ.get("CONTAINERKIT_ROOT"):
        return os.path.abspath(root)
    if os.geteuid() == 0:
        return "/var/lib/containerkit"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "containerkit")


WHOLE = ("copy", "btrfs")
"""Drivers whose trees hold all that lies below them, too: a container gets a tree of its own."""


def driver_of(root: str) -> str:
    """The storage driver of the state root ``root``; empty where none was needed yet.

    Layers without a word on their driver are overlay's: once there was no other.
    """
    try:
        fd = os.open(f"{root}/driver", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return "overlay" if _has_layers(root) else ""
    try:
        return os.read(fd, _DRIVER_LENGTH).decode(errors="replace").strip()
    finally:
        os.close(fd)


def _has_layers(root: str) -> bool:
    try:
        return bool(os.listdir(f"{root}/layers"))
    except FileNotFoundError:
        return False


def remember_driver(root: str, name: str, *, instead_of: str = "") -> str:
    """Write down the storage driver, where none is yet or only ``instead_of``; the one that holds from now on."""
    import fcntl

    fd = os.open(f"{root}/driver.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if (used := driver_of(root)) != instead_of:
            return used
        with open(f"{root}/driver.new", "w") as file:
            file.write(name + "\n")
        os.rename(f"{root}/driver.new", f"{root}/driver")
    finally:
        os.close(fd)
    return name


class State:
    """One state root. Cheap to make; opens the database on first use, once per thread and process.

    Raises :class:`StateError` where the root cannot be made or the database belongs to a newer version.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = os.path.abspath(os.fspath(root)) if root is not None else default_root()
        self._local = threading.local()
        self._connections: WeakSet[Database] = WeakSet()
        try:
            os.makedirs(self.root, mode=_PRIVATE, exist_ok=True)
            for part in ("blobs", "blobs/sha256", "ingest", "layers", "containers", "cache"):
                _make_private(os.path.join(self.root, part))
        except OSError as error:
            raise StateError(
                f"cannot use {self.root} as the state root: {error.strerror}",
                hint="give Host(root=...) or CONTAINERKIT_ROOT a directory that you may write",
            ) from error

    def path(self, *parts: str) -> str:
        """A path below the root."""
        return os.path.join(self.root, *parts)

    @property
    def database(self) -> Database:
        """This thread's connection, in autocommit mode; write inside :meth:`transaction`."""
        database: Database | None = getattr(self._local, "database", None)
        if database is None:
            database = self._local.database = self._open()
            self._connections.add(database)
        return database

    @contextmanager
    def transaction(self) -> Iterator[Database]:
        """One write transaction (``BEGIN IMMEDIATE``): all or nothing, one writer at a time.

        Raises :class:`StateError` where the disk is full, read-only or fails; nothing has changed then.
        """
        try:
            with self.database.transaction():
                yield self.database
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF
            if code not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
                raise
            hint = "" if code == sqlite3.SQLITE_READONLY else "free some space; nothing has changed"
            raise StateError(f"cannot write {self.path('state.db')}: {error}", hint=hint) from error

    def make_room(self) -> None:
        """Give back ``ROOT/room`` where the disk is full, for whoever removes things: the database writes that down."""
        if self._space() < _ROOM:
            with suppress(OSError):
                os.unlink(self.path("room"))

    def keep_room(self) -> None:
        """Take it again, where there is plenty."""
        path = self.path("room")
        with suppress(OSError):
            if (os.path.exists(path) and os.stat(path).st_size == _ROOM) or self._space() < _PLENTY:
                return
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, 0, _ROOM)
            finally:
                os.close(fd)

    def _space(self) -> int:
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def close(self) -> None:
        """Close every connection that this object opened in this process."""
        for database in list(self._connections):
            database.close()
        self._connections.clear()
        self._local = threading.local()

    def _open(self) -> Database:
        path = self.path("state.db")
        try:
            if self._is_frozen():
                database = Database(path, frozen=True)
                self._migrate(database)
                return database
            self.make_room()  # the database wants some for its -shm and -wal, also where it is only read
            database = Database(path, "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON")
            self._migrate(database)
            for name in (path, f"{path}-wal", f"{path}-shm"):
                _close_to_others(name)  # by name: a descriptor's close would drop SQLite's locks
        except sqlite3.Error as error:
            hint = "no space left on the disk: free some" if self._space() < _ROOM else ""
            raise StateError(f"cannot use the database {path}: {error}", hint=hint) from error
        self.keep_room()
        return database

    def _is_frozen(self) -> bool:
        """Whether nothing can be written here, and the database was closed by its last user."""
        if not os.statvfs(self.root).f_flag & os.ST_RDONLY:
            return False
        return not any(os.path.exists(self.path(f"state.db-{part}")) for part in ("wal", "shm"))

    def _migrate(self, database: Database) -> None:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == VERSION:
            return
        if version > VERSION:
            raise StateError(
                f"{self.root} was written by a newer containerkit (schema {version}, this one knows {VERSION})"
            )
        with database.transaction():
            version = database.execute("PRAGMA user_version").fetchone()[0]  # another process may have been faster
            steps = [] if version else [SCHEMA]
            steps += [MIGRATIONS[step] for step in range(max(version, 1) + 1, VERSION + 1)]
            for statement in ";".join(steps).split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version={VERSION}")


def _make_private(path: str) -> None:
    """A directory for its owner alone.

    The layers of images hold setuid programs, containers' records hold secrets: neither is for the host's other users.
    """
    try:
        os.mkdir(path, _PRIVATE)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        _close_to_others(path)


def _close_to_others(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if mode & 0o077:
        os.chmod(path, mode & 0o700)
