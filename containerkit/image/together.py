"""Work side by side in threads, which fails as one."""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from containerkit.image.stream import Cancelled

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    Begin = Callable[..., Future[None]]


@contextmanager
def together(
    at_once: int,
    name: str,
    cancelled: threading.Event,
    *,
    prepare: Callable[[], object] | None = None,
    interrupt: Callable[[], object] | None = None,
) -> Iterator[Begin]:
    """Call ``begin(task, *arguments)``, which is given, for each task: leaving waits for all.

    ``at_once`` threads, each ``prepare``-d, do them in their order; the threads' names begin with ``name``. The failure
    that came first is raised: then ``cancelled`` is set, ``interrupt`` called, and what has not begun never does. So it
    is where whoever waits is interrupted, or raises.
    """
    work: list[Future[None]] = []
    failures: list[BaseException] = []

    def run(task: Callable[..., None], *arguments: Any) -> None:
        if cancelled.is_set():
            raise Cancelled
        try:
            task(*arguments)
        except BaseException as error:
            failures.append(error)
            cancelled.set()
            raise

    def begin(task: Callable[..., None], *arguments: Any) -> Future[None]:
        work.append(pool.submit(run, task, *arguments))
        return work[-1]

    with ThreadPoolExecutor(at_once, name, initializer=prepare) as pool:
        whole = False
        try:
            yield begin
            wait(work, return_when=FIRST_EXCEPTION)
            whole = not failures
        finally:
            if not whole:
                cancelled.set()
                if interrupt is not None:
                    interrupt()
                pool.shutdown(cancel_futures=True)
    if failures:
        first = failures[0]
        failures.clear()  # with what holds it: an error that its own traceback leads to would keep streams open
        work.clear()
        try:
            raise first
        finally:
            del first
