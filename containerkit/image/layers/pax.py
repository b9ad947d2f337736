"""Pax extended headers (POSIX.1-2008, pax, "pax Header Block"): their records, and the numbers and times in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from containerkit.errors import CorruptLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

NEWLINE = 0x0A
NUMBERS = 1 << 63  # no number of a header is larger, nor a negative one lower
MOST_DIGITS = 19
_TIME = re.compile(rb"([+-]?)(\d+)(?:\.(\d*))?(?:[eE]([+-]?\d{1,3}))?")


def parse_pax(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    r"""The records ``length key=value\\n``, where length counts the whole record in decimal."""
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 20)
        digits = content[position : max(space, position)]
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not position < space < end <= len(content) or content[end - 1] != NEWLINE or not equals or not key:
            raise CorruptLayer("not a tar: a pax header does not parse")
        yield key, value
        position = end


def pax_number(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    """A decimal pax value; an empty one stands for the header's."""
    value = pax.get(key, b"")
    if not value:
        return default
    if not value.isdigit() or len(value) > MOST_DIGITS or int(value) >= NUMBERS:
        raise CorruptLayer(f"not a tar: the pax header says {key!r} is {value[:80]!r}")
    return int(value)


def pax_time(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    """A decimal time in seconds, with any number of places, as nanoseconds (rounded down).

    Also with an exponent, as Python's ``tarfile`` writes a short float (``1e-05``) and, unlike Go's reader, reads it.
    Everything else that only Python takes (``nan``, ``inf``, ``1_0``, spaces) is refused.
    """
    value = pax.get(key, b"")
    if not value:
        return default
    match = _TIME.fullmatch(value)
    sign, whole, places, exponent = match.groups(b"") if match else (b"", b"", b"", b"")
    if exponent:
        whole, places = _shifted(whole, places, int(exponent))
    if not whole or len(whole) > MOST_DIGITS or int(whole) >= NUMBERS:
        raise CorruptLayer(f"not a tar: the pax header says {key!r} is {value[:80]!r}")
    nanoseconds = int(whole) * 1_000_000_000 + int(places[:9].ljust(9, b"0"))
    if sign == b"-":
        return -nanoseconds - bool(places[9:].strip(b"0"))
    return nanoseconds


def _shifted(whole: bytes, places: bytes, exponent: int) -> tuple[bytes, bytes]:
    """The digits before and behind the point once that has moved by ``exponent`` to the right."""
    digits, point = whole + places, len(whole) + exponent
    if point <= 0:
        return b"0", b"0" * -point + digits
    digits = digits.ljust(point, b"0")
    return digits[:point].lstrip(b"0") or b"0", digits[point:]
