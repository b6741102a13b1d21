"""Chapter 28: a function as a tool, calls in a stream, a grammar for a random model, and how long one waits."""

import random

import torch

from minillm.config import ModelConfig
from minillm.inference import SamplingOptions
from minillm.model import Transformer
from minillm.serving import Engine, QueueFullError, tool_loop
from minillm.serving.tools import Toolbox, ToolCallParser, tool_schema
from minillm.serving.tools.calculator import calculate
from minillm.tokenizer import train_bpe

# 1. A signature and a docstring become a schema; arguments are checked before the function runs.
schema = tool_schema(calculate)["function"]
toolbox = Toolbox([calculate])
print(f"required arguments of {schema['name']}: {len(schema['parameters']['required'])}")
print(toolbox.run({"function": {"name": "calculate", "arguments": '{"expression": 23}'}}))

# 2. The loop: the model calls, the function runs, the model reads the result. Here the model is a script.
CALL = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "23*45"}}\n</tool_call>'
replies = iter([f"One moment.\n{CALL}", "It is 1035."])
question = [{"role": "user", "content": "What is 23*45?"}]
messages = list(tool_loop(lambda conversation, tools: next(replies), question, toolbox))
print(f"messages of the loop: {len(messages)}")
print(f"result of the tool: {messages[1]['content']}")

# 3. The same answer in pieces of one character: nobody sees a part of a call.
parser, shown, calls = ToolCallParser(tools=toolbox.schemas), "", []
for text, new_calls in [*map(parser.push, f"One moment.\n{CALL}"), parser.finish()]:
    shown, calls = shown + text, calls + new_calls
print(f"shown: {shown!r}, calls: {len(calls)}")

# 4. A model with random weights, and a grammar that allows digits only.
torch.manual_seed(0)
tokenizer = train_bpe(iter(["What is 23*45? 0123456789 \n"] * 5), vocab_size=272)
model = Transformer(ModelConfig.preset("demo", vocab_size=tokenizer.vocab_size)).eval()


class Digits:
    """What the engine asks of a constraint: which tokens may come next, and which one came."""

    def allowed(self, vocab_size: int) -> torch.Tensor:
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[[tokenizer.encode(digit)[0] for digit in "0123456789"]] = True
        return mask

    def accept(self, token: int) -> None:
        pass


def numbers(constraint) -> int:
    """Return how many of 20 sampled answers are numbers."""
    engine, options = Engine(model, tokenizer), {"max_new_tokens": 3, "eos_token_id": ()}
    requests = [
        engine.submit([5, 6], seed=seed, sampling=SamplingOptions(), constraint=constraint, **options)
        for seed in range(20)
    ]
    engine.run()
    return sum(request.completion().text.isdecimal() for request in requests)


print(f"numbers without the grammar: {numbers(None)}")
print(f"numbers with the grammar: {numbers(Digits())}")

# 5. A queue of two: who comes later is told so at once.
engine, n_refused = Engine(model, max_queue=2), 0
for _ in range(5):
    try:
        engine.submit([5, 6])
    except QueueFullError:
        n_refused += 1
print(f"refused: {n_refused}")

# 6. A server that is busy for a share of the time: a million requests of mean length 1, one after another.
for load in (0.5, 0.9):
    rng, wait, total = random.Random(0), 0.0, 0.0
    for _ in range(1_000_000):
        length = rng.expovariate(1.0)
        total += wait + length
        wait = max(0.0, wait + length - rng.expovariate(load))
    print(f"mean time at load {load}: {total / 1_000_000:.3f}")
