"""Messages between the provisioner, the warm process and a new kernel: one JSON a line.

The request carries the kernel's three standard streams as open files. Every process
that may see the socket belongs to one user, and both ends look at that.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

CHUNK = 1 << 16  # bytes read at once
LONGEST = 1 << 24  # bytes of one message: an environment is far shorter


class NotOurs(Exception):
    """The process at the other end belongs to another user."""


def send(
    end: socket.socket, message: dict[str, Any], files: Sequence[int] = ()
) -> None:
    """Sends one message, with open files beside its first byte.

    Raises:
        OSError: the other end is gone, or took nothing for the socket's timeout.
    """
    data = json.dumps(message).encode() + b"\n"
    sent = 0
    if files:
        sent = socket.send_fds(end, [data[:CHUNK]], list(files))
    end.sendall(data[sent:])


def receive_request(end: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Reads one message and the files that came with it.

    Raises:
        ConnectionError: the other end left before the message was whole, or sent
            something that is no message.
        OSError: nothing came for the socket's timeout.
    """
    data, files, _, _ = socket.recv_fds(end, CHUNK, 3)
    try:
        while not data.endswith(b"\n"):
            more = end.recv(CHUNK)
            if not more or len(data) > LONGEST:
                raise ConnectionError("the request was cut short")
            data += more
        return json.loads(data), list(files)
    except (OSError, ValueError) as error:
        for file in files:
            os.close(file)
        if isinstance(error, OSError):
            raise
        raise ConnectionError(f"the request is no message: {error}") from None


class Lines:
    """Messages out of bytes that come in any pieces."""

    def __init__(self) -> None:
        self.rest = b""

    def take(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that `data` completes."""
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in whole]


def check_peer(end: socket.socket) -> int:
    """The process at the other end.

    Raises:
        NotOurs: it belongs to another user.
    """
    size = struct.calcsize("3i")
    data = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, user, _ = struct.unpack("3i", data)
    if user != os.geteuid():
        raise NotOurs(f"the process at the other end belongs to user {user}")
    return pid
