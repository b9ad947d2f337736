"""A small registry of our own: in this process or standing alone, over a directory, with TLS, users, or an upstream."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import tempfile
import threading
import time
from contextlib import closing
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, Self

from containerkit.errors import BlobUnknown, RegistryNotFound, Unsupported
from containerkit.image.codec import parse_document
from containerkit.image.model import INDEX_TYPES, Index
from containerkit.registry.server.handler import Handler
from containerkit.registry.server.refusals import MissingPart
from containerkit.registry.server.storage import Directory, Manifest, is_name
from containerkit.registry.server.uploads import cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from containerkit.image.digest import Digest
    from containerkit.image.images import Images
    from containerkit.image.model import Descriptor
    from containerkit.registry.client import Registries
    from containerkit.registry.server.cache import Fetch, Upstream
    from containerkit.registry.server.certificate import Pem

NAMES = ("localhost", "127.0.0.1", "::1")
TAG_LIFE = 30.0
MOST_CONNECTIONS = 1000
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
BREATH = 0.1  # seconds until another connection is accepted when files or memory have run out
CLOSING = 10.0  # seconds that closing waits for a request that an upstream does not answer


class Content:
    """A blob to be sent: an open file of ``size`` bytes, which may still be growing. Close it."""

    def __init__(self, path: str, fetch: Fetch | None = None) -> None:
        self._fetch = fetch
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = fetch.size if fetch else os.fstat(self.fd).st_size

    def ready(self, offset: int) -> int:
        """How many bytes can be read from ``offset`` on, once there are some. Raises what the fetching raises."""
        return self._fetch.wait(offset) if self._fetch else self.size - offset

    def reached(self, offset: int) -> bool:
        """Whether everything up to ``offset`` is here."""
        return self._fetch is None or self._fetch.readable >= offset

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class RegistryServer(ThreadingHTTPServer):
    """The listening socket, and what handlers share. Use :func:`serve`."""

    daemon_threads = True  # who forgets to close the registry can still end
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        storage: Directory,
        *,
        users: Mapping[str, str] | None,
        writable: bool,
        deletion: bool,
        upstream: Upstream | None,
    ) -> None:
        self.storage = storage
        self.users = users
        self.writable = writable and upstream is None
        self.deletion = deletion
        self.upstream = upstream
        self.secure = False
        self.closing = False
        self._open: dict[socket.socket, threading.Thread] = {}
        self._idle: dict[socket.socket, None] = {}  # between requests, the longest first
        self._lock = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, without asking the name service who we are."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    # --- what handlers ask, and an upstream may answer

    def manifest(self, name: str, target: str) -> Manifest:
        """A manifest, from the upstream where there is one."""
        return (self.upstream or self.storage).manifest(name, target)

    def content(self, name: str, digest: Digest) -> Content:
        """A blob, which is being fetched where there is an upstream that has it."""
        if self.upstream is not None and not self.storage.holds(name, digest):
            fetch = self.upstream.fetch(name, digest)
            if fetch is not None:
                try:
                    return Content(fetch.path, fetch)
                except FileNotFoundError:  # it has ended already, well or not
                    fetch.wait(fetch.size)
                    self.storage.link(name, digest)  # another repository may have been the one that fetched it
        return self._kept(name, digest)

    def size(self, name: str, digest: Digest) -> int:
        """How long a blob is; nothing is fetched for that."""
        size = None
        if self.upstream is not None and not self.storage.holds(name, digest):
            size = self.upstream.size(name, digest)
        if size is not None:
            return size
        with closing(self._kept(name, digest)) as content:
            return content.size

    def _kept(self, name: str, digest: Digest) -> Content:
        try:
            return Content(self.storage.blob(name, digest))
        except FileNotFoundError:
            raise BlobUnknown(f"{name} has no blob {digest} any more", code="BLOB_UNKNOWN") from None

    def tags(self, name: str) -> list[str]:
        """The tags of a repository."""
        return (self.upstream or self.storage).tags(name)

    def referrers(self, name: str, digest: Digest) -> Iterable[Manifest]:
        """The manifests that refer to ``digest``, in the order of their digests."""
        return sorted((self.upstream or self.storage).referrers(name, digest), key=lambda manifest: manifest.digest)

    def mount(self, digest: Digest, source: str, name: str) -> bool:
        """Make a blob of the repository ``source`` (or of any) one of ``name``, too; False where it is not there."""
        if source and not is_name(source):
            return False
        sources = [source] if source else self.storage.repositories(everything=True)
        return any(self.storage.holds(each, digest) for each in sources) and self.storage.link(name, digest)

    def check_manifest(self, name: str, body: bytes, media_type: str) -> tuple[str, str]:
        """Its media type and its subject's digest, or nothing. What it names must be here; its subject need not.

        Raises :class:`InvalidImage`.
        """
        document = parse_document(body, media_type)
        if isinstance(document, Index):
            for child in document.manifests:
                self._check_child(name, child)
        else:
            for blob in (*document.layers, document.config):
                if not blob.urls and not self.storage.holds(name, blob.digest):
                    raise MissingPart(f"{name} has no blob {blob.digest}")
        subject = document.subject
        return document.media_type, str(subject.digest) if subject else ""

    def _check_child(self, name: str, child: Descriptor) -> None:
        """An index names manifests, or blobs that only it knows the meaning of."""
        try:
            self.storage.manifest(name, child.digest)
        except RegistryNotFound as error:
            if (
                "manifest" in child.media_type
                or child.media_type in INDEX_TYPES
                or not self.storage.holds(name, child.digest)
            ):
                raise MissingPart(f"{name} has no manifest {child.digest}") from error

    # --- connections

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection; one that cannot be accepted yet waits without keeping the processor busy."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in EXHAUSTED:
                time.sleep(BREATH)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection, remembered so that closing the server ends it.

        Where there are too many, the one that has been without a request for longest makes room.
        """
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="containerkit-request", daemon=True
        )
        with self._lock:
            oldest = next(iter(self._idle), None)
            full = len(self._open) >= MOST_CONNECTIONS
            if full and oldest is not None:
                full = False
                del self._idle[oldest]
                cut(oldest)  # its thread ends at once
            if not full:
                self._open[request] = thread
                self._idle[request] = None
        if full:
            self.shutdown_request(request)
        else:
            thread.start()

    def idle(self, connection: socket.socket) -> None:
        """It waits for a request from now on."""
        with self._lock:
            if connection in self._open:
                self._idle[connection] = None

    def busy(self, connection: socket.socket) -> None:
        """A whole request has come."""
        with self._lock:
            self._idle.pop(connection, None)

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        with self._lock:
            self._idle.pop(request, None)
        super().shutdown_request(request)
        with self._lock:
            self._open.pop(request, None)

    def server_close(self) -> None:
        """Close every connection and wait for their threads."""
        self.closing = True
        TCPServer.server_close(self)
        with self._lock:
            connections = dict(self._open)
        for connection in connections:
            cut(connection)
        deadline = time.monotonic() + CLOSING
        for thread in connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke concerns nobody else."""


class Registry:
    """A running registry; a context manager. ``host`` is what references name: ``127.0.0.1:PORT``.

    With TLS ``certificates`` has the files of its authority, certificate and key.
    """

    def __init__(self, server: RegistryServer, directory: str, *, temporary: bool, names: tuple[str, ...] = ()) -> None:
        self._server = server
        self._temporary = temporary
        self._closing = threading.Lock()
        self._closed = False
        self.directory = directory
        address, port = server.server_address[:2]
        shown = f"[{address!s}]" if ":" in str(address) else str(address)
        self.host = f"{shown}:{port}"
        self.certificates: Pem | None = _encrypt(server, directory, (*names, str(address))) if names else None
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="containerkit-registry", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Its address with the scheme."""
        return f"{'https' if self._server.secure else 'http'}://{self.host}"

    def name(self, image: str) -> str:
        """The full name of ``image`` here."""
        return f"{self.host}/{image}"

    def wait(self) -> None:
        """Serve until somebody else closes it."""
        self._thread.join()

    def close(self) -> None:
        """Stop serving; a directory of its own goes, a given one stays."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._server.shutdown()
            self._thread.join()
            if self._server.upstream is not None:
                self._server.upstream.close()
            self._server.server_close()
            if self._temporary:
                shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(
    directory: str | os.PathLike[str] | None = None,
    *,
    images: Images | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    users: Mapping[str, str] | None = None,
    tls: bool = False,
    names: Iterable[str] = (),
    read_only: bool = False,
    deletion: bool = True,
    upstream: str = "",
    tag_life: float = TAG_LIFE,
    registries: Registries | None = None,
) -> Registry:
    """Start a registry in this process, in threads of its own; port 0 takes any free one.

    Its content lies in ``directory``, or in a temporary one that goes with it; with ``images`` (a host's) it is those,
    read-only, and nothing is copied. ``users`` are passwords by user name
    (Basic authentication). With ``tls`` it makes itself an authority and a certificate, which stay with the directory;
    the certificate is for loopback, ``host`` and further ``names`` (or addresses) of this machine.
    With ``upstream`` (a registry's host) it is a read-through cache of that one: what is asked for is fetched once,
    kept, and pushed to nobody; a tag is asked for again after ``tag_life`` seconds. ``registries`` says how that one is
    reached (credentials, certificates), by default the machine's configuration.

    Raises ``OSError`` where it cannot listen there, :class:`Unsupported` where TLS wants the package cryptography.
    """
    temporary = directory is None
    path = tempfile.mkdtemp(prefix="containerkit-registry-") if directory is None else os.fspath(directory)
    try:
        storage = Directory(path)
        if images is not None:
            from containerkit.registry.server.store import Store

            storage = Store(images, path)
        cache = None
        if upstream:
            from containerkit.registry.server.cache import Upstream

            cache = Upstream(upstream, storage, tag_life, registries)
        server = RegistryServer(
            (host, port),
            storage,
            users=users,
            writable=not read_only and images is None,
            deletion=deletion and images is None,
            upstream=cache,
        )
        try:
            return Registry(server, path, temporary=temporary, names=(*NAMES, *names) if tls else ())
        except BaseException:
            server.server_close()
            raise
    except BaseException:
        if temporary:
            shutil.rmtree(path)
        raise


def _encrypt(server: RegistryServer, directory: str, names: Iterable[str]) -> Pem:
    """Speak TLS from now on."""
    try:
        from containerkit.registry.server.certificate import make
    except ImportError as error:
        raise Unsupported("a certificate cannot be made", remedy="pip install cryptography") from error
    own = os.path.join(directory, "tls")
    os.makedirs(own, mode=0o700, exist_ok=True)
    pem = make(own, dict.fromkeys(names))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(pem.certificate, pem.key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.secure = True
    return pem
