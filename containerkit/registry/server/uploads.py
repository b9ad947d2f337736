"""Uploads that are under way: files that only grow, whichever request, process or restart of the server adds to them.

The id of an upload contains a mark of its repository's name, so that no other repository can use it, even after a
restart. One request at a time writes, held by a lock on the file; a client that comes again takes it over. What a
cache is fetching lies among them, and means nothing once nobody holds it.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from containerkit.errors import DigestMismatch, RegistryNotFound, RegistryRejected
from containerkit.image.digest import Digest, new_hash
from containerkit.linux.locks import locked, same_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed import ReadableBuffer

MODE = 0o600
PIECE = 1 << 20
MOST = 1000  # uploads that are not finished
ABANDONED = 7 * 24 * 3600.0  # seconds without a byte
IDLE = 3600.0  # the same, where there are too many
PATIENCE = 10.0  # seconds that a request waits for another one on the same upload
IDENTITY = re.compile("[0-9a-f]{32}-[0-9a-f]{16}")
FETCH = "fetch-"  # how the name of what a cache is fetching begins: no client's upload


class Uploads:
    """All uploads of one directory; threads share it, and other processes use the same directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self._known: dict[str, Upload] = {}
        self._lock = threading.Lock()
        self.sweep(ABANDONED)

    def start(self, name: str) -> Upload:
        """A new, empty upload into a repository. Raises :class:`RegistryRejected` where there are too many."""
        with self._lock:
            self._make_room()
            upload = Upload(self, name, f"{uuid.uuid4().hex}-{_mark(name)}")
            os.close(_create(upload.path))
            self._known[upload.id] = upload
        return upload

    def fetch(self, name: str) -> tuple[Upload, int]:
        """A new file that only this process writes to, and its descriptor, which holds it; close it.

        Raises :class:`RegistryRejected` where there are too many.
        """
        with self._lock:
            self._make_room()
        upload = Upload(self, name, f"{FETCH}{uuid.uuid4().hex}")
        fd = _create(upload.path)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return upload, fd

    def _make_room(self) -> None:
        there = os.listdir(self.directory)
        for gone in self._known.keys() - set(there):  # finished by another process
            del self._known[gone]
        if len(there) >= MOST:
            self.sweep(IDLE)
            if len(os.listdir(self.directory)) >= MOST:
                message = f"{MOST} uploads have been begun and not finished"
                raise RegistryRejected(message, status=429, code="TOOMANYREQUESTS")

    def find(self, name: str, identity: str) -> Upload:
        """An upload that is under way, in this process or another one. Raises :class:`RegistryNotFound`."""
        if IDENTITY.fullmatch(identity) and identity.endswith(_mark(name)):
            with self._lock:
                upload = self._known.get(identity) or Upload(self, name, identity)
                if os.path.exists(upload.path):
                    return self._known.setdefault(identity, upload)
                self._known.pop(identity, None)
        raise unknown(identity)

    def forget(self, identity: str) -> None:
        """Remove an upload and what has come of it."""
        with self._lock:
            self._known.pop(identity, None)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.directory, identity))

    def sweep(self, age: float) -> None:
        """Remove what has not grown for ``age`` seconds, and nobody writes to."""
        oldest = time.time() - age
        for entry in os.scandir(self.directory):
            with suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest and _remove(entry.path):
                    self._known.pop(entry.name, None)

    def fetches(self) -> list[str]:
        """The files of what caches are fetching, or were when they died."""
        return [entry.path for entry in os.scandir(self.directory) if entry.name.startswith(FETCH)]

    def sweep_fetches(self) -> None:
        """Remove those of caches that died. None may be made meanwhile."""
        for path in self.fetches():
            with suppress(FileNotFoundError):
                _remove(path)


class Upload:
    """Bytes on their way into a repository, and the hash of those that came through this process."""

    def __init__(self, uploads: Uploads, name: str, identity: str) -> None:
        self.name = name
        self.id = identity
        self.path = os.path.join(uploads.directory, identity)
        self._uploads = uploads
        self._hash = new_hash()
        self._hashed = 0
        self._guard = threading.Lock()
        self._writing = threading.Lock()
        self._writer: socket.socket | None = None

    @property
    def size(self) -> int:
        """How many bytes have come. Raises :class:`RegistryNotFound` where the upload is over."""
        try:
            return os.stat(self.path).st_size
        except FileNotFoundError:
            raise unknown(self.id) from None

    @contextmanager
    def claimed(self, writer: socket.socket | None = None) -> Iterator[int]:
        """The file descriptor to :meth:`write` to, of the only one who may.

        ``writer`` is the connection it is for; the one before ends. Raises :class:`RegistryRejected` where another
        process goes on writing, and :class:`RegistryNotFound`.
        """
        with self._guard:
            before, self._writer = self._writer, writer
        if before is not None:
            reset(before)
            cut(before)
        if not self._writing.acquire(timeout=PATIENCE):
            raise _busy(self.id)
        try:
            fd = _open(self.path, self.id)
            try:
                _lock(fd, self.id)
                if not same_file(fd, self.path):  # while we waited it has become a blob, or was removed
                    raise unknown(self.id)
                yield fd
            finally:
                os.close(fd)
        finally:
            with self._guard:
                if self._writer is writer:
                    self._writer = None
            self._writing.release()

    def write(self, fd: int, pieces: Iterable[ReadableBuffer]) -> None:
        """Append."""
        size = os.fstat(fd).st_size
        for piece in pieces:
            with memoryview(piece) as view:
                written = 0
                while written < len(view):
                    written += os.write(fd, view[written:])
                if self._hashed == size:
                    self._hash.update(view)
                    self._hashed += written
                size += written

    def finish(self, fd: int, digest: Digest) -> None:
        """Check the whole content. Raises :class:`DigestMismatch`, and then it is gone.

        Raises :class:`RegistryNotFound` where it has been removed.
        """
        if digest.algorithm != self._hash.name:
            self._hash, self._hashed = digest.hasher(), 0
        while piece := os.pread(fd, PIECE, self._hashed):
            self._hash.update(piece)
            self._hashed += len(piece)
        actual = Digest.from_hash(self._hash)
        if not os.fstat(fd).st_nlink:
            raise unknown(self.id)
        if actual != digest:
            self._uploads.forget(self.id)
            raise DigestMismatch(f"the blob hashes to {actual}", expected=digest, actual=actual)


def cut(connection: socket.socket) -> None:
    """End a connection that another thread uses: it neither receives nor sends any more, and what is left is lost."""
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS's own would have the rest read as plain text


def reset(connection: socket.socket) -> None:
    """Have its closing reset it: a client that is sending to a closed window hears of nothing less."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def unknown(identity: str) -> RegistryNotFound:
    """The error for an upload that is not there."""
    return RegistryNotFound(f"there is no upload {identity[:64]}", status=404, code="BLOB_UPLOAD_UNKNOWN")


def _busy(identity: str) -> RegistryRejected:
    return RegistryRejected(f"another request writes to {identity}", status=409, code="BLOB_UPLOAD_INVALID")


def _mark(name: str) -> str:
    return new_hash("sha256", name.encode()).hexdigest()[:16]


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)


def _open(path: str, identity: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        raise unknown(identity) from None


def _remove(path: str) -> bool:
    """Remove a file, unless somebody holds it; who waits for it sees that it is gone."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if held := locked(fd):
            os.unlink(path)
    finally:
        os.close(fd)
    return held


def _lock(fd: int, identity: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not locked(fd):
        if time.monotonic() > deadline:
            raise _busy(identity)
        time.sleep(0.05)
