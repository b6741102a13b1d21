"""A chat over typed lines with a model that answers by rule, and a chat in a terminal of its own."""

import builtins
from types import SimpleNamespace

import pytest

from minillm.errors import UserError
from minillm.inference.chat import ChatSession, chat, session


class FakeModel:
    """Stands for a ``ChatModel``: one id per character; it notes the messages of every prompt."""

    def __init__(self, name="small", lora_name="", *, n_positions=40, opens_with="", completes_text=False):
        self.name, self.lora_name = name, lora_name
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=n_positions))
        self.tokenizer = SimpleNamespace(end_ids=(0,))
        self.opens_with, self.completes_text = opens_with, completes_text
        self.direct_start = "<think></think>"
        self.prompts, self.starts, self.tools = [], [], []

    def encode(self, messages, *, tools=None, start=""):
        self.prompts.append([(message["role"], message["content"]) for message in messages])
        self.starts.append(start)
        self.tools.append(tools)
        return [0] * sum(len(message["content"]) for message in messages)

    @property
    def asked(self):
        """Return the contents of each prompt."""
        return [[content for _, content in prompt] for prompt in self.prompts]


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """Run a chat over the typed lines; return the model, how it was asked, and what was shown."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def talk(*lines, answer=None, model=None, history_turns=3, max_new_tokens=5, load=None, **options):
        model = model or FakeModel()
        calls, typed = [], iter(lines)

        def read(prompt=""):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        def stream(model, ids, **given):
            calls.append((len(ids), given))
            if len(ids) + 1 > model.config.max_position_embeddings:
                raise UserError(f"prompt of {len(ids)} is too long")

            def pieces():
                reason = yield from answer() if answer else ["o", "k"]
                return SimpleNamespace(ids=[1, 2, 3], finish_reason=reason or "eos")

            return pieces()

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(session, "stream", stream)
        options |= {"history_turns": history_turns, "max_new_tokens": max_new_tokens, "load": load}
        chat(ChatSession(model, **options))
        shown = capsys.readouterr()
        return SimpleNamespace(model=model, asked=model.asked, calls=calls, out=shown.out, err=shown.err)

    return talk


@pytest.fixture
def says():
    """Return a rule for ``talk``: answer the texts one after the other, each in single characters."""

    def says(*texts):
        waiting = iter(texts)

        def answer():
            yield from next(waiting)

        return answer

    return says


@pytest.fixture
def stopped():
    """Return a rule for ``talk``: Ctrl-C comes after the pieces."""

    def stopped(*pieces):
        def answer():
            yield from pieces
            raise KeyboardInterrupt

        return answer

    return stopped
