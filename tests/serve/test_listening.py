"""What a connection has from the socket that it came in by."""

from __future__ import annotations

import socket

from tenon.serve.run import listen


def test_a_token_is_sent_at_once_and_little_is_kept_for_who_does_not_read() -> None:
    """Without TCP_NODELAY the kernel keeps a token back until the client has acknowledged the one before, 40 ms."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 1 << 20
