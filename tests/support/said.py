"""What an error gives away."""

from __future__ import annotations


def everything_said(error: BaseException | None) -> str:
    """An error and all that it comes from, with what they carry and their notes."""
    if error is None:
        return ""
    said = f"{error} {error!r} {vars(error)} {error.args}"
    return said + everything_said(error.__cause__) + everything_said(error.__context__)
