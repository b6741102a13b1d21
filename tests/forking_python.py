"""A ``python`` for tests that starts in milliseconds: a program is a fork of a process that has torch imported.

Tests of whole programs (a stage that is killed, two ranks, the demo's thirty commands) need processes of their own, and
each would spend four seconds on importing. Here one server imports everything once. The command
``python`` that :func:`start` writes sends it its arguments, environment, directory and standard streams; the server
forks, and the fork runs the program. What it prints, how it ends (exit code or signal) and signals sent to it are as
with the real interpreter. Flags of the interpreter itself go to the real one.

    python ARGS...  ──socket──▶  server  ──fork──▶  keeper  ──fork──▶  the program
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = """#!{python} -IS
import array, json, os, signal, socket, sys
words = sys.argv[1:]
if not words or (words[0].startswith("-") and words[0] not in ("-c", "-m")):
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps({{"argv": words, "env": dict(os.environ), "cwd": os.getcwd()}}).encode()
streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
server.sendmsg([len(request).to_bytes(4, "big")], streams)
server.sendall(request)
answers = server.makefile("r")
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline() or -signal.SIGKILL)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def start(directory: Path, *, owner: int) -> None:
    """Write ``directory/python`` and start its server, which ends after the process ``owner``."""
    address, command = directory / "socket", directory / "python"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    server = subprocess.Popen(
        [sys.executable, __file__, str(address), str(owner)],
        env=environment | {"DS_ACCELERATOR": "cpu"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=(directory / "server.log").open("w"),
        start_new_session=True,  # Ctrl-C is for the tests
    )
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the server did not start: {(directory / 'server.log').read_text()[-2000:]}")
    command.write_text(COMMAND.format(python=sys.executable, address=str(address)))
    command.chmod(0o755)


def serve(address: str, owner: int) -> None:
    """Import what programs import, then fork for each request, for as long as the process ``owner`` lives."""
    for path in sorted((ROOT / "minillm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            importlib.import_module(name)
    for name in ("torch._dynamo", "torch.distributed.run", "torch.distributed.fsdp", "matplotlib.pyplot", "deepspeed"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    importlib.import_module("tests.pictures").draw_pixels()
    importlib.import_module("minillm.inference.samples").MAX_NEW_TOKENS = 8
    gc.collect()
    gc.freeze()  # a fork that collects would copy every page
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    print("ready", flush=True)
    while Path(f"/proc/{owner}").exists():
        if not select.select([listener], [], [], 1.0)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            keep(connection)
        connection.close()


def keep(connection: socket.socket) -> None:
    """Fork the program, tell how it ended; end it when the one who asked is gone. Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    length = int.from_bytes(header, "big")
    request = json.loads(connection.makefile("rb").read(length))
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(request, streams)
    for stream in streams:
        os.close(stream)
    os.setsid()
    for stream in (0, 1, 2):
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(connection, select.POLLHUP | select.POLLRDHUP)
    if all(descriptor != ended for descriptor, _ in poll.poll()):
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def run(request: dict, streams: list[int]) -> None:
    """Become the program: streams, directory, environment, arguments. Never returns."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    words = request["argv"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    is_code, is_module = words[0] == "-c", words[0] == "-m"
    first = request["cwd"] if is_code or is_module else str(Path(words[0]).resolve().parent)
    sys.path[:] = [first, *paths, *(path for path in sys.path[1:] if path not in paths)]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(file), encoding="utf-8", line_buffering=True)
        for file in (io.FileIO(1, "w", closefd=False), io.FileIO(2, "w", closefd=False))
    )
    code = 1
    try:
        try:
            if is_code:
                sys.argv = ["-c", *words[2:]]
                exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
            elif is_module:
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
