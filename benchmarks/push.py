"""Images between a registry on loopback and an OCI layout, nothing unpacked: ours against skopeo, alternating rounds.

    python benchmarks/push.py [push|pull|complete] [--rounds 5] [--megabytes 500] [--server ours]

Needs Debian's docker-registry and skopeo. The image has eight layers of random bytes. ``pull`` copies it from the
registry to a layout that is not there, ``push`` from a layout to a registry that is empty. A time counts from spawning
a process to reaping it, ours too; ``the call alone`` is without starting Python and importing. Layouts and registries
are made and removed outside of it. ``complete`` is a pull of what is here already, in one process with an open
``Host``: its requests, counted by a proxy, and its milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [REPOSITORY, os.path.dirname(os.path.abspath(__file__)), os.path.join(REPOSITORY, "tests")]

from layouts import Layout  # noqa: E402 - found beside this file
from pull import registry  # noqa: E402
from serve import SKOPEO, ours  # noqa: E402

from support.counting_proxy import CountingProxy  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = """\
import sys, time; sys.path.insert(0, sys.argv[1])
import containerkit as ck
import containerkit.image.copies, containerkit.registry.mirrored, containerkit.registry.transport, requests
host = ck.Host(root=sys.argv[2])
start = time.perf_counter()
host.images.copy(*sys.argv[3:])
print(time.perf_counter() - start)
"""
REPEATS = 20
LAYERS = 8
PIECE = 1 << 20
SMALL = 8 << 20


class Run(NamedTuple):
    """One process: seconds, CPU seconds, and peak memory in bytes; ``inside`` are the seconds of our call alone."""

    seconds: float
    cpu: float
    peak: int
    inside: float = 0.0


def run(command: list[str]) -> Run:
    """Spawn and reap one process; what it takes is its own alone."""
    read, write = os.pipe()
    with open(read) as output:
        start = time.perf_counter()
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])
        os.close(write)
        _, status, used = os.wait4(pid, 0)
        seconds = time.perf_counter() - start
        said = output.read().strip()
    if status:
        raise RuntimeError(f"{' '.join(command)}: {os.waitstatus_to_exitcode(status)}")
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, float(said or 0))


def with_ours(state: str, source: str, target: str) -> Run:
    """``Host.images.copy`` in a process of its own."""
    return run([sys.executable, "-c", OURS, REPOSITORY, state, source, target])


def with_skopeo(_: str, source: str, target: str) -> Run:
    """``skopeo copy``."""
    return run([*SKOPEO, source, target])


CONTENDERS: dict[str, Callable[[str, str, str], Run]] = {"containerkit": with_ours, "skopeo": with_skopeo}
SERVERS = {"docker-registry": registry, "ours": ours}


def pulls(directory: str, rounds: int, server: str) -> dict[str, list[Run]]:
    """From a registry that has it to a new layout."""
    done: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    with SERVERS[server](os.path.join(directory, "registry")) as host:
        upload(directory, host)
        for number in range(rounds):
            for name in order(number):
                target = os.path.join(directory, f"pulled-{name}")
                os.sync()
                done[name].append(CONTENDERS[name](f"{directory}/state", f"docker://{host}/bench:1", f"oci:{target}:1"))
                shutil.rmtree(target)
    return done


def pushes(directory: str, rounds: int, server: str) -> dict[str, list[Run]]:
    """From a layout to a registry that has nothing: a new one each time."""
    done: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in order(number):
            place = os.path.join(directory, "registry")
            with SERVERS[server](place) as host:
                os.sync()
                target = f"docker://{host}/bench:1"
                done[name].append(CONTENDERS[name](f"{directory}/state", f"oci:{directory}/layout:bench", target))
            shutil.rmtree(place)
    return done


def order(number: int) -> list[str]:
    """Who comes first changes with every round."""
    return list(CONTENDERS)[:: -1 if number % 2 else 1]


def upload(directory: str, host: str) -> None:
    """The image, as it is."""
    subprocess.run(
        [*SKOPEO, "--preserve-digests", f"oci:{directory}/layout:bench", f"docker://{host}/bench:1"], check=True
    )


def complete(directory: str) -> None:
    """Pulls of what is here: into a layout, and into a host's store."""
    import containerkit as ck

    make_layout(os.path.join(directory, "layout"), SMALL)
    with registry(os.path.join(directory, "registry")) as upstream, CountingProxy(upstream) as proxy:
        upload(directory, upstream)
        host = ck.Host(root=os.path.join(directory, "state"))
        name = f"{proxy.host}/bench:1"
        actions: dict[str, Callable[[], object]] = {
            "images.copy to a layout": lambda: host.images.copy(f"docker://{name}", f"oci:{directory}/here:1"),
            "images.pull": lambda: host.images.pull(name),
        }
        for label, action in actions.items():
            action()
            times = []
            before = proxy.requests
            for _ in range(REPEATS):
                start = time.perf_counter()
                action()
                times.append((time.perf_counter() - start) * 1000)
            requests = (proxy.requests - before) / REPEATS
            print(f"{label:26} {requests:4.1f} requests, {statistics.median(times):6.1f} ms (worst {max(times):.1f})")
        host.close()


def make_layout(directory: str, size: int) -> None:
    """An OCI layout with an image of gzip layers that cannot get smaller: no engine compresses those itself."""
    layout = Layout(directory)
    for number in range(LAYERS):
        path = layout.path("new")
        layout.layer(path, "layer.v1.tar+gzip", write_layer(path, f"file{number}", size // LAYERS))
    layout.finish()


def write_layer(path: str, name: str, size: int) -> str:
    """A gzip tar of one file of random bytes; its diff id."""
    plain = hashlib.sha256()
    info = tarfile.TarInfo(name)
    info.size = size
    with gzip.GzipFile(path, "wb", 0, mtime=0) as file:
        pieces = (os.urandom(min(PIECE, size - at)) for at in range(0, size, PIECE))
        for piece in chain([info.tobuf()], pieces, [bytes(-size % 512 + 1024)]):
            plain.update(piece)
            file.write(piece)
    return f"sha256:{plain.hexdigest()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("push", "pull", "complete"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--server", choices=tuple(SERVERS), default="docker-registry")
    parser.add_argument("--directory", default=None, help="where everything goes (default: for temporary files)")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="ck-copy-", dir=options.directory)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if options.what in (None, "pull", "push"):
            make_layout(os.path.join(directory, "layout"), options.megabytes << 20)
        for what, measure in (("push", pushes), ("pull", pulls)):
            if options.what in (None, what):
                report(what, measure(directory, options.rounds, options.server))
                shutil.rmtree(os.path.join(directory, "registry"), ignore_errors=True)
        if options.what in (None, "complete"):
            shutil.rmtree(os.path.join(directory, "layout"), ignore_errors=True)
            complete(directory)


def report(what: str, done: dict[str, list[Run]]) -> None:
    """Medians, the ratio to skopeo, and the worst memory."""
    skopeo = statistics.median(each.seconds for each in done["skopeo"])
    print(f"\n{what:14} {'median s':>9} {'min s':>7} {'cpu s':>7} {'of skopeo':>10} {'peak MB':>8}   all")
    for name, runs in done.items():
        seconds = [each.seconds for each in runs]
        cpu = statistics.median(each.cpu for each in runs)
        middle, peak = statistics.median(seconds), max(each.peak for each in runs) / 1e6
        every = " ".join(f"{value:.2f}" for value in seconds)
        print(f"{name:14} {middle:9.2f} {min(seconds):7.2f} {cpu:7.2f} {middle / skopeo:10.2f} {peak:8.0f}   {every}")
    inside = [each.inside for each in done["containerkit"]]
    middle, every = statistics.median(inside), " ".join(f"{value:.2f}" for value in inside)
    print(f"{'the call alone':14} {middle:9.2f} {min(inside):7.2f} {'':7} {middle / skopeo:10.2f} {'':8}   {every}")


if __name__ == "__main__":
    main()
