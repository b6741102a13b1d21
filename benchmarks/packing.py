"""Packing against padding: the share of a fine-tuning step that is spent on real tokens.

    python benchmarks/packing.py --data_path chats.jsonl --tokenizer_path out/tokenizer
    python benchmarks/packing.py --hidden_size 512 --num_hidden_layers 8 --dtype bfloat16 --rounds 15

Conversations, model and loss are the same; only the rows differ:

- packed: rows of exactly max_seq_len, filled by best fit with conversations that do not see each other.
- padded: one conversation per row in random order, each micro-batch padded to its longest row, with as many rows as
  the budget allows. This is the dynamic padding of a padding collator.
- fixed_rows: the same with a fixed number of rows (batch_size), as from a DataLoader. Its micro-batches are smaller
  than the budget, so that the longest one still fits.
- sorted: our ``packing="none"``: as padded, but the rows of one update are first sorted by length (and with our own
  batches, whose document_ids become a mask).

A micro-batch has at most batch_size x max_seq_len positions on every side, and every micro-batch is one full step:
forward, backward, clipping, AdamW. Padded and fixed_rows have the cheapest correct attention: padding is on the right,
so causal attention already hides it and no mask is built; with --padding_mask they have the mask that transformers
builds from a collator's attention_mask. All sides take turns in one process; the ratios are medians of the ratios of
each round. Tokens are positions without padding.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import Side, format_table, median_ratio, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.data import ChatRows, StepBatches, collate
from minillm.errors import UserError
from minillm.hardware import keep_freed_memory
from minillm.losses import causal_lm_loss, count_targets
from minillm.model import Transformer
from minillm.precision import choose_device
from minillm.tokenizer import load_tokenizer

DEMO_DATA, DEMO_TOKENIZER = "dataset/demo/sft_train.jsonl", "out/demo/tokenizer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and how often."""

    data_path: str = DEMO_DATA
    """Conversations: a file, or a comma list of files. The default exists after `make demo`."""
    tokenizer_path: str = DEMO_TOKENIZER
    """Directory of the tokenizer. The default exists after `make demo`."""
    cache_dir: str = "out/.token_cache"
    """Cache of tokenised data."""
    max_seq_len: int = 1024
    """T of a packed row, positions; longer conversations are cut on every side."""
    batch_size: int = 4
    """Packed rows per micro-batch; a micro-batch of the others has at most as many positions."""
    accumulation_steps: int = 8
    """Micro-batches per update among which the sorted side puts rows in order of length."""
    padding_mask: bool = False
    """Padded and fixed_rows mask their padding, as transformers does; otherwise causal attention hides it."""
    hidden_size: int = 256
    """D, width of the model."""
    num_hidden_layers: int = 4
    """Blocks."""
    num_attention_heads: int = 4
    """H, query heads."""
    num_key_value_heads: int = 2
    """G, key and value heads."""
    rounds: int = 9
    """Rounds that count; in each, every side makes steps_per_round steps."""
    steps_per_round: int = 2
    """Steps per side and round."""
    dtype: str = "float32"
    """float32, or bfloat16 (autocast)."""
    device: str = "cpu"
    """cpu or cuda."""
    num_threads: int = 0
    """Threads of torch (0: torch's default)."""
    seed: int = 0
    """Of the order of rows and of the weights."""
    output: str = "out/benchmarks/packing.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("max_seq_len", "batch_size", "accumulation_steps", "rounds", "steps_per_round"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("num_threads", "seed"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        require(self.dtype in DTYPES, f"--dtype {self.dtype}: choose from {', '.join(DTYPES)}")
        for name, default in (("data_path", DEMO_DATA), ("tokenizer_path", DEMO_TOKENIZER)):
            value = getattr(self, name)
            exists = value != default or Path(value).exists()
            require(exists, f"--{name} {value}: does not exist yet; run make demo first, or name your own")


# ---- how rows become micro-batches -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one pass over the data, on one side."""

    rows: ChatRows
    """Its rows."""
    micro_batches: list[np.ndarray]
    """Row numbers of each."""
    make: Callable[[list], dict[str, Tensor]]
    """Turns rows into a batch."""

    def batch(self, index: int) -> tuple[dict[str, Tensor], int]:
        """Return (micro-batch ``index``, counted on past the end from the beginning; its number of tokens)."""
        numbers = self.micro_batches[index % len(self.micro_batches)]
        return self.make([self.rows[int(number)] for number in numbers]), int(self.rows.lengths[numbers].sum())

    def n_positions(self) -> int:
        """Return how many positions, padding included, the whole pass computes."""
        lengths, fixed = self.rows.lengths, self.rows.fixed_len
        return sum(len(numbers) * (fixed or int(lengths[numbers].max())) for numbers in self.micro_batches)

    def padding_share(self) -> float:
        """Return which share of the positions of the whole pass is padding."""
        n_tokens = sum(int(self.rows.lengths[numbers].sum()) for numbers in self.micro_batches)
        return 1 - n_tokens / self.n_positions()


def cut_to_budget(numbers: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Return ``numbers`` in order, cut into micro-batches of at most ``budget`` positions once padded."""
    cut, begin, longest = [], 0, 0
    for index, length in enumerate(lengths[numbers].tolist()):
        longest = max(longest, length)
        if (index - begin + 1) * longest > budget:
            cut.append(numbers[begin:index])
            begin, longest = index, length
    return [*cut, numbers[begin:]]


def padding_collator(rows: list[dict[str, np.ndarray]], *, mask: bool = False) -> dict[str, Tensor]:
    """Return the batch of a padding collator: inputs and targets, padded to the longest row, each from position 0.

    With ``mask`` also ``document_ids``, here 0 for tokens and -1 for padding, from which the model builds its mask.
    """
    batch = collate(rows)
    if mask:
        batch["document_ids"].clamp_(max=0)
    return {name: batch[name] for name in ("input_ids", "targets", *(["document_ids"] if mask else []))}


def make_plans(args: Arguments, tokenizer) -> dict[str, Plan]:
    """Return the plan of every side, over the same conversations."""
    rows = {
        packing: ChatRows(
            args.data_path,
            tokenizer,
            max_seq_len=args.max_seq_len,
            packing=packing,
            seed=args.seed,
            cache_dir=args.cache_dir,
        )
        for packing in ("best_fit", "none")
    }
    packed, single, budget = rows["best_fit"], rows["none"], args.batch_size * args.max_seq_len
    rng = np.random.default_rng(args.seed)

    def steps_of(rows: ChatRows, n_rows: int) -> list[np.ndarray]:
        """Return the row numbers of each step of ``n_rows`` rows, as the training loop takes them."""
        batches = StepBatches(rows, batch_size=n_rows, global_batch_size=n_rows, seed=args.seed)
        return [batches.step_rows(0, index) for index in range(batches.steps_per_epoch)]

    order = rng.permutation(len(single))
    padded = cut_to_budget(order, single.lengths, budget)
    window = max(1, round(args.accumulation_steps * len(single) / len(padded)))
    fixed = np.split(order, range(args.batch_size, len(order), args.batch_size))
    sorted_ = [cut for step in steps_of(single, window) for cut in cut_to_budget(step, single.lengths, budget)]
    pad = partial(padding_collator, mask=args.padding_mask)
    cuts = {
        "packed": (packed, steps_of(packed, args.batch_size), lambda rows: collate(rows, args.max_seq_len)),
        "padded": (single, padded, pad),
        "fixed_rows": (single, fixed, pad),
        "sorted": (single, sorted_, collate),
    }
    plans = {}
    for name, (side_rows, micro_batches, make) in cuts.items():
        # In any order: the sorted side's go from long to short, and only some of them are measured.
        shuffled = [micro_batches[int(index)] for index in rng.permutation(len(micro_batches))]
        plans[name] = Plan(side_rows, shuffled, make)
    return plans


def unpack(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the documents of a packed batch as a padding collator has them, one per row."""
    rows = []
    for row in range(batch["input_ids"].shape[0]):
        documents = batch["document_ids"][row]
        for document in range(int(documents.max()) + 1):
            columns = {name: column for name, column in batch.items() if column.ndim > 1}
            rows.append({name: column[row, documents == document].numpy() for name, column in columns.items()})
    return padding_collator(rows)


def check_same_loss(model: Transformer, batch: dict[str, Tensor]) -> None:
    """Raise UserError unless a packed batch and its documents, padded, have the same sum of losses and targets."""
    with torch.no_grad():
        (packed, n_packed), (padded, n_padded) = (causal_lm_loss(model, b) for b in (batch, unpack(batch)))
    if n_packed != n_padded or not torch.isclose(packed, padded, rtol=1e-5):
        raise UserError(
            f"the sides do not compute the same: packed {packed.item()} over {n_packed.item():.0f} targets, "
            f"padded {padded.item()} over {n_padded.item():.0f}"
        )


# ---- measuring ---------------------------------------------------------------------------------------------------


def make_sides(args: Arguments, plans: dict[str, Plan], vocab_size: int) -> dict[str, Side]:
    """Return a model per side, of equal weights, after checking that they compute the same loss."""
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
    )
    device = choose_device(args.device)
    sides = {}
    for name in plans:
        torch.manual_seed(args.seed)
        model = Transformer(config)
        if not sides:
            check_same_loss(model, plans["packed"].batch(0)[0])
        sides[name] = Side(model, mean_loss(model), device=device, dtype=DTYPES[args.dtype])
    return sides


def mean_loss(model: Transformer) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return the loss of every side: the mean over a batch's targets, as ``Run`` divides it."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        loss_sum, n_targets = causal_lm_loss(model, batch)
        return loss_sum / n_targets.clamp(min=1).to(loss_sum.dtype)

    return loss


def measure(args: Arguments, plans: dict[str, Plan], sides: dict[str, Side]) -> dict[str, dict]:
    """Let the sides take turns; return the figures of each."""
    names, n_steps = list(sides), args.steps_per_round
    rates: dict[str, dict[str, list]] = {name: {"tokens": [], "targets": []} for name in names}
    for turn in range(-1, args.rounds):  # round -1 warms up
        for name in turns(names, turn):
            side, n_tokens, n_targets = sides[name], 0, 0.0
            side.seconds.clear()
            for index in range(n_steps):
                batch, n = plans[name].batch((turn + 1) * n_steps + index)
                n_tokens, n_targets = n_tokens + n, n_targets + float(count_targets(batch["targets"]))
                side.timed_step({key: column.to(side.device) for key, column in batch.items()})
            if turn >= 0:
                rates[name]["tokens"].append(n_tokens / sum(side.seconds))
                rates[name]["targets"].append(n_targets / sum(side.seconds))
    return {
        name: {
            "micro_batches": len(plan.micro_batches),
            "positions_per_micro_batch": plan.n_positions() / len(plan.micro_batches),
            "padding_share": plan.padding_share(),
            "tokens_per_s": median(rates[name]["tokens"]),
            "targets_per_s": median(rates[name]["targets"]),
            "packed_ratio": median_ratio(rates["packed"]["tokens"], rates[name]["tokens"]),
        }
        for name, plan in plans.items()
    }


def table(figures: dict[str, dict]) -> str:
    """Return the figures as text, one side a line."""
    rows = [["rows", "positions/step", "padding", "tokens/s", "targets/s", "packed is"]]
    for name, side in figures.items():
        numbers = [f"{side[key]:,.0f}" for key in ("tokens_per_s", "targets_per_s")]
        share, ratio = f"{side['padding_share']:.1%}", f"{side['packed_ratio']:.2f}x"
        rows.append([name, f"{side['positions_per_micro_batch']:,.0f}", share, *numbers, ratio])
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Measure, print the table, write the JSON; return the figures of each side."""
    args = parse(Arguments, argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()  # as our trainer does; it applies to all sides, which share the process
    tokenizer = load_tokenizer(args.tokenizer_path)
    plans = make_plans(args, tokenizer)
    lengths = plans["padded"].rows.lengths
    data = {
        "conversations": len(lengths),
        "tokens": int(lengths.sum()),
        "targets": int(plans["padded"].rows.n_targets),
        "median_tokens": float(np.median(lengths)),
        "longest": int(lengths.max()),
    }
    print(f"{args.data_path}: " + ", ".join(f"{name} {value:,.0f}" for name, value in data.items()))
    figures = measure(args, plans, make_sides(args, plans, tokenizer.vocab_size))
    print(table(figures))
    write_json(args.output, {"arguments": dataclasses.asdict(args), "data": data, "results": figures})
    return figures


if __name__ == "__main__":
    main()
