"""Chapter 27: pages instead of rows, steps that are never idle, a prefix computed once, and guesses that stay exact."""

import torch

from minillm.config import ModelConfig
from minillm.inference import SamplingOptions, generate
from minillm.inference.answer import Answer
from minillm.model import Transformer
from minillm.serving import DraftModel, Engine
from minillm.serving.pages import PagePool
from minillm.serving.speculate import Draft, check_draft, n_uniforms

torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
model = Transformer(ModelConfig(**sizes)).eval()

# 1. Memory: three requests of 10, 37 and 100 tokens, in rows of 128 or in pages of 16.
lengths = [10, 37, 100]
pool = PagePool(n_pages=64, page_len=16)
print(f"places reserved in rows: {128 * len(lengths)}")
print(f"places reserved in pages: {16 * sum(pool.n_needed(n) for n in lengths)}")

# 2. Time: answers of 20 or 2 tokens, two at once. A fixed batch waits for its longest answer.
limits = [20, 2, 2, 2, 20, 2, 2, 2]
prompts = [[1 + n, 5, 9] for n in range(len(limits))]
engine = Engine(model, page_len=16, max_batch=2)
requests = [engine.submit(ids, max_new_tokens=n, eos_token_id=()) for ids, n in zip(prompts, limits, strict=True)]
engine.run()
fixed = sum(max(limits[n : n + 2]) for n in range(0, len(limits), 2))
print(f"steps of fixed batches: {fixed}")
print(f"steps of the engine: {engine.stats.n_steps}")
differ = 0
for request, n in zip(requests, limits, strict=True):
    alone = generate(model, [request.prompt_ids], max_new_tokens=n, temperature=0, eos_token_id=())[0]
    differ += request.new_ids != alone
print(f"answers unlike a single run: {differ}")

# 3. A shared beginning of 40 tokens: its two full pages are found, the rest is computed.
system = list(range(40))
engine.submit([*system, 50, 51], max_new_tokens=1)
engine.run()
second = engine.submit([*system, 60, 61, 62], max_new_tokens=1)
engine.run()
print(f"prompt tokens found: {second.n_cached} of {len(second.prompt_ids)}")

# 4. Speculation with a perfect guesser: 4 guesses and one token more in each pass.
engine = Engine(model, drafter=DraftModel(model, n_draft=4))
request = engine.submit([1, 5, 9], max_new_tokens=40, eos_token_id=())
engine.run()
print(f"passes for 40 tokens: {engine.stats.n_steps}")

# 5. A poor guesser: guesses follow q, yet what comes out follows p.
p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
guesses = torch.multinomial(q, 4000, replacement=True).tolist()
uniforms = torch.rand(4000, n_uniforms(2)).tolist()
tokens = []
for guess, numbers in zip(guesses, uniforms, strict=True):
    answer = Answer([0], limit=2, options=SamplingOptions(), uniforms=numbers)
    tokens.append(next(check_draft(answer, Draft([guess], q[None].double()), p.log().expand(2, 3))))
print(f"share of guesses kept: {sum(a == b for a, b in zip(tokens, guesses, strict=True)) / 4000:.4f}")
print(f"share of token 0: {tokens.count(0) / 4000:.4f}")
