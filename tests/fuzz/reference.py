"""Fuzz image references: any text is refused, or parses to what its two forms parse to."""

from __future__ import annotations

import sys

import engine

from containerkit.errors import ContainerkitError
from containerkit.image.platform import parse
from containerkit.image.reference import Reference

HEX = "0123456789abcdef" * 4
SEEDS = [
    text.encode()
    for text in (
        "debian", "library/debian:12", "user/app", "localhost:5000/a/b__c.d-e:1", "[2001:db8::1]:5000/app",
        f"quay.io/app:1@sha256:{HEX}", f"debian@sha512:{HEX}{HEX}", f"x@sha384:{HEX}{HEX[:32]}", "UPPER/app",
        "docker.io/library/a", "index.docker.io/a/b", f"docker.io/{HEX}", "linux/arm64/v8",
        "xn--7o8h.com/my---image:tag", "host:5000/" + "a" * 240,
    )
]  # fmt: skip
WORDS = [
    b":", b"@", b"/", b"//", b".", b"..", b"_", b"__", b"-", b"--", b"[", b"]", b"localhost", b"docker.io/",
    b"library/", b"index.docker.io/", b"sha256:", b"sha384:", b"blake3:", b"latest", HEX.encode(), b"\xc4\xb0",
    b"\xe1\xba\x9e", b"\n", b"\0", b"a" * 255, b"A", b"\xd9\xa1", b"\xef\xbc\x8f", b"windows(10.0.1)/amd64",
]  # fmt: skip


def target(data: bytes) -> None:
    """Parse; then the laws."""
    text = data.decode(errors="surrogateescape")
    try:
        parse(text)
    except ContainerkitError:
        pass
    reference = Reference.parse(text)
    assert Reference.parse(str(reference)) == reference, text
    assert Reference.parse(reference.familiar) == reference, text
    assert str(reference).isascii(), text
    assert reference.tag or reference.digest, text
    assert len(reference.repository) <= 255, text
    assert len(reference.tag) <= 128, text


if __name__ == "__main__":
    sys.exit(engine.main(target, SEEDS, WORDS))
