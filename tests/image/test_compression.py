from __future__ import annotations

import bz2
import gzip
import io
import os
import zlib

import pytest
import zstandard

from containerkit.errors import CorruptLayer
from containerkit.image import compression
from containerkit.image.compression import compression_of, decompressed

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


def test_a_bomb_comes_in_pieces() -> None:
    bomb = io.BytesIO(gzip.compress(bytes(64 << 20)))
    reader = decompressed(bomb.read)
    sizes = [len(piece) for piece in iter(reader, b"")]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= compression.MOST_AT_ONCE


@pytest.mark.parametrize("form", ["gzip", "gzip members", "zstd", "zstd frames"])
@pytest.mark.parametrize("cut", [1, 9, 20_000, 60_000])
def test_truncated(form: str, cut: int) -> None:
    with pytest.raises(CorruptLayer):
        read(FORMS[form][:-cut], 4096)


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_damaged(form: str) -> None:
    damaged = bytearray(FORMS[form])
    damaged[len(damaged) // 3] ^= 0x55
    with pytest.raises(CorruptLayer):
        read(bytes(damaged), 4096)


def test_rubbish_after_gzip() -> None:
    with pytest.raises(CorruptLayer):
        read(FORMS["gzip"] + b"rubbish, not a member", 4096)


def test_told_by_the_first_bytes() -> None:
    assert [compression_of(content[:4]) for content in (*FORMS.values(), b"", bz2.compress(b""))] == [
        "", "gzip", "gzip", "gzip", "zstd", "zstd", "zstd", "", "",
    ]  # fmt: skip
