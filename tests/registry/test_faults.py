"""Every way a registry can misbehave on the wire, by a server that does it."""

from __future__ import annotations

import io
import json
import socket
import traceback
from typing import TYPE_CHECKING

import pytest

from containerkit import errors
from containerkit.errors import (
    DigestMismatch,
    DocumentTooLarge,
    InvalidImage,
    ManifestUnknown,
    RateLimited,
    RegistryDisconnected,
    RegistryError,
    RegistryRejected,
    RegistryTimeout,
    RegistryUnauthorized,
    RegistryUnavailable,
    SizeMismatch,
    UnexpectedResponse,
    UnsupportedMediaType,
)
from containerkit.image.codec import LARGEST_DOCUMENT
from containerkit.image.digest import Digest
from containerkit.image.model import OCI_INDEX, OCI_MANIFEST, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry.bodies import read_body
from containerkit.registry.transport import Request
from support.faulty import answer, head, raw

if TYPE_CHECKING:
    from collections.abc import Callable

    from containerkit.registry.repository import Repository
    from support.faulty import Action, Connection, Faulty

MANIFEST = "/v2/some/image/manifests/1"
BODY = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
SHORT = 0.3
PAGES = (b"", b"<html>oh dear</html>", b'{"errors": "none"}', b"[" * 60_000, b"\xff\x00")


@pytest.fixture
def resolve(faulty: Faulty, repository: Callable[..., Repository]) -> Callable[..., tuple[Descriptor, bytes]]:
    """Resolve ``some/image:1`` at the faulty server, which answers as told."""

    def run(*actions: Action, timeout: float = 30.0) -> tuple[Descriptor, bytes]:
        faulty.on("GET", MANIFEST, *actions)
        name = f"{faulty.host}/some/image:1"
        return repository(name, timeout=timeout).resolve(Reference.parse(name))

    return run


@pytest.fixture
def download(
    faulty: Faulty, repository: Callable[..., Repository], blob: tuple[Descriptor, bytes]
) -> Callable[..., bytes]:
    """Read the blob from the faulty server in pieces, as it answers."""

    def run(*actions: Action, timeout: float = 30.0, piece: int = 40_000) -> bytes:
        faulty.on("GET", f"/v2/some/image/blobs/{blob[0].digest}", *actions)
        with repository(f"{faulty.host}/some/image:1", timeout=timeout).open(blob[0]) as stream:
            return b"".join(iter(lambda: stream.read(piece), b""))

    return run


def test_nobody_there(repository: Callable[..., Repository]) -> None:
    with socket.socket() as unused:  # bound and not listening: nobody else can have the port
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(RegistryUnavailable, match=f"{host} cannot be reached: Connection refused") as caught:
            repository(f"{host}/a:1").resolve(Reference.parse(f"{host}/a:1"))
    assert isinstance(caught.value, ConnectionError)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert (caught.value.status, caught.value.retryable) == (0, True)
    assert caught.value.url == f"http://{host}/v2/a/manifests/1"


def test_a_name_that_does_not_resolve(repository: Callable[..., Repository]) -> None:
    with pytest.raises(RegistryUnavailable, match=r"nowhere\.invalid cannot be reached"):
        repository("nowhere.invalid/a:1").resolve(Reference.parse("nowhere.invalid/a:1"))


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (400, RegistryRejected, False),
        (401, RegistryUnauthorized, False),
        (403, RegistryUnauthorized, False),
        (404, ManifestUnknown, False),
        (429, RateLimited, True),
        (500, RegistryUnavailable, True),
        (501, UnexpectedResponse, False),
        (503, RegistryUnavailable, True),
        (204, UnexpectedResponse, False),
        (304, UnexpectedResponse, False),
    ],
)
def test_statuses_whatever_the_body(
    status: int, kind: type[RegistryError], retryable: bool, resolve: Callable[..., object], faulty: Faulty
) -> None:
    for page in (b"",) if status in (204, 304) else PAGES:
        faulty.seen.clear()
        with pytest.raises(kind, match=f"some/image:1: {faulty.host} answered {status}") as caught:
            resolve(answer(status, page))
        assert type(caught.value) is kind
        assert (caught.value.status, caught.value.code, caught.value.retryable) == (status, "", retryable)
        assert len(faulty.seen) == (3 if retryable else 1)


def test_the_registrys_reason_is_said_on_one_short_line(resolve: Callable[..., object]) -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "no\x1b[31m\nno " + "x" * 9999}]}).encode()
    with pytest.raises(RegistryUnauthorized, match=r"DENIED: no \[31m no x+\)$") as caught:
        resolve(answer(403, body))
    assert caught.value.code == "DENIED"
    assert len(str(caught.value)) < 600


def test_a_failure_that_passes_is_not_seen(resolve: Callable[..., tuple[Descriptor, bytes]], faulty: Faulty) -> None:
    good = answer(200, BODY, content_type=OCI_MANIFEST)
    assert resolve(answer(503), raw(), good) == (Descriptor(OCI_MANIFEST, Digest.of(BODY), len(BODY)), BODY)
    assert len(faulty.seen) == 3


def test_answers_that_are_no_http(resolve: Callable[..., object]) -> None:
    with pytest.raises(UnexpectedResponse, match="does not answer in proper HTTP"):
        resolve(raw(b"SSH-2.0-OpenSSH_9.2\r\n"))


@pytest.mark.parametrize(
    "action",
    [
        raw(),
        raw(head(200, {"content_type": OCI_MANIFEST, "content_length": str(len(BODY))}), BODY[:-1]),
        raw(head(200, {"content_type": OCI_MANIFEST, "transfer_encoding": "chunked"}), b"10\r\n", BODY[:8]),
    ],
    ids=["before the answer", "in the body", "in a chunk"],
)
def test_manifest_cut(action: Action, resolve: Callable[..., object], faulty: Faulty) -> None:
    with pytest.raises(RegistryDisconnected, match=f"some/image:1: {faulty.host} cut the connection") as caught:
        resolve(action)
    assert caught.value.retryable
    assert len(faulty.seen) == 3


def test_a_cut_is_seen_even_where_urllib3_does_not_look(faulty: Faulty, repository: Callable[..., Repository]) -> None:
    """As urllib3 1.x does by default."""
    faulty.on("GET", "/v2/some", raw(head(200, {"content_length": "5"}), b"1234"))
    with repository(f"{faulty.host}/a").transport.stream(Request("GET", "some", "it")) as response:
        response.raw.enforce_content_length = False
        with pytest.raises(RegistryDisconnected, match="it: "):
            read_body(response, 100, "it")


@pytest.mark.parametrize("start", [b"", head(200, {"content_length": "99"}) + b"{"], ids=["no answer", "half a body"])
def test_manifest_stalls(start: bytes, resolve: Callable[..., object]) -> None:
    with pytest.raises(RegistryTimeout, match="stopped answering") as caught:
        resolve(raw(start, stall=True), timeout=SHORT)
    assert isinstance(caught.value, TimeoutError)


def test_html_instead_of_a_manifest(resolve: Callable[..., object]) -> None:
    with pytest.raises(UnexpectedResponse, match="text/html") as caught:
        resolve(answer(200, b"<html>log in</html>", content_type="text/html; charset=utf-8"))
    assert "address of a registry" in caught.value.hint


@pytest.mark.parametrize(
    ("served", "body", "error"),
    [
        ("application/vnd.oci.empty.v1+json", b"{}", UnsupportedMediaType),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", b"{}", UnsupportedMediaType),
        ("application/json", b"{}", UnsupportedMediaType),
        ("application/json", b'{"mediaType": "application/zip"}', UnsupportedMediaType),
        ("application/json", b'{"mediaType": ["a"]}', InvalidImage),
        (OCI_MANIFEST, b"<html>", InvalidImage),
        (OCI_MANIFEST, b"[" * 100_000, InvalidImage),
        (OCI_MANIFEST, b"\xff\xfe", InvalidImage),
        (OCI_MANIFEST, b"[]", InvalidImage),
        (OCI_MANIFEST, json.dumps({"mediaType": OCI_INDEX}).encode(), InvalidImage),
    ],
)
def test_documents_that_are_no_manifest(
    served: str, body: bytes, error: type[Exception], resolve: Callable[..., object]
) -> None:
    with pytest.raises(error, match="some/image:1") as caught:
        resolve(answer(200, body, content_type=served))
    assert type(caught.value) is error


@pytest.mark.parametrize("served", [f"{OCI_MANIFEST}; charset=utf-8", "application/json", "text/plain"])
def test_a_vague_type_is_made_good_by_the_document(served: str, resolve: Callable[..., object]) -> None:
    answered = resolve(answer(200, BODY, content_type=served))
    assert answered == (Descriptor(OCI_MANIFEST, Digest.of(BODY), len(BODY)), BODY)


def test_wrong_digests(resolve: Callable[..., object], faulty: Faulty, repository: Callable[..., Repository]) -> None:
    lie = str(Digest.of(b"else"))
    headers = {"content_type": OCI_MANIFEST, "docker_content_digest": lie}
    with pytest.raises(DigestMismatch, match=f"announced {lie}") as caught:
        resolve(answer(200, BODY, **headers))
    assert (caught.value.expected, caught.value.actual) == (lie, Digest.of(BODY))
    with pytest.raises(UnexpectedResponse, match="Docker-Content-Digest"):
        resolve(answer(200, BODY, **{**headers, "docker_content_digest": "md5:1"}))
    name = f"{faulty.host}/some/image@{lie}"
    faulty.on("GET", f"/v2/some/image/manifests/{lie}", answer(200, BODY, content_type=OCI_MANIFEST))
    with pytest.raises(DigestMismatch, match=f"wanted {lie}"):
        repository(name).resolve(Reference.parse(name))


def test_sha512_is_compared_too(resolve: Callable[..., object]) -> None:
    import hashlib

    digest = "sha512:" + hashlib.sha512(BODY).hexdigest()
    answered = resolve(answer(200, BODY, content_type=OCI_MANIFEST, docker_content_digest=digest))
    assert answered == (Descriptor(OCI_MANIFEST, Digest(digest), len(BODY)), BODY)
    with pytest.raises(DigestMismatch):
        resolve(answer(200, BODY + b" ", content_type=OCI_MANIFEST, docker_content_digest=digest))


def test_a_manifest_without_end(resolve: Callable[..., object]) -> None:
    largest = BODY.ljust(LARGEST_DOCUMENT)
    assert resolve(answer(200, largest, content_type=OCI_MANIFEST))
    whole = answer(200, largest + b" ", content_type=OCI_MANIFEST)
    chunked = raw(head(200, {"content_type": OCI_MANIFEST}), largest, b" " * 100_000, stall=True)
    declared = raw(
        head(200, {"content_type": OCI_MANIFEST, "content_length": str(10**15)}), stall=True
    )  # no body at all
    for action, found in ((whole, LARGEST_DOCUMENT + 1), (chunked, LARGEST_DOCUMENT + 1), (declared, 10**15)):
        with pytest.raises(DocumentTooLarge, match="some/image:1: the answer is longer than 4194304 bytes") as caught:
            resolve(action)
        assert (caught.value.limit, caught.value.allowed, caught.value.found) == ("manifest", LARGEST_DOCUMENT, found)


def serve(content: bytes, cut: int, *, ranges: bool = True, reset: bool = False) -> Action:
    """The blob from where the request wants it, with an honest length, cut after ``cut`` bytes."""

    def act(connection: Connection) -> None:
        wanted = connection.request.headers.get("range", "bytes=0-") if ranges else "bytes=0-"
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        headers = {"content_length": str(len(content) - start)}
        if start:
            headers["content_range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        connection.send(head(206 if start else 200, headers) + content[start : start + cut])
        if cut < len(content) - start:
            if reset:
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            raw()(connection)

    return act


def test_a_cut_download_resumes_where_it_was(
    download: Callable[..., bytes], blob: tuple[Descriptor, bytes], faulty: Faulty
) -> None:
    _, content = blob
    assert download(serve(content, 300_000), serve(content, 10**9)) == content
    assert [request.headers.get("range") for request in faulty.seen] == [None, "bytes=300000-"]


@pytest.mark.parametrize("piece", [1000, 40_000, 2_000_000, -1])
def test_a_cut_download_without_ranges_starts_again(
    piece: int, download: Callable[..., bytes], blob: tuple[Descriptor, bytes]
) -> None:
    _, content = blob
    actions = [serve(content, cut, ranges=False) for cut in (300_000, 200_000, 10**9)]
    assert download(*actions, piece=piece) == content


def test_a_stalled_download_resumes(download: Callable[..., bytes], blob: tuple[Descriptor, bytes]) -> None:
    _, content = blob
    stalled = raw(head(200, {"content_length": str(len(content))}), content[:100_000], stall=True)
    assert download(stalled, serve(content, 10**9), timeout=SHORT) == content


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_cut_for_good(
    reset: bool, download: Callable[..., bytes], blob: tuple[Descriptor, bytes], faulty: Faulty
) -> None:
    _, content = blob
    with pytest.raises(RegistryDisconnected, match=f"{blob[0].digest}: {faulty.host} cut the connection"):
        download(serve(content, 0, reset=reset))
    assert len(faulty.seen) == 5


def test_a_download_stalled_for_good(download: Callable[..., bytes], blob: tuple[Descriptor, bytes]) -> None:
    start = head(200, {"content_length": str(blob[0].size)})
    with pytest.raises(RegistryTimeout, match="stopped answering"):
        download(raw(start, stall=True), timeout=0.1)


def test_resumed_at_the_wrong_place(download: Callable[..., bytes], blob: tuple[Descriptor, bytes]) -> None:
    _, content = blob
    wrong = answer(206, content[1:], content_range=f"bytes 1-{len(content) - 1}/{len(content)}")
    with pytest.raises(UnexpectedResponse, match="another place than byte 1000"):
        download(serve(content, 1000), wrong)


def test_a_part_that_ends_early_and_then_everything(
    repository: Callable[..., Repository], faulty: Faulty, blob: tuple[Descriptor, bytes]
) -> None:
    """Both are allowed, the second from another server behind the same name: it is gone on from the right byte."""
    descriptor, content = blob
    part = answer(206, content[10_000:100_000], content_range=f"bytes 10000-99999/{len(content)}")
    faulty.on("GET", f"/v2/some/image/blobs/{descriptor.digest}", part, answer(200, content))
    with repository(f"{faulty.host}/some/image:1").open_at(descriptor, 10_000) as stream:
        assert b"".join(iter(lambda: stream.read(65536), b"")) == content[10_000:]
    assert [request.headers["range"] for request in faulty.seen] == ["bytes=10000-", "bytes=100000-"]


def test_lengths_that_lie(download: Callable[..., bytes], blob: tuple[Descriptor, bytes]) -> None:
    _, content = blob
    for wrong in (len(content) - 1, len(content) + 1):
        with pytest.raises(SizeMismatch, match=f"has {wrong} bytes"):
            download(answer(200, content, content_length=str(wrong)))


@pytest.mark.parametrize(("extra", "error"), [(b"!", SizeMismatch), (b"", None), (None, SizeMismatch)])
def test_a_body_without_length(
    extra: bytes | None, error: type[Exception] | None, download: Callable[..., bytes], blob: tuple[Descriptor, bytes]
) -> None:
    """Chunked: its last chunk says where it ends, and the descriptor says where it should."""
    _, content = blob
    body = content[:-1] if extra is None else content + extra
    chunked = raw(head(200, {"transfer_encoding": "chunked"}), f"{len(body):x}\r\n".encode(), body, b"\r\n0\r\n\r\n")
    if error is None:
        assert download(chunked) == content
        return
    with pytest.raises(error, match=blob[0].digest):
        download(chunked)


def test_a_body_that_ends_with_the_connection(
    download: Callable[..., bytes], blob: tuple[Descriptor, bytes], faulty: Faulty
) -> None:
    _, content = blob
    assert download(raw(head(200, {"connection": "close"}), content)) == content
    with pytest.raises(RegistryDisconnected):
        download(raw(head(200, {"connection": "close"}), content[:-1]))
    with pytest.raises(SizeMismatch):
        download(raw(head(200, {"connection": "close"}), content, b"!"))


def test_a_blob_is_not_decoded(
    repository: Callable[..., Repository], faulty: Faulty, blob: tuple[Descriptor, bytes]
) -> None:
    """A server that calls a gzip layer ``Content-Encoding: gzip`` must not change its bytes."""
    import gzip

    packed = gzip.compress(blob[1], mtime=0)
    descriptor = Descriptor(blob[0].media_type, Digest.of(packed), len(packed))
    faulty.on("GET", f"/v2/some/image/blobs/{descriptor.digest}", answer(200, packed, content_encoding="gzip"))
    with repository(f"{faulty.host}/some/image").open(descriptor) as stream:
        assert stream.read() == packed
    assert faulty.seen[0].headers["accept-encoding"] == "identity"


def test_one_connection_serves_one_request_after_the_other(
    repository: Callable[..., Repository], faulty: Faulty, blob: tuple[Descriptor, bytes]
) -> None:
    descriptor, content = blob
    name = Reference.parse(f"{faulty.host}/some/image:1")
    remote = repository(str(name))
    faulty.on("GET", MANIFEST, answer(200, BODY, content_type=OCI_MANIFEST))
    faulty.on("PUT", MANIFEST, answer(201))
    faulty.on("GET", f"/v2/some/image/blobs/{descriptor.digest}", serve(content, 10**9))
    faulty.on("POST", "/v2/some/image/blobs/uploads/", answer(202, location="/up"))
    faulty.on("PUT", "/up", answer(201))
    remote.resolve(name)
    assert not remote.has(descriptor)
    with remote.open(descriptor) as stream:
        assert stream.read(len(content)) == content  # the caller need not read on to the end
    remote.put(descriptor, io.BytesIO(content))
    remote.put_manifest(name, OCI_MANIFEST, BODY)
    assert len(faulty.seen) == 6
    assert faulty.connections == 1


def test_redirected_blobs_keep_their_secrets(
    repository: Callable[..., Repository], faulty: Faulty, blob: tuple[Descriptor, bytes]
) -> None:
    """Downloads are often redirected to storage, with the permission in the query."""
    descriptor, content = blob
    path = f"/v2/some/image/blobs/{descriptor.digest}"
    faulty.on("GET", path, answer(307, location="/storage/x?signature=hush"))
    faulty.on("GET", "/storage/x", serve(content, 10**9))
    remote = repository(f"{faulty.host}/some/image")
    with remote.open(descriptor) as stream:
        assert stream.read() == content
    for broken in (answer(403), raw(), raw(b"nonsense\r\n")):
        faulty.on("GET", "/storage/x", broken)
        with pytest.raises(RegistryError) as caught:
            remote.open(descriptor)
        assert "hush" not in "".join(traceback.format_exception(caught.value))
        assert "hush" not in caught.value.url


def test_redirects_without_end(resolve: Callable[..., object]) -> None:
    with pytest.raises(UnexpectedResponse):
        resolve(answer(302, location=MANIFEST))


def test_uploads_do_not_follow_redirects(
    repository: Callable[..., Repository], faulty: Faulty, blob: tuple[Descriptor, bytes]
) -> None:
    faulty.on("POST", "/v2/some/image/blobs/uploads/", answer(302, location="/other"))
    with open("/dev/null", "rb") as stream, pytest.raises(UnexpectedResponse, match="answered 302"):
        repository(f"{faulty.host}/some/image").put(blob[0], stream)


@pytest.mark.parametrize("location", [{}, {"location": "file:///etc/passwd"}])
def test_an_upload_without_a_place(
    location: dict[str, str],
    repository: Callable[..., Repository],
    faulty: Faulty,
    blob: tuple[Descriptor, bytes],
) -> None:
    faulty.on("POST", "/v2/some/image/blobs/uploads/", answer(202, **location))
    with open("/dev/null", "rb") as stream, pytest.raises(UnexpectedResponse, match="does not say where to send it"):
        repository(f"{faulty.host}/some/image").put(blob[0], stream)


def test_every_registry_error_is_one_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RegistryError)]
    for kind in kinds:
        error = kind("it broke", url="http://h/v2/", status=500, code="C", hint="try")
        assert (str(error), error.url, error.status, error.code) == ("it broke (try)", "http://h/v2/", 500, "C")
