"""Content digests: ``algorithm:hex``, as the OCI image specification's descriptor section has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.errors import InvalidDigest

if TYPE_CHECKING:
    from _hashlib import HASH
    from typing import Self

LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
REGISTERED = frozenset({"blake3"})  # by the OCI image specification, and not here: hashlib has no such thing
ALGORITHM = frozenset("abcdefghijklmnopqrstuvwxyz0123456789+._-")
HEX = frozenset("0123456789abcdef")


class Digest(str):
    """A validated digest. Compares, hashes and prints as the string that it is.

    Raises :class:`InvalidDigest` for anything but lower-case sha256, sha384 or sha512; other algorithms are named.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        """``value`` itself, once it has been checked."""
        algorithm, _, encoded = value.partition(":")
        if LENGTHS.get(algorithm) != len(encoded) or not HEX.issuperset(encoded):
            raise _invalid(value, algorithm)
        return super().__new__(cls, value)

    @classmethod
    def of(cls, content: bytes | memoryview) -> Self:
        """The sha256 digest of ``content``."""
        return cls.from_hash(new_hash("sha256", content))

    @classmethod
    def from_hash(cls, state: HASH) -> Self:
        """The digest that a hash object stands at."""
        return cls(f"{state.name}:{state.hexdigest()}")

    @property
    def algorithm(self) -> str:
        """``sha256``, ``sha384`` or ``sha512``."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The digits after the colon."""
        return self.partition(":")[2]

    @property
    def short(self) -> str:
        """The first twelve digits, as Docker prints ids."""
        return self.hex[:12]

    def hasher(self) -> HASH:
        """A fresh hash object of this digest's algorithm."""
        return new_hash(self.algorithm)


def _invalid(value: str, algorithm: str) -> InvalidDigest:
    if ":" in value and algorithm not in LENGTHS and algorithm and ALGORITHM.issuperset(algorithm):
        state = "registered, but not supported here" if algorithm in REGISTERED else "unknown"
        return InvalidDigest(
            f"not a digest: the algorithm {algorithm[:40]!r} is {state}", hint=f"known are {', '.join(LENGTHS)}"
        )
    digits = LENGTHS.get(algorithm, LENGTHS["sha256"])
    wanted = algorithm if algorithm in LENGTHS else "sha256"
    return InvalidDigest(f"not a digest: {value[:160]!r}", hint=f"{wanted}: and {digits} lower-case hexadecimal digits")


def new_hash(algorithm: str = "sha256", content: bytes | memoryview = b"") -> HASH:
    """A hash object; ``hashlib`` loads on first use, for a start needs none."""
    import hashlib

    return hashlib.new(algorithm, content, usedforsecurity=False)
