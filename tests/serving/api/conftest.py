"""A server with a tiny model for each module, and the real ``openai`` client in front of it."""

import asyncio
import contextlib
import re
import socket
import threading
import time

import openai
import pytest
import torch

from minillm.config import ModelConfig
from minillm.inference import complete
from minillm.model import Transformer
from minillm.serving import Engine
from minillm.serving.api import create_app
from minillm.serving.api.server import make_server
from minillm.tokenizer import SPECIAL_TOKENS, TAG_TOKENS, encode_chat, train_bpe

KEY = "sk-tiny"
TEXTS = ["Who are you? I am tiny.\n", "小明有三个苹果 🙂\n", '{"name": "add", "arguments": {"a": 1, "b": [true]}}\n']


class Script:
    """A constraint that leaves an answer no choice: the tokens of a text, then the end."""

    def __init__(self, ids: list[int]):
        self.ids, self.n_accepted = ids, 0

    def allowed(self, vocab_size):
        """Return a mask with the next token of the script alone."""
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[self.ids[self.n_accepted]] = True
        return mask

    def accept(self, token):
        """Go on behind a token."""
        assert token == self.ids[self.n_accepted]
        self.n_accepted += 1


class TestEngine(Engine):
    """An engine that can be told what to say, and how fast."""

    __test__ = False
    script: str | None = None
    pause_s = 0.0
    error: Exception | None = None

    def submit(self, prompt_ids, *, constraint=None, **options):
        """Submit, with the script if there is one."""
        if self.script is not None:
            constraint = Script([*encode_tags(self.tokenizer, self.script), self.tokenizer.end_ids[-1]])
        return super().submit(prompt_ids, constraint=constraint, **options)

    def step(self):
        """Step after a pause, or fail."""
        time.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        return super().step()


def encode_tags(tokenizer, text):
    """Return the ids of a text whose tags are single tokens, as a model writes them."""
    ids = []
    for n, part in enumerate(re.split("(" + "|".join(map(re.escape, TAG_TOKENS)) + ")", text)):
        ids += [tokenizer.token_id(part)] if n % 2 else tokenizer.encode(part)
    return ids


@pytest.fixture(scope="session")
def tokenizer():
    """Tags, 256 bytes and a few merges: most characters are several tokens."""
    return train_bpe(iter(TEXTS * 3), vocab_size=320)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Random weights, large enough that greedy answers do not repeat themselves at once; padded embeddings.

    Tags and ends are improbable: their logits are 0.
    """
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.vocab_size + 5, "hidden_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = Transformer(ModelConfig(**shape, initializer_range=0.4)).eval()
    with torch.no_grad():
        for name in SPECIAL_TOKENS:
            model.model.embed_tokens.weight[tokenizer.token_id(name)] = 0
    return model


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    """The module's engine: few pages, so that requests wait and lose theirs."""
    return TestEngine(model, tokenizer, n_pages=200, page_len=4, max_batch=16, max_batch_tokens=64, max_queue=64)


@pytest.fixture(autouse=True)
def plain(engine):
    """Take back what a test told the engine."""
    yield
    engine.script, engine.pause_s, engine.error = None, 0.0, None


@pytest.fixture(scope="module")
def app(engine):
    """The module's app."""
    return create_app(engine, model_name="tiny", api_key=KEY, send_timeout_s=2, log_content=False)


@contextlib.contextmanager
def running(app, **options):
    """Serve an app in a thread; give its address and the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(app, host="127.0.0.1", port=0, **options)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(app):
    """Where the module's server listens."""
    with running(app, grace_s=2) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    """The real client."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def single(model, tokenizer):
    """Call it for what the model answers to one prompt alone: a ``Completion``."""

    def single(prompt, *, seed=None, **options):
        ids = prompt
        if isinstance(prompt, str):
            ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)[0]
        options = {"temperature": 0, "eos_token_id": tokenizer.end_ids, "tokenizer": tokenizer} | options
        if seed is not None:
            options["generator"] = torch.Generator().manual_seed(seed)
        return complete(model, [ids], **options)[0]

    return single


@pytest.fixture
def idle(engine, app):
    """Call it to wait until nothing runs; it returns the number of free pages."""

    def idle(within_s=20):
        end = time.monotonic() + within_s
        while engine.has_work and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.has_work
        return engine.pool.n_free

    return idle
