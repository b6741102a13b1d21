"""Chapter 9: the bytes that a token leaves behind, and decoding with a cache against decoding without one."""

import torch

from minillm.config import ModelConfig
from minillm.model import KVCache, Transformer


def bytes_per_token(config, bytes_per_number):
    """Keys and values of all layers: 2 · layers · G · K · bytes."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number


# 1. By hand against a real cache of 100 slots; then with a key head for every query head; then a well-known model.
small = ModelConfig.preset("small")
cache = KVCache(small, batch_size=1, max_len=100, dtype=torch.bfloat16)
print(f"bytes per token by hand: {bytes_per_token(small, 2)}")
print(f"bytes per token of the cache: {sum(t.nbytes for t in cache.keys + cache.values) / 100:.0f}")
full = ModelConfig.preset("small", num_key_value_heads=8)
print(f"bytes per token with 8 kv heads: {bytes_per_token(full, 2)}")
llama = ModelConfig(  # the shape of Llama 3.1 8B
    vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, tie_word_embeddings=False,
)  # fmt: skip
print(f"KiB per token, Llama 3.1 8B: {bytes_per_token(llama, 2) / 1024:.0f}")
print(f"GiB for 128 Ki tokens: {bytes_per_token(llama, 2) * 128 * 1024 / 1024**3:.1f}")
print(f"GiB of the weights: {llama.num_parameters() * 2 / 1024**3:.1f}")

# 2. Fifty new tokens behind a prompt of ten, greedy, both ways.
torch.manual_seed(0)
model = Transformer(ModelConfig.preset("demo", initializer_range=0.1)).eval()
prompt = torch.randint(1024, (1, 10))
with torch.no_grad():
    ids, n_without = prompt, 0
    for _ in range(50):
        logits_without = model(ids)[:, -1]
        n_without += ids.shape[1]
        ids = torch.cat([ids, logits_without.argmax(-1, keepdim=True)], dim=1)
    cache, new, n_with = KVCache(model.config, batch_size=1, max_len=60), prompt, 0
    followed = prompt
    for _ in range(50):
        logits_with = model(new, cache=cache)[:, -1]
        n_with += new.shape[1]
        new = logits_with.argmax(-1, keepdim=True)  # only the new token goes in next
        followed = torch.cat([followed, new], dim=1)
print(f"positions computed without a cache: {n_without}")
print(f"positions computed with a cache: {n_with}")
print(f"tokens that differ: {int((ids != followed).sum())}")
print(f"largest difference of the last logits: {(logits_with - logits_without).abs().max():.5f}")
