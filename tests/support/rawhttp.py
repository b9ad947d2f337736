"""Requests to a registry one by one, with nothing in between: no retries, no redirects, no opinion."""

from __future__ import annotations

import http.client
import json
import socket
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from containerkit.image.digest import Digest
from containerkit.image.model import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Answer(NamedTuple):
    """Status, headers (lower case) and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The protocol's code of an error."""
        return str(self.json["errors"][0]["code"])


def ask(host: str, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **headers: str) -> Answer:
    """One request on a connection of its own; ``content_type="..."`` becomes ``Content-Type``."""
    if path.startswith("http"):
        parts = urlsplit(path)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPConnection(host, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named, encode_chunked=not isinstance(body, bytes | None))
        response = connection.getresponse()
        try:
            content = response.read()
        except http.client.IncompleteRead as cut:  # docker-registry announces a body with its 416, and sends none
            content = cut.partial
        return Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, content)
    finally:
        connection.close()


def raw(host: str, request: bytes, *, half_close: bool = False) -> bytes:
    """Everything that the server says to these bytes until it closes the connection."""
    name, _, port = host.rpartition(":")
    with socket.create_connection((name, int(port)), timeout=30) as connection:
        connection.sendall(request)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        said = b""
        while piece := connection.recv(65536):
            said += piece
        return said


def add(location: str, digest: str) -> str:
    """Where an upload is finished with this digest."""
    return f"{location}{'&' if '?' in location else '?'}digest={quote(digest, safe='')}"


class Repository:
    """One repository, spoken to by :func:`ask`, with a name that nobody else has."""

    def __init__(self, host: str, name: str = "") -> None:
        self.host = host
        self.name = name or f"spec/{uuid.uuid4().hex}"

    def ask(self, method: str, path: str, body: bytes | Iterable[bytes] | None = None, **headers: str) -> Answer:
        return ask(self.host, method, path if path.startswith("http") else f"/v2/{self.name}/{path}", body, **headers)

    def at(self, location: str, method: str, body: bytes | Iterable[bytes] | None = None, **headers: str) -> Answer:
        return ask(self.host, method, location, body, **headers)

    def begin(self) -> str:
        answer = self.ask("POST", "blobs/uploads/", b"")
        assert answer.status == 202
        return answer.headers["location"]

    def push_blob(self, content: bytes) -> Digest:
        digest = Digest.of(content)
        answer = self.at(add(self.begin(), digest), "PUT", content, content_type="application/octet-stream")
        assert answer.status == 201, answer
        return digest

    def push_manifest(self, target: str, document: Mapping[str, Any]) -> Answer:
        return self.ask(
            "PUT", f"manifests/{target}", json.dumps(document).encode(), content_type=str(document["mediaType"])
        )

    def image(self, mark: bytes = b"", **more: Any) -> dict[str, Any]:
        """A manifest whose blobs have been pushed."""
        config, layer = b'{"mark":"' + mark + b'"}', b"layer" + mark
        return {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": self.push_blob(config), "size": len(config)},
            "layers": [{"mediaType": OCI_LAYER, "digest": self.push_blob(layer), "size": len(layer)}],
            **more,
        }

    def push_image(self, tag: str, mark: bytes = b"", **more: Any) -> Digest:
        document = self.image(mark, **more)
        answer = self.push_manifest(tag, document)
        assert answer.status == 201, answer
        digest = Digest.of(json.dumps(document).encode())
        assert answer.headers["docker-content-digest"] == digest
        return digest


def describe(digest: str, size: int, media_type: str = OCI_MANIFEST) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size}
