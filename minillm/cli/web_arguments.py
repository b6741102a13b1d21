"""The arguments of ``web_demo.py``."""

import os
import shlex
from dataclasses import dataclass
from typing import Annotated

import tyro

from minillm.cli.command_line import require


@dataclass(frozen=True, kw_only=True)
class WebArguments:
    """A page in the browser: chat with a model, and look at training runs."""

    server: str = "http://127.0.0.1:8000"
    """Address of the OpenAI server that answers; if none runs there, serve_api.py is started."""
    start_server: bool = True
    """Start serve_api.py if no server answers."""
    model: str = ""
    """For serve_api.py, if it is started: a stage name, a run's name or a model directory."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """For serve_api.py, if it is started: an adapter, as NAME=ADAPTER; may be given several times."""
    server_flags: str = ""
    """Further flags for serve_api.py, if it is started: --server_flags="--max_queue 8 --num_threads 2"."""
    api_key: str = ""
    """Key that the server asks for (default: the variable MINILLM_API_KEY)."""
    tools: str = ""
    """Python file with functions that a model may be offered (default: calculator, clock, units)."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    host: str = "127.0.0.1"
    """Address on which the page listens; 0.0.0.0: all of this machine, for everybody who can reach it."""
    port: int = 8501
    """Port of the page."""

    @property
    def key(self) -> str:
        """The API key; "" if there is none."""
        return self.api_key or os.environ.get("MINILLM_API_KEY", "")

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        require(0 < self.port < 65536, f"--port {self.port}: must lie between 1 and 65535")
        try:
            shlex.split(self.server_flags)
        except ValueError as error:
            require(False, f"--server_flags {self.server_flags!r}: {error}")
