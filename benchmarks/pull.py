"""Pulling a real image from a registry on loopback: ours against docker, podman, and tar alone, in alternating rounds.

    python benchmarks/pull.py [--rounds 3] [--megabytes 670] [--directory DIR]

Needs root, Debian's docker-registry and skopeo. The image has eight gzip layers of this machine's /usr. Every round
pulls into nothing; what a round made is removed outside its time. Times count from spawning a process to reaping it,
ours too. ``tar -xz`` unpacks the same layers one after another, from files: no network, no digests.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [REPOSITORY, os.path.dirname(os.path.abspath(__file__))]

import peers  # noqa: E402 - found beside this file
from layouts import Layout  # noqa: E402
from unpack import choose_files  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS = 8
OURS = """\
import sys; sys.path.insert(0, sys.argv[1])
import containerkit as ck
ck.Host(root=sys.argv[2]).images.pull(sys.argv[3])
"""
CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {directory}}}}}
http: {{addr: "127.0.0.1:{port}", secret: none}}
"""


def make_layout(directory: str, megabytes: int) -> list[str]:
    """An OCI layout with one image, and the paths of its layers, lowest first."""
    names = choose_files(megabytes)
    layout = Layout(directory)
    paths = []
    for number in range(LAYERS):
        part = names[number * len(names) // LAYERS : (number + 1) * len(names) // LAYERS]
        plain = os.path.join(directory, "plain.tar")
        command = ["tar", "-C", "/", "--null", "--no-recursion", "-T", "-", "-cf", plain]
        text = "\0".join(name.lstrip("/") for name in (*parents(part[0]), *part))  # builders put them first, too
        subprocess.run(command, input=text.encode(errors="surrogateescape"), check=True)
        with open(plain, "rb") as file:
            diff_id = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with open(plain + ".gz", "wb") as raw, gzip.GzipFile("", "wb", 6, raw, 0) as packed:
                shutil.copyfileobj(file, packed, 1 << 20)
        paths.append(layout.layer(plain + ".gz", "layer.v1.tar+gzip", diff_id))
    os.unlink(plain)
    layout.finish()
    print(f"{LAYERS} layers, {len(names)} entries, {layout.size / 1e6:.0f} MB compressed")
    return paths


def parents(path: str) -> list[str]:
    """The directories above a path, the topmost first."""
    above = os.path.dirname(path)
    return [*parents(above), above] if above != "/" else []


@contextlib.contextmanager
def registry(directory: str) -> Iterator[str]:
    """Debian's docker-registry on a free port: ``127.0.0.1:PORT``."""
    os.makedirs(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = os.path.join(directory, "config.yml")
    with open(config, "w") as file:
        file.write(CONFIG.format(directory=directory, port=port))
    with subprocess.Popen(["docker-registry", "serve", config], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


def timed(command: list[str]) -> float:
    """Seconds from spawning a command to reaping it."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def ours(directory: str, image: str) -> list[str]:
    """``host.images.pull`` in a process of its own, into an empty state root."""
    return [sys.executable, "-c", OURS, REPOSITORY, directory, image]


def peak_memory(command: list[str]) -> int:
    """The most bytes that a process and its children have at once (proportional set size), looked at every 30 ms."""
    most = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most = max(most, sum(map(proportional, (process.pid, *children(process.pid)))))
            time.sleep(0.03)
    return most


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def proportional(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def with_tar(directory: str, layers: list[str]) -> float:
    """``tar -xz`` of all layers into one directory."""
    os.mkdir(directory)
    return sum(timed(["tar", "-C", directory, "-xzf", layer]) for layer in layers)


def with_podman(runner: peers.Runner, directory: str, image: str) -> float:
    """``podman pull`` into a store of its own."""
    stores = ["--root", f"{directory}/root", "--runroot", f"{directory}/run", "--events-backend", "none"]
    try:
        return runner.time(["podman", *stores, "pull", "-q", "--tls-verify=false", image]) / 1000
    finally:
        runner.time(["umount", f"{directory}/root/overlay"], check=False)


def with_docker(runner: peers.Runner, directory: str, image: str) -> float:
    """``docker pull`` by a daemon of its own, which is up already."""
    os.makedirs(directory)
    with peers.daemon(directory) as address:
        return runner.time(["docker", "-H", address, "pull", "-q", image]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=670)
    parser.add_argument("--directory", default=None, help="where everything goes (default: for temporary files)")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="ck-pull-", dir=options.directory)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        layers = make_layout(os.path.join(directory, "layout"), options.megabytes)
        host = stack.enter_context(registry(os.path.join(directory, "registry")))
        image = f"{host}/bench:1"
        copy = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false"]
        subprocess.run([*copy, f"oci:{directory}/layout:bench", f"docker://{image}"], check=True)
        runner = peers.Runner()
        stack.callback(runner.close)
        contenders: dict[str, Callable[[str], float]] = {
            "containerkit": lambda place: timed(ours(place, image)),
            "tar -xz": lambda place: with_tar(place, layers),
        }
        if shutil.which("podman"):
            contenders["podman pull"] = lambda place: with_podman(runner, place, image)
        if shutil.which("dockerd"):
            contenders["docker pull"] = lambda place: with_docker(runner, place, image)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(options.rounds):
            for name, pull in contenders.items():
                os.sync()
                times[name].append(pull(os.path.join(directory, f"{name.replace(' ', '-')}-{number}")))
        report(times)
        peak = peak_memory(ours(os.path.join(directory, "memory"), image))
        print(f"\npeak memory of containerkit's processes together: {peak / 1e6:.0f} MB (a pull of its own, not timed)")


def report(times: dict[str, list[float]]) -> None:
    """A table of medians, and how many times ours each takes."""
    own = statistics.median(times["containerkit"])
    print(f"\n{'':14} {'median s':>9} {'min s':>7} {'ratio':>7}   all")
    for name, values in times.items():
        middle = statistics.median(values)
        every = " ".join(f"{value:.1f}" for value in values)
        print(f"{name:14} {middle:9.2f} {min(values):7.2f} {middle / own:7.2f}   {every}")


if __name__ == "__main__":
    main()
