"""The machine's own root file system as an image: the embedded default, which needs no network and no archive.

Its one layer is the host's root, read-only below a private writable layer in memory. An overlay does not look through
mount points, so nothing of other file systems (/proc, /sys, tmpfs, network drives) shows; :data:`HIDDEN` empties what
lies on the root file system itself and is nobody's business.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from containerkit.errors import InvalidImage
from containerkit.image.runconfig import RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

ID = "host"
HIDDEN = (
    "/root",
    "/home",
    "/tmp",  # noqa: S108 - hidden, not used
    "/run",
    "/var/tmp",  # noqa: S108 - hidden, not used
    "/mnt",
    "/media",
    "/srv",
    "/boot",
    "/lost+found",
    "/etc/shadow",
    "/etc/shadow-",
    "/etc/gshadow",
    "/etc/gshadow-",
    "/etc/ssl/private",
    "/etc/docker",
    "/etc/containers",
    "/etc/sudoers",
    "/etc/sudoers.d",
    "/etc/krb5.keytab",
    "/etc/letsencrypt",
    "/etc/wireguard",
    "/etc/openvpn",
    "/etc/NetworkManager/system-connections",
    "/etc/kubernetes",
    "/etc/rancher",
    "/var/lib/kubelet",
    "/var/lib/rancher",
    "/var/lib/cloud",
    "/var/lib/private",
    "/var/lib/mysql",
    "/var/lib/postgresql",
    "/var/lib/libvirt",
    "/swapfile",
    "/var/lib/docker",
    "/var/lib/containerd",
    "/var/lib/containers",
    "/var/lib/containerkit",
    "/var/log",
    "/var/mail",
    "/var/spool",
    "/var/backups",
)
"""Paths that are empty in the container: homes, secrets, other people's temporary files, other engines' state."""

WRITABLE_BYTES = 1 << 30


class HostImage:
    """The host's root as an image; takes the place of an :class:`~containerkit.image.images.Image` in every start."""

    id = ID
    names = (ID,)
    digest = ""
    layers: tuple[str, ...] = ()
    lowers = ("/",)
    driver = ""
    in_memory = WRITABLE_BYTES
    run = RunConfig(command=("/bin/sh",))

    def __init__(self, hidden: tuple[str, ...]) -> None:
        self.hidden = hidden

    def __repr__(self) -> str:
        return f"<HostImage, {len(self.hidden)} paths hidden>"


def host_image(*, show: Iterable[str] = (), hide: Iterable[str] = ()) -> HostImage:
    """The machine's own root file system as an image.

    ``show`` names paths of :data:`HIDDEN` to leave visible, ``hide`` further paths to hide; the state root is always
    hidden. Raises :class:`InvalidImage` for a path that is not absolute.
    """
    shown, more = set(show), tuple(hide)
    for path in (*shown, *more):
        if not path.startswith("/") or ".." in path.split("/"):
            raise InvalidImage(f"host_image: {path!r} is not an absolute path")
    keys = tuple(f"/etc/ssh/{name}" for name in _names("/etc/ssh") if name.endswith("_key"))
    hidden = (*HIDDEN, *keys, *more)
    return HostImage(tuple(dict.fromkeys(path.rstrip("/") for path in hidden if path not in shown)))


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
