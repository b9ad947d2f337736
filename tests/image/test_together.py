"""Tasks side by side that fail as one."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest

from containerkit.image.stream import Cancelled
from containerkit.image.together import together

if TYPE_CHECKING:
    from concurrent.futures import Future


class Held:
    """Something that a task holds while it fails."""


def test_all_is_done_in_threads_that_were_prepared() -> None:
    done: list[tuple[int, bool]] = []
    local = threading.local()
    with together(3, "some", threading.Event(), prepare=lambda: setattr(local, "ready", True)) as begin:
        for number in range(50):
            begin(lambda number: done.append((number, local.ready)), number)
    assert sorted(done) == [(number, True) for number in range(50)]


def test_the_first_failure_is_raised_and_nothing_more_begins() -> None:
    cancelled, begun, interrupted = threading.Event(), list[int](), list[bool]()

    def fail_or_wait(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise ZeroDivisionError("first")
        assert cancelled.wait(20)
        raise Cancelled

    def work() -> None:
        with together(2, "some", cancelled, interrupt=lambda: interrupted.append(True)) as begin:
            for number in range(20):
                begin(fail_or_wait, number)

    with pytest.raises(ZeroDivisionError, match="first"):
        work()
    assert sorted(begun) == [0, 1]
    assert interrupted == [True]


def test_what_waits_for_a_task_that_never_began_does_not_take_it_for_done() -> None:
    """As a layer waits for the one below it."""
    cancelled, seen = threading.Event(), list[BaseException]()

    def wait_for(work: Future[None]) -> None:
        try:
            work.result()
        except BaseException as error:
            seen.append(error)
            raise

    def work() -> None:
        with together(2, "some", cancelled) as begin:
            cancelled.set()
            below = begin(lambda: None)
            assert isinstance(below.exception(), Cancelled)
            cancelled.clear()
            assert isinstance(begin(wait_for, below).exception(), Cancelled)
            raise ValueError("outside")

    with pytest.raises(ValueError, match="outside"):
        work()
    assert [type(error) for error in seen] == [Cancelled]
    assert cancelled.is_set()


def test_a_failure_holds_nothing_once_it_is_handled() -> None:
    """Not even until the garbage collector runs: streams may hang on it."""
    held: list[weakref.ref[Held]] = []

    def fail() -> None:
        mine = Held()
        held.append(weakref.ref(mine))
        raise ZeroDivisionError

    gc.collect()
    gc.disable()
    try:
        try:
            with together(2, "some", threading.Event()) as begin:
                begin(fail)
        except ZeroDivisionError:
            pass
        assert held[0]() is None
    finally:
        gc.enable()
