"""The chat as a user has it: a terminal with its keys, and eval_model.py with a model."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from minillm.config import ModelConfig
from minillm.data import read_records
from minillm.hub.huggingface import save_model
from minillm.lora import apply_lora, save_lora
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's pseudo terminals")
ROOT = Path(__file__).parents[3]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b(\[[0-9;?]*)?$|[\x01\x02]")  # also one that has not come whole
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"

# A chat whose model repeats the question, or does what it says.
PROGRAM = """
import time
from types import SimpleNamespace
from minillm.errors import script
from minillm.inference.chat import ChatSession, chat, session
from tests.inference.chat.conftest import FakeModel

def stream(model, ids, **options):
    question = said[-1]["content"]
    if "forever" in question:
        while True:
            yield "word "
            time.sleep(0.01)
    if "slowly" in question:
        time.sleep(60)
    if "think" in question:
        yield "<think>"
        yield "a thought</think>"
    yield from "many words " * 5000 if "much" in question else "said " + repr([turn["content"] for turn in said])
    return SimpleNamespace(ids=[1] * 5, finish_reason="eos")

def encode(messages, **options):
    global said
    said = messages
    return [0]

model = FakeModel(n_positions=10**6)
model.encode, session.stream = encode, stream
main = lambda argv=None: chat(ChatSession(model, load=None, history_turns=3, max_new_tokens=5))
script(main)()
"""


class Terminal:
    """A program in a pseudo terminal: what is typed, and what is on the screen."""

    def __init__(self, command: list[str], *, cwd=ROOT, **variables: str):
        self.screen, self._at = "", 0
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm", "LC_ALL": "C.UTF-8"} | variables
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def type(self, text: str | bytes) -> None:
        os.write(self._master, text.encode() if isinstance(text, str) else text)

    def wait_for(self, words: str, *, within_s: float = 30.0) -> str:
        """Return what appeared up to ``words``, without escape codes."""
        end = time.monotonic() + within_s
        while words not in self.text[self._at :]:
            assert time.monotonic() < end, f"no {words!r} in {self.text[self._at :]!r}"
            if not self._read(0.1) and self.process.poll() is not None:
                assert words in self.text[self._at :], f"ended, and no {words!r} in {self.text[self._at :]!r}"
        begin, self._at = self._at, self.text.index(words, self._at) + len(words)
        return self.text[begin : self._at]

    def ask(self, line: str) -> str:
        """Type a line at the prompt; return what follows, up to the next prompt."""
        self.type(line + "\r")
        return self.wait_for("\n> ")

    @property
    def text(self) -> str:
        """Return all that appeared, without escape codes."""
        return ESCAPES.sub("", self.screen).replace("\r", "")

    def end(self) -> int:
        """Return the exit code; the program must end by itself."""
        end = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        while self._read(0.0):
            pass
        return self.process.wait(timeout=1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        with contextlib.suppress(OSError):  # the other side is closed
            data = os.read(self._master, 1 << 16)
            self.screen += data.decode(errors="replace")
            return bool(data)
        return False


@pytest.fixture
def start(python, tmp_path):
    """Start a program in a terminal; every cache is in the test's directory."""
    terminals = []

    def start(*words, **variables):
        settings = {"XDG_CACHE_HOME": str(tmp_path / "cache")} | variables
        terminals.append(Terminal([python, *map(str, words)], **settings))
        terminals[-1].wait_for("\n> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def chat(start):
    return lambda **variables: start("-c", PROGRAM, **variables)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(chat):
    terminal = chat()
    terminal.type("forever\r")
    terminal.wait_for("word word word")
    terminal.type(CTRL_C)
    assert "[stopped" in terminal.wait_for("\n> ")
    terminal.type("slowly\r")
    terminal.wait_for("slowly\n")
    time.sleep(0.1)
    terminal.type(CTRL_C)
    assert "[stopped" in terminal.wait_for("\n> ")
    answer = terminal.ask("and now")
    assert "word word" in answer
    assert "slowly" not in answer
    assert "5 tokens in" in answer
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text


def test_ctrl_c_at_the_prompt(chat):
    # With Ctrl-C a terminal also drops what it has not shown yet, now and then a prompt: it is tried up to four times.
    for attempt in range(4):
        terminal = chat()
        terminal.type("half a line" + CTRL_C)
        try:
            shown = terminal.wait_for("\n> ", within_s=5)
            assert "said ['one']" in terminal.ask("one")
            terminal.type(CTRL_C)
            terminal.wait_for("\n> ", within_s=5)
            terminal.type(CTRL_C)
            status = terminal.end()
        except (AssertionError, subprocess.TimeoutExpired):
            if attempt == 3:
                raise
            continue
        assert "once more" in shown
        assert status == 0
        assert "Traceback" not in terminal.text
        return


def test_editing_history_and_completion(chat, tmp_path):
    history = tmp_path / "cache" / "minillm" / "chat_history"
    terminal = chat()
    assert "said ['你好 🙂']" in terminal.ask("你好a\x7f 🙂")
    terminal.ask("two")
    assert history.read_text() == "你好 🙂\ntwo\n"
    assert history.stat().st_mode & 0o777 == 0o600
    os.kill(terminal.process.pid, signal.SIGKILL)
    again = chat()
    assert "said ['你好 🙂']" in again.ask(UP + UP)
    assert "system message: none" in again.ask("/sys\t")
    (tmp_path / "abc.jsonl").write_text("{")
    assert "abc.jsonl" in again.ask(f"/load {tmp_path}/ab\t")


def test_pasted_text_of_several_lines_is_one_question(chat):
    terminal = chat()
    assert "\x1b[?2004h" in terminal.screen
    assert r"said ['a\nb\n/quit c']" in terminal.ask("\x1b[200~a\rb\n/quit\x1b[201~ c")
    terminal.type("one\\\r")
    terminal.wait_for("\n. ")
    assert r"'one\ntwo'" in terminal.ask("two")
    terminal.type('"""three\r')
    terminal.wait_for("\n. ")
    assert r"'three\nfour'" in terminal.ask('four"""')


def test_a_line_that_is_not_utf8(chat):
    terminal = chat()
    terminal.type(b"a\xff\xfe\r")
    assert "not UTF-8" in terminal.wait_for("\n> ")
    assert "said ['b']" in terminal.ask("b")


def test_a_very_long_answer_arrives_whole(chat):
    assert chat().ask("much").count("many words") == 5000


@pytest.mark.parametrize(
    ("variables", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours(chat, variables, has_colour):
    terminal = chat(**variables)
    assert "a thought" in terminal.ask("think")
    assert ("\x1b[2ma thought" in terminal.screen) == has_colour
    assert ("\x1b[1m" in terminal.screen) == has_colour
    if "TERM" in variables:
        assert "\x1b" not in terminal.screen


def test_a_note_stands_in_for_hidden_thinking(chat):
    terminal = chat()
    terminal.ask("/think hide")
    answer = terminal.ask("think")
    assert "thinking…said" in answer
    assert "a thought" not in answer
    assert "thinking…\x1b[0m\r\x1b[Ksaid" in terminal.screen
    assert "thinking…" not in chat(NO_COLOR="1").ask("think")


def test_a_cache_that_cannot_be_written_costs_only_the_history(chat, tmp_path):
    (tmp_path / "file").write_text("")
    terminal = chat(XDG_CACHE_HOME=str(tmp_path / "file"))
    terminal.ask("one")
    assert "said ['one'" in terminal.ask(UP)


def test_pipes_have_no_history_and_no_codes(python, tmp_path):
    done = subprocess.run(
        [python, "-c", PROGRAM],
        input="think\n/help\n",
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "a thought\nsaid ['think']" in done.stdout
    assert "\x1b" not in done.stdout
    assert not list(tmp_path.iterdir())


# ---- eval_model.py -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two tiny models that never end an answer, and an adapter. Every byte is a token: Chinese characters are three."""
    directory = tmp_path_factory.mktemp("out")
    tokenizer = train_bpe(iter(["a"]), vocab_size=267)
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(**shape, num_key_value_heads=1, max_position_embeddings=4096, initializer_range=0.3)
    for seed, stage in enumerate(("full_sft", "rlhf")):
        torch.manual_seed(seed)
        model = Transformer(config)
        model.model.embed_tokens.weight.data[list(tokenizer.end_ids)] = 0.0  # also the output layer's rows
        save_model(model, directory / f"{stage}_32", tokenizer=tokenizer)
    apply_lora(model, rank=2)
    save_lora(model, directory / "lora" / "cooking_32")
    return directory


def test_eval_model_opens_a_chat(start, out, tmp_path):
    terminal = start(ROOT / "eval_model.py", "--save_dir", out, "--device", "cpu", "--max_new_tokens", 60)
    assert "/help lists the commands" in terminal.text
    answer = terminal.ask("你好 🙂")
    assert re.search(
        r"\[\d+ tokens in [\d.]+ s, [\d,]+ tokens/s, first after \d+ ms; cut at --max_new_tokens 60\]\n\n> $", answer
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", terminal.text)
    assert "rlhf_32: parameters" in terminal.ask("/model rlhf")
    assert "in " + str(out) in terminal.ask("/model nothing")
    assert "cooking_32: parameters" in terminal.ask("/lora cooking")
    assert "rlhf_32, adapter: cooking" in terminal.ask("/lora")
    assert "still model" in terminal.ask("/lora baking")
    assert "rlhf_32: parameters" in terminal.ask("/lora off")
    assert "tokens" in terminal.ask("/retry")
    assert "system message: be kind" in terminal.ask("/system be kind")
    assert "saved 1 answer" in terminal.ask(f"/save {tmp_path / 'chat.jsonl'}")
    terminal.type("/quit\r")
    assert terminal.end() == 0
    (record,) = read_records(tmp_path / "chat.jsonl")
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    assert record.messages[1]["content"] == "你好 🙂"


def test_ctrl_c_stops_a_real_answer(start, out):
    terminal = start(
        ROOT / "eval_model.py", "--save_dir", out, "--device", "cpu", "--temperature", 0, "--max_new_tokens", 4000
    )
    terminal.type("hello\r")
    terminal.wait_for("hello\n")
    time.sleep(0.3)
    terminal.type(CTRL_C)
    assert "[stopped" in terminal.wait_for("\n> ")
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text
