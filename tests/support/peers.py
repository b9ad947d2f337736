"""Other engines with private state: a dockerd and a podman that know nothing of the machine's own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Protocol

from support import facts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

START_SECONDS = 60
PATIENCE = 120
OVER_ETC = 'mkdir -p /etc/docker && mount --bind "$0" /etc/docker && exec "$@"'


class Run(Protocol):
    """Runs one command of the engine: its output, or an assertion that fails with its errors."""

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        """Run it."""


class Failed(AssertionError):
    """The engine's own words for why a command failed."""


@contextlib.contextmanager
def docker(*options: str, etc: str = "", at: str = "") -> Iterator[Run]:
    """A dockerd of our own: private state, no bridge, no rules of a firewall.

    ``etc`` is its ``/etc/docker``, ``at`` the path of its socket, if that matters.
    """
    facts.require("docker", "dockerd")
    with tempfile.TemporaryDirectory(prefix="dockerd-") as directory:
        address = f"unix://{at or directory + '/socket'}"
        places = ["--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec"]
        quiet = ["--bridge", "none", "--iptables=false", "--ip6tables=false", "--storage-driver", "vfs"]
        command = ["dockerd", "-H", address, *places, "--pidfile", f"{directory}/pid", *quiet, *options]
        if etc:
            command = ["unshare", "-m", "sh", "-c", OVER_ETC, etc, *command]
        client = ["docker", "--config", f"{directory}/client", "-H", address]
        with (
            open(f"{directory}/log", "wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log, env=_environment({})) as daemon,
        ):
            try:
                _wait(client, daemon, log.name)
                yield lambda *arguments, stdin="": _run([*client, *arguments], stdin, {})
            finally:
                daemon.terminate()


@contextlib.contextmanager
def podman(environment: Mapping[str, str] | None = None) -> Iterator[Run]:
    """A podman with a store and a home of its own; ``environment`` is what it sees besides."""
    facts.require("podman")
    with tempfile.TemporaryDirectory(prefix="podman-") as directory:
        stores = ["--root", f"{directory}/root", "--runroot", f"{directory}/run", "--storage-driver", "vfs"]
        base = ["podman", *stores, "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        own = {"HOME": directory, "XDG_RUNTIME_DIR": directory, **(environment or {})}
        try:
            yield lambda *arguments, stdin="": _run([*base, *arguments], stdin, own)
        finally:
            _run([*base, "rmi", "--all", "--force"], "", own)


def skopeo(*arguments: str, environment: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """Run skopeo as it is: with the certificates and credentials of ``environment``'s home."""
    facts.require("skopeo")
    return _run(["skopeo", "--insecure-policy", *arguments], stdin, environment or {})


def umoci(*arguments: str) -> None:
    """Run umoci."""
    facts.require("umoci")
    _run(["umoci", *arguments], "", {})


def umoci_unpack(image: str, bundle: str) -> str:
    """Let umoci unpack the image ``LAYOUT:TAG`` into a new bundle; where the tree is."""
    umoci("unpack", "--image", image, bundle)
    return os.path.join(bundle, "rootfs")


def _wait(client: list[str], daemon: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run([*client, "version"], check=False, capture_output=True).returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            with open(log) as text:
                facts.skip(f"a dockerd that starts: {text.read()[-300:]}")
        time.sleep(0.1)


def _run(command: list[str], stdin: str, more: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, input=stdin, text=True, env=_environment(more), timeout=PATIENCE
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """The process's, without proxies."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, **more}
