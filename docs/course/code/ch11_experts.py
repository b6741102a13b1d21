"""Chapter 11: parameters that wait, a router with favourites, and the bias that evens them out."""

import torch

from minillm.config import ModelConfig
from minillm.model import RouterStats
from minillm.model.moe import Router, update_router_bias

# 1. What a token goes through is less than what is stored.
moe = ModelConfig.preset("moe")
print(f"parameters, all: {moe.num_parameters()}")
print(f"parameters, active per token: {moe.num_parameters(active=True)}")


# 2. The balance loss of a router that spreads its tokens evenly, and of one that sends all to the same two of eight.
def balance_loss(logits, n_chosen=2):
    """Return the library's balance loss, without its coefficient, for router logits (T, E)."""
    config = ModelConfig(num_hidden_layers=1, num_experts=logits.shape[1], num_experts_per_tok=n_chosen)
    stats = RouterStats(config, aux_loss_coef=1.0, z_loss_coef=0.0)
    stats.begin({"targets": torch.zeros(1, len(logits), dtype=torch.long)})
    chosen = logits.topk(n_chosen).indices
    stats.record(0, logits[None], logits.softmax(-1)[None], chosen[None])
    return stats.finish() / len(logits)


even = torch.full((8, 8), -20.0)
for t in range(8):
    even[t, [t, (t + 1) % 8]] = 20.0  # token t: experts t and t + 1
collapsed = torch.full((8, 8), -20.0)
collapsed[:, :2] = 20.0
print(f"balance loss, even: {balance_loss(even):.3f}")
print(f"balance loss, collapsed: {balance_loss(collapsed):.3f}")

# 3. Tokens have something in common, so some experts are everybody's favourites. The bias learns to hold them back.
torch.manual_seed(0)
config = ModelConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, num_experts=8,
    num_experts_per_tok=2, n_shared_experts=1, scoring_func="sigmoid",
)  # fmt: skip
router = Router(config)
torch.nn.init.normal_(router.weight, std=0.2)
common = torch.randn(32)


def counts_of(n_tokens):
    """Return how many of fresh tokens chose each expert, (E,)."""
    with torch.no_grad():
        _, _, chosen, _ = router(common + torch.randn(n_tokens, 32))  # chosen (N, k)
    return torch.bincount(chosen.flatten(), minlength=8)


def shares(counts):
    return " ".join(f"{share:.2f}" for share in (counts / counts.sum()).tolist())


before = counts_of(20_000)
for _ in range(400):
    update_router_bias(router, counts_of(2000)[None].double(), speed=0.005)
after = counts_of(20_000)
print(f"shares before, of 8 experts: {shares(before)}")
print(f"shares after, of 8 experts: {shares(after)}")
print(f"busiest expert before, in units of the mean: {float(before.max() / before.sum() * 8):.2f}")
print(f"busiest expert after, in units of the mean: {float(after.max() / after.sum() * 8):.2f}")
with torch.no_grad():
    _, scores, chosen, weights = router(common + torch.randn(5000, 32))
is_other = (scores.topk(2).indices.sort().values != chosen.sort().values).any(dim=1)
print(f"share of tokens whose experts are not their best two: {float(is_other.float().mean()):.2f}")
print(f"sum of a token's weights: {float(weights.sum(1).mean()):.3f}")
