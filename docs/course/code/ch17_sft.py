"""Chapter 17: which tokens are targets, what the loss of the questions is, what forgets, and what replay keeps."""

import math

import torch

from minillm.config import ModelConfig
from minillm.losses import causal_lm_loss
from minillm.losses.cross_entropy import IGNORE_INDEX
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, train_bpe

torch.set_num_threads(1)  # the model is small

# 1. The mask of a conversation: 1 where a token is a target.
tokenizer = train_bpe(iter(["2+3= 5 ok " * 20]), vocab_size=267)  # single characters
chat = [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]
chat += [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "ok"}]
for train_on in ("all", "last"):
    ids, mask = encode_chat(tokenizer, chat, train_on=train_on)
    learnt = tokenizer.decode(
        [i for i, is_target in zip(ids, mask, strict=True) if is_target], skip_special_tokens=False
    )
    print(f"targets with {train_on}: {sum(mask)} of {len(ids)}: {learnt}")

# A little world: a conversation is <skill> <question> <answer>. The answer to question k is k + 1 in skill 0 (old),
# and k + 7 in skill 1 (new), modulo 20.
N, ANSWER = 20, 2
OLD, NEW = N, N + 1  # the two skills' tokens


def conversations(skill: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Return n conversations with random questions, (n, 3)."""
    question = torch.randint(N, (n,), generator=generator)
    answer = (question + (1 if skill == OLD else 7)) % N
    return torch.stack([torch.full((n,), skill), question, answer], dim=1)


def batch_of(ids: torch.Tensor, *, only_answers: bool) -> dict[str, torch.Tensor]:
    targets = ids[:, 1:].clone()  # (n, 2): the question and the answer
    if only_answers:
        targets[:, : ANSWER - 1] = IGNORE_INDEX
    return {"input_ids": ids[:, :-1], "targets": targets}


def train(model, skills, *, n_steps=200, only_answers=True) -> float:
    """Train on equal parts of the skills; return the mean loss of the last 20 steps."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(n_steps):
        ids = torch.cat([conversations(skill, 64 // len(skills), generator) for skill in skills])
        loss_sum, n_targets = causal_lm_loss(model, batch_of(ids, only_answers=only_answers))
        loss = loss_sum / n_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@torch.no_grad()
def share_right(model, skill: int) -> float:
    """Return the share of all questions that the model answers."""
    question = torch.arange(N)
    ids = torch.stack([torch.full((N,), skill), question], dim=1)
    right = (question + (1 if skill == OLD else 7)) % N
    return (model(ids)[:, -1].argmax(-1) == right).float().mean().item()


def new_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.preset("demo", vocab_size=N + 2, hidden_size=32, num_hidden_layers=2))


# 2. The questions are random, so their loss cannot be learnt: with them the mean has a floor of ln 20 / 2.
print(f"ln 20 / 2: {math.log(N) / 2:.4f}")
print(f"loss over all tokens: {train(new_model(), [OLD], only_answers=False):.4f}")
base = new_model()
print(f"loss over the answers: {train(base, [OLD]):.4f}")

# 3. A new skill, learnt alone and with old conversations mixed in.
start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
print(f"before: old skill {share_right(base, OLD):.2f}, new skill {share_right(base, NEW):.2f}")
for name, skills in (("alone", [NEW]), ("with replay", [NEW, OLD])):
    base.load_state_dict(start)
    train(base, skills)
    print(f"new skill {name}: {share_right(base, NEW):.2f}")
    print(f"old skill after the new one {name}: {share_right(base, OLD):.2f}")
