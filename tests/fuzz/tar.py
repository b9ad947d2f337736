"""Fuzz layers: any bytes are refused, or unpack into their own directory and nowhere else."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from typing import TYPE_CHECKING

import engine
import zstandard

from containerkit.errors import ContainerkitError
from containerkit.image.layers.compression import decompressed
from containerkit.image.layers.extract import Extractor
from containerkit.image.layers.layer import TarReader, is_header
from containerkit.image.limits import ImageLimits

if TYPE_CHECKING:
    import random

LIMITS = ImageLimits(
    entries=500, depth=40, file_size=1 << 24, layer_size=1 << 24, ratio=100, ratio_free=1 << 20, regions=1000
)
BLOCK = 512
CANARY = b"nobody touches me"
EXTRACTED = 8  # one in so many is unpacked, too: that takes ten times as long


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: object) -> tuple[object, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o755
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


ENTRIES = [
    entry("d/", tarfile.DIRTYPE), entry("d/f", data=b"x" * 700), entry("d/l", tarfile.LNKTYPE, linkname="d/f"),
    entry("s", tarfile.SYMTYPE, linkname="../canary"), entry("out", tarfile.SYMTYPE, linkname="../.."),
    entry("n" * 180, data=b"y", mtime=-1.5, uid=2**25, pax_headers={"SCHILY.xattr.user.a": "v"}),
    entry("d/.wh.gone"), entry("d/.wh..wh..opq"), entry("p", tarfile.FIFOTYPE), entry("ü" * 60, data=b"z" * 5000),
    entry("c", tarfile.CHRTYPE, devmajor=1, devminor=3), entry("e/f/g", data=b""), entry("/abs/x", data=b"a"),
    entry("gone", tarfile.CHRTYPE), entry("l", tarfile.LNKTYPE, linkname="low/f"), entry("low/.wh.f"), entry(".wh.low"),
]  # fmt: skip
SPARSE = {
    "0.0": {"GNU.sparse.size": "900", "GNU.sparse.offset": "5", "GNU.sparse.numbytes": "3"},
    "0.1": {"GNU.sparse.size": "900", "GNU.sparse.map": "5,3", "GNU.sparse.name": "real"},
    "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "real", "GNU.sparse.realsize": "900"},
}


def archive(form: int, entries: list[tuple[object, bytes]]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))  # type: ignore[arg-type]
    return target.getvalue()[: -(-target.tell() // BLOCK) * BLOCK].rstrip(b"\0").ljust(BLOCK) + bytes(1024)


def seeds() -> list[bytes]:
    made = [archive(form, ENTRIES) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
    made.append(archive(tarfile.USTAR_FORMAT, ENTRIES[:5] + ENTRIES[6:9]))
    for version, headers in SPARSE.items():
        data = b"1\n5\n3\n".ljust(BLOCK, b"\0") + b"abc" if version == "1.0" else b"abc"
        made.append(archive(tarfile.PAX_FORMAT, [entry("sparse", data=data, pax_headers=headers)]))
    old = bytearray(archive(tarfile.GNU_FORMAT, [entry("sparse", b"S", b"abc")]))
    old[386:410] = b"00000000005\x0000000000003\0"
    old[483:495] = b"00000001604\0"
    made.append(summed(bytes(old), 0))
    made = [tar + bytes(-len(tar) % BLOCK) for tar in made]
    pack = (gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress)
    return made + [compress(made[0]) for compress in pack] + [compress(bytes(500_000)) for compress in pack[:1]]


WORDS = [
    b"../", b"/", b"./", b"../canary", b"canary", b"\0", b"out/", b"s/", b".wh.", b".wh...", b".wh..wh..opq", b"d/f",
    b"x", b"g", b"L", b"K", b"S", b"M", b"D", b"V", b"N", b"1", b"2", b"5", b"7777777\0", b"\x80" + bytes(10) + b"\xff",
    b"\xff" * 12, b"99999999999", b"ustar\x0000", b"ustar  \0", b"tar\0", b"\n18 path=../canary\n", b"9" * 5000,
    b"20 size=99999999999\n", b"30 mtime=-99999999999999999.5\n", b"GNU.sparse.major=1", b"=", b"\n", bytes(512),
    b"/../", b"low/f", b"twin",
]  # fmt: skip


def summed(data: bytes, at: int) -> bytes:
    """With the right checksum in the header at ``at``."""
    block = data[at : at + 148] + b" " * 8 + data[at + 156 : at + BLOCK]
    return data[: at + 148] + b"%06o\0 " % (sum(block) & 0o777777) + data[at + 156 :]


def repair(chance: random.Random, data: bytes) -> bytes:
    """Mostly with right checksums again, for a wrong one hides whatever else is wrong."""
    if chance.random() < 0.2:
        return data
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        block = data[at : at + BLOCK]
        if block[257:262] == b"ustar" and not is_header(block):
            data = summed(data, at)
    return data


class Target:
    """Reads every input, and unpacks every eighth into a directory beside the canary."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._count = 0
        with open(f"{place}/canary", "wb") as file:
            file.write(CANARY)
        os.mkdir(f"{place}/box")
        self._lower = f"{place}/lower"
        os.makedirs(f"{self._lower}/low")
        with open(f"{self._lower}/low/f", "wb") as file:
            file.write(CANARY)
        os.link(f"{self._lower}/low/f", f"{self._lower}/twin")
        os.symlink("low", f"{self._lower}/s")
        os.utime(place, (1, 1))
        self._before = self._seen()

    def __call__(self, data: bytes) -> None:
        self._count += 1
        with contextlib.suppress(ContainerkitError):
            if self._count % EXTRACTED == 0:
                self._extract(data)
        reader = reader_of(data)
        while entry := reader.next():
            assert b"\0" not in entry.name, entry
            assert entry.name, entry
            assert sum(map(len, reader.pieces())) <= LIMITS.layer_size, entry

    def _extract(self, data: bytes) -> None:
        root = f"{self._place}/box/root"
        os.mkdir(root)
        try:
            lowers = (self._lower,) if self._count % (2 * EXTRACTED) else ()
            with Extractor(root, lowers) as extractor:
                extractor.unpack(reader_of(data))
                extractor.finish(lowers)
        finally:
            shutil.rmtree(root)
            assert self._seen() == self._before, "something outside the root was touched"

    def _seen(self) -> object:
        status = os.stat(f"{self._place}/canary")
        with open(f"{self._place}/canary", "rb") as file:
            content = file.read()
        names = sorted(os.listdir(self._place)), os.listdir(f"{self._place}/box"), sorted(os.listdir(self._lower))
        outside = os.stat(self._place)
        below = os.stat(f"{self._lower}/twin")
        names += (below.st_nlink, below.st_mode, below.st_mtime_ns, below.st_size)
        return content, status.st_mode, status.st_nlink, status.st_mtime_ns, names, outside.st_mode, outside.st_mtime_ns


def reader_of(data: bytes) -> TarReader:
    return TarReader(decompressed(io.BytesIO(data).read1, LIMITS), LIMITS)


if __name__ == "__main__":
    os.umask(0)
    with tempfile.TemporaryDirectory(prefix="ck-fuzz-") as directory:
        sys.exit(engine.main(Target(directory), seeds(), WORDS, repair))
