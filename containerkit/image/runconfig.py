"""What a container takes from its image's config. The start path reads it from the database: free to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from containerkit.image.codec import Document
    from containerkit.image.model import ImageConfig


class Healthcheck(NamedTuple):
    """How a container is asked whether it is well. Times in nanoseconds, as images have them; 0 means the default.

    ``test`` is empty (inherit), ``("NONE",)``, ``("CMD", ...)`` or ``("CMD-SHELL", line)``.
    """

    test: tuple[str, ...] = ()
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class RunConfig(NamedTuple):
    """The defaults of an image. ``env`` are ``KEY=value``; ``exposed_ports`` are ``80/tcp``.

    ``stop_timeout`` is in seconds. ``shell`` and ``on_build`` speak to builders only; ``args_escaped`` is Windows's.
    """

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = {}
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    healthcheck: Healthcheck | None = None
    stop_timeout: int | None = None
    shell: tuple[str, ...] = ()
    on_build: tuple[str, ...] = ()
    args_escaped: bool = False

    def to_json(self) -> str:
        """For the database."""
        import json

        return json.dumps(self._asdict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """From the database."""
        import json

        fields: dict[str, Any] = json.loads(text)
        if health := fields.get("healthcheck"):
            fields["healthcheck"] = Healthcheck(tuple(health[0]), *health[1:])
        for key, value in fields.items():
            if isinstance(value, list):
                fields[key] = tuple(value)
        return cls(**fields)

    @classmethod
    def from_config(cls, config: ImageConfig) -> RunConfig:
        """From a config. Raises :class:`~containerkit.errors.InvalidImage` for values of the wrong kind."""
        from containerkit.image.codec import Document

        document = Document(dict(config.config), "config.config")
        return cls(
            entrypoint=_words(document, "Entrypoint"),
            command=_words(document, "Cmd"),
            env=document.texts("Env"),
            user=document.text("User"),
            workdir=document.text("WorkingDir"),
            stop_signal=document.text("StopSignal"),
            labels=document.mapping("Labels"),
            volumes=tuple(document.child("Volumes").fields),
            exposed_ports=tuple(document.child("ExposedPorts").fields),
            healthcheck=_healthcheck(document),
            stop_timeout=document.integer("StopTimeout") if document.fields.get("StopTimeout") is not None else None,
            shell=document.texts("Shell"),
            on_build=document.texts("OnBuild"),
            args_escaped=document.flag("ArgsEscaped"),
        )


def _healthcheck(document: Document) -> Healthcheck | None:
    if document.fields.get("Healthcheck") is None:
        return None
    health = document.child("Healthcheck")
    keys = ("Interval", "Timeout", "StartPeriod", "StartInterval", "Retries")
    numbers = (health.integer(key) if health.fields.get(key) is not None else 0 for key in keys)
    return Healthcheck(health.texts("Test"), *numbers)


def _words(document: Document, key: str) -> tuple[str, ...]:
    """A command; early Docker images have a string in its place, for the shell."""
    if isinstance(value := document.fields.get(key), str):
        return ("/bin/sh", "-c", value)
    return document.texts(key)
