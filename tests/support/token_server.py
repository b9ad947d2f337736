"""A token service as registries name them: users, access by repository, tokens that docker-registry verifies.

Source: the Distribution project's "Token Authentication Specification" and "OAuth2 Token Authentication".
"""

from __future__ import annotations

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509 import load_pem_x509_certificate

if TYPE_CHECKING:
    from typing import Self

    from support.certificates import Pair

ISSUER = "tests"
SERVICE = "registry.tests"


class Asked(NamedTuple):
    """A request to the service."""

    method: str
    fields: dict[str, list[str]]
    authorization: str


class TokenServer:
    """``users`` maps names to passwords, ``refresh`` identity tokens to names; the rest is anonymous.

    Everybody may pull what begins with ``public/``; users may do everything. ``life`` is how long (seconds) a token is
    good at the registry, ``says`` what the answer claims. ``answer`` replaces the service's own: status, type, body.
    """

    def __init__(self, signer: Pair) -> None:
        with open(signer.certificate, "rb") as file:
            self.certificate = load_pem_x509_certificate(file.read())
        with open(signer.key, "rb") as file:
            self.key: Any = serialization.load_pem_private_key(file.read(), None)
        self.users = {"alice": "s3cret:with colon"}
        self.refresh = {"refresh-me": "alice"}
        self.life = 300.0
        self.says: int | None = 300
        self.answer: tuple[int, str, bytes] | None = None
        self.asked: list[Asked] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                service.serve(self, parse_qs(urlsplit(self.path).query), refresh=False)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                service.serve(self, parse_qs(body.decode()), refresh=True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/token"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler, fields: dict[str, list[str]], *, refresh: bool) -> None:
        authorization = handler.headers.get("Authorization", "")
        self.asked.append(Asked(handler.command, fields, authorization))
        status, kind, body = self.answer or self._respond(fields, authorization, refresh=refresh)
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)

    def _respond(self, fields: dict[str, list[str]], authorization: str, *, refresh: bool) -> tuple[int, str, bytes]:
        try:
            user = self._user(fields, authorization, refresh=refresh)
        except KeyError:
            return 401, "application/json", b'{"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]}'
        scopes = [scope for text in fields.get("scope", []) for scope in text.split()]
        document: dict[str, Any] = {"access_token" if refresh else "token": self.sign(user, scopes)}
        if self.says is not None:
            document["expires_in"] = self.says
        return 200, "application/json", json.dumps(document).encode()

    def _user(self, fields: dict[str, list[str]], authorization: str, *, refresh: bool) -> str:
        if refresh:
            return self.refresh[fields["refresh_token"][0]]
        if not authorization:
            return ""
        name, _, password = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        if self.users[name] != password:
            raise KeyError(name)
        return name

    def sign(self, user: str, scopes: list[str]) -> str:
        now = time.time()
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": int(now + self.life),
            "nbf": int(now - 100),
            "iat": int(now - 100),
            "jti": str(now),
            "access": [access for scope in scopes if (access := _grant(user, scope))],
        }
        chain = base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()
        signed = f"{_encode({'typ': 'JWT', 'alg': 'ES256', 'x5c': [chain]})}.{_encode(claims)}"
        first, second = decode_dss_signature(self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64(first.to_bytes(32, 'big') + second.to_bytes(32, 'big'))}"


def _grant(user: str, scope: str) -> dict[str, Any] | None:
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    granted = [action for action in actions.split(",") if user or (action == "pull" and name.startswith("public/"))]
    return {"type": kind, "name": name, "actions": granted} if granted else None


def _encode(document: dict[str, Any]) -> str:
    return _base64(json.dumps(document).encode())


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
