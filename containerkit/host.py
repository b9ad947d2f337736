"""A host: one state directory and its collections."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from containerkit.container import container
from containerkit.container.container import Container
from containerkit.container.containers import Containers
from containerkit.image.images import Images
from containerkit.isolation import spawner
from containerkit.registry.client import Registries
from containerkit.state import State

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from containerkit.container.options import Source
    from containerkit.image.limits import ImageLimits
    from containerkit.isolation.process import Completed


__all__ = ["Container", "Host", "default_host", "run"]


class Host:
    """One state directory, shared by any number of processes and threads: its images and its containers.

    Without ``root``: ``$CONTAINERKIT_ROOT``, else /var/lib/containerkit, or below ``$XDG_DATA_HOME`` without root.
    ``driver`` keeps layers on the disk (``overlay``, ``btrfs``, ``fuse-overlayfs``, ``copy``): by default the one that
    the root has already, else the first that works there. ``registries`` says how registries are reached, ``limits``
    how much an image may ask for. ``durable`` has every image on the disk before it is there, at the cost of waiting
    for all that the file system has to write; without it, as with other engines, a power failure within seconds of a
    pull may leave files of it empty.

    Raises :class:`StateError` where the root cannot be used, :class:`Unsupported` for a driver that it cannot hold.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        driver: str = "",
        registries: Registries | None = None,
        limits: ImageLimits | None = None,
        durable: bool = False,
    ) -> None:
        self.state = State(root)
        if driver:
            from containerkit.image.drivers import choose

            choose(self.state.root, driver)
        self.registries = registries or Registries()
        self.images = Images(self.state, self.registries.connect)
        self.images.limits = limits
        self.images.durable = durable
        self.containers = Containers(self.state, self.images)

    def __repr__(self) -> str:
        return f"<Host {self.state.root}>"

    @property
    def root(self) -> str:
        """The state directory."""
        return self.state.root

    def run(self, image: Source | str, command: str | Sequence[str] | None = None, **options: Any) -> Completed:
        """Run a command in a container of its own that is gone afterwards: :meth:`Containers.run`."""
        return self.containers.run(image, command, **options)

    def login(self, registry: str, username: str, password: str) -> None:
        """Keep credentials for a registry (or ``registry/namespace``) in this process, once the registry accepts them.

        Raises :class:`RegistryUnauthorized` and what else reaching it raises; then nothing is kept.
        """
        self.registries.login(registry, username, password)

    def logout(self, registry: str) -> bool:
        """Forget what :meth:`login` kept; whether there was anything."""
        return self.registries.credentials.logout(registry)

    def warm_up(self) -> None:
        """Start the helper process now, so that the first container need not wait for it (about 40 ms)."""
        spawner.warm_up()

    def close(self) -> None:
        """Close the database connections that this process holds. Containers go on."""
        self.state.close()


_lock = threading.Lock()
_default: Host | None = None


def default_host() -> Host:
    """The Host on the default state root, made once a process."""
    global _default  # noqa: PLW0603 - the default of a process
    with _lock:
        if _default is None or _default.root != State(None).root:
            _default = Host()
        return _default


container.default_containers = lambda: default_host().containers


def run(image: Source | str, command: str | Sequence[str] | None = None, **options: Any) -> Completed:
    """Run a command on the default host: :meth:`Host.run`."""
    return default_host().run(image, command, **options)
