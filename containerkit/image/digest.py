"""Content digests: ``algorithm:hex``, as the OCI image specification's descriptor section has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from containerkit.errors import InvalidDigest

if TYPE_CHECKING:
    from _hashlib import HASH
    from typing import Self

LENGTHS = {"sha256": 64, "sha512": 128}
HEX = frozenset("0123456789abcdef")


class Digest(str):
    """A validated digest. Compares, hashes and prints as the string that it is.

    Raises :class:`InvalidDigest` for anything but lower-case sha256 or sha512.
    """

    __slots__ = ()

    def __new__(cls, value: str) -> Self:
        """``value`` itself, once it has been checked."""
        algorithm, _, encoded = value.partition(":")
        if LENGTHS.get(algorithm) != len(encoded) or not HEX.issuperset(encoded):
            raise InvalidDigest(f"not a digest: {value[:160]!r}", hint="sha256: and 64 lower-case hexadecimal digits")
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
        """``sha256`` or ``sha512``."""
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


def new_hash(algorithm: str = "sha256", content: bytes | memoryview = b"") -> HASH:
    """A hash object; ``hashlib`` loads on first use, for a start needs none."""
    import hashlib

    return hashlib.new(algorithm, content, usedforsecurity=False)
