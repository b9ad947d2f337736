"""Datagrams with file descriptors beside them (unix(7), ``SOCK_SEQPACKET`` and ``SCM_RIGHTS``)."""

from __future__ import annotations

import _socket
import struct

_MAX_FDS = 16
_MAX_WORD = 1 << 16
_MSG_CMSG_CLOEXEC = 0x40000000


def pair() -> tuple[_socket.socket, _socket.socket]:
    """Two connected sockets, close-on-exec."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    return ours, theirs


def send(connection: _socket.socket, word: bytes, fds: tuple[int, ...] | list[int] = ()) -> None:
    """One datagram; the fds are duplicated into the receiver. Raises :class:`OSError` where nobody listens."""
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    connection.sendmsg([word], rights)


def receive(connection: _socket.socket) -> tuple[bytes, list[int]]:
    """One datagram and its fds, close-on-exec; ``b""`` at the end."""
    word, ancillary, _, _ = connection.recvmsg(_MAX_WORD, _socket.CMSG_SPACE(_MAX_FDS * 4), _MSG_CMSG_CLOEXEC)
    return word, [fd for _, _, data in ancillary for fd in struct.unpack(f"={len(data) // 4}i", data)]
