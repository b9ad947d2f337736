"""A real Distribution registry on loopback, with images that skopeo and umoci made: a plugin of fixtures."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support import facts
from support.peers import umoci

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {directory}}}
  delete: {{enabled: true}}
http:
  addr: 127.0.0.1:0
  secret: not-one
"""
LISTENING = "0A"
START_SECONDS = 30
# A whole tar block: umoci 0.4.7 does not pad the last file of an inserted layer.
GREETING = "hello from the second layer\n".ljust(512, ".")


class Registry(NamedTuple):
    """A running server; ``host`` is what references name: ``127.0.0.1:PORT``."""

    host: str
    directory: str

    def name(self, image: str) -> str:
        """The full name of ``image`` here."""
        return f"{self.host}/{image}"

    def blob_path(self, digest: str) -> str:
        """The file in which the server keeps a blob or manifest."""
        algorithm, _, encoded = digest.partition(":")
        path = f"docker/registry/v2/blobs/{algorithm}/{encoded[:2]}/{encoded}/data"
        return os.path.join(self.directory, path)


def skopeo(*arguments: str) -> bytes:
    """Run skopeo against registries without TLS; its standard output."""
    facts.require("skopeo")
    command, *rest = arguments
    options = {"copy": ["--src-tls-verify=false", "--dest-tls-verify=false"]}.get(command, ["--tls-verify=false"])
    return _run("skopeo", "--insecure-policy", command, *options, *rest)


def _run(*command: str) -> bytes:
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(command, check=False, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
    return done.stdout


@pytest.fixture(scope="session")
def registry(session_directory: str) -> Iterator[Registry]:
    """Debian's docker-registry, empty at first, on a port that the kernel chose."""
    facts.require("docker-registry")
    directory = tempfile.mkdtemp(prefix="registry-", dir=session_directory)
    config = os.path.join(directory, "config.yml")
    with open(config, "w") as file:
        file.write(CONFIG.format(directory=directory))
    with (
        open(os.path.join(directory, "log"), "wb") as log,
        subprocess.Popen(
            ["docker-registry", "serve", config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        ) as server,
    ):
        try:
            yield Registry(f"127.0.0.1:{_port(server, log.name)}", directory)
        finally:
            server.terminate()
    shutil.rmtree(directory)


def _port(server: subprocess.Popen[bytes], log: str) -> int:
    """The port that ``server`` listens on, once it does."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        inodes = _sockets(server.pid)
        with open("/proc/net/tcp") as table:
            for row in map(str.split, list(table)[1:]):
                if row[3] == LISTENING and row[9] in inodes:
                    return int(row[1].rpartition(":")[2], 16)
        time.sleep(0.01)
    with open(log) as file:
        raise AssertionError(f"docker-registry did not start: {file.read()}")


def _sockets(pid: int) -> set[str]:
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            kind, _, inode = os.readlink(f"/proc/{pid}/fd/{name}").partition(":")
        except FileNotFoundError:
            continue
        if kind == "socket":
            found.add(inode.strip("[]"))
    return found


@pytest.fixture(scope="session")
def busybox_layout(busybox_root: str, session_directory: str) -> str:
    """An OCI layout with the image ``1``: two layers, the busybox root and a file on top, made by umoci."""
    layout = os.path.join(session_directory, "busybox-layout")
    extra = os.path.join(session_directory, "greeting")
    with open(extra, "w") as file:
        file.write(GREETING)
    umoci("init", "--layout", layout)
    umoci("new", "--image", f"{layout}:1")
    umoci("insert", "--image", f"{layout}:1", busybox_root, "/")
    umoci("insert", "--image", f"{layout}:1", extra, "/greeting")
    settings = ["--config.cmd", "/bin/sh", "--config.env", "PATH=/bin:/sbin:/usr/bin:/usr/sbin"]
    umoci("config", "--image", f"{layout}:1", *settings, "--config.workingdir", "/tmp")
    return layout


@pytest.fixture(scope="session")
def busybox(registry: Registry, busybox_layout: str) -> str:
    """The name of that image in the registry, pushed by skopeo: ``127.0.0.1:PORT/busybox:1``."""
    name = registry.name("busybox:1")
    skopeo("copy", f"oci:{busybox_layout}:1", f"docker://{name}")
    return name


@pytest.fixture(scope="session")
def busybox_docker(registry: Registry, busybox_layout: str) -> str:
    """The same with a Docker schema 2 manifest: ``127.0.0.1:PORT/busybox:docker``."""
    name = registry.name("busybox:docker")
    skopeo("copy", "--format", "v2s2", f"oci:{busybox_layout}:1", f"docker://{name}")
    return name
