"""How long it takes to list 1,000 images, to find one, and to count and collect: on rows alone, no layers.

    python benchmarks/listing.py [IMAGES]

The peer is ``podman images`` on a store with a tenth of them (making more takes podman minutes), where it is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import containerkit as ck

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7
RUN = {"entrypoint": ["/entry"], "command": ["sh"], "env": ["PATH=/bin", "A=b"], "labels": {"team": "x"}}


def fill(host: ck.Host, count: int) -> None:
    """Rows as pulls write them: each image eight layers and one name."""
    with host.state.transaction() as database:
        for number in range(count):
            digest = "sha256:" + hashlib.sha256(str(number).encode()).hexdigest()
            row = (digest, digest, "application/vnd.oci.image.manifest.v1+json", json.dumps(RUN))
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps([digest] * 8), 1, number)
            )
            name = f"docker.io/library/image{number}:1"
            database.execute("INSERT INTO names VALUES (?, ?, ?, ?, ?)", (name, digest, digest, row[2], 1))


def milliseconds(action: Callable[[], object]) -> float:
    """The median of some rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def podman(directory: str, count: int) -> float | None:
    """``podman images`` with ``count`` images of an empty layer, in milliseconds."""
    if shutil.which("podman") is None:
        return None
    stores = ["--root", f"{directory}/root", "--runroot", f"{directory}/run", "--storage-driver", "vfs"]
    command = ["podman", *stores, "--events-backend", "none"]
    empty = os.path.join(directory, "empty.tar")
    subprocess.run(["tar", "-cf", empty, "-T", "/dev/null"], check=True)
    for number in range(count):
        arguments = ["import", "-q", "--change", f"LABEL number={number}", empty, f"image{number}:1"]
        subprocess.run([*command, *arguments], check=True, capture_output=True)
    return milliseconds(lambda: subprocess.run([*command, "images"], check=True, capture_output=True))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory(prefix="ck-listing-") as directory:
        host = ck.Host(root=os.path.join(directory, "state"))
        fill(host, count)
        ours = milliseconds(host.images.list)
        print(f"list {count} images            {ours:8.2f} ms (budget 50 for 1,000)")
        print(f"get one by name             {milliseconds(lambda: host.images.get('image7:1')):8.2f} ms")
        print(f"df                          {milliseconds(host.images.df):8.2f} ms")
        theirs = podman(os.path.join(directory), count // 10)
        if theirs is not None:
            print(f"podman images, {count // 10} images   {theirs:8.2f} ms: {theirs / ours:.1f} times ours")
        host.close()


if __name__ == "__main__":
    main()
