"""Mutating what is right until something breaks: the loop that the fuzz targets share.

A target is a function of bytes. It may return, or raise a ContainerkitError; whatever else it raises, a MemoryError
under its limit and ten seconds without an end among them, is a finding. ``python tests/fuzz/TARGET.py SECONDS [SEED]``
prints the number of executions, or the input and the traceback, with status 1.
"""

from __future__ import annotations

import base64
import faulthandler
import os
import random
import resource
import signal
import sys
import time
import traceback
import zlib
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from containerkit.errors import ContainerkitError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MEMORY = 1 << 30
PATIENCE = 10
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x2F, 0x2E, 0x3D, 0x0A)


class Slow(Exception):
    """An execution took longer than ten seconds."""


def main(
    target: Callable[[bytes], object],
    seeds: Sequence[bytes],
    words: Sequence[bytes],
    repair: Callable[[random.Random, bytes], bytes] = lambda _, data: data,
) -> int:
    """Run for the seconds of the command line; the exit status. ``repair`` makes mutated input plausible again."""
    seconds = float(sys.argv[1]) if sys.argv[1:] else 10.0
    number = int(sys.argv[2]) if sys.argv[2:] else random.SystemRandom().getrandbits(32)
    chance = random.Random(number)  # noqa: S311 - to be repeated
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)
    end = time.monotonic() + seconds
    done = refused = 0
    for seed in seeds:
        target(seed)  # what is right must be taken, or nothing behind it is ever reached
    while time.monotonic() < end:
        data = repair(chance, mutated(chance, seeds, words))
        signal.alarm(PATIENCE)
        try:
            target(data)
        except ContainerkitError:
            refused += 1
        except BaseException:  # noqa: BLE001
            signal.alarm(0)
            packed = base64.b64encode(zlib.compress(data, 9)).decode()
            where = f"seed {number}, execution {done}, input (base64 of zlib) {packed}"
            sys.stderr.write(f"{traceback.format_exc()}{where}\n")
            return 1
        done += 1
    signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    sys.stdout.write(f"{done} executions, {refused} refused, nothing found; peak {peak} MiB; seed {number}\n")
    return 0


def _too_slow(*_: object) -> None:
    raise Slow


def mutated(chance: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One seed after one to eight mutations."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5, 8))):
        chance.choice(MUTATIONS)(chance, data, seeds, words)
    return bytes(data)


def _place(chance: random.Random, data: bytearray) -> int:
    return chance.randrange(len(data) + 1)


def _flip(chance: random.Random, data: bytearray, *_: object) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(chance: random.Random, data: bytearray, *_: object) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice(NUMBERS)


def _word(chance: random.Random, data: bytearray, _: object, words: Sequence[bytes]) -> None:
    word, at = chance.choice(words), _place(chance, data)
    data[at : at + (len(word) if chance.random() < 0.8 else 0)] = word


def _remove(chance: random.Random, data: bytearray, *_: object) -> None:
    at = _place(chance, data)
    del data[at : at + chance.choice((1, 2, 16, 512))]


def _repeat(chance: random.Random, data: bytearray, *_: object) -> None:
    at, size = _place(chance, data), chance.choice((1, 8, 512, 1024))
    data[at:at] = data[at : at + size] * chance.choice((1, 2, 30))


def _cut(chance: random.Random, data: bytearray, *_: object) -> None:
    del data[_place(chance, data) :]


def _join(chance: random.Random, data: bytearray, seeds: Sequence[bytes], _: object) -> None:
    other = chance.choice(seeds)
    data[_place(chance, data) // 512 * 512 :] = other[chance.randrange(len(other) + 1) // 512 * 512 :]


def _noise(chance: random.Random, data: bytearray, *_: object) -> None:
    at, size = _place(chance, data), chance.choice((1, 4, 12))
    data[at : at + size] = chance.randbytes(size)


MUTATIONS = (_flip, _set, _word, _word, _remove, _repeat, _cut, _join, _noise)
