"""Debian's docker-registry with any settings: passwords, tokens, TLS."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from support import facts
from support.registry import Registry, _port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from support.certificates import Pair
    from support.token_server import TokenServer


@contextmanager
def distribution(
    parent: str, *, auth: Mapping[str, Any] | None = None, tls: Pair | None = None, client_authority: str = ""
) -> Iterator[Registry]:
    """A server of its own; its configuration is YAML, of which JSON is a part."""
    facts.require("docker-registry")
    directory = tempfile.mkdtemp(prefix="distribution-", dir=parent)
    http: dict[str, Any] = {"addr": "127.0.0.1:0", "secret": "not-one"}
    if tls:
        http["tls"] = {"certificate": tls.certificate, "key": tls.key}
        if client_authority:
            http["tls"]["clientcas"] = [client_authority]
    document = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": directory}, "delete": {"enabled": True}},
        "http": http,
        **({"auth": auth} if auth else {}),
    }
    config = os.path.join(directory, "config.yml")
    with open(config, "w", encoding="utf-8") as file:
        json.dump(document, file)
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    with (
        open(os.path.join(directory, "log"), "wb") as log,
        subprocess.Popen(
            ["docker-registry", "serve", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        ) as server,
    ):
        try:
            yield Registry(f"127.0.0.1:{_port(server, log.name)}", directory)
        finally:
            server.terminate()


def htpasswd(directory: str, **users: str) -> dict[str, Any]:
    """The ``auth`` settings for these users and passwords."""
    facts.require("htpasswd")
    path = os.path.join(directory, "htpasswd")
    with open(path, "wb") as file:
        for name, password in users.items():
            command = ["htpasswd", "-niB", "-C", "4", name]
            file.write(subprocess.run(command, input=password.encode(), capture_output=True, check=True).stdout)
    return {"htpasswd": {"realm": "tests", "path": path}}


def tokens(server: TokenServer, authority: str, service: str, issuer: str) -> dict[str, Any]:
    """The ``auth`` settings for a token service."""
    return {"token": {"realm": server.realm, "service": service, "issuer": issuer, "rootcertbundle": authority}}
