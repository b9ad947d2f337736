"""Sparse files in tars: the old GNU form and pax 0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse Files")."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from containerkit.errors import CorruptLayer, FileTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from containerkit.image.layers.layer import TarReader

BLOCK = 512
MOST_DIGITS = 20


class Sparse(NamedTuple):
    """A file's length and its regions, ``(offset, length)`` in bytes; their data follow each other in the tar."""

    size: int
    regions: tuple[tuple[int, int], ...]

    def stored(self) -> int:
        """How many bytes of data there are."""
        return sum(length for _, length in self.regions)


def make(size: int, regions: Iterable[tuple[int, int]]) -> Sparse:
    """A checked map: in order, without overlap, inside the file."""
    checked = tuple(regions)
    position = 0
    for offset, length in checked:
        if offset < position or length < 0 or offset + length > size:
            raise CorruptLayer("a sparse file's map does not fit the file")
        position = offset + length
    return Sparse(size, checked)


def read_gnu_map(reader: TarReader, block: bytes, most: int) -> Sparse:
    """The map of an entry of type ``S``: four regions in the header, 21 in each extension block that follows it."""
    from containerkit.image.layers.layer import number

    regions = _gnu_regions(block[386:482], number)
    more, blocks = block[482], 0
    while more:
        extension = reader.take(BLOCK)
        regions += _gnu_regions(extension[:504], number)
        more, blocks = extension[504], blocks + 1
        _check_count(max(len(regions), blocks), most)
    return make(number(block[483:495]), regions)


def pax_sparse(reader: TarReader, pax: dict[bytes, bytes], pairs: list[tuple[bytes, bytes]], most: int) -> Sparse:
    """The map of a pax entry with ``GNU.sparse.*`` keys."""
    if pax.get(b"GNU.sparse.major") == b"1":
        return _read_map_1_0(reader, decimal(pax.get(b"GNU.sparse.realsize", b"")), most)
    size = decimal(pax.get(b"GNU.sparse.size", b""))
    if b"GNU.sparse.map" in pax:
        numbers = [decimal(part) for part in pax[b"GNU.sparse.map"].split(b",") if part]
    else:
        numbers = [decimal(value) for key, value in pairs if key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}]
    _check_count(len(numbers) // 2, most)
    return make(size, _pairs(numbers))


def _check_count(count: int, most: int) -> None:
    if count > most:
        message = f"a sparse file's map has more than the {most} parts that are allowed"
        raise FileTooLarge(message, limit="regions", allowed=most, found=count)


def _gnu_regions(table: bytes, number: Callable[[bytes], int]) -> list[tuple[int, int]]:
    rows = (table[at : at + 24] for at in range(0, len(table), 24))
    return [(number(row[:12]), number(row[12:])) for row in rows if row[0]]


def _read_map_1_0(reader: TarReader, size: int, most: int) -> Sparse:
    """Before the data, padded to a block: the number of regions, then offset and length of each, a line each."""
    text = b""

    def line() -> int:
        nonlocal text
        if b"\n" not in text:
            text += reader.take_data(BLOCK)
        first, _, text = text.partition(b"\n")
        return decimal(first)

    count = line()
    _check_count(count, most)
    return make(size, [(line(), line()) for _ in range(count)])


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise CorruptLayer("a sparse file's map has an offset without a length")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def decimal(text: bytes) -> int:
    """A number of a sparse map."""
    if not text.isdigit() or len(text) > MOST_DIGITS:
        raise CorruptLayer(f"a sparse file's map has {text[:32]!r} for a number")
    return int(text)
