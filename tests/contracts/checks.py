"""The promises that the classic training bugs break, each as a function that raises AssertionError.

The test files call them on the library as it is; ``test_seeded_bugs.py`` calls them with a bug put in.
"""

import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.data import ChatRows
from minillm.distributed.engine import Engine
from minillm.losses import causal_lm_loss
from minillm.model import KVCache
from minillm.tokenizer import train_bpe
from minillm.training import optim
from tests.contracts.harness import CONFIG, arguments, gradients_of_steps, largest_difference, tiny_model, train


def partition_invariance(
    directory: Path,
    *,
    double: bool,
    bound: float,
    global_batch_size: int = 12,
    config: ModelConfig = CONFIG,
    weighted: bool = False,
) -> None:
    """Any micro-batch × accumulation gives the same gradients, in the last, partial step too."""

    def gradients(batch_size: int) -> list[dict]:
        args = arguments(
            directory / str(batch_size),
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            learning_rate=1e-30,  # every step at the same weights
            weight_decay=0.0,
        )
        return gradients_of_steps(args, double=double, config=config, weighted=weighted)

    whole = gradients(global_batch_size)
    assert len(whole) == 3
    for batch_size in (1, 3, 4):
        for step, cut in enumerate(gradients(batch_size)):
            difference = largest_difference(cut, whole[step])
            assert difference <= bound, f"step {step}, micro-batches of {batch_size}: {difference:.1e}"


def loss_is_next_token(directory: Path) -> None:
    """The loss of a text is that of predicting each token from those before it, written out with the logits."""
    model = tiny_model(double=True)
    stored = torch.randint(CONFIG.vocab_size, (1, 12), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": stored[:, :-1], "targets": stored[:, 1:]}
    log_probs = F.log_softmax(model(stored), dim=-1)
    expected = -sum(log_probs[0, t, stored[0, t + 1]] for t in range(11))
    loss_sum, n_targets = causal_lm_loss(model, batch)
    assert n_targets == 11
    assert abs((loss_sum - expected).item()) < 1e-10


def answers_are_the_targets(directory: Path) -> None:
    """What a conversation teaches is exactly its answers and their end tokens, each predicted one place before."""
    path = directory / "chat.jsonl"
    path.write_text(
        '{"conversations": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "two"}, '
        '{"role": "user", "content": "and 2?"}, {"role": "assistant", "content": "four then"}]}\n'
    )
    tokenizer = train_bpe(iter(["two four then and"]), vocab_size=267)
    rows = ChatRows([path], tokenizer, max_seq_len=200, packing="best_fit", cache_dir=directory / "cache", seed=0)
    row = rows[0]
    taught = row["targets"] != -100
    text = tokenizer.decode(row["targets"][taught].tolist())
    assert text == "two<|im_end|>four then<|im_end|>", text
    following = row["input_ids"][1:][taught[:-1]]
    assert (following == row["targets"][:-1][taught[:-1]]).all()


def resume_is_exact(
    directory: Path, *, stop_after: int = 4, total: int = 7, config: ModelConfig = CONFIG, log_interval: int = 1
) -> None:
    """A run cut in two equals the whole one bit by bit, with dropout drawing random numbers, past an epoch's end."""
    common = {"batch_size": 3, "accumulation_steps": 2, "max_steps": total, "save_interval": 1, "seed": 7}
    common["log_interval"] = log_interval
    model = {"dropout": 0.2, "n_rows": 17, "config": config}
    whole = train(arguments(directory / "whole", **common), **model)

    class Killed(Exception):
        pass

    def kill(run) -> None:
        if run.step == stop_after:
            raise Killed

    with contextlib.suppress(Killed):
        train(arguments(directory / "cut", **common), **model, before_update=kill)
    torch.manual_seed(1234)  # a new process would not have the old generator either
    resumed = train(arguments(directory / "cut", from_resume=True, **common), **model)
    assert resumed["metrics"] == whole["metrics"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    for index, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(resumed["optimizer"]["state"][index][name], value), (index, name)


@torch.no_grad()
def cache_equals_full(directory: Path) -> None:
    """Decoding token by token with the cache gives the logits of the full forward, for rows of different lengths."""
    model = tiny_model(double=True).eval()
    tokens = torch.randint(CONFIG.vocab_size, (2, 11), generator=torch.Generator().manual_seed(5))
    document_ids = torch.zeros(2, 6, dtype=torch.long)
    document_ids[1, 4:] = -1  # row 1 starts with 4 tokens, row 0 with 6
    cache = KVCache(CONFIG, batch_size=2, max_len=12, dtype=torch.float64)
    model(tokens[:, :6], document_ids=document_ids, cache=cache)
    lengths = [6, 4]
    while max(lengths) < 11:
        step = torch.stack([tokens[row, length] for row, length in enumerate(lengths)])[:, None]
        logits = model(step, cache=cache)[:, 0]
        lengths = [length + 1 for length in lengths]
        for row, length in enumerate(lengths):
            full = model(tokens[row : row + 1, :length])[0, -1]
            assert float((logits[row] - full).abs().max() / full.abs().max()) < 1e-10, (row, length)


@torch.no_grad()
def documents_are_apart(directory: Path) -> None:
    """Documents of a packed row give the logits they give alone, and one cannot change another."""
    model = tiny_model(double=True).eval()
    tokens = torch.randint(CONFIG.vocab_size, (1, 13), generator=torch.Generator().manual_seed(6))
    document_ids = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2])
    packed = model(tokens, document_ids=document_ids)
    assert torch.isfinite(packed).all()
    for span in (slice(0, 5), slice(5, 11)):
        alone = model(tokens[:, span])
        assert float((packed[:, span] - alone).abs().max() / alone.abs().max()) < 1e-10
    tokens[0, 2] = (tokens[0, 2] + 1) % CONFIG.vocab_size
    assert torch.equal(model(tokens, document_ids=document_ids)[:, 5:11], packed[:, 5:11])


def norms_do_not_decay(directory: Path) -> None:
    """With gradients of zero, weight decay shrinks matrices by lr × decay and leaves the norms' scales alone."""
    model = tiny_model(double=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.adamw(model, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-12, atol=0)


class ScaledEngine(Engine):
    """One process with a loss scale of 1,024, as under float16, on products that stay exact."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)


def loss_scale_changes_nothing(directory: Path) -> None:
    """Clipping works on unscaled gradients: a power of two as loss scale gives the very same run."""
    common = {"batch_size": 6, "accumulation_steps": 2}
    plain = train(arguments(directory / "plain", **common))
    scaled = train(arguments(directory / "scaled", **common), engine=ScaledEngine)
    assert all(row["grad_norm"] > 0.5 for row in plain["metrics"])  # so clipping is at work
    for ours, wanted in zip(scaled["metrics"], plain["metrics"], strict=True):
        assert math.isclose(ours["grad_norm"], wanted["grad_norm"], rel_tol=1e-6)
    assert largest_difference(scaled["weights"], plain["weights"]) <= 1e-6
