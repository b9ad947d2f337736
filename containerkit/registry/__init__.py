"""The Distribution v2 protocol: pull and push, and a registry of our own by :func:`serve`.

Importing this loads nothing else; every name loads its module when it is first used (PEP 562).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from containerkit.registry.server.server import serve as serve

_HOME = {"serve": "containerkit.registry.server.server"}

__all__ = ["serve"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'containerkit.registry' has no attribute {name!r}")
    import importlib

    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value
