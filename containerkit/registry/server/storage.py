"""What the server keeps, as files: content by digest, and for each repository its manifests, tags and referrers.

::

    ROOT/blobs/ALGORITHM/HEX                        content, shared by all repositories
    ROOT/repositories/NAME/_blobs/ALGORITHM-HEX     a blob of this repository (empty)
    ROOT/repositories/NAME/_manifests/ALGORITHM-HEX a manifest of this repository: its media type
    ROOT/repositories/NAME/_tags/TAG                the digest that the tag means
    ROOT/repositories/NAME/_referrers/A-HEX/A-HEX   a manifest whose subject is the first digest
    ROOT/uploads/ID                                 what has come of an upload
    ROOT/uploads/fetch-ID                           what a cache is fetching
    ROOT/new/ID                                     a small file on its way to its place
    ROOT/lock                                       shared while something is entered, exclusive while it is removed

Everything appears by a rename, so that a killed server leaves nothing half-written. Processes may share a directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import (
    BlobUnknown,
    ContainerkitError,
    DigestMismatch,
    InvalidDigest,
    ManifestUnknown,
    RegistryNotFound,
)
from containerkit.image.digest import Digest
from containerkit.image.reference import LONGEST_PATH, PATH, TAG
from containerkit.registry.server.uploads import Uploads, unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.registry.server.uploads import Upload

STALE = 3600.0  # seconds after which a file on its way is nobody's
KINDS = frozenset({"_tags", "_blobs", "_manifests"})


class Manifest(NamedTuple):
    """A stored manifest: its bytes, media type and digest."""

    body: bytes
    media_type: str
    digest: Digest


def is_name(name: str) -> bool:
    """Whether it is the name of a repository: it then stays below its directory."""
    return len(name) <= LONGEST_PATH and re.fullmatch(PATH, name) is not None


class Directory:
    """The server's content below the directory ``root``, made where it is missing; threads and processes share it.

    Names of repositories must be such (:func:`is_name`); everything else is checked here.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        for part in ("blobs", "repositories", "new"):
            os.makedirs(os.path.join(self.root, part), mode=0o700, exist_ok=True)
        self.uploads = Uploads(os.path.join(self.root, "uploads"))
        if self.uploads.fetches():
            with self._locked(exclusive=True):
                self.uploads.sweep_fetches()
        oldest = time.time() - STALE
        for entry in os.scandir(os.path.join(self.root, "new")):
            with suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)

    # --- blobs

    def blob(self, name: str, digest: Digest) -> str:
        """The file of a repository's blob. Raises :class:`BlobUnknown`."""
        path = self.content(digest)
        if not os.path.exists(self._path(name, "_blobs", _file(digest))) or not os.path.exists(path):
            raise BlobUnknown(f"{name} has no blob {digest}", code="BLOB_UNKNOWN")
        return path

    def content(self, digest: Digest) -> str:
        """Where content of a digest is, or would be."""
        return os.path.join(self.root, "blobs", digest.algorithm, digest.hex)

    def link(self, name: str, digest: Digest) -> bool:
        """Make content that is here a blob of the repository, too; False where it is not here."""
        with self._locked():
            if not os.path.exists(self.content(digest)):
                return False
            self._write(self._path(name, "_blobs", _file(digest)), b"")
        return True

    def holds(self, name: str, digest: Digest) -> bool:
        """Whether the repository has this blob."""
        with suppress(BlobUnknown):
            return bool(self.blob(name, digest))
        return False

    def finish(self, upload: Upload, fd: int, digest: Digest) -> None:
        """Make an upload, claimed as ``fd``, a blob of its repository.

        Raises :class:`DigestMismatch`, and then the upload is gone, or where it has been removed
        :class:`RegistryNotFound`.
        """
        upload.finish(fd, digest)
        target = self.content(digest)
        with self._locked():
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            # First the mark, which means nothing without content: once the upload's file is gone, the blob is there.
            self._write(self._path(upload.name, "_blobs", _file(digest)), b"")
            try:
                os.rename(upload.path, target)
            except FileNotFoundError:
                raise unknown(upload.id) from None
        self.uploads.forget(upload.id)

    def fetch(self, name: str) -> tuple[Upload, int]:
        """A new file for what a cache fetches into a repository, and the descriptor that holds it; close it."""
        with self._locked():  # a server that starts would remove it between its making and its being held
            return self.uploads.fetch(name)

    def remove_blob(self, name: str, digest: Digest) -> None:
        """Take a blob out of a repository; the content goes with the last. Raises :class:`BlobUnknown`."""
        with self._locked(exclusive=True):
            self.blob(name, digest)
            os.unlink(self._path(name, "_blobs", _file(digest)))
            self._drop(digest)

    def _drop(self, digest: Digest) -> None:
        """Remove content that no repository has any more."""
        for name in self.repositories(everything=True):
            if any(os.path.exists(self._path(name, kind, _file(digest))) for kind in ("_blobs", "_manifests")):
                return
        with suppress(FileNotFoundError):
            os.unlink(self.content(digest))

    # --- manifests

    def manifest(self, name: str, target: str) -> Manifest:
        """The manifest of a tag or digest. Raises :class:`ManifestUnknown`."""
        digest = meant(name, target) or self._tagged(name, target)
        try:
            with open(self._path(name, "_manifests", _file(digest)), encoding="utf-8") as file:
                media_type = file.read()
            with open(self.content(digest), "rb") as file:
                return Manifest(file.read(), media_type, digest)
        except FileNotFoundError:
            raise _no_manifest(name, target) from None

    def put_manifest(self, name: str, target: str, body: bytes, media_type: str) -> Digest:
        """Keep a manifest and point ``target`` to it, where that is a tag. Raises :class:`DigestMismatch`."""
        wanted = meant(name, target)
        state = wanted.hasher() if wanted else None
        if state is None:
            digest = Digest.of(body)
        else:
            state.update(body)
            digest = Digest.from_hash(state)
        if wanted not in (None, digest):
            raise DigestMismatch(f"the manifest hashes to {digest}", expected=wanted, actual=digest)
        with self._locked():
            self._write(self.content(digest), body)
            self._write(self._path(name, "_manifests", _file(digest)), media_type.encode())
            if (subject := _subject(body)) is not None:
                self._write(self._path(name, "_referrers", _file(subject), _file(digest)), b"")
            if wanted is None:
                self._write(self._path(name, "_tags", target), digest.encode())
        return digest

    def tag(self, name: str, tag: str, digest: Digest) -> None:
        """Point a tag to a manifest. Raises :class:`ManifestUnknown` where it is not here, or no more."""
        with self._locked():
            if not os.path.exists(self._path(name, "_manifests", _file(digest))):
                raise _no_manifest(name, digest)
            self._write(self._path(name, "_tags", tag), digest.encode())

    def tagged_at(self, name: str, tag: str) -> float:
        """When the tag was last set (seconds since 1970); 0 where there is none."""
        try:
            return os.stat(self._path(name, "_tags", tag)).st_mtime
        except FileNotFoundError:
            return 0.0

    def remove_manifest(self, name: str, target: str) -> None:
        """Remove a tag, or by its digest a manifest and all its tags. Raises :class:`ManifestUnknown`."""
        with self._locked(exclusive=True):
            if meant(name, target) is None:
                self._tagged(name, target)
                os.unlink(self._path(name, "_tags", target))
                return
            manifest = self.manifest(name, target)
            for tag in self.tags(name):
                if self._tagged(name, tag) == manifest.digest:
                    os.unlink(self._path(name, "_tags", tag))
            os.unlink(self._path(name, "_manifests", _file(manifest.digest)))
            if (subject := _subject(manifest.body)) is not None:
                with suppress(FileNotFoundError):
                    os.unlink(self._path(name, "_referrers", _file(subject), _file(manifest.digest)))
            self._drop(manifest.digest)

    def tags(self, name: str) -> list[str]:
        """The tags of a repository, sorted. Raises :class:`RegistryNotFound` where there is no such repository."""
        if not any(os.path.isdir(self._path(name, kind)) for kind in KINDS):
            raise RegistryNotFound(f"there is no repository {name}", code="NAME_UNKNOWN")
        return sorted(_names(self._path(name, "_tags")))

    def referrers(self, name: str, digest: Digest) -> Iterator[Manifest]:
        """The manifests whose subject is ``digest``."""
        for found in sorted(_names(self._path(name, "_referrers", _file(digest)))):
            algorithm, _, encoded = found.partition("-")
            with suppress(ManifestUnknown):
                yield self.manifest(name, f"{algorithm}:{encoded}")

    def repositories(self, *, everything: bool = False) -> list[str]:
        """The names of all repositories with tags, sorted; with ``everything`` of those without, too."""
        top = os.path.join(self.root, "repositories")
        found = []
        for directory, names, _ in os.walk(top):
            there = KINDS.intersection(names)
            if there if everything else "_tags" in there and _names(os.path.join(directory, "_tags")):
                found.append(os.path.relpath(directory, top))
            names[:] = [name for name in names if not name.startswith("_")]
        return sorted(found)

    # --- files

    def _tagged(self, name: str, tag: str) -> Digest:
        try:
            with open(self._path(name, "_tags", tag), encoding="ascii") as file:
                return Digest(file.read())
        except FileNotFoundError:
            raise _no_manifest(name, tag) from None

    def _path(self, name: str, *parts: str) -> str:
        return os.path.join(self.root, "repositories", name, *parts)

    @contextmanager
    def _locked(self, *, exclusive: bool = False) -> Iterator[None]:
        """Nothing that is being entered is removed meanwhile, by whichever thread or process."""
        fd = os.open(os.path.join(self.root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(fd)

    def _write(self, path: str, content: bytes) -> None:
        temporary = os.path.join(self.root, "new", uuid.uuid4().hex)
        try:
            with open(temporary, "wb", opener=_private) as file:
                file.write(content)
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.rename(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _no_manifest(name: str, target: str) -> ManifestUnknown:
    return ManifestUnknown(f"{name} has no manifest {target[:160]}", code="MANIFEST_UNKNOWN")


def meant(name: str, target: str) -> Digest | None:
    """The digest by which a manifest is asked for, or None for a tag. Raises :class:`ManifestUnknown` for neither."""
    try:
        digest = Digest(target) if ":" in target else None
    except InvalidDigest as error:
        raise ManifestUnknown(f"{target[:160]} is no digest", code="MANIFEST_UNKNOWN") from error
    if digest is None and not re.fullmatch(TAG, target):
        raise _no_manifest(name, target)
    return digest


def _file(digest: Digest) -> str:
    return f"{digest.algorithm}-{digest.hex}"


def _subject(body: bytes) -> Digest | None:
    try:
        return Digest(json.loads(body)["subject"]["digest"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ContainerkitError):
        return None


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []
