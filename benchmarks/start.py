"""How long a start takes, here and with the engines that this machine has, in one alternating run.

    python benchmarks/start.py [ROUNDS]

Needs root and busybox-static. Every contender runs /bin/true of the same busybox root without network, with a memory
and a pids limit, from the call or the spawn to the moment at which it is over and removed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, NamedTuple

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [REPOSITORY, os.path.join(REPOSITORY, "tests")]

import peers  # noqa: E402 - found beside this file

import containerkit as ck  # noqa: E402
from support import rootfs  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "containerkit"
LIMITS: Any = {"memory": peers.MEMORY, "pids_limit": peers.PIDS, "network": "none"}
FRESH = "import containerkit as ck; ck.Host(root={root!r}).run('bench:1', ['/bin/true'], **{limits!r})"


class Budget(NamedTuple):
    """A promise of the project and what was measured."""

    promise: str
    value: float
    limit: float
    unit: str

    def __str__(self) -> str:
        verdict = "kept" if self.value <= self.limit else "BROKEN"
        return f"  {self.promise:<58} {self.value:8.2f} of {self.limit:7.2f} {self.unit:<8} {verdict}"


Samples = dict[str, list[float]]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    print(f"{platform.release()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {rounds} rounds")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ck-bench-"))
        root = rootfs.busybox_rootfs(os.path.join(directory, "busybox"))
        runner = peers.Runner()
        stack.callback(runner.close)
        host = stack.enter_context(contextlib.closing(ck.Host(root=os.path.join(directory, "state"))))
        image = host.images.import_rootfs(root, tag="bench:1")
        idle = stack.enter_context(ck.Container(image, list(peers.IDLE), host=host, **LIMITS))
        others = stack.enter_context(peers.installed(runner, root, directory))

        runs: dict[str, Callable[[], object]] = {OURS: functools.partial(host.run, image, [peers.TRUE], **LIMITS)}
        runs |= {peer.name: functools.partial(runner.time, peer.run) for peer in others}
        run = report("run", alternate(runs, rounds))
        execs: dict[str, Callable[[], object]] = {OURS: functools.partial(idle.exec, [peers.TRUE])}
        execs |= {peer.name: functools.partial(runner.time, peer.exec) for peer in others}
        exec_ = report("exec", alternate(execs, rounds))
        budgets = [
            Budget("run of /bin/true, p50", run[OURS], 15, "ms"),
            Budget("exec of /bin/true, p50", exec_[OURS], 6, "ms"),
            *([Budget("run against half of runc run, p50", run[OURS], run["runc"] / 2, "ms")] if "runc" in run else []),
            *fresh_process(host, run.get("docker"), max(10, rounds // 2)),
            Budget("PSS of an idle container's keeper", keeper_pss(idle.pid), 3, "MiB"),
        ]
    print("\nbudgets")
    print(*budgets, sep="\n")


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> Samples:
    """Every contender once a round, each round begun by the next one; one that returns a float has timed itself (ms).

    A start leaves work behind for the kernel and for daemons: nobody may always come after the one that leaves most.
    """
    samples: Samples = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            result = contenders[name]()
            elapsed = (time.perf_counter() - begin) * 1000
            if number:  # the first round warms the caches
                samples[name].append(result if isinstance(result, float) else elapsed)
    return samples


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def report(title: str, samples: Samples, base: str = OURS) -> dict[str, float]:
    """Print p50, p95 and the ratio to ``base``; give the medians."""
    medians = {name: percentile(values, 50) for name, values in samples.items()}
    print(f"\n{title:<34} {'p50 ms':>8} {'p95 ms':>8} {'ratio':>7}")
    for name, values in samples.items():
        print(f"  {name:<32} {medians[name]:8.2f} {percentile(values, 95):8.2f} {medians[name] / medians[base]:7.2f}")
    return medians


def fresh_process(host: ck.Host, docker: float | None, rounds: int) -> list[Budget]:
    """What a new Python process pays: for the import, and for its first container."""
    first = FRESH.format(root=str(host.root), limits=LIMITS)
    statements = {"python -c pass": "pass", "import containerkit": "import containerkit", "first container": first}
    cpu: Samples = {name: [] for name in statements}
    contenders: dict[str, Callable[[], object]] = {
        name: functools.partial(python, statement, cpu[name]) for name, statement in statements.items()
    }
    medians = report("fresh process", alternate(contenders, rounds), "python -c pass")
    processor = {name: percentile(values[1:], 50) for name, values in cpu.items()}
    modules = int(python_output("import sys; n = len(sys.modules); import containerkit; print(len(sys.modules) - n)"))
    over = medians["first container"] - medians["python -c pass"]
    return [
        Budget("first container of a fresh process, over python -c pass", over, 250, "ms"),
        *([Budget("the same against docker run", over, docker, "ms")] if docker else []),
        Budget(
            "import containerkit, CPU over python -c pass",
            processor["import containerkit"] - processor["python -c pass"],
            8,
            "ms",
        ),
        Budget("import containerkit, modules over the bare interpreter", modules, 12, "modules"),
    ]


def python(statement: str, cpu: list[float]) -> float:
    """Run a statement in a fresh interpreter: the milliseconds, and its CPU milliseconds into ``cpu``."""
    begin = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", statement], {**os.environ, "PYTHONPATH": REPOSITORY})
    _, status, usage = os.wait4(pid, 0)
    elapsed = (time.perf_counter() - begin) * 1000
    if status:
        raise RuntimeError(statement)
    cpu.append((usage.ru_utime + usage.ru_stime) * 1000)
    return elapsed


def python_output(statement: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", statement], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout


def keeper_pss(init: int | None) -> float:
    """Proportional set size (MiB) of the process that keeps a container: the parent of its init."""
    with open(f"/proc/{init}/stat") as file:
        keeper = file.read().rpartition(")")[2].split()[1]
    with open(f"/proc/{keeper}/smaps_rollup") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
