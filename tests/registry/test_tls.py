"""TLS: private authorities, client certificates, certificates that do not hold, proxies, and Docker Hub by its name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import ssl
import threading
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import (
    CertificateRejected,
    ManifestUnknown,
    RedirectRefused,
    RegistryConfigError,
    RegistryDisconnected,
    RegistryError,
    RegistryUnavailable,
    TlsFailed,
)
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_LAYER, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry.bodies import interrupt, read_raw
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credential, Credentials
from containerkit.registry.mirrors import Mirrors
from containerkit.registry.tls import Tls, context, find
from containerkit.registry.transport import Request, Transport
from support.certificates import Authority, self_signed
from support.cutting_proxy import ConnectProxy
from support.distribution import distribution, htpasswd
from support.faulty import Faulty, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.certificates import Pair
    from support.registry import Registry

BODY = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
MANIFEST = answer(200, BODY, content_type=OCI_MANIFEST)
LAYER = b"layer" * 1000
BLOB = Descriptor(OCI_LAYER, Digest.of(LAYER), len(LAYER))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(os.fspath(tmp_path_factory.mktemp("tls")))


class Secure:
    """A faulty server behind TLS, by a thread for each connection."""

    def __init__(self, server: Faulty, pair: Pair) -> None:
        self.server = server
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*pair)
        inner = server._server
        finish = inner.get_request

        def get_request() -> tuple[socket.socket, Any]:
            client, address = finish()
            client.settimeout(10)
            try:
                return self._context.wrap_socket(client, server_side=True), address
            except OSError:
                client.close()
                raise

        inner.get_request = get_request  # type: ignore[method-assign]
        inner.request_queue_size = 20


@pytest.fixture
def secure(authority: Authority) -> Iterator[Callable[..., Faulty]]:
    """Faulty servers with a certificate each."""
    with contextlib.ExitStack() as stack:

        def make(pair: Pair | None = None) -> Faulty:
            server = Faulty()
            Secure(server, pair or authority.issue(f"s{len(os.listdir(authority.directory))}", "127.0.0.1"))
            return stack.enter_context(server)

        yield make


def registries(**options: Any) -> Registries:
    return Registries(**{"credentials": Credentials({}), "mirrors": Mirrors(files=()), "timeout": 5.0, **options})


def resolve(host: str, **options: Any) -> bytes:
    reference = Reference.parse(f"{host}/a:1")
    with registries(**options).connect(reference) as remote:
        return remote.resolve(reference)[1]


@pytest.mark.registry
@pytest.mark.parametrize("client", [False, True])
def test_docker_registry_with_tls(client: bool, authority: Authority, session_directory: str) -> None:
    pair = authority.issue("server", "127.0.0.1")
    auth = htpasswd(authority.directory, alice="hush")
    with distribution(
        session_directory, auth=auth, tls=pair, client_authority=authority.path if client else ""
    ) as server:
        options: dict[str, Any] = {"authorities": {server.host: [authority.path]}}
        reference = Reference.parse(server.name("a:1"))
        alice = Credential("alice", "hush")
        if client:
            with registries(**options).connect(reference, credential=alice) as remote, pytest.raises(RegistryError):
                remote.has(BLOB)
            options["clients"] = {server.host: tuple(authority.issue("client"))}
        with registries(**options).connect(reference, credential=alice) as remote:
            remote.put(BLOB, io.BytesIO(LAYER))
            with remote.open(BLOB) as stream:
                assert stream.read() == LAYER
        with registries().connect(reference) as remote, pytest.raises(TlsFailed):
            remote.has(BLOB)


def test_certs_d(
    authority: Authority, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, secure: Callable[..., Faulty]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    server = secure()
    server.on("GET", "/v2/a/manifests/1", MANIFEST)
    with pytest.raises(CertificateRejected):
        resolve(server.host)
    place = tmp_path / ".docker/certs.d" / server.host
    place.mkdir(parents=True)
    shutil.copy(authority.path, place / "ca.crt")
    assert resolve(server.host) == BODY
    client = authority.issue("c")
    shutil.copy(client.certificate, place / "client.cert")
    with pytest.raises(RegistryConfigError, match=r"client\.key"):
        resolve(server.host)
    shutil.copy(client.key, place / "client.key")
    assert find(server.host, [str(tmp_path / ".docker/certs.d")]).client == (
        str(place / "client.cert"),
        str(place / "client.key"),
    )
    assert resolve(server.host) == BODY
    (place / "ca.crt").write_text("no certificate")
    with pytest.raises(RegistryConfigError, match=r"ca\.crt"):
        resolve(server.host)


@pytest.mark.parametrize("kind", ["self-signed", "expired", "other host", "unknown authority"])
def test_certificates_that_do_not_hold(
    kind: str, authority: Authority, tmp_path: Any, secure: Callable[..., Faulty]
) -> None:
    pair = {
        "self-signed": lambda: self_signed(str(tmp_path), "self", "127.0.0.1"),
        "expired": lambda: authority.issue("old", "127.0.0.1", days=-1),
        "other host": lambda: authority.issue("other", "registry.example"),
        "unknown authority": lambda: Authority(str(tmp_path), "stranger").issue("x", "127.0.0.1"),
    }[kind]()
    server = secure(pair)
    server.on("GET", "/v2/a/manifests/1", MANIFEST)
    with pytest.raises(CertificateRejected, match="certificate that does not hold") as caught:
        resolve(server.host, authorities={server.host: [authority.path]})
    assert not caught.value.retryable
    assert isinstance(caught.value, RegistryUnavailable)
    assert server.seen == []
    assert resolve(server.host, insecure=[server.host]) == BODY  # only where that is allowed


@pytest.mark.registry
def test_http_where_tls_is_wanted(registry: Registry, authority: Authority) -> None:
    with pytest.raises(TlsFailed, match="did not agree on TLS"):
        resolve(registry.host, authorities={registry.host: [authority.path]})
    with pytest.raises(ManifestUnknown):
        resolve(registry.host, insecure=[registry.host])


@pytest.mark.registry
def test_tls_where_http_is_usual(authority: Authority, session_directory: str) -> None:
    """Loopback is spoken to without TLS; where the server wants it, with all that TLS proves."""
    with distribution(session_directory, tls=authority.issue("loop", "127.0.0.1")) as server:
        with pytest.raises(CertificateRejected):
            resolve(server.host)
        with pytest.raises(TlsFailed, match="wants TLS"), Transport(server.host) as transport:
            transport.exchange(Request("GET", "", "ping"))
        reference = Reference.parse(server.name("a:1"))
        with registries(insecure=[server.host]).connect(reference) as remote:
            assert not remote.has(BLOB)


def test_a_redirect_from_https_to_http(authority: Authority, secure: Callable[..., Faulty], faulty: Faulty) -> None:
    server = secure()
    server.on("GET", "/v2/a/manifests/1", answer(302, location=f"http://{faulty.host}/x"))
    with pytest.raises(RedirectRefused, match="https to http"):
        resolve(server.host, authorities={server.host: [authority.path]})
    assert faulty.seen == []


def test_an_upload_from_https_to_http(authority: Authority, secure: Callable[..., Faulty], faulty: Faulty) -> None:
    """A layer is no less private than the manifest."""
    server = secure()
    server.on("POST", "/v2/a/blobs/uploads/", answer(202, location=f"http://{faulty.host}/up"))
    faulty.on("PUT", "/up", answer(201))
    with (
        registries(authorities={server.host: [authority.path]}).connect(Reference.parse(f"{server.host}/a")) as remote,
        pytest.raises(RedirectRefused, match="without TLS"),
    ):
        remote.put(BLOB, io.BytesIO(LAYER))
    assert faulty.seen == []
    with registries(insecure=[server.host]).connect(Reference.parse(f"{server.host}/a")) as remote:
        remote.put(BLOB, io.BytesIO(LAYER))
    assert [request.body for request in faulty.seen] == [LAYER]


def test_an_interrupt_makes_no_content_of_what_is_encrypted(
    authority: Authority, secure: Callable[..., Faulty]
) -> None:
    """Only what came before it is given, however much lies there to be read."""
    server, content = secure(), os.urandom(1 << 20)
    descriptor = Descriptor(OCI_LAYER, Digest.of(content), len(content))
    server.on("GET", f"/v2/a/blobs/{descriptor.digest}", answer(200, content))
    options = {"authorities": {server.host: [authority.path]}}
    with registries(**options).connect(Reference.parse(f"{server.host}/a")) as remote:
        response = remote.origin.fetch(descriptor, 0)
        came = read_raw(response, 1000, "")
        interrupt(response)
        with contextlib.suppress(RegistryDisconnected):
            while data := read_raw(response, 1 << 16, ""):
                came += data
        response.close()
        assert content.startswith(came)
        assert came != content
        with remote.open(descriptor) as stream:
            assert stream.read(1000) == content[:1000]
            stream.interrupt()  # type: ignore[attr-defined]
            with pytest.raises(RegistryDisconnected, match=f"{descriptor.digest}: interrupted"):
                stream.read(1000)


def test_contexts(tmp_path: Any) -> None:
    with pytest.raises(RegistryConfigError):
        context(Tls(authorities=(str(tmp_path / "none"),)))
    with pytest.raises(RegistryConfigError):
        context(Tls(client=(str(tmp_path / "none"), str(tmp_path / "none"))))
    assert context(Tls()).verify_mode == ssl.CERT_REQUIRED


@pytest.fixture
def hub(
    authority: Authority, secure: Callable[..., Faulty], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Faulty, Faulty, Faulty, ConnectProxy]]:
    """Docker Hub, its token service and its storage under their own names, behind a proxy of the environment."""
    names = ("registry-1.docker.io", "auth.docker.io", "storage.example")
    servers = [secure(authority.issue(name, name)) for name in names]
    registry, auth, storage = servers
    challenge = answer(401, www_authenticate='Bearer realm="https://auth.docker.io/token",service="registry.docker.io"')
    limits = {"ratelimit_limit": "100;w=21600", "ratelimit_remaining": "76;w=21600"}
    manifest = answer(200, BODY, content_type=OCI_MANIFEST, **limits)
    registry.on("GET", "/v2/library/alpine/manifests/latest", challenge, manifest)
    target = "https://storage.example/blob?signature=hush"
    registry.on("GET", f"/v2/library/alpine/blobs/{BLOB.digest}", answer(307, location=target))
    auth.on("GET", "/token", answer(200, b'{"token": "t0ken", "expires_in": 300}'))
    storage.on("GET", "/blob", answer(200, LAYER))
    routes = {f"{name}:443": server.host for name, server in zip(names, servers, strict=True)}
    monkeypatch.setenv("SSL_CERT_FILE", authority.path)
    with ConnectProxy(routes) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@{proxy.host}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("https_proxy", raising=False)
        yield registry, auth, storage, proxy


def test_docker_hub(hub: tuple[Faulty, Faulty, Faulty, ConnectProxy]) -> None:
    registry, auth, storage, proxy = hub
    credentials = Credentials({})
    credentials.login("docker.io", "alice", "hush")
    reference = Reference.parse("alpine")
    with registries(credentials=credentials).connect(reference) as remote:
        assert remote.resolve(reference)[1] == BODY
        with remote.open(BLOB) as stream:
            assert stream.read() == LAYER
        assert remote.origin.transport.rate_limit == (100, 76, 21600)
    assert auth.seen[0].headers["authorization"].startswith("Basic ")
    assert "scope=repository%3Alibrary%2Falpine%3Apull" in auth.seen[0].path
    assert [each.headers.get("authorization") for each in registry.seen] == [None, *["Bearer t0ken"] * 2]
    assert [name for each in storage.seen for name in each.headers if name in ("authorization", "cookie")] == []
    assert all("Proxy-Authorization: Basic" in head for head in proxy.heads)
    assert "proxy-authorization" not in {name for each in registry.seen for name in each.headers}


def test_docker_hub_through_a_mirror(hub: tuple[Faulty, Faulty, Faulty, ConnectProxy], faulty: Faulty) -> None:
    """The mirror has the manifest alone; what it lacks comes from the Hub."""
    registry, _, storage, _ = hub
    registry.on("GET", f"/v2/library/alpine/blobs/{BLOB.digest}", answer(307, location="https://storage.example/blob"))
    faulty.on("GET", "/v2/library/alpine/manifests/latest", MANIFEST)
    reference = Reference.parse("alpine")
    credentials = Credentials({})
    credentials.login("docker.io", "alice", "hush")
    settings = Mirrors({"docker.io": [f"http://{faulty.host}"]}, files=())
    with registries(mirrors=settings, credentials=credentials).connect(reference) as remote:
        assert remote.resolve(reference)[1] == BODY
        with remote.open(BLOB) as stream:
            assert stream.read() == LAYER
    assert len(faulty.seen) == 2
    assert [name for each in faulty.seen for name in each.headers if name == "authorization"] == []
    assert storage.seen


def test_a_proxy_that_refuses(hub: tuple[Faulty, Faulty, Faulty, ConnectProxy]) -> None:
    """It is named, without its password, and what it says is said."""
    says = rf"elsewhere\.example cannot be reached \(through the proxy {hub[-1].host}\): Tunnel connection failed: [45]"
    with pytest.raises(RegistryUnavailable, match=says) as caught:
        resolve("elsewhere.example")
    assert "word" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "proxy", ["http://[", "http://u:SECRET@127.0.0.1:99999", "http://u:SECRET@", " ", "gopher://u:SECRET@a:1"]
)
def test_a_proxy_that_is_none(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(RegistryConfigError, match=r"the proxy '.*' cannot be used") as caught:
        resolve("elsewhere.example")
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("names", "spared"),
    [
        ("[2001:db8::1]", True),
        ("a, 2001:db8::1", True),
        ("2001:db8::/32", True),
        ("[2001:db8::2],2001:db9::/32,10.0.0.0/8,[,2001:db8::1/999", False),
    ],
)
def test_no_proxy_for_addresses_in_brackets(names: str, spared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", names)
    with Transport("[2001:db8::1]:5000") as transport:
        assert (transport._proxies_for(transport.root) == {}) == spared


def test_no_proxy(
    hub: tuple[Faulty, Faulty, Faulty, ConnectProxy], monkeypatch: pytest.MonkeyPatch, faulty: Faulty
) -> None:
    proxy = hub[-1]
    monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
    with pytest.raises(RegistryUnavailable):
        resolve("nowhere.invalid")
    faulty.on("GET", "/v2/a/manifests/1", MANIFEST)
    monkeypatch.setenv("HTTP_PROXY", f"http://{proxy.host}")
    assert resolve(faulty.host) == BODY  # loopback needs no proxy
    assert proxy.heads == []


def test_a_cut_handshake_may_pass() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"

        def hang_up() -> None:
            for _ in range(5):
                server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        transport = Transport(host, root=f"https://{host}/v2/", delays=(0.0,) * 4)
        with transport, pytest.raises(RegistryError) as caught:
            transport.exchange(Request("GET", "", "ping"))
        thread.join()
    assert caught.value.retryable
