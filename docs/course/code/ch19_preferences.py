"""Chapter 19: where preference losses start, where they may end, and three ways of being stuck at ln 2."""

import math

import torch

from minillm.losses import dpo_loss, kto_loss

CHOSEN = torch.tensor([0] * 8 + [1] * 2)  # ten people: eight prefer reply 0 to reply 1, two the other way round


def pair_loss(policy, reference, *, beta=0.1):
    """Return the mean DPO loss of the ten pairs from the log-probabilities (3,) of three replies to one prompt."""
    loss_sum, n_pairs = dpo_loss(
        policy[CHOSEN], policy[1 - CHOSEN], reference[CHOSEN], reference[1 - CHOSEN], beta=beta
    )
    return loss_sum / n_pairs


def tune(*, n_steps=300, learning_rate=0.1, dtype=torch.float32, reference_moves=False):
    """Tune the logits of three replies; return the last loss, and by how much log p of each reply has changed."""
    logits = torch.tensor([4.0, 5.0, 3.0], dtype=dtype, requires_grad=True)
    start = logits.detach().float().log_softmax(-1)
    for _ in range(n_steps):
        policy = logits.float().log_softmax(-1)
        reference = policy.detach() if reference_moves else start
        loss = pair_loss(policy, reference)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= learning_rate * gradient.sign()  # what AdamW does at first: a step of the rate's size
    return loss.item(), logits.detach().float().log_softmax(-1) - start


# 1. Before the first step the policy is the reference, so every difference of log-probabilities is 0.
zero = torch.zeros(1)
for name in ("sigmoid", "hinge", "ipo"):
    lengths = {"chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)} if name == "ipo" else {}
    print(f"{name} at the start: {dpo_loss(zero, zero, zero, zero, beta=0.1, loss_type=name, **lengths)[0]:.4f}")
print(f"kto at the start: {kto_loss(zero, zero, torch.tensor([True]), torch.zeros(()))[0]:.4f}")

# 2. Where the labels disagree there is a floor: the entropy of 8 : 2.
print(f"entropy of 8 : 2: {-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)):.4f}")
loss, moved = tune()
print(f"loss after tuning: {loss:.4f}")
print(f"margin in nats: {moved[0] - moved[1]:.2f}")

# 3. Stuck at 0.69: a rate that is too small, weights too coarse for it, a reference that moves along.
print(f"rate too small: {tune(learning_rate=1e-6)[0]:.4f}")
print(f"rate 0.005 in float32: {tune(learning_rate=0.005)[0]:.4f}")
print(f"rate 0.005 in bfloat16: {tune(learning_rate=0.005, dtype=torch.bfloat16)[0]:.4f}")
loss, moved = tune(reference_moves=True)
print(f"reference moves along: {loss:.4f}, although the margin is {moved[0] - moved[1]:.1f} nats")

# 4. The loss sees differences alone: both replies may become less probable while it falls.
start = torch.tensor([-20.0, -20.0])
fallen = start + torch.tensor([-5.0, -25.0])
loss_sum, _ = dpo_loss(*fallen[:, None], *start[:, None])
print(f"chosen 5 nats down, rejected 25 down: {loss_sum:.4f}")
lengths = torch.tensor([10.0])
loss_sum, _ = dpo_loss(
    *fallen[:, None], *start[:, None], sft_weight=1.0, chosen_lengths=lengths, rejected_lengths=lengths
)
print(f"the same with sft_weight 1: {loss_sum:.4f}")
