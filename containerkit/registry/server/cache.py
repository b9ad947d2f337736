"""A read-through cache of one upstream registry: what is asked for is fetched once and kept."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from containerkit.errors import (
    BlobUnknown,
    ContainerkitError,
    ImageError,
    InvalidReference,
    ManifestUnknown,
    RegistryConfigError,
    RegistryDisconnected,
    RegistryError,
    RegistryNotFound,
    UnexpectedResponse,
)
from containerkit.image.model import Descriptor
from containerkit.image.reference import Reference
from containerkit.registry import discovery
from containerkit.registry.bodies import number
from containerkit.registry.client import Registries
from containerkit.registry.server.storage import Manifest, meant
from containerkit.registry.transport import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import TypeVar

    from containerkit.image.digest import Digest
    from containerkit.registry.repository import Repository
    from containerkit.registry.server.storage import Directory
    from containerkit.registry.server.uploads import Upload

    T = TypeVar("T")

PIECE = 64 << 10  # also what is held back until the digest is right
TAG_LIFE = 30.0
CLOSING = 5.0  # seconds that closing waits for an upstream that is silent
PATIENCE = 120.0  # seconds that a client waits while nothing comes


class Fetch:
    """One blob on its way from the upstream: ``path`` is a file that grows to ``size`` bytes.

    The last bytes can be read only once the digest is right: nobody sees a whole wrong blob.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self.readable = 0
        self._ended = False
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def wait(self, offset: int) -> int:
        """How many bytes can be read from ``offset`` on, once there are some or it has ended.

        Raises what the fetch raised, and :class:`RegistryDisconnected` where it makes no progress.
        """
        with self._changed:
            while self.readable <= offset and not self._ended:
                if not self._changed.wait(PATIENCE):
                    raise RegistryDisconnected("the upstream sends nothing")
            if self.readable <= offset and self._error is not None:
                raise self._error
            return max(0, self.readable - offset)

    def advance(self, readable: int) -> None:
        """So much can be read now."""
        with self._changed:
            self.readable = max(readable, self.readable)
            self._changed.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """All is here, or this went wrong."""
        with self._changed:
            self._ended, self._error = True, error
            if error is None:
                self.readable = self.size
            self._changed.notify_all()


class Turn:
    """One question that is being asked, and what came of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.began = -1.0
        self.answer: Any = None
        self.error: Exception | None = None


class Shared:
    """Questions that many ask at once: those who come while one is being asked share the answer to the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[Hashable, Turn] = {}

    def ask(self, key: Hashable, question: Callable[[], T]) -> T:
        """What ``question`` gives or raises, asked by somebody after this began."""
        now = time.monotonic()
        with self._lock:
            turn = self._turns.setdefault(key, Turn())
            turn.users += 1
        try:
            with turn.lock:
                if turn.began < now:
                    turn.began, turn.answer, turn.error = time.monotonic(), None, None
                    try:
                        turn.answer = question()
                    except Exception as error:  # noqa: BLE001 - whoever waits gets it
                        turn.error = error
                if turn.error is not None:
                    raise turn.error
                return cast("T", turn.answer)
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[key]


class Upstream:
    """The registry behind, as references name it (``docker.io``, ``127.0.0.1:5000``), reached by ``registries``.

    Digests are answered from the cache. A tag is asked for again after ``tag_life`` seconds, and answered from the
    cache where the upstream cannot answer. Raises :class:`RegistryConfigError` for what is no registry.
    """

    def __init__(
        self, registry: str, storage: Directory, tag_life: float = TAG_LIFE, registries: Registries | None = None
    ) -> None:
        self._registry = _registry(registry)
        self._registries = registries or Registries()
        self._storage = storage
        self._tag_life = tag_life
        self._repositories: dict[str, Repository] = {}
        self._lock = threading.Lock()
        self._fetching: dict[Digest, Fetch] = {}
        self._shared = Shared()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def manifest(self, name: str, target: str) -> Manifest:
        """A manifest by tag or digest. Raises what the upstream raises."""
        meant(name, target)
        return self._shared.ask((name, target), lambda: self._manifest(name, target))

    def _manifest(self, name: str, target: str) -> Manifest:
        fresh = ":" in target or time.time() - self._storage.tagged_at(name, target) < self._tag_life
        if fresh:
            with suppress(ManifestUnknown):
                return self._storage.manifest(name, target)
        return self._or_kept(lambda: self._fetch_manifest(name, target), lambda: self._storage.manifest(name, target))

    def _fetch_manifest(self, name: str, target: str) -> Manifest:
        repository = self._repository(name)
        mark = "@" if ":" in target else ":"
        try:
            descriptor, body = repository.resolve(Reference.parse(f"{self._registry}/{name}{mark}{target}"))
        except ManifestUnknown:
            if mark == ":":
                with suppress(RegistryNotFound):
                    self._storage.remove_manifest(name, target)
            raise
        except ImageError as error:  # to this server's clients it is no fault of theirs
            raise UnexpectedResponse(error.message, hint=error.hint) from error
        self._storage.put_manifest(name, descriptor.digest, body, descriptor.media_type)
        if mark == ":":
            self._storage.tag(name, target, descriptor.digest)
        return Manifest(body, descriptor.media_type, descriptor.digest)

    def tags(self, name: str) -> list[str]:
        """The upstream's tags, or those that are here where it cannot answer."""
        return self._or_kept(lambda: discovery.tags(self._repository(name)), lambda: self._storage.tags(name))

    def referrers(self, name: str, digest: Digest) -> list[Manifest]:
        """The manifests that refer to ``digest`` at the upstream, or those that are here where it cannot answer."""

        def ask() -> list[Manifest]:
            found = discovery.referrers(self._repository(name), digest)
            return [self.manifest(name, each.digest) for each in found]

        return self._or_kept(ask, lambda: list(self._storage.referrers(name, digest)))

    def fetch(self, name: str, digest: Digest) -> Fetch | None:
        """Bring one blob in; of several that ask at once, one fetches. Nothing where it is here already.

        Raises what the upstream raises.
        """
        return self._shared.ask((name, digest), lambda: self._fetch(name, digest))

    def size(self, name: str, digest: Digest) -> int | None:
        """How long a blob is, without fetching it; nothing where it is here. Raises what the upstream raises."""
        with self._lock:
            if (running := self._fetching.get(digest)) is not None:
                return running.size
        if self._storage.link(name, digest):
            return None
        return self._shared.ask((name, digest, "size"), lambda: self._size(name, digest))

    def _fetch(self, name: str, digest: Digest) -> Fetch | None:
        with self._lock:  # in this order: one that has just ended is held
            if (running := self._fetching.get(digest)) is not None:
                return running
        if self._storage.holds(name, digest) or self._storage.link(name, digest):
            return None
        return self._start(name, digest, self._size(name, digest))

    def close(self) -> None:
        """Break off what is being fetched and close the connections to the upstream."""
        with self._lock:
            self._closed = True
            threads, fetches = set(self._threads), set(self._fetching.values())
        for fetch in fetches:
            fetch.end(RegistryDisconnected("the cache is being closed"))
        deadline = time.monotonic() + CLOSING
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for repository in self._repositories.values():
            repository.close()

    def _size(self, name: str, digest: Digest) -> int:
        repository = self._repository(name)
        subject = f"blob {self._registry}/{name}@{digest}"
        head = repository.transport.exchange(
            Request("HEAD", f"{repository.name}/blobs/{digest}", subject, missing=BlobUnknown)
        )
        if (length := number(head.headers.get("Content-Length", ""))) is None:
            raise UnexpectedResponse(f"{subject}: the registry does not say how long it is")
        return length

    def _start(self, name: str, digest: Digest, size: int) -> Fetch:
        with self._lock:
            if (running := self._fetching.get(digest)) is not None:  # for another repository
                return running
            upload, fd = self._storage.fetch(name)
            fetch = Fetch(upload.path, size)
            thread = threading.Thread(target=self._run, args=(digest, upload, fd, fetch), daemon=True)
            self._fetching[digest] = fetch
            self._threads.add(thread)
        thread.start()
        return fetch

    def _run(self, digest: Digest, upload: Upload, fd: int, fetch: Fetch) -> None:
        try:
            self._bring(digest, upload, fd, fetch)
        except ImageError as error:  # to this server's clients it is no fault of theirs
            fetch.end(UnexpectedResponse(error.message, hint=error.hint))
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            fetch.end(error)
        else:
            fetch.end()
        finally:
            os.close(fd)
            self._storage.uploads.forget(upload.id)
            with self._lock:
                self._fetching.pop(digest, None)
                self._threads.discard(threading.current_thread())

    def _bring(self, digest: Digest, upload: Upload, fd: int, fetch: Fetch) -> None:
        descriptor = Descriptor("application/octet-stream", digest, fetch.size)
        with self._repository(upload.name).open(descriptor) as stream:
            done = 0
            while piece := stream.read(PIECE):
                if self._closed:
                    raise RegistryDisconnected("the cache is being closed")
                upload.write(fd, (piece,))
                done += len(piece)
                fetch.advance(min(done, fetch.size - PIECE))
            self._storage.finish(upload, fd, digest)

    def _repository(self, name: str) -> Repository:
        with self._lock:
            if self._closed:
                raise RegistryDisconnected("the cache is being closed")
            if name not in self._repositories:
                self._repositories[name] = self._registries.connect(Reference.parse(f"{self._registry}/{name}")).origin
            return self._repositories[name]

    def _or_kept(self, ask: Callable[[], T], kept: Callable[[], T]) -> T:
        """What the upstream answers; what is here, where it fails in a way that may pass."""
        try:
            return ask()
        except RegistryError as error:
            if not error.retryable:
                raise
            try:
                return kept()
            except (RegistryNotFound, ContainerkitError):
                raise error from None


def _registry(name: str) -> str:
    """As references have it."""
    with suppress(InvalidReference):
        found = Reference.parse(f"{name}/some/thing")
        if found.repository == "some/thing":
            return found.registry
    raise RegistryConfigError(f"{name!r} is no registry", hint="write its host, as in registry.example.org:5000")
