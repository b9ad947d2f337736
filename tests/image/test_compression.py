from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from typing import TYPE_CHECKING

import pytest
import zstandard

from containerkit.errors import CompressionBomb, CorruptLayer, LayerTooLarge
from containerkit.image.layers import compression
from containerkit.image.layers.compression import compression_of, decompressed
from containerkit.image.limits import ImageLimits
from support.images import make_tar, member

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN = os.urandom(50_000) + bytes(3_000_000) + os.urandom(50_000)
ZSTD = zstandard.ZstdCompressor(write_checksum=True)
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0skip"

FORMS = {
    "plain": PLAIN,
    "gzip": gzip.compress(PLAIN, 1),
    "gzip members": gzip.compress(PLAIN[:70_000]) + gzip.compress(b"") + gzip.compress(PLAIN[70_000:]),
    "gzip padding": gzip.compress(PLAIN, 1) + bytes(3000),
    "zstd": ZSTD.compress(PLAIN),
    "zstd frames": ZSTD.compress(PLAIN[:70_000]) + SKIPPABLE + ZSTD.compress(PLAIN[70_000:]),
    "zstd skippable first": SKIPPABLE + ZSTD.compress(PLAIN),
    "bzip2": bz2.compress(PLAIN),
    "bzip2 streams": bz2.compress(PLAIN[:70_000]) + bz2.compress(b"") + bz2.compress(PLAIN[70_000:]),
    "xz": lzma.compress(PLAIN, preset=1),
    "xz streams": lzma.compress(PLAIN[:70_000]) + bytes(8) + lzma.compress(PLAIN[70_000:], preset=1) + bytes(4),
}


@pytest.fixture(params=["isal", "zlib"], autouse=True)
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(compression, "_inflater", lambda: (lambda: zlib.decompressobj(31), zlib.error))


def read(content: bytes, piece: int) -> bytes:
    stream = io.BytesIO(content)
    reader = decompressed(lambda: stream.read(piece))
    return b"".join(iter(reader, b""))


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("piece", [3, 4096, 1 << 20])
def test_every_form(content: bytes, piece: int) -> None:
    assert read(content, piece) == PLAIN


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, ZSTD.compress])
def test_a_bomb_comes_in_pieces(compress: Callable[[bytes], bytes]) -> None:
    bomb = io.BytesIO(compress(bytes(64 << 20)))
    reader = decompressed(bomb.read)
    sizes = [len(piece) for piece in iter(reader, b"")]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 2 * compression.MOST_AT_ONCE


@pytest.mark.parametrize("form", ["gzip", "gzip members", "zstd", "zstd frames", "bzip2", "bzip2 streams", "xz"])
@pytest.mark.parametrize("cut", [1, 9, 20_000, 60_000])
def test_truncated(form: str, cut: int) -> None:
    with pytest.raises(CorruptLayer):
        read(FORMS[form][:-cut], 4096)


@pytest.mark.parametrize("form", ["gzip", "zstd", "bzip2", "xz"])
def test_damaged(form: str) -> None:
    damaged = bytearray(FORMS[form])
    damaged[len(damaged) // 3] ^= 0x55
    with pytest.raises(CorruptLayer):
        read(bytes(damaged), 4096)


@pytest.mark.parametrize("form", ["gzip", "bzip2", "xz"])
def test_rubbish_after_the_end(form: str) -> None:
    with pytest.raises(CorruptLayer):
        read(FORMS[form] + b"rubbish, nothing of the kind", 4096)


def test_told_by_the_first_bytes() -> None:
    for size in (4, 10):
        assert {name: compression_of(content[:size]) for name, content in FORMS.items()} == {
            name: "" if name == "plain" else name.partition(" ")[0] for name in FORMS
        }
    assert compression_of(b"") == compression_of(b"\xfd") == compression_of(b"BZh0123456") == ""
    assert compression_of(bz2.compress(b"")) == "bzip2"


def test_a_tar_whose_first_name_looks_like_bzip2() -> None:
    tar = make_tar([member("BZh91AY.txt", b"plain")])
    assert read(tar, 4) == tar


@pytest.mark.parametrize(
    ("form", "limits", "error", "limit"),
    [
        ("gzip", {"ratio_free": 1 << 20, "ratio": 20}, CompressionBomb, "ratio"),
        ("bzip2", {"ratio_free": 1 << 20, "ratio": 20}, CompressionBomb, "ratio"),
        ("xz", {"ratio_free": 1 << 20, "ratio": 20}, CompressionBomb, "ratio"),
        ("zstd", {"ratio_free": 1 << 20, "ratio": 20}, CompressionBomb, "ratio"),
        ("plain", {"layer_size": 3_099_999}, LayerTooLarge, "layer_size"),
        ("xz", {"layer_size": 3_099_999}, LayerTooLarge, "layer_size"),
    ],
)
def test_limits(form: str, limits: dict[str, int], error: type[LayerTooLarge], limit: str) -> None:
    stream = io.BytesIO(FORMS[form])
    reader = decompressed(lambda: stream.read(4096), ImageLimits(**limits))  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        list(iter(reader, b""))
    assert (type(caught.value), caught.value.limit, caught.value.allowed) == (error, limit, limits[limit])
    assert caught.value.found > caught.value.allowed


def test_just_within_the_limits_and_counted() -> None:
    stream, counts = io.BytesIO(FORMS["gzip"]), []
    limits = ImageLimits(layer_size=len(PLAIN), ratio_free=len(PLAIN), ratio=1)
    reader = decompressed(lambda: stream.read(4096), limits, counts.append)
    assert b"".join(iter(reader, b"")) == PLAIN
    assert (counts[0], counts[-1], counts) == (0, len(PLAIN), sorted(counts))


SMALL = {
    "gzip": gzip.compress(b"", mtime=0),
    "gzip of a byte": gzip.compress(b"x", mtime=0),
    "gzip and padding": gzip.compress(b"", mtime=0) + b"\0",
    "zstd": zstandard.ZstdCompressor(write_content_size=False).compress(b""),
    "skippable": SKIPPABLE,
    "bzip2": bz2.compress(b""),
    "xz": lzma.compress(b""),
}


@pytest.fixture
def returned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes decompressors had taken, and copied, behind the end of each member."""
    counts: list[int] = []
    give_back = compression._Packed.give_back

    def counted(packed: compression._Packed, count: int) -> None:
        counts.append(count)
        give_back(packed, count)

    monkeypatch.setattr(compression._Packed, "give_back", counted)
    return counts


@pytest.mark.parametrize("form", SMALL)
def test_what_lies_behind_small_members_is_not_copied_for_each(form: str, returned: list[int]) -> None:
    count = 20_000
    plain = b"x" * count if form == "gzip of a byte" else b""
    assert read(SMALL[form] * count, 1 << 20) == plain
    assert len(returned) >= count // 2
    assert max(returned) <= compression.FIRST_SLICE


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, ZSTD.compress])
def test_slices_grow_with_their_members(pack: Callable[[bytes], bytes], returned: list[int]) -> None:
    content = [os.urandom(size) for size in (100, 300_000, 5, 40_000, 1_000_000, 1)]
    members = [pack(each) for each in content]
    assert read(b"".join(members), 1 << 20) == b"".join(content)
    assert sum(returned) <= sum(2 * max(len(each), compression.FIRST_SLICE) for each in members) * 2


@pytest.mark.parametrize("form", ["gzip", "bzip2", "xz"])
@pytest.mark.parametrize("piece", [1, 4096, 1 << 20])
def test_padding_of_any_length(form: str, piece: int) -> None:
    member = SMALL[form] if form != "gzip" else SMALL["gzip of a byte"]
    padding = bytes(3 * compression.FIRST_SLICE + 8)
    plain = b"xx" if form == "gzip" else b""
    assert read(member + padding + member + padding, piece) == plain
    with pytest.raises(CorruptLayer):
        read(member + padding + b"rubbish", piece)
