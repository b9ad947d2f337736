"""Packing layers: both digests, the same bytes each time, and nothing kept of what fails."""

from __future__ import annotations

import gzip
import os
import subprocess
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from containerkit.errors import InvalidImage
from containerkit.image.digest import Digest
from containerkit.image.layers.compression import decompressed
from containerkit.image.model import OCI_LAYER
from containerkit.image.pack import Gzip, pack
from containerkit.image.store.blobs import BlobStore
from containerkit.image.stream import PIECE
from support import facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from containerkit.state import State

CONTENT = bytes(range(256)) * 9000 + os.urandom(PIECE) + b"end"


@pytest.fixture
def blobs(state: State) -> BlobStore:
    return BlobStore(state.root)


def cut(content: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def stored(blobs: BlobStore, digest: Digest) -> bytes:
    with open(blobs.path(digest), "rb") as file:
        return file.read()


@pytest.mark.parametrize(
    ("compression", "level", "suffix"),
    [("gzip", None, "+gzip"), ("gzip", 9, "+gzip"), ("zstd", None, "+zstd"), ("zstd", 1, "+zstd"), ("none", None, "")],
)
@pytest.mark.parametrize("content", [CONTENT, b"", b"x"], ids=["large", "empty", "small"])
def test_both_digests_and_the_content_are_right(
    blobs: BlobStore, compression: str, level: int | None, suffix: str, content: bytes
) -> None:
    packed = pack(cut(content, 300_001), blobs, compression, level)
    blob = stored(blobs, packed.descriptor.digest)
    read = decompressed(iter([blob, b"", b"", b""]).__next__)
    assert b"".join(iter(read, b"")) == content
    assert packed.diff_id == Digest.of(content)
    assert packed.descriptor.digest == Digest.of(blob)
    assert (packed.descriptor.size, packed.descriptor.media_type) == (len(blob), OCI_LAYER + suffix)
    if compression != "none" and content is CONTENT:
        assert len(blob) < len(content) * 0.6


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_the_bytes_do_not_depend_on_how_they_come(blobs: BlobStore, compression: str) -> None:
    ways: list[Iterable[bytes]] = [[CONTENT], cut(CONTENT, 7777), cut(CONTENT, PIECE), cut(CONTENT, PIECE + 1)]
    assert len({pack(way, blobs, compression) for way in ways}) == 1


def test_the_gzip_header_says_nothing_and_gzip_reads_it(blobs: BlobStore) -> None:
    facts.require("gzip")
    for level in (None, 6):
        blob = stored(blobs, pack([CONTENT], blobs, "gzip", level).descriptor.digest)
        assert blob[:10] == b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
        assert subprocess.run(["gzip", "-dc"], input=blob, check=True, capture_output=True).stdout == CONTENT
    assert stored(blobs, pack([CONTENT], blobs, "gzip", 6).descriptor.digest)[10:-8] == _deflated(CONTENT)


def _deflated(content: bytes) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return deflate.compress(content) + deflate.flush()


@given(st.lists(st.binary(max_size=50), max_size=5), st.sampled_from([None, 1]))
def test_gzip_members_are_whole(pieces: list[bytes], level: int | None) -> None:
    compressor = Gzip(level)
    packed = b"".join(map(compressor.compress, pieces)) + compressor.finish()
    assert gzip.decompress(packed) == b"".join(pieces)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_nothing_is_kept_of_pieces_that_fail(blobs: BlobStore, state_root: str, compression: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield from cut(CONTENT, PIECE)
        raise OSError("the file has become shorter")

    with pytest.raises(OSError, match="shorter"):
        pack(pieces(), blobs, compression)
    assert list(blobs.digests()) == []
    assert os.listdir(os.path.join(state_root, "ingest")) == []


def test_a_store_that_fails_is_told(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    from containerkit.image.store import ingest

    monkeypatch.setattr(ingest.Ingest, "write", full)
    taken = []

    def pieces() -> Iterator[bytes]:
        for piece in cut(bytes(64 * PIECE), PIECE):
            taken.append(piece)
            yield piece

    with pytest.raises(OSError, match="No space left"):
        pack(pieces(), blobs, "none")
    assert len(taken) < 64


def test_an_unknown_compression_is_refused(blobs: BlobStore) -> None:
    with pytest.raises(InvalidImage, match="lz4"):
        pack([b"x"], blobs, "lz4")
