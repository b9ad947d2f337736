"""containerkit: Docker's engine as an importable Python library.

::

    import containerkit as ck

    host = ck.Host()
    image = host.images.pull("127.0.0.1:5000/debian:12")
    print(host.run(image, ["cat", "/etc/os-release"], memory="64m").stdout.decode())

Importing this package costs next to nothing: every public name loads its module when it is first used (PEP 562).
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost more than all the rest of this module
if TYPE_CHECKING:
    from containerkit.container.container import Container as Container
    from containerkit.doctor import doctor as doctor
    from containerkit.explain import explain as explain
    from containerkit.host import Host as Host
    from containerkit.host import run as run
    from containerkit.image.host_image import host_image as host_image
    from containerkit.image.images import Image as Image
    from containerkit.isolation.process import DEVNULL as DEVNULL
    from containerkit.isolation.process import PIPE as PIPE
    from containerkit.isolation.process import Completed as Completed
    from containerkit.isolation.process import Process as Process

__version__ = "0.1.0"

_HOME = {
    "Completed": "isolation.process",
    "Container": "host",
    "DEVNULL": "isolation.process",
    "Host": "host",
    "Image": "image.images",
    "PIPE": "isolation.process",
    "Process": "isolation.process",
    "doctor": "doctor",
    "explain": "explain",
    "host_image": "image.host_image",
    "run": "host",
}

__all__ = [*sorted(_HOME), "errors"]  # noqa: PLE0604 - strings, all of them


def __getattr__(name: str) -> object:
    """Load a public name, an error class or a submodule on first use."""
    import importlib

    if name in _HOME:
        value = getattr(importlib.import_module(f"containerkit.{_HOME[name]}"), name)
    elif name == "errors":
        value = importlib.import_module("containerkit.errors")
    else:
        errors = importlib.import_module("containerkit.errors")
        value = getattr(errors, name, None)
        if not (isinstance(value, type) and issubclass(value, errors.ContainerkitError)):
            raise AttributeError(f"module 'containerkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
