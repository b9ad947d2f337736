"""A read-through cache of one upstream registry: what is asked for is fetched once and kept."""

from __future__ import annotations

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
from containerkit.registry.client import Registries
from containerkit.registry.server.storage import Manifest
from containerkit.registry.transport import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import TypeVar

    from containerkit.image.digest import Digest
    from containerkit.registry.repository import Repository
    from containerkit.registry.server.storage import Directory
    from containerkit.registry.server.uploads import Upload

    T = TypeVar("T")

PIECE = 1 << 20
TAG_LIFE = 30.0
CLOSING = 5.0  # seconds that closing waits for an upstream that is silent
PATIENCE = 120.0  # seconds that a client waits for the next piece


class Fetch:
    """One blob on its way from the upstream: ``path`` is a file that grows to ``size`` bytes.

    The last piece can be read only once the digest is right: nobody sees a whole wrong blob.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = path
        self.size = size
        self._readable = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def wait(self, offset: int) -> int:
        """How many bytes can be read from ``offset`` on, once there are some. Raises what the fetch raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._readable > offset, PATIENCE)
            if self._readable <= offset:
                raise self._error or RegistryDisconnected("the upstream sends nothing")
            return self._readable - offset

    def advance(self, readable: int, error: Exception | None = None) -> None:
        """So much can be read now, or this went wrong."""
        with self._changed:
            self._readable, self._error = max(readable, self._readable), error
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
                    except ContainerkitError as error:
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

    def _fetch(self, name: str, digest: Digest) -> Fetch | None:
        with self._lock:  # in this order: one that has just ended is held
            if (running := self._fetching.get(digest)) is not None:
                return running
        if self._storage.holds(name, digest) or self._storage.link(name, digest):
            return None
        return self._start(name, digest)

    def close(self) -> None:
        """Break off what is being fetched and close the connections to the upstream."""
        with self._lock:
            self._closed = True
            threads, fetches = set(self._threads), set(self._fetching.values())
        for fetch in fetches:
            fetch.advance(0, RegistryDisconnected("the cache is being closed"))
        deadline = time.monotonic() + CLOSING
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for repository in self._repositories.values():
            repository.close()

    def _start(self, name: str, digest: Digest) -> Fetch:
        repository = self._repository(name)
        subject = f"blob {self._registry}/{name}@{digest}"
        head = repository.transport.exchange(
            Request("HEAD", f"{repository.name}/blobs/{digest}", subject, missing=BlobUnknown)
        )
        length = head.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise UnexpectedResponse(f"{subject}: the registry does not say how long it is")
        upload = self._storage.uploads.start(name)
        fetch = Fetch(upload.path, int(length))
        thread = threading.Thread(target=self._run, args=(name, digest, upload, fetch), daemon=True)
        with self._lock:
            self._fetching[digest] = fetch
            self._threads.add(thread)
        thread.start()
        return fetch

    def _run(self, name: str, digest: Digest, upload: Upload, fetch: Fetch) -> None:
        try:
            self._bring(name, digest, upload, fetch)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            fetch.advance(0, error)
        else:
            fetch.advance(fetch.size)
        finally:
            self._storage.uploads.forget(upload.id)
            with self._lock:
                self._fetching.pop(digest, None)
                self._threads.discard(threading.current_thread())

    def _bring(self, name: str, digest: Digest, upload: Upload, fetch: Fetch) -> None:
        descriptor = Descriptor("application/octet-stream", digest, fetch.size)
        with upload.claimed() as fd, self._repository(name).open(descriptor) as stream:
            before = done = 0
            while piece := stream.read(PIECE):
                if self._closed:
                    raise RegistryDisconnected("the cache is being closed")
                upload.write(fd, (piece,))
                before, done = done, done + len(piece)
                fetch.advance(before)
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
