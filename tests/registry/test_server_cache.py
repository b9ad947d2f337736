"""The server as a read-through cache of another registry: once fetched, once and for all."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import BlobUnknown, RegistryConfigError
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_INDEX
from containerkit.registry import serve
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credentials
from containerkit.registry.server import cache as cache_module
from containerkit.registry.server import uploads
from containerkit.registry.server.cache import Fetch, Shared, Upstream
from containerkit.registry.server.server import RegistryServer
from support.faulty import Faulty, answer, raw
from support.rawhttp import Answer, Repository, ask, describe
from support.registry import skopeo
from support.standalone import standalone

if TYPE_CHECKING:
    from collections.abc import Iterator

    from containerkit.registry.server.server import Registry
    from support.faulty import Connection

CONTENT = bytes(range(251)) * 20_000
DIGEST = Digest.of(CONTENT)


@pytest.fixture
def upstream() -> Iterator[Registry]:
    with serve() as registry:
        yield registry


def test_a_second_pull_does_not_reach_the_upstream(busybox_layout: str, tmp_path: Any) -> None:
    with contextlib.ExitStack() as stack:
        upstream = serve()
        stack.callback(upstream.close)
        skopeo("copy", f"oci:{busybox_layout}:1", f"docker://{upstream.name('team/busybox:1')}")
        cache = stack.enter_context(serve(tmp_path / "cache", upstream=upstream.host))
        name = f"docker://{cache.name('team/busybox:1')}"
        skopeo("copy", name, f"oci:{tmp_path}/first:1")
        upstream.close()
        skopeo("copy", name, f"oci:{tmp_path}/second:1")
        blobs = [sorted(os.listdir(tmp_path / which / "blobs/sha256")) for which in ("first", "second")]
        assert blobs[0] == blobs[1]
        assert os.listdir(tmp_path / "cache/uploads") == []


def test_a_tag_that_is_old_is_asked_for_again(upstream: Registry, tmp_path: Any) -> None:
    origin = Repository(upstream.host, "team/app")
    first = origin.push_image("latest", b"1")
    with serve(tmp_path, upstream=upstream.host, tag_life=0) as cache:
        repository = Repository(cache.host, "team/app")
        assert repository.ask("GET", "manifests/latest").headers["docker-content-digest"] == first
        second = origin.push_image("latest", b"2")
        assert repository.ask("GET", "manifests/latest").headers["docker-content-digest"] == second
        assert repository.ask("GET", "tags/list").json["tags"] == ["latest"]
        upstream.close()
        assert repository.ask("GET", "manifests/latest").headers["docker-content-digest"] == second
        assert repository.ask("GET", f"manifests/{first}").status == 200
        assert repository.ask("GET", "tags/list").json["tags"] == ["latest"]
        down = repository.ask("GET", "manifests/other")
        assert down.status == 502


def test_what_the_upstream_has_not(upstream: Registry) -> None:
    Repository(upstream.host, "team/app").push_image("latest")
    with serve(upstream=upstream.host) as cache:
        repository = Repository(cache.host, "team/app")
        assert repository.ask("GET", "manifests/missing").code == "MANIFEST_UNKNOWN"
        assert repository.ask("GET", f"blobs/{DIGEST}").code == "BLOB_UNKNOWN"
        assert repository.ask("POST", "blobs/uploads/", b"").status == 405


def test_referrers_come_from_the_upstream(upstream: Registry) -> None:
    origin = Repository(upstream.host, "team/app")
    subject = origin.push_image("latest")
    origin.push_image("sig", b"s", artifactType="application/sig", subject=describe(subject, 1))
    with serve(upstream=upstream.host) as cache:
        rows = Repository(cache.host, "team/app").ask("GET", f"referrers/{subject}").json["manifests"]
        assert [row["artifactType"] for row in rows] == ["application/sig"]


def blob(send: Any) -> Any:
    """An upstream that has one blob, and sends it as told."""

    def act(connection: Connection) -> None:
        if connection.request.method == "HEAD":
            answer(200, content_length=str(len(CONTENT)))(connection)
        else:
            send(connection)

    return act


def get(host: str, results: list[Answer]) -> None:
    results.append(ask(host, "GET", f"/v2/team/app/blobs/{DIGEST}"))


def test_many_at_once_fetch_a_blob_once_and_see_it_come(faulty: Faulty, tmp_path: Any) -> None:
    """The beginning is with the clients before the upstream has sent the end."""
    released = threading.Event()

    def slowly(connection: Connection) -> None:
        connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode())
        connection.send(CONTENT[:-1000])
        assert released.wait(20)
        connection.send(CONTENT[-1000:])

    faulty.on("GET", f"/v2/team/app/blobs/{DIGEST}", blob(slowly))
    faulty.on("HEAD", f"/v2/team/app/blobs/{DIGEST}", blob(slowly))
    results: list[Answer] = []
    with serve(tmp_path, upstream=faulty.host) as cache:
        name, _, port = cache.host.rpartition(":")
        with socket.create_connection((name, int(port)), timeout=20) as early:
            early.sendall(f"GET /v2/team/app/blobs/{DIGEST} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            got = b""
            while len(got) < 1_000_000:
                got += early.recv(65536)
            threads = [threading.Thread(target=get, args=(cache.host, results)) for _ in range(5)]
            for thread in threads:
                thread.start()
            released.set()
            for thread in threads:
                thread.join()
        assert [result.body == CONTENT for result in results] == [True] * 5
    assert len(faulty.requests("GET")) == 1, faulty.seen


def test_who_asks_as_a_fetch_ends_gets_the_blob(faulty: Faulty, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of entering it there is one who asks."""
    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{DIGEST}", blob(answer(200, CONTENT)))
    results: list[Answer] = []
    threads: list[threading.Thread] = []
    served = threading.Semaphore(0)
    content, rename = RegistryServer.content, os.rename

    def told(*arguments: Any) -> Any:
        try:
            return content(*arguments)
        finally:
            served.release()

    def ask_now() -> None:
        threads.append(threading.Thread(target=get, args=(cache.host, results)))
        threads[-1].start()
        assert served.acquire(timeout=20)

    def watched(source: str, target: str) -> None:
        if not threads:
            assert served.acquire(timeout=20)  # whose question began the fetch
        ask_now()
        rename(source, target)
        ask_now()

    with serve(tmp_path, upstream=faulty.host) as cache:
        monkeypatch.setattr(RegistryServer, "content", told)
        monkeypatch.setattr(os, "rename", watched)
        get(cache.host, results)
        monkeypatch.undo()
        for thread in threads:
            thread.join()
    assert len(threads) == 4
    assert [result.body == CONTENT for result in results] == [True] * 5
    assert len(faulty.requests("GET")) == 1, faulty.seen


def test_nobody_gets_a_whole_wrong_blob(faulty: Faulty, tmp_path: Any) -> None:
    wrong = b"X" + CONTENT[1:]
    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{DIGEST}", blob(answer(200, wrong)))
    results: list[Answer] = []
    with serve(tmp_path, upstream=faulty.host) as cache:
        get(cache.host, results)
        assert results[0].status == 200
        assert len(results[0].body) < len(CONTENT)
    assert os.listdir(tmp_path / "uploads") == []
    assert not os.path.exists(tmp_path / "blobs/sha256" / DIGEST.hex)


@pytest.mark.parametrize("size", [0, 5])
def test_a_small_wrong_blob_is_the_upstreams_fault(faulty: Faulty, size: int) -> None:
    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{DIGEST}", answer(200, b"x" * size))
    with serve(upstream=faulty.host) as cache:
        assert ask(cache.host, "GET", f"/v2/team/app/blobs/{DIGEST}").status == 502


def test_an_empty_blob(faulty: Faulty) -> None:
    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{Digest.of(b'')}", answer(200, b""))
    with serve(upstream=faulty.host) as cache:
        told = ask(cache.host, "GET", f"/v2/team/app/blobs/{Digest.of(b'')}")
    assert (told.status, told.body) == (200, b"")


def test_what_another_repository_fetches_is_of_both(
    faulty: Faulty, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that fetch has ended before anything of it is read."""
    both, fetch = threading.Event(), Upstream.fetch

    def wait(connection: Connection) -> None:
        assert both.wait(20)
        answer(200, CONTENT)(connection)

    faulty.on("HEAD", f"/v2/team/first/blobs/{DIGEST}", blob(None))
    faulty.on("GET", f"/v2/team/first/blobs/{DIGEST}", wait)

    def ended(self: Upstream, name: str, digest: Digest) -> Fetch | None:
        fetch(self, "team/first", digest)
        found = fetch(self, name, digest)
        both.set()
        assert found is not None
        found.wait(found.size - 1)
        return found

    with serve(tmp_path, upstream=faulty.host) as cache:
        monkeypatch.setattr(Upstream, "fetch", ended)
        assert ask(cache.host, "GET", f"/v2/team/app/blobs/{DIGEST}").body == CONTENT
        monkeypatch.undo()
        assert ask(cache.host, "GET", f"/v2/team/app/blobs/{DIGEST}").body == CONTENT
    assert len(faulty.requests("GET")) == 1, faulty.seen


def test_a_failure_that_is_no_error_of_ours_is_shared_too() -> None:
    shared, failures, calls = Shared(), list[BaseException](), list[None]()
    begun, together = threading.Event(), threading.Event()

    def fail() -> None:
        calls.append(None)
        raise OSError("no space")

    def first() -> None:
        begun.set()
        assert together.wait(20)

    def run(question: Any) -> None:
        try:
            shared.ask("key", question)
        except BaseException as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=(question,)) for question in (first, fail, fail)]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    deadline = time.monotonic() + 20
    while shared._turns["key"].users < 3:
        assert time.monotonic() < deadline
    together.set()
    for thread in threads:
        thread.join()
    assert [type(failure) for failure in failures] == [OSError] * 2
    assert len(calls) == 1


@pytest.mark.parametrize(
    "target", ["bad%20tag", "..%2f..%2fx", "%00", "a" * 300, "sha256:x", f"a@{DIGEST}", "5000%2fx"]
)
def test_tags_and_digests_that_are_none(faulty: Faulty, target: str) -> None:
    with serve(upstream=faulty.host) as cache:
        told = ask(cache.host, "GET", f"/v2/team/app/manifests/{target}")
    assert (told.status, told.code) == (404, "MANIFEST_UNKNOWN")
    assert faulty.seen == []


def stalled(faulty: Faulty, released: threading.Event) -> None:
    """The blob's last bytes come when released."""

    def slowly(connection: Connection) -> None:
        connection.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode() + CONTENT[:2_000_000])
        assert released.wait(30)
        connection.send(CONTENT[2_000_000:])

    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{DIGEST}", blob(slowly))


@contextlib.contextmanager
def fetching(host: str) -> Iterator[http.client.HTTPResponse]:
    """Somebody gets the blob, and has begun to."""
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        connection.request("GET", f"/v2/team/app/blobs/{DIGEST}")
        response = connection.getresponse()
        assert response.read(1_000_000) == CONTENT[:1_000_000]
        yield response
    finally:
        connection.close()


def test_what_a_killed_cache_was_fetching_goes_at_the_next_start(faulty: Faulty, tmp_path: Any) -> None:
    released = threading.Event()
    stalled(faulty, released)
    with standalone(tmp_path, f"--upstream={faulty.host}") as (process, host), fetching(host):
        assert len(os.listdir(tmp_path / "uploads")) == 1
        process.kill()
        process.wait()
    released.set()
    assert len(os.listdir(tmp_path / "uploads")) == 1
    with serve(tmp_path):
        assert os.listdir(tmp_path / "uploads") == []


def test_a_server_that_starts_leaves_the_fetches_of_another_one(faulty: Faulty, tmp_path: Any) -> None:
    released = threading.Event()
    stalled(faulty, released)
    with serve(tmp_path, upstream=faulty.host) as cache, fetching(cache.host) as response, serve(tmp_path):
        released.set()
        assert response.read() == CONTENT[1_000_000:]
        assert ask(cache.host, "GET", f"/v2/team/app/blobs/{DIGEST}").body == CONTENT
    assert len(faulty.requests("GET")) == 1, faulty.seen


def test_asking_for_the_head_fetches_nothing(faulty: Faulty, tmp_path: Any) -> None:
    faulty.on("HEAD", f"/v2/team/app/blobs/{DIGEST}", blob(None))
    with serve(tmp_path, upstream=faulty.host) as cache:
        told = ask(cache.host, "HEAD", f"/v2/team/app/blobs/{DIGEST}")
        assert (told.status, told.headers["content-length"]) == (200, str(len(CONTENT)))
        assert ask(cache.host, "HEAD", f"/v2/team/app/blobs/{Digest.of(b'missing')}").status == 404
        with pytest.raises(BlobUnknown):
            cache._server.storage.blob("team/app", DIGEST)
    assert faulty.requests("GET") == []


def test_a_part_that_is_far_from_here_is_not_waited_for(faulty: Faulty, tmp_path: Any) -> None:
    """Who asked for it gets the whole, which comes sooner; a part of what is here already is one."""
    released = threading.Event()
    stalled(faulty, released)
    with serve(tmp_path, upstream=faulty.host) as cache, fetching(cache.host):
        path = f"/v2/team/app/blobs/{DIGEST}"
        head = ask(cache.host, "HEAD", path)
        assert (head.status, head.headers["content-length"]) == (200, str(len(CONTENT)))
        near = ask(cache.host, "GET", path, range="bytes=500000-500009")
        assert (near.status, near.body) == (206, CONTENT[500_000:500_010])
        connection = http.client.HTTPConnection(cache.host, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Range": "bytes=4000000-"})
            response = connection.getresponse()
            assert response.status == 200
            assert response.read(1_000_000) == CONTENT[:1_000_000]
            released.set()
            assert response.read() == CONTENT[1_000_000:]
        far = ask(cache.host, "GET", path, range="bytes=4000000-")
        assert (far.status, far.body) == (206, CONTENT[4_000_000:])


def test_patience_is_with_silence_not_with_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = Fetch("", 10)

    class Slow(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            del timeout
            fetch.advance(fetch.readable + 1)
            return True

    monkeypatch.setattr(cache_module, "PATIENCE", 0)
    monkeypatch.setattr(fetch, "_changed", Slow())
    assert fetch.wait(5) == 1


def test_closing_does_not_wait_for_a_silent_upstream(faulty: Faulty) -> None:
    beginning = f"HTTP/1.1 200 OK\r\nContent-Length: {len(CONTENT)}\r\n\r\n".encode() + CONTENT[:2_000_000]
    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{DIGEST}", blob(raw(beginning, stall=True)))
    with serve(upstream=faulty.host) as cache:
        name, _, port = cache.host.rpartition(":")
        with socket.create_connection((name, int(port)), timeout=20) as client:
            client.sendall(f"GET /v2/team/app/blobs/{DIGEST} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            faulty.closing.set()
            cache.close()


def test_an_upstream_that_is_no_registry(faulty: Faulty) -> None:
    faulty.on(
        "GET",
        "/v2/team/app/manifests/latest",
        raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"),
    )
    with serve(upstream=faulty.host) as cache:
        assert ask(cache.host, "GET", "/v2/team/app/manifests/latest").status == 502


def test_many_at_once_ask_for_a_tag_once(faulty: Faulty) -> None:
    """Also where it must not be kept, and where the answer is an error: those who wait share it."""
    body = b'{"schemaVersion":2,"mediaType":"%s","manifests":[]}' % OCI_INDEX.encode()
    begun, released = threading.Barrier(9), threading.Event()

    def slowly(connection: Connection) -> None:
        assert released.wait(20)
        answer(200, body, content_type=OCI_INDEX)(connection)

    faulty.on("GET", "/v2/team/app/manifests/latest", slowly)
    results: list[int] = []

    def ask_for_it() -> None:
        begun.wait(20)
        results.append(ask(cache.host, "GET", "/v2/team/app/manifests/latest").status)

    with serve(upstream=faulty.host, tag_life=0) as cache:
        threads = [threading.Thread(target=ask_for_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait(20)
        # All have asked once as many connections are open: only then may the first be answered.
        deadline = time.monotonic() + 20
        while sum(thread.name == "containerkit-request" for thread in threading.enumerate()) < 8:
            assert time.monotonic() < deadline
        released.set()
        for thread in threads:
            thread.join()
    assert results == [200] * 8
    assert len(faulty.requests("GET")) <= 3


def test_a_tag_that_the_upstream_has_no_more(upstream: Registry) -> None:
    origin = Repository(upstream.host, "team/app")
    digest = origin.push_image("latest")
    with serve(upstream=upstream.host, tag_life=0) as cache:
        repository = Repository(cache.host, "team/app")
        assert repository.ask("GET", "manifests/latest").status == 200
        assert origin.ask("DELETE", "manifests/latest").status == 202
        assert repository.ask("GET", "manifests/latest").code == "MANIFEST_UNKNOWN"
        upstream.close()
        assert repository.ask("GET", "manifests/latest").status == 502
        assert repository.ask("GET", f"manifests/{digest}").status == 200


@pytest.mark.parametrize("lie", ["asked", "announced"])
def test_a_manifest_of_another_digest_is_the_upstreams_fault(faulty: Faulty, lie: str, tmp_path: Any) -> None:
    body = b'{"schemaVersion":2,"mediaType":"%s","manifests":[]}' % OCI_INDEX.encode()
    target = str(DIGEST) if lie == "asked" else "latest"
    headers = {"docker_content_digest": str(DIGEST)} if lie == "announced" else {}
    faulty.on("GET", f"/v2/team/app/manifests/{target}", answer(200, body, content_type=OCI_INDEX, **headers))
    with serve(tmp_path, upstream=faulty.host) as cache:
        assert ask(cache.host, "GET", f"/v2/team/app/manifests/{target}").status == 502
        assert [name for _, _, names in os.walk(tmp_path / "repositories") for name in names] == []


@pytest.mark.parametrize(("wait", "passed_on"), [("100", "100"), ("9" * 400, "86400")])
def test_how_long_to_wait_is_passed_on(faulty: Faulty, wait: str, passed_on: str) -> None:
    faulty.on("GET", "/v2/team/app/manifests/latest", answer(429, b"", retry_after=wait))
    with serve(upstream=faulty.host) as cache:
        told = ask(cache.host, "GET", "/v2/team/app/manifests/latest")
    assert (told.status, told.code, told.headers["retry-after"]) == (429, "TOOMANYREQUESTS", passed_on)


def test_an_upstream_that_wants_credentials() -> None:
    """The cache has its own; without, its clients are not asked for some that would not help."""
    credentials = Credentials({})
    with serve(users={"alice": "s3cret"}) as upstream:
        credentials.login(upstream.host, "alice", "s3cret")
        secret = "Basic " + base64.b64encode(b"alice:s3cret").decode()
        start = ask(
            upstream.host, "POST", f"/v2/team/app/blobs/uploads/?digest={DIGEST}", CONTENT, authorization=secret
        )
        assert start.status == 201
        for known, status in ((credentials, 200), (Credentials({}), 403)):
            with serve(upstream=upstream.host, registries=Registries(credentials=known)) as cache:
                assert ask(cache.host, "GET", f"/v2/team/app/blobs/{DIGEST}").status == status


@pytest.mark.parametrize("name", ["example", "http://127.0.0.1:5000", "registry.example.org/", "a b", "x.org/team"])
def test_an_upstream_that_is_no_name_of_a_registry(name: str, tmp_path: Any) -> None:
    with pytest.raises(RegistryConfigError, match="is no registry"):
        serve(tmp_path, upstream=name)


def test_only_so_many_fetches_at_once(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    stalled(faulty, released)
    other = Digest.of(b"other")
    for method in ("GET", "HEAD"):
        faulty.on(method, f"/v2/team/app/blobs/{other}", answer(200, b"other"))
    monkeypatch.setattr(uploads, "MOST", 1)
    with serve(upstream=faulty.host) as cache, fetching(cache.host) as response:
        told = ask(cache.host, "GET", f"/v2/team/app/blobs/{other}")
        assert (told.status, told.code) == (429, "TOOMANYREQUESTS")
        released.set()
        response.read()
        assert ask(cache.host, "GET", f"/v2/team/app/blobs/{other}").body == b"other"
