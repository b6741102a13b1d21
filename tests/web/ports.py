"""A free port that stays free for its test, while other tests and programs look for one too."""

import socket


def hold_port() -> socket.socket:
    """Return a socket that keeps a port until it is closed: nothing listens there, and nobody else is given it.

    A server of the test may listen there all the same, because it and this socket both set ``SO_REUSEADDR``.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder
