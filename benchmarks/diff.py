"""Diff and write of a layer: 10,000 files changed in an overlay's upper directory, against ``tar -c`` of it.

    python benchmarks/diff.py [--runs 7] [--files 10000] [--megabytes 100] [--directory DIR]

Rounds alternate, in rotating order; everything is in the page cache, and each writes a plain tar into a new file.
"diff" also lists the changes (A, C, D) against the layers below; "with digest" puts the layer into a content store,
which syncs it to the disk. The budget is 1.5 times ``tar -c`` for the layer's diff and write.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from containerkit.image.blobs import BlobStore
from containerkit.image.changes import upper_changes
from containerkit.image.difflayer import upper_layer
from containerkit.image.merged import MergedView
from containerkit.image.pack import pack
from containerkit.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BUDGET = 1.5
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
    def with_tar(path: str) -> None:
        subprocess.run(["tar", "-C", upper, "-cf", path, "."], check=True)

    def layer(path: str) -> None:
        write(upper_layer(upper), path)

    def diff_and_layer(path: str) -> None:
        for _ in upper_changes(upper, MergedView([lower])):
            pass
        write(upper_layer(upper), path)

    def packed(compression: str) -> Callable[[str], None]:
        def work(_: str) -> None:
            blobs = BlobStore(State(os.path.join(directory, f"state-{time.monotonic_ns()}")).root)
            pack(upper_layer(upper), blobs, compression)

        return work

    return {
        "tar -c": with_tar,
        "ours, layer": layer,
        "ours, diff and layer": diff_and_layer,
        "ours, with digest": packed("none"),
        "ours, gzip and digests": packed("gzip"),
    }


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
        times: dict[str, list[float]] = {name: [] for name in runners}
        for run in range(options.runs):
            names = list(runners)
            for name in (*names[run % len(names) :], *names[: run % len(names)]):
                work, path = runners[name], os.path.join(directory, f"{run}.tar")
                os.sync()  # nobody pays for what another has left to be written
                start = time.perf_counter()
                work(path)
                times[name].append(time.perf_counter() - start)
                if os.path.exists(path):
                    os.unlink(path)
        report(times, options.files, options.megabytes)
    finally:
        shutil.rmtree(directory)


def report(times: dict[str, list[float]], files: int, megabytes: int) -> None:
    baseline = statistics.median(times["tar -c"])
    print(f"{files} files, {megabytes} MB, {len(times['tar -c'])} alternating rounds; budget {BUDGET} x tar -c")
    print(f"{'':24} {'median s':>9} {'min s':>7} {'of tar -c':>10}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:24} {median:9.3f} {min(values):7.3f} {median / baseline:9.2f}x")


if __name__ == "__main__":
    main()
