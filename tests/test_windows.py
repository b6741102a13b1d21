"""What Windows lacks is taken away, in a process of its own: everything imports, trains, saves, resumes and answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Modules and names of Python that exist on Unix alone; directories cannot be opened, files flushed only for writing.
HIDE = """
import os, pathlib, signal, sys
# Other packages have their own ways on Windows: they are imported whole.
import numpy, pytest, safetensors.torch, tokenizers, torch.distributed.checkpoint, torch.distributed.fsdp
import torch.distributed.run, torch.utils.data, tqdm, tyro, yaml
for name in ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog", "posix_ipc"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "killpg", "setsid", "sched_getaffinity",
             "getloadavg", "mkfifo", "chown", "wait3", "wait4"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGCONT", "SIGTSTP", "SIGPIPE"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("alarm", "setitimer", "pthread_sigmask", "pause", "sigwait"):
    if hasattr(signal, name):
        delattr(signal, name)
"""

# Only once torch is imported, which asks for the platform's own files.
HIDE_OS = """
real_open, real_fsync, real_kill = os.open, os.fsync, os.kill
writable = set()
os.O_BINARY = 0
def open_(path, flags, *more, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    descriptor = real_open(path, flags, *more, **named)
    (writable.add if flags & (os.O_RDWR | os.O_WRONLY) else writable.discard)(descriptor)
    return descriptor
def fsync(descriptor):
    import fcntl_real
    if fcntl_real.fcntl(descriptor, fcntl_real.F_GETFL) & (os.O_RDWR | os.O_WRONLY) == 0:
        raise OSError(9, "Bad file descriptor")
    return real_fsync(descriptor)
def kill(pid, number):
    raise AssertionError("os.kill ends processes on Windows, whatever the signal")
os.open, os.fsync, os.kill = open_, fsync, kill
import minillm.checkpoints.checkpoint as checkpoint
class Windows:
    name = "nt"
    def __getattr__(self, name):
        return getattr(os, name)
checkpoint.os = Windows()
"""


def run(code: str, *, cwd: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    prefix = "import fcntl\nimport sys\nsys.modules['fcntl_real'] = fcntl\n" + HIDE
    done = subprocess.run(
        [sys.executable, "-c", prefix + code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="is the real thing there")


def test_everything_imports_and_a_model_is_trained_resumed_and_answers(tmp_path):
    code = f"""
import importlib, pkgutil, runpy, torch
import minillm
names = [m.name for m in pkgutil.walk_packages(minillm.__path__, "minillm.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert len(names) > 80
for script in sorted(pathlib.Path({str(ROOT)!r}).glob("*.py")):
    if script.name != "setup.py":
        runpy.run_path(str(script), run_name="imported")
sys.path.insert(0, {str(ROOT)!r})
import eval_model, train_pretrain
from tests.stages.conftest import PLAIN, SHAPE, documents, sentence, write_lines
from minillm.tokenizer import train_bpe
{HIDE_OS}
train_bpe((sentence(n, 20) for n in range(60)), vocab_size=300).save(pathlib.Path("out/tokenizer"))
data = write_lines(pathlib.Path("text.jsonl"), documents(20))
argv = ["--data_path", str(data), "--max_seq_len", "48", "--batch_size", "4", "--save_interval", "1", *SHAPE, *PLAIN]
train_pretrain.main([*argv, "--max_steps", "2"])
train_pretrain.main([*argv, "--max_steps", "2", "--from_resume"])
pathlib.Path("prompts.txt").write_text("the little\\n")
eval_model.main(["--model_mode", "0", "--prompts", "prompts.txt", "--max_new_tokens", "4", "--device", "cpu",
                 "--hidden_size", "32"])
"""
    run(code, cwd=tmp_path)
    assert (tmp_path / "out" / "pretrain_32" / "model.safetensors").is_file()
    assert len(list((tmp_path / "out" / "pretrain_32" / "checkpoints").glob("step-*"))) >= 1
