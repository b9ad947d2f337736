"""Time of creation: SOURCE_DATE_EPOCH (reproducible-builds.org), and dates as documents have them."""

from __future__ import annotations

import os
import time

from containerkit.errors import InvalidOption

EPOCH = "SOURCE_DATE_EPOCH"
_NANO = 1_000_000_000


def source_date(given: int | None = None) -> int | None:
    """``given``, else the environment's SOURCE_DATE_EPOCH, in seconds since 1970; None without either.

    Raises :class:`InvalidOption`.
    """
    text = os.environ.get(EPOCH, "") if given is None else str(given)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise InvalidOption(f"{EPOCH}: {text!r} is no number of seconds") from None


def timestamp(epoch: int | None) -> str:
    """RFC 3339 with nanoseconds, as Docker writes it; without an epoch the present."""
    seconds, nanoseconds = (epoch, 0) if epoch is not None else divmod(time.time_ns(), _NANO)
    fraction = f".{nanoseconds:09}" if nanoseconds else ""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"
