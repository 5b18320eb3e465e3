"""Connections between processes: made as soon as the other side listens, with messages, or passed on.

JAX's client ends its process as soon as its connection to process 0 breaks: from C++, with exit status 1 and
without a word on what is saved. So in every other process the client connects to a port of its own process,
from which the bytes are passed on to process 0. When process 0 is gone, the client's own connection stays
open, and `peers` has the time to report what happened.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LOOPBACK = "127.0.0.1"
RETRY_SECONDS = 0.2
CHUNK_BYTES = 1 << 16
LINE_BYTES = 1 << 16

Address = tuple[str, int]
Message = dict[str, Any]

_held: list[socket.socket] = []  # connections whose other side is gone; open for as long as the process


class Link:
    """A connection between two processes: messages in both directions, one JSON object a line.

    Attributes:
        spoke: when the last message was sent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer, self._sending = connection, b"", threading.Lock()
        connection.settimeout(1.0)
        self.spoke = time.monotonic()

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError if the connection is closed."""
        with self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        self.spoke = time.monotonic()

    def receive(self) -> Message | None:
        """Return the next message, or None if none comes within a second.

        Raises:
            OSError: the connection is closed.
            ValueError: what came is no message.
        """
        while b"\n" not in self._buffer:
            try:
                chunk = self._connection.recv(CHUNK_BYTES)
            except TimeoutError:
                return None
            if not chunk:
                raise ConnectionResetError
            self._buffer += chunk
            if len(self._buffer) > LINE_BYTES:
                raise ValueError
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError
        return message

    def detach(self) -> tuple[socket.socket, bytes]:
        """Return the connection, for other use, and the bytes that came after the last message."""
        self._connection.settimeout(None)
        return self._connection, self._buffer

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def dial(address: Address, seconds: float) -> socket.socket:
    """Connect to an address; try again for some seconds, as nobody may listen there yet.

    Raises:
        OSError: the last failure.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 1.0))
            if connection.getsockname() != connection.getpeername():  # Linux may connect a port to itself
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            connection.close()
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(RETRY_SECONDS)


def listen(host: str, port: int) -> socket.socket:
    """Listen at a port, 0 for any free one; an empty host is every address of this machine, IPv6 included.

    Raises:
        OSError: the port is taken, or the host is not this machine.
    """
    if host or not socket.has_dualstack_ipv6():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)


def port_of(listener: socket.socket) -> int:
    """Return the port at which a socket listens."""
    port: int = listener.getsockname()[1]
    return port


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with listen(LOOPBACK, 0) as listener:
        return port_of(listener)


def serve(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Call `handle` with each connection to a listener, in a thread of its own, until the process ends."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:  # of this connection, or no descriptor is free: see accept(2)
                time.sleep(RETRY_SECONDS)
                continue
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def carry(near: socket.socket, far: socket.socket, *, hold: bool = False) -> None:
    """Pass bytes on between two connections, both ways, in threads of their own.

    Args:
        near: one of them.
        far: the other.
        hold: keep `near` open after `far` has ended; else the end of either ends both.
    """
    if hold:
        _held.append(near)
    for source, target, closes in ((near, far, True), (far, near, not hold)):
        threading.Thread(target=_pass_on, args=(source, target, closes), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, closes: bool) -> None:
    with suppress(OSError):
        while chunk := source.recv(CHUNK_BYTES):
            target.sendall(chunk)
    if closes:
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
