"""Answers that are broken on purpose: each ends at once in the error that says what it was, or in the truth."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from containerkit.errors import (
    DocumentTooLarge,
    InvalidImage,
    ManifestUnknown,
    RedirectRefused,
    RegistryDisconnected,
    RegistryUnavailable,
    SizeMismatch,
    UnexpectedResponse,
)
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry import discovery
from containerkit.registry.client import Registries
from containerkit.registry.credentials import Credential, Credentials
from containerkit.registry.mirrors import Mirrors
from containerkit.registry.ranges import Ranges
from support.certificates import Authority
from support.faulty import Faulty, answer, head, raw
from support.token_server import TokenServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from containerkit.registry.repository import Repository
    from support.faulty import Action, Connection

BODY = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}'
PLAIN = {"content_type": OCI_MANIFEST}
GOOD = {**PLAIN, "content_length": str(len(BODY))}
CHUNKED = {**PLAIN, "transfer_encoding": "chunked"}
PATH = "/v2/some/image/manifests/1"


def lines(status: int, headers: dict[str, str], *more: bytes) -> bytes:
    return head(status, headers)[:-2] + b"".join(line + b"\r\n" for line in more) + b"\r\n"


def endless(start: bytes, more: bytes) -> Action:
    def act(connection: Connection) -> None:
        connection.send(start)
        while not connection.closing.is_set():
            connection.send(more)

    return act


# What is sent, and the error, or nothing where what comes is right all the same.
ANSWERS: dict[str, tuple[Action, type[Exception] | None]] = {
    "a length below zero": (raw(head(200, {**PLAIN, "content_length": "-1"}), BODY), None),
    "a length of letters": (raw(head(200, {**PLAIN, "content_length": "many"}), BODY), None),
    "a length of 5000 digits": (raw(head(200, {**PLAIN, "content_length": "9" * 5000}), BODY), None),
    "a length of 20 digits": (raw(head(200, {**PLAIN, "content_length": "9" * 20}), BODY), DocumentTooLarge),
    "a length that is no digit": (raw(lines(200, PLAIN, b"Content-Length: \xb2"), BODY), None),
    "too short a length": (raw(head(200, {**PLAIN, "content_length": "20"}), BODY), InvalidImage),
    "too long a length": (raw(head(200, {**PLAIN, "content_length": "99"}), BODY), RegistryDisconnected),
    "two lengths": (raw(lines(200, GOOD, b"Content-Length: 5"), BODY), UnexpectedResponse),
    "no end of chunks": (raw(head(200, CHUNKED), b"%x\r\n" % len(BODY), BODY), RegistryDisconnected),
    "trailers": (raw(head(200, CHUNKED), b"%x\r\n" % len(BODY), BODY, b"\r\n0\r\nX: y\r\nY: z\r\n\r\n"), None),
    "trailers without end": (
        endless(head(200, CHUNKED) + b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n", b"A: b\r\n" * 1000),
        UnexpectedResponse,
    ),
    "a chunk below zero": (raw(head(200, CHUNKED), b"-5\r\n", BODY), RegistryDisconnected),
    "a chunk without size": (raw(head(200, CHUNKED), b"\r\n", BODY), RegistryDisconnected),
    "a huge chunk": (raw(head(200, CHUNKED), b"f" * 16 + b"\r\n", BODY), RegistryDisconnected),
    "an endless chunk size": (raw(head(200, CHUNKED), b"5;" + b"x" * 99_999), UnexpectedResponse),
    "a header of 10 MB": (raw(lines(200, GOOD, b"X: " + b"y" * 10**7), BODY), UnexpectedResponse),
    "a status of 1 MB": (raw(b"HTTP/1.1 200 " + b"y" * 10**6), UnexpectedResponse),
    "100,000 headers": (raw(lines(200, GOOD, *[b"X: y"] * 10**5), BODY), UnexpectedResponse),
    "headers without end": (endless(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 1000), UnexpectedResponse),
    "interim answers without end": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), UnexpectedResponse),
    "an interim answer": (raw(b"HTTP/1.1 100 Continue\r\n\r\n", head(200, GOOD), BODY), None),
    "early hints": (raw(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", head(200, GOOD), BODY), None),
    "a document without end": (endless(head(200, PLAIN), b" " * 10**5), DocumentTooLarge),
    "an error page without end": (endless(head(500, {}), b" " * 10**5), RegistryUnavailable),
    "numbers that are none": (
        raw(lines(200, GOOD, b"RateLimit-Limit: \xb2;w=\xb2", b"RateLimit-Remaining: \xb2"), BODY),
        None,
    ),
    "numbers that are too long": (
        raw(lines(200, GOOD, b"RateLimit-Limit: 1;w=" + b"9" * 5000, b"RateLimit-Remaining: 1"), BODY),
        None,
    ),
    "a header without colon": (raw(lines(200, GOOD, b"nonsense"), BODY), UnexpectedResponse),
    "cut in the status": (raw(b"HTTP/1.1 2"), RegistryDisconnected),
    "cut in a header": (raw(head(200, GOOD)[:-9]), RegistryDisconnected),
    "status 99": (raw(head(99, GOOD), BODY), UnexpectedResponse),
    "status 206": (raw(head(206, GOOD), BODY), UnexpectedResponse),
    "status 999": (raw(head(999, GOOD), BODY), RegistryUnavailable),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_a_manifest(what: str, faulty: Faulty, repository: Callable[..., Repository]) -> None:
    action, error = ANSWERS[what]
    faulty.on("GET", PATH, action)
    remote, name = repository(f"{faulty.host}/some/image", timeout=5), Reference.parse(f"{faulty.host}/some/image:1")
    if error is None:
        assert remote.resolve(name)[1] == BODY
    else:
        with pytest.raises(error, match="some/image:1") as caught:
            remote.resolve(name)
        assert type(caught.value) is error
    # Whatever was left on the wire is not taken for the next answer.
    faulty.on("GET", PATH, answer(200, BODY, **PLAIN))
    assert remote.resolve(name)[1] == BODY


def test_an_answer_that_is_cut_at_any_byte(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    """Headers too: what came of them before is never taken for all."""
    whole = head(200, {**GOOD, "docker_content_digest": str(Digest.of(BODY))}) + BODY
    name = Reference.parse(f"{faulty.host}/some/image:1")
    remote = repository(str(name))
    remote.transport.delays = ()
    for size in range(len(whole)):
        faulty.on("GET", PATH, raw(whole[:size]))
        with pytest.raises(RegistryDisconnected):
            remote.resolve(name)
    faulty.on("GET", PATH, raw(whole))
    assert remote.resolve(name)[1] == BODY


RANGES: dict[str, tuple[str, type[Exception] | None]] = {
    "none": ("", UnexpectedResponse),
    "unsatisfied": ("bytes */100", UnexpectedResponse),
    "of another place": ("bytes 5-10", UnexpectedResponse),
    "backwards": ("bytes 1000-4/SIZE", UnexpectedResponse),
    "no number": ("bytes 1000-\xb2/\xb2", None),
    "too many digits": ("bytes 1000-" + "9" * 5000 + "/" + "9" * 5000, None),
    "of another blob": ("bytes 1000-1005/1006", SizeMismatch),
    "of things": ("things 1000-1005/SIZE", UnexpectedResponse),
    "of no known size": ("bytes 1000-LAST/*", None),
}


@pytest.mark.parametrize("what", RANGES)
def test_a_range(
    what: str, faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> None:
    said, error = RANGES[what]
    descriptor, content = blob
    said = said.replace("SIZE", str(len(content))).replace("LAST", str(len(content) - 1))
    start = raw(head(200, {"content_length": str(len(content))}), content[:1000])
    more = [b"Content-Range: " + said.encode("latin-1")] if said else []
    rest = raw(lines(206, {"content_length": str(len(content) - 1000)}, *more), content[1000:])
    faulty.on("GET", f"/v2/a/blobs/{descriptor.digest}", start, rest)
    with repository(f"{faulty.host}/a").open(descriptor) as stream:
        if error is None:
            assert stream.read() == content
        else:
            with pytest.raises(error, match=descriptor.digest):
                stream.read()


@pytest.mark.parametrize(
    "location",
    [
        "http://a b/", "http://127.0.0.1:0/", "http://127.0.0.1:x/", "http://[::1", "http://" + "a" * 70 + "/",
        "http://.../", "http://\xfc.example/", "http://%31/", "http://-/", "http://*/", "http://[1:2]/",
        "javascript:1", "data:,x", "unix:///x", "http://" + "a." * 200 + "/",
    ],
)  # fmt: skip
def test_a_redirect_to_what_is_no_address(location: str, faulty: Faulty, repository: Callable[..., Repository]) -> None:
    faulty.on("GET", PATH, raw(lines(307, {"content_length": "0"}, b"Location: " + location.encode("latin-1"))))
    with pytest.raises(RedirectRefused, match="redirects to nowhere"):
        repository(f"{faulty.host}/some/image").resolve(Reference.parse(f"{faulty.host}/some/image:1"))


@pytest.mark.parametrize(
    "location", ["/x", "x", "//HOST/x", "http://HOST/x", "HTTP://HOST/x#y", "../../../../../x", "?to=x"]
)
def test_a_redirect_by_every_form_of_address(
    location: str, faulty: Faulty, repository: Callable[..., Repository]
) -> None:
    faulty.on("GET", PATH, answer(307, location=location.replace("HOST", faulty.host)), answer(200, BODY, **PLAIN))
    for path in ("/x", "/v2/some/image/manifests/x"):
        faulty.on("GET", path, answer(200, BODY, **PLAIN))
    name = Reference.parse(f"{faulty.host}/some/image:1")
    assert repository(str(name)).resolve(name)[1] == BODY
    assert len(faulty.seen) == 2


@pytest.mark.parametrize("link", ["http://[bad", "http://a:99999/", "ftp://a/", "\xff\xb2", ""])
def test_a_next_page_that_is_no_address(link: str, faulty: Faulty, repository: Callable[..., Repository]) -> None:
    page = b'{"tags":[]}'
    headers = {"content_length": str(len(page))}
    faulty.on(
        "GET", "/v2/a/tags/list", raw(lines(200, headers, b"Link: <" + link.encode("latin-1") + b">; rel=next"), page)
    )
    with pytest.raises((UnexpectedResponse, ManifestUnknown, LookupError)):
        discovery.tags(repository(f"{faulty.host}/a"))


class Six(Faulty):
    """The same at ``[::1]``."""

    @property
    def host(self) -> str:
        return f"[::1]:{self._server.server_address[1]}"


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    from support import faulty

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on loopback")
    monkeypatch.setattr(faulty._Server, "address_family", socket.AF_INET6)
    original = faulty._Server.__init__
    monkeypatch.setattr(faulty._Server, "__init__", lambda self, _, handler: original(self, ("::1", 0), handler))
    with Six() as server:
        yield server


def test_addresses_in_brackets(six: Faulty, blob: tuple[Descriptor, bytes]) -> None:
    """As the registry's name, as a mirror, and in redirects."""
    path = f"/v2/some/image/blobs/{blob[0].digest}"
    six.on("GET", path, answer(401, www_authenticate='Basic realm="x"'), answer(302, location=f"http://{six.host}/x"))
    six.on("GET", "/x", answer(200, blob[1]))
    for name, mirrors in ((six.host, {}), ("registry.example", {"registry.example": [f"http://{six.host}"]})):
        credentials = Credentials({})
        credentials.login(six.host, "alice", "hush")
        registries = Registries(credentials=credentials, mirrors=Mirrors(mirrors, files=()))
        with registries.connect(Reference.parse(f"{name}/some/image")) as remote, remote.open(blob[0]) as stream:
            assert stream.read() == blob[1]
    assert [each.path for each in six.seen if "authorization" in each.headers] == [path, "/x"]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_token_that_expires_within_a_blob(side_by_side: bool, faulty: Faulty, tmp_path: Any) -> None:
    """A new one is asked for, once, and the download goes on at the byte it had reached."""
    content = os.urandom(1 << 20)
    descriptor = Descriptor("application/octet-stream", Digest.of(content), len(content))
    ranges = Ranges(smallest=1 << 19 if side_by_side else 1 << 40, piece=1 << 18, fast=float("inf"))
    sent, limit, lock = [0], 300_000, threading.Lock()

    def act(connection: Connection) -> None:
        token = connection.request.headers.get("authorization", "").removeprefix("Bearer ")
        known.setdefault(token, len(known))
        if known[token] != good_until[0]:
            answer(401, www_authenticate=f'Bearer realm="{service.realm}",service="s"')(connection)
            return
        wanted = connection.request.headers.get("range", "bytes=0-").removeprefix("bytes=")
        begin, _, end = wanted.partition("-")
        first, last = int(begin), int(end or len(content) - 1)
        partial = "range" in connection.request.headers
        headers = {"content_length": str(last - first + 1)}
        if partial:
            headers["content_range"] = f"bytes {first}-{last}/{len(content)}"
        body = content[first : last + 1]
        with lock:
            if good_until[0] == 1 and sent[0] + len(body) > limit:  # the first token expires now
                good_until[0] = 2
                body = body[:1000]
            sent[0] += len(body)
        connection.send(head(206 if partial else 200, headers) + body)
        if len(body) <= last - first:
            raw()(connection)

    known: dict[str, int] = {"": 0}
    good_until = [1]
    with TokenServer(Authority(str(tmp_path)).issue("signer")) as service:
        faulty.on("GET", f"/v2/a/blobs/{descriptor.digest}", act)
        registries = Registries(credentials=Credentials({}), mirrors=Mirrors(files=()), ranges=ranges)
        reference = Reference.parse(f"{faulty.host}/a")
        with (
            registries.connect(reference, credential=Credential("alice", service.users["alice"])) as remote,
            remote.open(descriptor) as stream,
        ):
            assert stream.read() == content
        assert len(service.asked) == 2
    assert sent[0] == len(content)
