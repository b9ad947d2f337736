"""The way into a registry: :func:`connect`. Importing this costs nothing; connecting loads requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from containerkit.image.reference import Reference
    from containerkit.registry.repository import Repository


def connect(reference: Reference, *, timeout: float = 30.0) -> Repository:
    """The repository that ``reference`` names. Nothing is sent yet.

    ``timeout`` is how long (seconds) the registry may stay silent before :class:`~containerkit.errors.RegistryTimeout`.
    Registries on loopback speak plain http and are reached without the environment's proxies, all others https.
    """
    from containerkit.registry.repository import Repository
    from containerkit.registry.transport import Transport

    return Repository(reference.registry, reference.repository, Transport(reference.registry, timeout=timeout))
