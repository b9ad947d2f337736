"""Threads as layers are unpacked in."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from containerkit.linux.paths import private_umask

if TYPE_CHECKING:
    from collections.abc import Callable


def in_thread(work: Callable[[], None]) -> None:
    """Run in a thread with the umask 0; raise what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            private_umask()
            work()
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
