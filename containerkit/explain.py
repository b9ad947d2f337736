"""``containerkit.explain``: what a start would do, in words, before it does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from containerkit.container.container import Container
from containerkit.isolation.plan import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from containerkit.container.options import Source
    from containerkit.host import Host


def explain(
    what: Container | Source | str,
    command: str | Sequence[str] | None = None,
    *,
    host: Host | None = None,
    **options: Any,
) -> str:
    """The plan of a container as text: every operation, in order.

    ``what`` is a container, or an image with the command and options that ``host.containers.create`` takes; nothing is
    created then. Raises what ``create`` raises.
    """
    if isinstance(what, Container):
        return describe(what.plan())
    if host is None:
        from containerkit.host import default_host

        host = default_host()
    return describe(host.containers.draft(what, command, **options).plan())
