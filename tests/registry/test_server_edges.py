"""Our server where clients are rude, many, or locked out, and where it is closed under their hands."""

from __future__ import annotations

import base64
import errno
import gc
import os
import socket
import ssl
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import ManifestUnknown, RegistryNotFound
from containerkit.image.digest import Digest
from containerkit.registry import serve
from containerkit.registry.server import certificate, uploads
from containerkit.registry.server import server as server_module
from containerkit.registry.server.certificate import make
from containerkit.registry.server.storage import Directory
from containerkit.registry.server.uploads import Upload, Uploads
from support import rawhttp
from support.rawhttp import Repository, add, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.registry.server.server import Registry

NOWHERE = Digest.of(b"nobody has this")
ROUTES = [
    "",
    "_catalog",
    "a/b/tags/list",
    "a/b/manifests/latest",
    f"a/b/manifests/{NOWHERE}",
    f"a/b/blobs/{NOWHERE}",
    "a/b/blobs/uploads/",
    "a/b/blobs/uploads/x",
    f"a/b/referrers/{NOWHERE}",
    "no/such/route",
    "A/../B",
]


@pytest.fixture
def server() -> Iterator[Registry]:
    with serve() as registry:
        yield registry


def at_once(count: int, act: Callable[[int], Any]) -> list[Any]:
    """What as many threads get or raise."""
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        try:
            results[number] = act(number)
        except OSError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def connect(registry: Registry) -> socket.socket:
    address, _, port = registry.host.rpartition(":")
    plain = socket.create_connection((address, int(port)), timeout=20)
    if registry.certificates is None:
        return plain
    context = ssl.create_default_context(cafile=registry.certificates.authority)
    return context.wrap_socket(plain, server_hostname=address)


def send_on(connection: socket.socket, piece: bytes, sending: threading.Event, broken: list[OSError]) -> None:
    """Send the same again and again, until that fails."""
    try:
        while True:
            connection.sendall(piece)
            sending.set()
    except OSError as error:
        broken.append(error)


# --- who may ask


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
def test_every_route_wants_credentials(method: str) -> None:
    wrong = base64.b64encode(b"alice:wrong").decode()
    with serve(users={"alice": "s3cret"}) as registry:
        for route in ROUTES:
            for headers in ({}, {"authorization": f"Basic {wrong}"}, {"authorization": "Bearer s3cret"}):
                answer = ask(registry.host, method, f"/v2/{route}", **headers)
                assert answer.status == 401, route
                assert answer.headers["www-authenticate"] == 'Basic realm="containerkit"'
                assert method == "HEAD" or answer.code == "UNAUTHORIZED"
        assert os.listdir(os.path.join(registry.directory, "uploads")) == []


# --- what is asked


@pytest.mark.parametrize("target", ["http://[/v2/", "/v2/?" + "&".join(f"a{number}=1" for number in range(200))])
def test_addresses_that_cannot_be_read(server: Registry, target: str) -> None:
    said = rawhttp.raw(server.host, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b'{"errors":[{"code":' in said


def test_what_can_be_got_can_be_asked_for_without_its_body(server: Registry) -> None:
    repository = Repository(server.host)
    digest = repository.push_image("latest")
    location = repository.begin()
    for path in ("tags/list", "manifests/latest", f"blobs/{Digest.of(b'layer')}", f"referrers/{digest}", location):
        where = path if path.startswith("/") else f"/v2/{repository.name}/{path}"
        got, head = ask(server.host, "GET", where), ask(server.host, "HEAD", where)
        assert (head.status, head.body) == (got.status, b"")
        same = {"content-type", "content-length", "docker-content-digest", "range"}
        assert {k: v for k, v in head.headers.items() if k in same} == {
            k: v for k, v in got.headers.items() if k in same
        }
    assert repository.ask("POST", "tags/list", b"").headers["allow"] == "GET, HEAD"


def test_a_mount_that_fails_and_a_body(server: Registry) -> None:
    """``mount`` and ``digest`` in one request: what is not there to mount is in the body."""
    repository = Repository(server.host)
    path = f"blobs/uploads/?mount={NOWHERE}&from=some/where&digest={Digest.of(b'body')}"
    assert repository.ask("POST", path, b"body").status == 201
    assert repository.ask("GET", f"blobs/{Digest.of(b'body')}").body == b"body"


# --- many at once


def test_twenty_push_the_same_blob(server: Registry) -> None:
    content = os.urandom(2_000_000)
    digest = Digest.of(content)

    def push(number: int) -> int:
        repository = Repository(server.host, "one/and-the-same" if number % 2 else f"one/of-many-{number}")
        status: int = repository.at(add(repository.begin(), digest), "PUT", content).status
        return status

    assert at_once(20, push) == [201] * 20
    for number in (0, 1, 18):
        name = "one/and-the-same" if number % 2 else f"one/of-many-{number}"
        assert Repository(server.host, name).ask("GET", f"blobs/{digest}").body == content
    assert [os.listdir(os.path.join(server.directory, part)) for part in ("uploads", "new")] == [[], []]


def test_all_use_the_same_upload(server: Registry) -> None:
    """The last one has it; the others hear so at once, though the server stopped reading in the middle."""
    repository = Repository(server.host)
    content = os.urandom(5_000_000)
    location = repository.begin()
    results = at_once(
        6,
        lambda _: (
            repository.at(
                add(location, Digest.of(content)), "PUT", content, content_range=f"0-{len(content) - 1}"
            ).status
        ),
    )
    assert not [result for result in results if isinstance(result, TimeoutError)]
    assert {result for result in results if isinstance(result, int)} <= {201, 404, 416}


def test_an_upload_over_tls_is_taken_over(tmp_path: Path) -> None:
    """Nothing but what the first client meant to send is kept of it."""
    with serve(tmp_path, tls=True) as registry:
        first = connect(registry)
        first.sendall(b"POST /v2/a/b/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        said = first.recv(4096).decode()
        location = said.partition("Location: ")[2].partition("\r\n")[0]
        first.sendall(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000000\r\n\r\n".encode())
        upload = tmp_path / "uploads" / location.rpartition("/")[2]
        sending, broken = threading.Event(), list[OSError]()
        thread = threading.Thread(target=send_on, args=(first, b"a" * (1 << 16), sending, broken))
        thread.start()
        assert sending.wait(20)
        with connect(registry) as second:
            second.sendall(f"PATCH {location} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbbb".encode())
            assert second.recv(4096).startswith(b"HTTP/1.1 202 ")
        thread.join()
        first.close()
        assert not isinstance(broken[0], TimeoutError)
        assert set(upload.read_bytes()) == set(b"ab")


@pytest.mark.parametrize("how", ["finished", "removed"])
def test_an_upload_that_ends_while_somebody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing is added to what another process has made a blob meanwhile."""
    one, two = Directory(str(tmp_path)), Directory(str(tmp_path))
    upload = one.uploads.start("a")
    late = two.uploads.find("a", upload.id)
    lock = uploads._lock

    def ended_first(fd: int, identity: str) -> None:
        monkeypatch.setattr(uploads, "_lock", lock)
        with upload.claimed() as own:
            if how == "finished":
                upload.write(own, (b"content",))
                one.finish(upload, own, Digest.of(b"content"))
            else:
                one.uploads.forget(upload.id)
        lock(fd, identity)

    monkeypatch.setattr(uploads, "_lock", ended_first)
    with pytest.raises(RegistryNotFound), late.claimed() as fd:
        late.write(fd, (b" and more",))
    if how == "finished":
        assert Path(two.blob("a", Digest.of(b"content"))).read_bytes() == b"content"


@pytest.mark.parametrize("when", ["before its check", "after its check"])
def test_an_upload_that_is_removed_as_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    storage = Directory(str(tmp_path))
    upload = storage.uploads.start("a")
    check = Upload.finish

    def removed(self: Upload, fd: int, digest: Digest) -> None:
        if when == "before its check":
            storage.uploads.forget(self.id)
        check(self, fd, digest)
        storage.uploads.forget(self.id)

    monkeypatch.setattr(Upload, "finish", removed)
    with upload.claimed() as fd:
        upload.write(fd, (b"content",))
        with pytest.raises(RegistryNotFound) as told:
            storage.finish(upload, fd, Digest.of(b"content"))
    assert told.value.code == "BLOB_UPLOAD_UNKNOWN"
    assert not storage.holds("a", Digest.of(b"content"))


def test_what_is_being_written_is_not_swept(tmp_path: Path) -> None:
    one, two = Uploads(str(tmp_path)), Uploads(str(tmp_path))
    upload = one.start("a")
    with upload.claimed():
        os.utime(upload.path, (0, 0))
        two.sweep(1)
        assert upload.size == 0
    two.sweep(1)
    assert os.listdir(tmp_path) == []


def test_what_another_process_has_finished_is_not_remembered(tmp_path: Path) -> None:
    one, two = Uploads(str(tmp_path)), Uploads(str(tmp_path))
    upload = one.start("a")
    known = weakref.ref(two.find("a", upload.id))
    one.forget(upload.id)
    two.start("a")
    gc.collect()
    assert known() is None


def test_where_files_run_out_accepting_takes_a_breath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def accept(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    slept: list[float] = []
    with serve(tmp_path) as registry:
        server = registry._server
        with monkeypatch.context() as patched:
            patched.setattr(server, "socket", Exhausted())
            patched.setattr(server_module.time, "sleep", slept.append)
            with pytest.raises(OSError, match="Too many open files"):
                server.get_request()
    assert slept


@pytest.mark.parametrize("tls", [False, True])
def test_closing_it_ends_who_is_sending(tls: bool) -> None:
    registry = serve(tls=tls)
    connection = connect(registry)
    path = f"/v2/a/blobs/uploads/?digest={NOWHERE}"
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000000\r\n\r\n".encode())
    sending, broken = threading.Event(), list[OSError]()
    thread = threading.Thread(target=send_on, args=(connection, bytes(1 << 20), sending, broken))
    thread.start()
    assert sending.wait(20)
    registry.close()
    thread.join()
    connection.close()
    assert not isinstance(broken[0], TimeoutError)


def test_no_tag_outlives_its_manifest(server: Registry) -> None:
    """One that is deleted between its coming and its being tagged has no tag."""
    storage = Directory(server.directory)
    repository = Repository(server.host)
    digest = repository.push_image("latest")
    assert repository.ask("DELETE", f"manifests/{digest}").status == 202
    with pytest.raises(ManifestUnknown):
        storage.tag(repository.name, "late", digest)
    assert repository.ask("GET", "tags/list").json["tags"] == []


# --- certificates


def test_a_certificate_for_further_names(tmp_path: Path) -> None:
    with serve(tmp_path, tls=True, names=["registry.lab", "192.0.2.7"]) as registry:
        assert registry.certificates is not None
        context = ssl.create_default_context(cafile=registry.certificates.authority)
        for name in ("registry.lab", "192.0.2.7", "localhost", "127.0.0.1"):
            address, _, port = registry.host.rpartition(":")
            with context.wrap_socket(socket.create_connection((address, int(port))), server_hostname=name) as made:
                assert made.version() in ("TLSv1.2", "TLSv1.3")
        plain = socket.create_connection((address, int(port)))
        other = context.wrap_socket(plain, server_hostname="registry.example", do_handshake_on_connect=False)
        with other, pytest.raises(ssl.SSLCertVerificationError):
            other.do_handshake()


def test_certificates_are_made_once_and_whole(tmp_path: Path) -> None:
    """Several servers of one directory agree; what a killed one has left is made good."""

    def files(*_: object) -> list[bytes]:
        return [Path(path).read_bytes() for path in make(str(tmp_path), ["localhost"])]

    first, *others = at_once(5, files)
    assert others == [first] * 4
    os.unlink(tmp_path / "server.crt")
    (tmp_path / "server.key").write_bytes(b"")
    again = files()
    assert again != first
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    assert sorted(os.listdir(tmp_path)) == ["ca.crt", "server.crt", "server.key"]


@pytest.mark.parametrize("file", ["server.key", "server.crt"])
def test_a_death_while_a_certificate_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The old certificate is not taken for one of the new key, nor of the new authority."""
    own = tmp_path / "tls"
    own.mkdir()
    make(str(own), server_module.NAMES)
    write = certificate._write

    def die(path: str, content: bytes) -> None:
        if path.endswith(file):
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(certificate, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        make(str(own), (*server_module.NAMES, "registry.lab"))
    monkeypatch.undo()
    with serve(tmp_path, tls=True) as registry, connect(registry):
        assert len(list(own.iterdir())) == 3
