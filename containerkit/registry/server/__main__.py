"""``python -m containerkit.registry.server``: a registry that stands alone."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from containerkit.errors import ContainerkitError
from containerkit.registry.server.server import serve


def lines_of(path: str | None) -> list[str]:
    """The lines of a file, or of standard input, that are not empty."""
    if path is None:
        return []
    with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
        return [line for line in file.read().splitlines() if line]


def users_of(entries: list[str]) -> dict[str, str] | None:
    """Names and passwords; None where everybody may come in."""
    users = {}
    for entry in entries:
        name, colon, password = entry.partition(":")
        if not (name and colon and password):
            raise ValueError("a user is written NAME:PASSWORD")
        users[name] = password
    return users or None


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m containerkit.registry.server", description="A small registry.")
    parser.add_argument("directory", help="where its content is kept")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--tls", action="store_true", help="make an authority and a certificate, and speak https")
    parser.add_argument("--name", action="append", default=[], help="the certificate is for this name or address, too")
    parser.add_argument("--user", action="append", default=[], metavar="NAME:PASSWORD", help="everybody sees it in ps")
    parser.add_argument("--users", metavar="FILE", help="NAME:PASSWORD on each line; - for standard input")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--no-deletion", action="store_true")
    parser.add_argument("--upstream", default="", help="be a read-through cache of this registry")
    options = parser.parse_args()
    try:
        users = users_of([*options.user, *lines_of(options.users)])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.users and not users:
        parser.error(f"{options.users} has no users")
    try:
        registry = serve(
            options.directory,
            host=options.host,
            port=options.port,
            users=users,
            tls=options.tls,
            names=options.name,
            read_only=options.read_only,
            deletion=not options.no_deletion,
            upstream=options.upstream,
        )
    except (OSError, OverflowError, ValueError, ContainerkitError) as error:  # no port, no name, no registry
        parser.error(str(error))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with registry:
        print(registry.url, flush=True)  # noqa: T201 - a program's own output
        if registry.certificates:
            print(f"authority: {registry.certificates.authority}", flush=True)  # noqa: T201
        stop.wait()


if __name__ == "__main__":
    main()
