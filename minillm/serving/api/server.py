"""Runs an app with uvicorn until a signal, and ends it without breaking answers off."""

import asyncio
import logging

from minillm.errors import UserError, missing_package
from minillm.serving.api.logs import log_as_json

BACKLOG = 2048  # connections that the system keeps while the event loop is busy
KEEP_ALIVE_S = 75  # longer than proxies and clients keep idle connections (60 s): otherwise they meet closed ones
SPARE_S = 5.0  # beyond the grace time, for answers that have ended and are still being sent
log = logging.getLogger(__name__)


def serve(app, *, host: str, port: int, grace_s: float = 30.0, on_start=None) -> None:
    """Serve ``app`` until SIGINT or SIGTERM, then let what runs finish.

    New requests are refused at once. After ``grace_s`` seconds the running ones end with what they have. A second
    signal ends the program at once.

    Args:
        port: 0 takes a free one.
        on_start: called with the port that is used.

    Raises:
        UserError: uvicorn is not installed, or the address cannot be used.
    """
    server = make_server(app, host=host, port=port, grace_s=grace_s)
    try:
        socket = server.config.bind_socket()
        socket.listen(BACKLOG)  # from now on clients can connect; they wait until the loop runs
    except (OSError, SystemExit) as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or 'address in use or not allowed'}): "
            f"choose another --port or --host"
        ) from None
    log_as_json()
    if on_start is not None:
        on_start(socket.getsockname()[1])
    server.run(sockets=[socket])


def make_server(app, *, host: str, port: int, grace_s: float = 30.0):
    """Return a ``uvicorn.Server`` for ``app`` that ends as ``serve`` says."""
    try:
        import uvicorn
    except ImportError:
        raise missing_package("uvicorn", purpose="the server", extra="serve") from None

    class Server(uvicorn.Server):
        """Tells the worker of its end."""

        async def shutdown(self, sockets=None):
            log.info("ending", extra={"fields": {"grace_s": grace_s}})
            draining = asyncio.ensure_future(app.state.worker.drain(grace_s))
            await super().shutdown(sockets)
            draining.cancel()

        def handle_exit(self, sig, frame):
            """Note a signal. uvicorn's own handler would raise it once more at the end, and the exit code be its."""
            self.force_exit = self.should_exit
            self.should_exit = True

    # Access lines are the guard's, and ``log_as_json`` writes uvicorn's own.
    quiet = {"access_log": False, "log_config": None, "server_header": False}
    times = {"timeout_keep_alive": KEEP_ALIVE_S, "timeout_graceful_shutdown": int(grace_s + SPARE_S) + 1}
    return Server(uvicorn.Config(app, host=host, port=port, backlog=BACKLOG, **times, **quiet))
