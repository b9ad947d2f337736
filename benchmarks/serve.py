"""Our registry against Debian's docker-registry as servers of the same image, in alternating rounds.

    python benchmarks/serve.py [--rounds 5] [--megabytes 500] [--directory DIR]

Needs docker-registry and skopeo. Both run in processes of their own. The image has eight layers of random bytes: what
is timed is the way from the server's files to the client's, not a compressor. A round is

- ``skopeo copy`` of the whole image into an empty directory, from spawning to reaping it
- one client that reads the largest blob from a plain connection and drops it
- the same with eight clients at once
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import TYPE_CHECKING

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [REPOSITORY, os.path.dirname(os.path.abspath(__file__))]

from layouts import Layout  # noqa: E402 - found beside this file
from pull import registry  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = 8
SKOPEO = ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]


def make_layout(directory: str, megabytes: int) -> None:
    """An OCI layout with one image of random layers."""
    layout = Layout(directory)
    for _ in range(LAYERS):
        path = layout.path("new")
        with open(path, "wb") as file:
            file.write(os.urandom((megabytes << 20) // LAYERS))
        layout.layer(path, "layer.v1.tar")
    layout.finish()


@contextlib.contextmanager
def ours(directory: str) -> Iterator[str]:
    """Our server, standing alone; its host."""
    command = [sys.executable, "-m", "containerkit.registry.server", directory, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        try:
            yield process.stdout.readline().strip().removeprefix("http://")
        finally:
            process.terminate()


def copy(source: str, target: str) -> float:
    """One ``skopeo copy``, in seconds."""
    begin = time.perf_counter()
    subprocess.run([*SKOPEO, source, target], check=True)
    return time.perf_counter() - begin


def pull(host: str, layout: str) -> float:
    """Into an empty directory, which is removed outside the time."""
    target = f"{layout}-pulled"
    taken = copy(f"docker://{host}/bench:1", f"dir:{target}")
    shutil.rmtree(target)
    return taken


def first_layer(host: str) -> tuple[str, int]:
    """The path and size of a layer as skopeo has pushed it: compressed."""
    request = urllib.request.Request(f"http://{host}/v2/bench/manifests/1", headers={"Accept": "*/*"})
    with urllib.request.urlopen(request) as answer:  # noqa: S310 - a server of our own
        layer = json.load(answer)["layers"][0]
    return f"/v2/bench/blobs/{layer['digest']}", layer["size"]


def download(host: str, path: str, size: int) -> float:
    """One blob over one connection, dropped as it comes."""
    name, _, port = host.rpartition(":")
    room = bytearray(1 << 20)
    begin = time.perf_counter()
    with socket.create_connection((name, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        got = 0
        while count := connection.recv_into(room):
            got += count
    if got < size:
        raise RuntimeError(f"{host} sent {got} bytes of {size}")
    return time.perf_counter() - begin


def at_once(host: str, path: str, size: int) -> float:
    """Eight of them."""
    threads = [threading.Thread(target=download, args=(host, path, size)) for _ in range(LAYERS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--directory", default=None, help="where everything goes (default: for temporary files)")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="ck-serve-", dir=options.directory)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        layout = os.path.join(directory, "layout")
        make_layout(layout, options.megabytes)
        hosts = [
            stack.enter_context(ours(os.path.join(directory, "ours"))),
            stack.enter_context(registry(os.path.join(directory, "theirs"))),
        ]
        for host in hosts:
            copy(f"oci:{layout}:bench", f"docker://{host}/bench:1")
        layer = first_layer(hosts[0])
        rows = {
            "skopeo copy from it": lambda host: pull(host, layout),
            "one blob, one client": lambda host: download(host, *layer),
            "one blob, 8 clients": lambda host: at_once(host, *layer),
        }
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in rows}
        for number in range(options.rounds):
            for name, action in rows.items():
                for which in (0, 1) if number % 2 else (1, 0):
                    os.sync()
                    times[name][which].append(action(hosts[which]))
        report(times)


def report(times: dict[str, tuple[list[float], list[float]]]) -> None:
    """Medians in seconds."""
    print(f"\n{'':22} {'ours':>8} {'docker-registry':>16} {'ours/theirs':>12}")
    for name, pair in times.items():
        mine, their = (statistics.median(values) for values in pair)
        print(f"{name:22} {mine:8.3f} {their:16.3f} {mine / their:12.2f}")


if __name__ == "__main__":
    main()
