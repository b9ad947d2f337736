"""``python -m containerkit.registry.server``: a registry that stands alone."""

from __future__ import annotations

import argparse
import signal
import threading

from containerkit.registry.server.server import serve


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m containerkit.registry.server", description="A small registry.")
    parser.add_argument("directory", help="where its content is kept")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--tls", action="store_true", help="make an authority and a certificate, and speak https")
    parser.add_argument("--name", action="append", default=[], help="the certificate is for this name or address, too")
    parser.add_argument("--user", action="append", default=[], metavar="NAME:PASSWORD")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--no-deletion", action="store_true")
    parser.add_argument("--upstream", default="", help="be a read-through cache of this registry")
    options = parser.parse_args()
    users = dict(user.split(":", 1) for user in options.user) or None
    with serve(
        options.directory,
        host=options.host,
        port=options.port,
        users=users,
        tls=options.tls,
        names=options.name,
        read_only=options.read_only,
        deletion=not options.no_deletion,
        upstream=options.upstream,
    ) as registry:
        print(registry.url, flush=True)  # noqa: T201 - a program's own output
        if registry.certificates:
            print(f"authority: {registry.certificates.authority}", flush=True)  # noqa: T201
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()


if __name__ == "__main__":
    main()
