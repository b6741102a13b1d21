"""``ServerKeeper``: finds the server at an address, or starts one and stops it when this process ends."""

import atexit
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from minillm.errors import UserError
from minillm.web.client import Client

LOCAL = ("127.0.0.1", "localhost", "::1")
START_S = 600.0  # a large model takes minutes to load
STOP_S = 15.0  # the server finishes what runs, or returns it
N_LINES = 20  # of the output of a server that died


class ServerKeeper:
    """Makes sure that a server answers. One object for all visitors of the page; any thread may call it.

    Args:
        client: of the server. command: what starts one at the client's address; empty: none is started. api_key: of a
            server that is started, which gets it in its environment: command lines are visible to all users.

    Attributes:
        process: the server that was started here; None if there is none.
        failure: why there is no server; empty while one answers.
    """

    def __init__(self, client: Client, command: Sequence[str], *, api_key: str = "", start_s: float = START_S):
        self.client, self.command, self.start_s = client, command, start_s
        self.environment = os.environ | ({"MINILLM_API_KEY": api_key} if api_key else {})
        self.process: subprocess.Popen | None = None
        self.failure = ""
        self._output: IO[bytes] | None = None
        self._lock = threading.Lock()

    def ensure(self) -> None:
        """Return when a server answers; start one first if none does.

        Raises:
            UserError: there is no server and none can be started; or the one that was started here ended, with the end
                of its output. The same error comes back until ``forget_failure``: a server that dies is not started
                over and over by pages that are drawn again.
        """
        with self._lock:
            if not self.failure and not self.client.is_up():
                self.failure = self._start()
            if self.failure:
                raise UserError(self.failure)

    def forget_failure(self) -> None:
        """Let the next ``ensure`` try again."""
        with self._lock:
            self.stop()
            self.failure = ""

    def stop(self) -> None:
        """End the server that was started here, if there is one: first by asking it, then by killing it."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._output.close()

    def _start(self) -> str:
        """Start a server, or wait for the one that was; return why it does not answer, or nothing if it does."""
        url, end = self.client.url, time.monotonic() + self.start_s
        if not self.command:
            return f"no server answers at {url}, and none is to be started (--start_server 0)"
        if self.client.host not in LOCAL:
            return f"no server answers at {url}; only one on this machine (127.0.0.1) can be started from here"
        if self.process is None:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 - the server writes there as long as it runs
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )
            atexit.register(self.stop)
        while not self.client.is_up():
            code = self.process.poll()
            if code is not None:
                return f"{shlex.join(self.command)}\nended with exit code {code}:\n{self._last_lines()}"
            if time.monotonic() > end:
                return f"{shlex.join(self.command)}\nis silent for {self.start_s:g} s:\n{self._last_lines()}"
            time.sleep(0.1)
        return ""

    def _last_lines(self) -> str:
        self._output.seek(0)
        return "\n".join(self._output.read().decode("utf-8", errors="replace").splitlines()[-N_LINES:])
