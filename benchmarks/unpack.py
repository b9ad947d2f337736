"""Unpacking a real tar: ours against ``tar -x`` and Python's ``tarfile``, in alternating runs.

    python benchmarks/unpack.py [--runs 3] [--megabytes 350]

The tar is made of this machine's /usr, on the file system of ``--directory``. Every run unpacks into a fresh directory;
all are removed at the end, for ext4 is slow to give out inodes that have just been freed. "with diff id" hashes the
stream while it unpacks, as every pull does.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from containerkit.image.layers.compression import decompressed
from containerkit.image.layers.extract import Extractor
from containerkit.image.layers.filewriters import writers
from containerkit.image.layers.layer import TarReader
from containerkit.image.stream import PIECE, ReadAhead
from containerkit.linux.paths import private_umask

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCES = ("/usr/lib/python3", "/usr/share", "/usr/include", "/usr/bin", "/usr/lib")
LARGEST_FILE = 20 << 20
FEWEST_FILES = 10_000


def choose_files(megabytes: int) -> list[str]:
    """Paths below /usr, until there are enough bytes and files."""
    chosen, size = [], 0
    for source in SOURCES:
        for directory, _, names in os.walk(source):
            chosen.append(directory)
            for name in sorted(names):
                path = os.path.join(directory, name)
                length = os.lstat(path).st_size
                if length <= LARGEST_FILE:
                    chosen.append(path)
                    size += length
            if size >= megabytes << 20 and len(chosen) >= FEWEST_FILES:
                return chosen
    return chosen


def make_tar(directory: str, megabytes: int) -> str:
    path = os.path.join(directory, "layer.tar")
    names = "\0".join(name.lstrip("/") for name in choose_files(megabytes))
    command = ["tar", "-C", "/", "--null", "--no-recursion", "-T", "-", "-cf", path]
    subprocess.run(command, input=names.encode(errors="surrogateescape"), check=True)
    with open(path, "rb") as plain, gzip.open(path + ".gz", "wb", 6) as packed:
        shutil.copyfileobj(plain, packed, PIECE)
    return path


def ours(path: str, target: str, *, hashed: bool) -> None:
    def work() -> None:
        private_umask()
        with (
            open(path, "rb", buffering=0) as file,
            writers(os.stat(path).st_size) as helpers,
            Extractor(target) as extractor,
        ):
            if helpers is not None:
                extractor.hand_files_to(helpers)
            read = decompressed(lambda: file.read(PIECE))
            if hashed:
                with ReadAhead(read, hashlib.sha256()) as ahead:
                    extractor.unpack(TarReader(ahead.piece))
            else:
                extractor.unpack(TarReader(read))
            extractor.finish(())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def with_tar(path: str, target: str) -> None:
    subprocess.run(["tar", "-C", target, "-xf", path], check=True)


def with_tarfile(path: str, target: str) -> None:
    with tarfile.open(path) as tar:
        tar.extractall(target, filter="fully_trusted")  # noqa: S202 - our own tar


CONTENDERS: dict[str, Callable[[str, str], None]] = {
    "tar -x": with_tar,
    "ours": lambda path, target: ours(path, target, hashed=False),
    "ours, with diff id": lambda path, target: ours(path, target, hashed=True),
    "tarfile": with_tarfile,
}


def measure(path: str, directory: str, runs: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for run in range(runs):
        for name, unpack in CONTENDERS.items():
            target = os.path.join(directory, f"{os.path.basename(path)}-{run}-{name.replace(' ', '-')}")
            os.mkdir(target)
            start = time.perf_counter()
            unpack(path, target)
            times[name].append(time.perf_counter() - start)
    return times


def report(path: str, times: dict[str, list[float]]) -> None:
    baseline = statistics.median(times["tar -x"])
    print(f"\n{os.path.basename(path)}, {os.stat(path).st_size / 1e6:.0f} MB")
    print(f"{'':20} {'median s':>9} {'min s':>7} {'of tar -x':>10}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:20} {median:9.2f} {min(values):7.2f} {median / baseline:9.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=350)
    parser.add_argument(
        "--directory", default=None, help="where to unpack (default: the directory for temporary files)"
    )
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="containerkit-unpack-", dir=options.directory)
    try:
        path = make_tar(directory, options.megabytes)
        with tarfile.open(path) as tar:
            print(f"{len(tar.getmembers())} entries")
        for form in (path, path + ".gz"):
            report(form, measure(form, directory, options.runs))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
