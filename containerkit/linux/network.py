"""Network interfaces: netdevice(7) requests."""

from __future__ import annotations

import _socket
import fcntl
import struct

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 0x1
_IFREQ = "=16sh22x"


def set_up(interface: str) -> None:
    """Bring an interface of the own network namespace up."""
    connection = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        request = struct.pack(_IFREQ, interface.encode(), 0)
        flags = struct.unpack(_IFREQ, fcntl.ioctl(connection.fileno(), _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(connection.fileno(), _SIOCSIFFLAGS, struct.pack(_IFREQ, interface.encode(), flags | _IFF_UP))
    finally:
        connection.close()
