"""Diff and write of a layer: 10,000 files changed in an overlay's upper directory, against ``tar -c`` of it.

    python benchmarks/diff.py [--runs 7] [--files 10000] [--megabytes 100] [--directory DIR]

Rounds alternate, in rotating order; everything is in the page cache, and each writes into a new file. Half of the files
replace others of the layer below. CPU time is user and system time of the process and its children. tar's time has its
start in it, ours no interpreter's.

- ``tar -c``: whole seconds, no extended attributes; what the budget is measured by. With ``--xattrs --format=posix`` it
  keeps what a layer keeps.
- ``layer``: the upper directory as a plain layer tar, whiteouts and extended attributes looked for.
- ``as commit does it``: whether anything differs from the layer below, then the layer. The budget, 1.5 times
  ``tar -c``, is for this.
- ``list and layer``: first the whole list of changes (A, C, D) against the layer below, in a walk of its own.
- ``with digest``: the layer into a content store, hashed, synced to the disk; beside it tar, sha256sum and sync. ``gzip
  and digests`` is also compressed, and hashed twice.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from containerkit.image.layers.changes import upper_changes, upper_differs
from containerkit.image.layers.difflayer import upper_layer
from containerkit.image.layers.merged import MergedView
from containerkit.image.pack import pack
from containerkit.image.store.blobs import BlobStore
from containerkit.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BUDGET = 1.5
BASELINE, BUDGETED = "tar -c", "ours, as commit does it"
FILES_PER_DIRECTORY = 100


def make_tree(directory: str, files: int, megabytes: int) -> tuple[str, str]:
    """A lower layer that has half of the files, and the upper directory that has all."""
    chance = random.Random(1)  # noqa: S311 - sizes, not secrets
    lower, upper = os.path.join(directory, "lower"), os.path.join(directory, "upper")
    weights = [chance.lognormvariate(0, 1.5) for _ in range(files)]
    scale = (megabytes << 20) / sum(weights)
    for number, weight in enumerate(weights):
        name = f"usr/lib/d{number // FILES_PER_DIRECTORY:03}/file-{number:05}.dat"
        for root in (upper, lower) if number % 2 else (upper,):
            path = os.path.join(root, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(chance.randbytes(int(weight * scale)) if root == upper else b"old")
    return lower, upper


def write(pieces: Iterable[bytes], path: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.writelines(pieces)


def contenders(directory: str, lower: str, upper: str) -> dict[str, Callable[[str], None]]:
    def tar(*options: str) -> Callable[[str], None]:
        return lambda path: shell("tar", "-C", upper, *options, "-cf", path, ".")

    def tar_hash_sync(path: str) -> None:
        shell("sh", "-ec", 'tar -C "$1" -c . | tee "$2" | sha256sum; sync "$2"', "-", upper, path)

    def layer(path: str) -> None:
        write(upper_layer(upper), path)

    def as_commit(path: str) -> None:
        if upper_differs(upper, MergedView([lower])):
            layer(path)

    def list_and_layer(path: str) -> None:
        list(upper_changes(upper, MergedView([lower])))
        layer(path)

    def packed(compression: str) -> Callable[[str], None]:
        def work(_: str) -> None:
            blobs = BlobStore(State(os.path.join(directory, f"state-{time.monotonic_ns()}")).root)
            pack(upper_layer(upper), blobs, compression)

        return work

    return {
        BASELINE: tar(),
        "tar -c --xattrs, pax": tar("--xattrs", "--xattrs-include=*", "--format=posix"),
        "ours, layer": layer,
        BUDGETED: as_commit,
        "ours, list and layer": list_and_layer,
        "tar -c, sha256sum, sync": tar_hash_sync,
        "ours, with digest": packed("none"),
        "ours, gzip and digests": packed("gzip"),
    }


def shell(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def cpu() -> float:
    """Seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--directory", default=None, help="where to work (default: the directory for temporary files)")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="containerkit-diff-", dir=options.directory)
    try:
        trees = make_tree(directory, options.files, options.megabytes)
        runners = contenders(directory, *trees)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
        for run in range(options.runs):
            names = list(runners)
            for name in (*names[run % len(names) :], *names[: run % len(names)]):
                work, path = runners[name], os.path.join(directory, f"{run}.tar")
                os.sync()  # nobody pays for what another has left to be written
                begun, start = cpu(), time.perf_counter()
                work(path)
                times[name].append((time.perf_counter() - start, cpu() - begun))
                if os.path.exists(path):
                    os.unlink(path)
        report(times, options.files, options.megabytes)
    finally:
        shutil.rmtree(directory)


def report(times: dict[str, list[tuple[float, float]]], files: int, megabytes: int) -> None:
    baseline, spent = (statistics.median(column) for column in zip(*times[BASELINE], strict=True))
    print(f"{files} files, {megabytes} MB, {len(times[BASELINE])} alternating rounds")
    print(f"{'':25} {'median s':>9} {'min s':>7} {'of tar -c':>10} {'CPU s':>7} {'of tar -c':>10}")
    for name, values in times.items():
        walls, cpus = zip(*values, strict=True)
        wall, used = statistics.median(walls), statistics.median(cpus)
        verdict = (
            f"   budget {BUDGET}x: {'met' if wall <= BUDGET * baseline else 'NOT met'}" if name == BUDGETED else ""
        )
        row = f"{name:25} {wall:9.3f} {min(walls):7.3f} {wall / baseline:9.2f}x {used:7.3f} {used / spent:9.2f}x"
        print(row + verdict)


if __name__ == "__main__":
    main()
