"""Our own registry: other engines use it, several processes share it, bad requests and kill -9 do no harm."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.image.digest import Digest
from containerkit.registry import serve
from support import facts, rawhttp
from support.rawhttp import Repository, add, ask
from support.standalone import ROOT, standalone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.registry.server.server import Registry

SIZE = 3_000_000


@pytest.fixture
def server() -> Iterator[Registry]:
    with serve() as registry:
        yield registry


@pytest.fixture
def repository(server: Registry) -> Repository:
    return Repository(server.host)


def files(directory: str) -> set[str]:
    return {os.path.join(at, name) for at, _, names in os.walk(directory) for name in names}


def until(happened: Any) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- life


def test_it_is_there_at_once_and_leaves_nothing() -> None:
    threads = set(threading.enumerate())
    with serve() as registry:
        directory = registry.directory
        repository = Repository(registry.host)
        repository.push_image("latest")
        idle = socket.create_connection(("127.0.0.1", int(registry.host.rpartition(":")[2])))
        until(lambda: sum(thread.name == "containerkit-request" for thread in threading.enumerate()) == 1)
    with idle, contextlib.suppress(ConnectionResetError):  # it may not have been accepted yet
        assert idle.recv(1) == b""
    assert set(threading.enumerate()) == threads
    assert not os.path.exists(directory)
    with pytest.raises(ConnectionRefusedError):
        ask(registry.host, "GET", "/v2/")


def test_close_twice_and_a_client_that_takes_nothing(tmp_path: Any) -> None:
    registry = serve(tmp_path)
    repository = Repository(registry.host)
    digest = repository.push_blob(bytes(30_000_000))
    with socket.create_connection(("127.0.0.1", int(registry.host.rpartition(":")[2]))) as stalled:
        stalled.sendall(f"GET /v2/{repository.name}/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        stalled.recv(100)
        registry.close()
        registry.close()
    assert os.path.exists(tmp_path / "blobs")


def test_tls_with_clients_that_do_not_speak_it(tmp_path: Any) -> None:
    with serve(tmp_path, tls=True) as registry:
        silent = socket.create_connection(("127.0.0.1", int(registry.host.rpartition(":")[2])))
        assert b"HTTP/1.1 200" not in rawhttp.raw(registry.host, b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        certificates = registry.certificates
        assert certificates is not None
        context = ssl.create_default_context(cafile=certificates.authority)
        for name in ("localhost", "127.0.0.1"):
            connection = http.client.HTTPSConnection(name, int(registry.host.rpartition(":")[2]), context=context)
            connection.request("GET", "/v2/")
            assert connection.getresponse().status == 200
            connection.close()
        with open(certificates.authority, "rb") as file:
            authority = file.read()
    silent.close()
    with serve(tmp_path, tls=True) as registry, open(tmp_path / "tls" / "ca.crt", "rb") as file:
        assert file.read() == authority  # who trusts it need not be told again
        assert os.stat(tmp_path / "tls" / "server.key").st_mode & 0o077 == 0


def test_only_so_many_connections(server: Registry, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has been idle for longest makes room; who is at work stays."""
    from containerkit.registry.server import server as module

    address = ("127.0.0.1", int(server.host.rpartition(":")[2]))
    location = repository.begin()
    with half_sent(server.host, "PATCH", location, b"ab", declared=4) as busy:
        until(lambda: repository.at(location, "GET").headers["range"] == "0-1")
        until(lambda: len(server._server._open) == 1)
        monkeypatch.setattr(module, "MOST_CONNECTIONS", 5)
        held = [socket.create_connection(address, timeout=20) for _ in range(7)]
        assert [connection.recv(1) for connection in held[:3]] == [b""] * 3
        assert ask(server.host, "GET", "/v2/").status == 200
        for connection in held:
            connection.close()
        until(lambda: len(server._server._open) == 1)
        monkeypatch.setattr(module, "MOST_CONNECTIONS", 1)
        with socket.create_connection(address, timeout=20) as refused:
            assert refused.recv(1) == b""
        busy.sendall(b"cd")
        assert busy.recv(1000).startswith(b"HTTP/1.1 202 ")
    until(lambda: ask_or_none(server.host) == 200)


def ask_or_none(host: str) -> int | None:
    try:
        return ask(host, "GET", "/v2/").status
    except OSError:
        return None


def test_content_stays_with_its_directory(tmp_path: Any) -> None:
    with serve(tmp_path) as registry:
        repository = Repository(registry.host)
        repository.push_image("latest")
    with serve(tmp_path) as registry:
        assert ask(registry.host, "GET", f"/v2/{repository.name}/manifests/latest").status == 200


def test_ipv6() -> None:
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        facts.skip("IPv6")
    with serve(host="::1") as registry:
        assert registry.host.startswith("[::1]:")
        with socket.create_connection(("::1", int(registry.host.rpartition(":")[2]))) as connection:
            connection.sendall(b"GET /v2/ HTTP/1.0\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_importing_the_room_loads_nothing() -> None:
    code = "import sys, containerkit.registry as r; assert not {'http.server', 'requests', 'ssl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code + "; r.serve"], check=True, cwd=ROOT)


# --- other engines


@pytest.mark.parametrize("form", ["plain", "users", "tls"])
def test_skopeo_pushes_and_pulls(form: str, busybox_layout: str, tmp_path: Any) -> None:
    users = {"alice": "s3cr:et"} if form == "users" else None
    with serve(users=users, tls=form == "tls") as registry:
        name = f"docker://{registry.name('team/busybox:1')}"
        end = "src", "dest"
        options: list[str] = []
        if form == "users":
            refused = subprocess.run(
                ["skopeo", "inspect", "--tls-verify=false", "--no-creds", name], capture_output=True, check=False
            )
            assert refused.returncode != 0
            assert b"unauthorized" in refused.stderr
            options = ["--{}-creds=alice:s3cr:et"]
        if registry.certificates:
            os.mkdir(tmp_path / "certs")
            os.symlink(registry.certificates.authority, tmp_path / "certs" / "ca.crt")
            options = ["--{}-cert-dir=" + str(tmp_path / "certs"), "--{}-tls-verify=true"]
        facts.require("skopeo")
        base = ["skopeo", "--insecure-policy", "copy", "-q"]
        verify = [] if form == "tls" else ["--src-tls-verify=false", "--dest-tls-verify=false"]
        for source, target, which in (
            (f"oci:{busybox_layout}:1", name, end[1]),
            (name, f"oci:{tmp_path}/back:1", end[0]),
        ):
            mine = [option.format(which) for option in options]
            subprocess.run([*base, *verify, *mine, source, target], check=True, timeout=60)
        digests = [
            subprocess.run(
                ["skopeo", "inspect", "--format={{.Digest}}", f"oci:{path}:1"], capture_output=True, check=True
            ).stdout
            for path in (busybox_layout, tmp_path / "back")
        ]
        assert digests[0] == digests[1]


# --- who may do what


def test_users(server: Registry) -> None:
    with serve(users={"alice": "s3cret", "zoë": "pässword"}) as registry:
        answer = ask(registry.host, "GET", "/v2/")
        assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
        assert answer.headers["www-authenticate"] == 'Basic realm="containerkit"'
        table = {
            b"alice:s3cret": 200,
            "zoë:pässword".encode(): 200,
            b"alice:wrong": 401,
            b"alice:": 401,
            b"alice": 401,
            b"nobody:s3cret": 401,
            b":": 401,
        }
        for given, status in table.items():
            token = base64.b64encode(given).decode()
            assert ask(registry.host, "GET", "/v2/", authorization=f"Basic {token}").status == status, given
        for header in ("Basic", "Basic !!!", "Bearer abc", "basic " + base64.b64encode(b"alice:s3cret").decode()):
            wanted = 200 if header.startswith("basic") else 401
            assert ask(registry.host, "GET", "/v2/", authorization=header).status == wanted
        for method, path in (("POST", "a/blobs/uploads/"), ("PUT", "a/manifests/x"), ("DELETE", "a/manifests/x")):
            assert ask(registry.host, method, f"/v2/{path}", b"x" * 100).status == 401


def test_read_only_and_without_deletion(tmp_path: Any) -> None:
    with serve(tmp_path) as registry:
        repository = Repository(registry.host, "some/thing")
        digest = repository.push_image("latest")
    before = files(tmp_path)
    with serve(tmp_path, read_only=True) as registry:
        repository = Repository(registry.host, "some/thing")
        assert repository.ask("GET", "manifests/latest").status == 200
        for method, path in (
            ("POST", "blobs/uploads/"),
            ("PUT", "manifests/latest"),
            ("DELETE", "manifests/latest"),
            ("DELETE", f"blobs/{digest}"),
        ):
            answer = repository.ask(method, path, b"")
            assert (answer.status, answer.code) == (405, "UNSUPPORTED")
    with serve(tmp_path, deletion=False) as registry:
        repository = Repository(registry.host, "some/thing")
        assert repository.ask("DELETE", f"manifests/{digest}").status == 405
        assert repository.at(repository.begin(), "DELETE").status == 204
    assert files(tmp_path) - {str(tmp_path / "lock")} == before - {str(tmp_path / "lock")}


# --- several at once


def test_two_processes_share_a_directory(tmp_path: Any) -> None:
    with standalone(tmp_path) as (_, first), standalone(tmp_path) as (_, second):
        one, two = Repository(first, "both"), Repository(second, "both")
        location = one.at(one.begin(), "PATCH", b"begun here, ").headers["location"]
        location = two.at(location, "PATCH", b"gone on there, ").headers["location"]
        content = b"begun here, gone on there, finished here"
        assert one.at(add(location, Digest.of(content)), "PUT", b"finished here").status == 201
        assert two.ask("GET", f"blobs/{Digest.of(content)}").body == content
        assert two.at(location, "GET").status == 404
        digest = two.push_image("latest")
        assert one.ask("DELETE", f"manifests/{digest}").status == 202
        assert two.ask("GET", "tags/list").json["tags"] == []


def test_pushes_and_deletions_at_once_lose_nothing(server: Registry) -> None:
    """While repositories of the same blobs come and go, what is pushed and not deleted is whole."""
    keep: list[Repository] = []

    def work(number: int) -> None:
        for turn in range(6):
            repository = Repository(server.host, f"at-once/{number}-{turn}")
            digest = repository.push_image("latest")
            if turn % 2:
                repository.ask("DELETE", f"manifests/{digest}")
                for blob in (b"layer", b'{"mark":""}'):
                    repository.ask("DELETE", f"blobs/{Digest.of(blob)}")
            else:
                keep.append(repository)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keep) == 18
    for repository in keep:
        assert repository.ask("GET", "manifests/latest").status == 200
        assert repository.ask("GET", f"blobs/{Digest.of(b'layer')}").body == b"layer"


def test_content_goes_with_the_last_repository(server: Registry) -> None:
    one, two = Repository(server.host), Repository(server.host)
    digest = one.push_blob(b"shared")
    two.push_blob(b"shared")
    path = os.path.join(server.directory, "blobs/sha256", digest.hex)
    assert one.ask("DELETE", f"blobs/{digest}").status == 202
    assert os.path.exists(path)
    assert two.ask("DELETE", f"blobs/{digest}").status == 202
    assert not os.path.exists(path)


def test_a_client_that_comes_again_takes_its_upload_over(repository: Repository) -> None:
    """Its old connection is still open, and silent."""
    location = repository.begin()
    with half_sent(repository.host, "PATCH", location, b"0123456789", declared=100):
        until(lambda: repository.at(location, "GET").headers["range"] == "0-9")
        content = b"0123456789and the rest"
        answer = repository.at(add(location, Digest.of(content)), "PUT", content[10:], content_range="10-21")
        assert answer.status == 201


# --- what breaks


@contextlib.contextmanager
def half_sent(host: str, method: str, path: str, body: bytes, *, declared: int) -> Iterator[socket.socket]:
    """A request whose body is not finished."""
    name, _, port = host.rpartition(":")
    with socket.create_connection((name, int(port)), timeout=30) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {declared}\r\n\r\n".encode() + body)
        yield connection


def test_kill_9_in_the_middle_of_an_upload(tmp_path: Any) -> None:
    content = os.urandom(SIZE)
    digest = Digest.of(content)
    with standalone(tmp_path) as (process, host):
        repository = Repository(host, "some/thing")
        location = repository.begin()
        with half_sent(host, "PATCH", location, content[: SIZE // 2], declared=SIZE):
            until(lambda: repository.at(location, "GET").headers["range"] == f"0-{SIZE // 2 - 1}")
            process.kill()
            process.wait()
    with standalone(tmp_path) as (process, host):
        repository = Repository(host, "some/thing")
        assert repository.ask("GET", f"blobs/{digest}").status == 404
        assert Repository(host, "another/one").ask("GET", f"blobs/uploads/{location.rpartition('/')[2]}").status == 404
        status = repository.at(location, "GET")
        assert (status.status, status.headers["range"]) == (204, f"0-{SIZE // 2 - 1}")
        assert repository.at(add(location, digest), "PUT", content[SIZE // 2 :]).status == 201
        assert repository.ask("GET", f"blobs/{digest}").body == content
    assert process.returncode == 0
    assert os.listdir(tmp_path / "uploads") == os.listdir(tmp_path / "new") == []


def test_the_standalone_server_ends_by_sigint(tmp_path: Any) -> None:
    with standalone(tmp_path, "--user=a:b", "--read-only") as (process, host):
        assert ask(host, "GET", "/v2/").status == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_users_of_the_standalone_server_from_a_file(tmp_path: Any) -> None:
    users = tmp_path / "users"
    users.write_text("alice:s3cret:with a colon\n\nbob:x\n")
    with standalone(tmp_path / "registry", f"--users={users}") as (_, host):
        for name, password, status in (("alice", "s3cret:with a colon", 200), ("bob", "x", 200), ("bob", "y", 401)):
            secret = base64.b64encode(f"{name}:{password}".encode()).decode()
            assert ask(host, "GET", "/v2/", authorization=f"Basic {secret}").status == status


@pytest.mark.parametrize("content", [None, "", "nobody\n", ":x\n", "a:\n"])
def test_a_file_without_users_does_not_let_everybody_in(tmp_path: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / "users").write_text(content)
    command = [sys.executable, "-m", "containerkit.registry.server", str(tmp_path / "registry")]
    done = subprocess.run(
        [*command, f"--users={tmp_path}/users"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    "option",
    ["--port=70000", "--port=-1", "--host=192.0.2.1", "--host=" + "a" * 300, "--upstream=a b", "--name=\xe4"],
)
def test_options_that_make_no_server(tmp_path: Any, option: str) -> None:
    command = [sys.executable, "-m", "containerkit.registry.server", str(tmp_path), "--port=0", "--tls", option]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_connection_that_breaks_keeps_what_came(repository: Repository, method: str) -> None:
    location, content = repository.begin(), b"all of it, in the end"
    path = location if method == "PATCH" else add(location, Digest.of(content))
    with half_sent(repository.host, method, path, content[:6], declared=len(content)):
        pass
    until(lambda: repository.at(location, "GET").headers["range"] == "0-5")
    answer = repository.at(add(location, Digest.of(content)), "PUT", content[6:], content_range="6-20")
    assert answer.status == 201


def test_a_broken_post_leaves_nothing(server: Registry, repository: Repository) -> None:
    path = f"/v2/{repository.name}/blobs/uploads/?digest={Digest.of(b'never')}"
    with half_sent(repository.host, "POST", path, b"nev", declared=5):
        until(lambda: os.listdir(os.path.join(server.directory, "uploads")))
    until(lambda: not os.listdir(os.path.join(server.directory, "uploads")))
    bad = repository.ask("POST", "blobs/uploads/?digest=sha256:nonsense", b"never")
    assert (bad.status, bad.code) == (400, "DIGEST_INVALID")
    assert os.listdir(os.path.join(server.directory, "uploads")) == []


def test_an_upload_belongs_to_its_repository(repository: Repository) -> None:
    location = repository.begin()
    other = Repository(repository.host)
    identity = location.rpartition("/")[2]
    for method, body in (("GET", None), ("PATCH", b"mine now"), ("DELETE", None)):
        answer = other.ask(method, f"blobs/uploads/{identity}", body)
        assert (answer.status, answer.code) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert repository.at(location, "GET").status == 204


def test_a_flood_of_uploads(server: Registry, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    from containerkit.registry.server import uploads

    monkeypatch.setattr(uploads, "MOST", 20)
    for _ in range(20):
        location = repository.begin()
    answer = repository.ask("POST", "blobs/uploads/", b"")
    assert (answer.status, answer.code) == (429, "TOOMANYREQUESTS")
    assert repository.at(add(location, Digest.of(b"one")), "PUT", b"one").status == 201
    old = os.path.join(server.directory, "uploads")
    assert repository.ask("POST", "blobs/uploads/", b"").status == 202
    for name in os.listdir(old):
        os.utime(os.path.join(old, name), (0, 0))
    assert repository.ask("POST", "blobs/uploads/", b"").status == 202  # the abandoned ones made room
    assert len(os.listdir(old)) == 1


HEAD = "{method} {path} HTTP/1.1\r\nHost: x\r\n"
BAD_REQUESTS = {
    "no request": (b"nonsense\r\n\r\n", 400),
    "no version": (b"GET / HTTP/x\r\n\r\n", 400),
    "a method of its own": (b"BREW /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    "a long line": (b"GET /v2/" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
    "a huge header": (b"GET /v2/ HTTP/1.1\r\nX: " + b"a" * 70000 + b"\r\n\r\n", 431),
    "many headers": (b"GET /v2/ HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    "long headers": (b"GET /v2/ HTTP/1.1\r\n" + (b"X: " + b"a" * 1000 + b"\r\n") * 90 + b"\r\n", 431),
    "a return within a header": (b"GET /v2/ HTTP/1.1\r\nX: a\rY: b\r\n\r\n", 400),
    "a null within a header": (b"GET /v2/ HTTP/1.1\r\nX: a\0b\r\n\r\n", 400),
    "a folded header": (b"GET /v2/ HTTP/1.1\r\nX: a\r\n b\r\n\r\n", 400),
    "an encoding after what is no blank": (
        b"GET /v2/ HTTP/1.1\r\nTransfer-Encoding: \x0bchunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a length after what is no blank": (
        b"GET /v2/ HTTP/1.1\r\nContent-Length: \xa01\r\nConnection: close\r\n\r\na",
        400,
    ),
    "a header without a colon": (b"GET /v2/ HTTP/1.1\r\nnonsense\r\nHost: x\r\n\r\n", 400),
    "two lengths": (b"GET /v2/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "a length and chunks": (
        b"GET /v2/ HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "an unknown encoding": (b"GET /v2/ HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    **{
        f"the length {text!r}": (b"GET /v2/ HTTP/1.1\r\nContent-Length: " + text + b"\r\n\r\n", 400)
        for text in (b"-1", b"abc", b"1e3", b"+5", b"0x10", b"1_0", b"\xb2", b"9" * 5000)
    },
}


@pytest.mark.parametrize("what", sorted(BAD_REQUESTS))
def test_bad_requests(server: Registry, what: str) -> None:
    request, status = BAD_REQUESTS[what]
    said = rawhttp.raw(server.host, request)
    assert said.startswith(f"HTTP/1.1 {status} ".encode()), said[:200]
    assert b'{"errors":[{"code":' in said
    assert ask(server.host, "GET", "/v2/").status == 200


def test_headers_that_end_early_are_no_request(repository: Repository) -> None:
    digest = repository.push_image("latest")
    head = f"DELETE /v2/{repository.name}/manifests/{digest} HTTP/1.1\r\nHost: x\r\n".encode()
    assert rawhttp.raw(repository.host, head, half_close=True).startswith(b"HTTP/1.1 400 ")
    assert repository.ask("GET", "manifests/latest").status == 200


@pytest.mark.parametrize(
    "size", [b"", b"g", b"-5", b"+5", b"0x5", b"1_0", b"\xb2", b"5" * 2000, b"f" * 16, b" 5"], ids=repr
)
def test_bad_chunk_sizes(repository: Repository, size: bytes) -> None:
    location = repository.begin()
    head = f"PATCH {location} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    said = rawhttp.raw(repository.host, head + b"3\r\nabc\r\n" + size + b"\r\nhello\r\n0\r\n\r\n", half_close=True)
    assert said.startswith(b"HTTP/1.1 400 "), said[:200]
    assert repository.at(location, "GET").headers["range"] == "0-2"


@pytest.mark.parametrize(
    "end", [b"", b"5\r\nhel", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n"], ids=["none", "in a chunk", "no end", "half"]
)
def test_chunks_that_end_early_are_no_whole_blob(repository: Repository, end: bytes) -> None:
    location = repository.begin()
    path = add(location, Digest.of(b"hello" if b"lo" in end else b"hel" if end else b""))
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert b" 201 " not in rawhttp.raw(repository.host, head + end, half_close=True)
    assert repository.at(location, "GET").status == 204


def test_a_chunk_longer_than_it_says_and_endless_trailers(repository: Repository) -> None:
    head = f"PATCH {repository.begin()} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    for body in (b"3\r\nabcdef\r\n0\r\n\r\n", b"0\r\n" + b"X: y\r\n" * 200 + b"\r\n"):
        assert rawhttp.raw(repository.host, head + body).startswith(b"HTTP/1.1 400 ")


def test_a_length_that_is_too_small_leaves_no_second_request(repository: Repository) -> None:
    """What follows is a request of its own, and a bad one."""
    path = add(repository.begin(), Digest.of(b"hello"))
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n".encode()
    said = rawhttp.raw(repository.host, head + b"hello world\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 201 ")
    assert said.count(b"HTTP/1.1 ") == 2
    assert b"HTTP/1.1 400 " in said


PATHS = [
    "..",
    "%2e%2e",
    "../../../etc/passwd",
    "a/../../b",
    "a%2f..%2fb",
    "A/b",
    "a//b",
    "-a",
    "a_",
    "_blobs",
    "a/_tags",
    "%00",
    "a" * 300,
    "/".join(["a"] * 200),
    "ä",
    "a b",
]


@pytest.mark.parametrize("name", PATHS)
def test_names_that_are_none(server: Registry, name: str) -> None:
    before = files(server.directory)
    for method, path in (
        ("GET", "tags/list"),
        ("POST", "blobs/uploads/"),
        ("PUT", "manifests/x"),
        ("GET", "manifests/x"),
    ):
        request = f"{method} /v2/{name}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        said = rawhttp.raw(server.host, request.encode())
        assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")), said[:100]
    assert files(server.directory) == before


@pytest.mark.parametrize(
    "target",
    ["..", ".", "%2e%2e", "%2e%2e%2f%2e%2e%2fblobs", "a%2Fb", "%00", "-x", "x" * 200, "sha256:..", "sha256:%2f", ":"],
)
def test_tags_and_digests_that_are_none(server: Registry, repository: Repository, target: str) -> None:
    repository.push_image("latest")
    before = files(server.directory)
    for method, path in (
        ("GET", f"manifests/{target}"),
        ("HEAD", f"manifests/{target}"),
        ("DELETE", f"manifests/{target}"),
        ("PUT", f"manifests/{target}"),
        ("GET", f"blobs/{target}"),
        ("DELETE", f"blobs/{target}"),
        ("GET", f"referrers/{target}"),
        ("GET", f"blobs/uploads/{target}"),
        ("DELETE", f"blobs/uploads/{target}"),
        ("POST", f"blobs/uploads/?mount={Digest.of(b'layer')}&from={target}/../{repository.name}"),
    ):
        answer = repository.ask(method, path, b"")
        wanted = {202} if method == "POST" else {400, 404}
        assert answer.status in wanted, (method, path, answer)
    assert {path for path in files(server.directory) if "/uploads/" not in path} == before


def test_odd_numbers_and_ranges(repository: Repository) -> None:
    repository.push_image("latest")
    for text in ("-1", "x", "1e3", "%C2%B2", "9" * 5000, "0x1"):
        assert repository.ask("GET", f"tags/list?n={text}").code == "PAGINATION_NUMBER_INVALID"
    digest = repository.push_blob(b"0123456789")
    for text in ("bytes=-", "bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0-1,5-6", "bytes=" + "9" * 5000 + "-"):
        answer = repository.ask("GET", f"blobs/{digest}", range=text)
        assert (answer.status, answer.body) == (200, b"0123456789"), text
    assert repository.ask("GET", f"blobs/{digest}", range="bytes=-0").status == 416
    location = repository.begin()
    for text in ("x", "5-2", "0-" + "9" * 5000, "0-99"):
        assert repository.at(location, "PATCH", b"abc", content_range=text).status == 416, text


def test_a_manifest_that_is_too_long(repository: Repository) -> None:
    answer = repository.ask("PUT", "manifests/long", b"x" * (5 << 20))
    assert (answer.status, answer.code) == (413, "SIZE_INVALID")
    chunked = repository.ask("PUT", "manifests/long", iter([b"x" * (5 << 20)]))
    assert chunked.status == 413


def test_who_asks_first_whether_to_send_is_answered(repository: Repository) -> None:
    location = repository.begin()
    with half_sent(
        repository.host, "PATCH", location + " HTTP/1.1\r\nExpect: 100-continue\r\nX:", b"", declared=5
    ) as it:
        assert it.recv(100).startswith(b"HTTP/1.1 100 ")
        it.sendall(b"hello")
        assert it.recv(1000).startswith(b"HTTP/1.1 202 ")


def test_an_index_may_come_under_several_tags_at_once(repository: Repository) -> None:
    """Distribution specification 1.1, end-7b."""
    import json

    body = json.dumps(repository.image()).encode()
    path = f"manifests/{Digest.of(body)}?tag=one&tag=two"
    kind = "application/vnd.oci.image.manifest.v1+json"
    assert repository.ask("PUT", path, body, content_type=kind).headers["oci-tag"] == "one, two"
    assert repository.ask("GET", "tags/list").json["tags"] == ["one", "two"]
    assert repository.ask("PUT", f"manifests/{Digest.of(body)}?tag=..", body, content_type=kind).status == 400
