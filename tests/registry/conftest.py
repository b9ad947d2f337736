"""A server that misbehaves, and repositories that are closed afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from containerkit.image.digest import Digest
from containerkit.image.model import OCI_LAYER, Descriptor
from containerkit.image.reference import Reference
from containerkit.registry.repository import Repository
from containerkit.registry.transport import Transport
from support.faulty import Faulty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    with Faulty() as server:
        yield server


@pytest.fixture
def repository() -> Iterator[Callable[..., Repository]]:
    """Opens the repository of a name, with short pauses between repeats."""
    made = []

    def open_repository(name: str, *, timeout: float = 30.0) -> Repository:
        reference = Reference.parse(name)
        transport = Transport(reference.registry, timeout=timeout, delays=(0.0, 0.0))
        made.append(Repository(reference.registry, reference.repository, transport))
        return made[-1]

    yield open_repository
    for each in made:
        each.close()


@pytest.fixture
def blob() -> tuple[Descriptor, bytes]:
    """A blob of a million bytes that no chunk size divides."""
    content = bytes(range(251)) * 4001
    return Descriptor(OCI_LAYER, Digest.of(content), len(content)), content
