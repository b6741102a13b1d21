"""Training speed of our model, transformers' Llama and litgpt, one optimizer update at a time.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --shapes demo --dtypes float32 --rounds 40
    python benchmarks/train_step.py --shapes demo --profile

A step is forward, loss, backward, gradient clipping and fused AdamW, on the same random batch in which every position
has a target. Our side computes what the training loop does (``causal_lm_loss`` on a batch with document_ids); each
other side has the loss of its own training code. All sides take turns in one process, so a busy machine slows all of
them: read the ratios, which are medians of the ratios of each round. Between the steps a matrix product in the same
dtype is timed, as an upper bound of the arithmetic.
"""

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import Side, format_table, median_ratio, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.errors import UserError, missing_package
from minillm.hardware import keep_freed_memory
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.precision import choose_device

# name: (preset, T positions, B rows)
SHAPES = {"small": ("small", 512, 4), "demo": ("demo", 256, 8)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LITGPT = "pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse"
PRODUCT_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and how often."""

    shapes: str = "small,demo"
    """Comma list of: small (512x8, 26M parameters, T 512, 4 rows), demo (128x4, 0.9M, T 256, 8 rows)."""
    dtypes: str = "float32,bfloat16"
    """Comma list of: float32, bfloat16 (autocast)."""
    rounds: int = 0
    """Measured steps per side (0: 9 for small, 60 for demo)."""
    seq_len: int = 0
    """T, positions per row (0: the shape's own)."""
    batch_size: int = 0
    """B, rows (0: the shape's own)."""
    documents_per_row: int = 1
    """Our side's rows hold so many documents that do not see each other (the other sides have no such thing)."""
    num_threads: int = 0
    """Threads of torch (0: torch's default)."""
    device: str = "cpu"
    """cpu or cuda."""
    peers: str = "transformers,litgpt"
    """Comma list of peers to compare with (empty: none)."""
    profile: bool = False
    """Print the operators of our side, by the time spent in them, instead of comparing."""
    output: str = "out/benchmarks/train_step.json"
    """JSON file for the figures (empty: none)."""

    def check(self):
        """Raise UserError for a value out of range."""
        for name in filter(None, self.shapes.split(",")):
            require(name in SHAPES, f"--shapes {name}: choose from {', '.join(SHAPES)}")
        for name in filter(None, self.dtypes.split(",")):
            require(name in DTYPES, f"--dtypes {name}: choose from {', '.join(DTYPES)}")
        for name in filter(None, self.peers.split(",")):
            require(name in PEERS, f"--peers {name}: choose from {', '.join(PEERS)}")
        for name in ("rounds", "seq_len", "batch_size", "num_threads"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        require(self.documents_per_row >= 1, f"--documents_per_row {self.documents_per_row}: must be at least 1")


# ---- the sides: each takes our configuration and initial weights, and returns (model, loss) -----------------------


def ours(config: ModelConfig, state: dict[str, Tensor]) -> tuple[nn.Module, Callable]:
    """Return our model and its mean loss, as ``Run`` divides it."""
    model = Transformer(config)
    model.load_state_dict(state)

    def loss(batch):
        loss_sum, n_targets = causal_lm_loss(model, batch)
        return loss_sum / n_targets

    return model, loss


def transformers_llama(config: ModelConfig, state: dict[str, Tensor]) -> tuple[nn.Module, Callable]:
    """Return ``LlamaForCausalLM`` with the same weights, and the loss that its own forward computes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = config.to_hf() | {"use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**values, attn_implementation="sdpa"))
    model.load_state_dict(state)

    def loss(batch):
        targets = batch["targets"]
        return model(batch["input_ids"], labels=targets, shift_labels=targets).loss

    return model, loss


def litgpt(config: ModelConfig, state: dict[str, Tensor]) -> tuple[nn.Module, Callable]:
    """Return litgpt's ``GPT`` of the same shape, and the chunked loss of its ``pretrain`` command."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = Config(
        block_size=config.max_position_embeddings,
        padded_vocab_size=config.vocab_size,
        vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_embd=config.hidden_size,
        n_head=config.num_attention_heads,
        n_query_groups=config.num_key_value_heads,
        head_size=config.head_dim,
        intermediate_size=config.intermediate_size,
        rotary_percentage=1.0,
        rope_base=int(config.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(shape)
    model.transformer.wte.weight = model.lm_head.weight  # as its pretrain command ties them
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=config.initializer_range)

    def loss(batch):
        # Under mixed precision Fabric, in which litgpt trains, hands the outputs on in float32.
        return chunked_cross_entropy(model(batch["input_ids"]).float(), batch["targets"])

    return model, loss


PEERS = {"transformers": transformers_llama, "litgpt": litgpt}


def installed_peers(wanted: str) -> dict[str, Callable]:
    """Return the peers that can be measured; say how to install one that cannot. transformers is not optional."""
    peers = {}
    for name in filter(None, wanted.split(",")):
        if importlib.util.find_spec(name) is not None:
            peers[name] = PEERS[name]
        elif name == "transformers":
            raise missing_package("transformers", purpose="this comparison", extra="bench")
        else:
            print(f"litgpt is not installed and is left out; to compare with it: {LITGPT}")
    return peers


# ---- measuring ---------------------------------------------------------------------------------------------------


def make_batch(config: ModelConfig, *, n_rows: int, seq_len: int, n_documents: int, device) -> dict[str, Tensor]:
    """Return a batch as the data layer makes it, of random tokens, with a target at every position."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (n_rows, seq_len + 1), generator=generator)  # (B, T + 1)
    index = torch.arange(seq_len)
    documents = index * n_documents // seq_len  # (T,)
    starts = torch.where(documents != documents.roll(1), index, 0).cummax(0).values
    batch = {
        "input_ids": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "position_ids": (index - starts).expand(n_rows, -1).contiguous(),
        "document_ids": documents.expand(n_rows, -1).contiguous(),
    }
    return {name: column.to(device) for name, column in batch.items()}


def product_seconds(device, dtype, size: int) -> float:
    """Return the time of one product of two size × size matrices, the best of three."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def compare(shape: str, dtype_name: str, args: Arguments, peers: dict[str, Callable]) -> dict:
    """Measure one shape in one dtype; return the row of the table as numbers."""
    config, sides, batch, device, dtype = set_up(shape, dtype_name, args, peers)
    # The same function on both sides: equal weights, equal batch, equal loss.
    losses = {name: side.step(batch if name != "ours" else plain(batch)) for name, side in sides.items()}
    if "transformers" in losses and abs(losses["ours"] - losses["transformers"]) > 1e-2:
        raise UserError(f"the sides do not compute the same: losses {losses}")
    for side in sides.values():
        side.step(batch)
    names, products = list(sides), []
    rounds = args.rounds or (9 if shape == "small" else 60)
    for turn in range(rounds):
        for name in turns(names, turn):
            sides[name].timed_step(batch)
        if turn % max(1, rounds // 9) == 0:
            products.append(product_seconds(device, dtype, PRODUCT_SIZE))
    n_tokens = batch["input_ids"].numel()
    rates = {name: n_tokens / median(side.seconds) for name, side in sides.items()}
    ratios = {name: median_ratio(side.seconds, sides["ours"].seconds) for name, side in sides.items() if name != "ours"}
    product_rate = 2 * PRODUCT_SIZE**3 / median(products)
    return {
        "shape": shape,
        "dtype": dtype_name,
        "rows": batch["input_ids"].shape[0],
        "seq_len": batch["input_ids"].shape[1],
        "documents_per_row": args.documents_per_row,
        "parameters": config.num_parameters(),
        "rounds": rounds,
        "tokens_per_s": rates,
        "ratio": ratios,
        "ratio_to_best": min(ratios.values(), default=None),
        "matrix_flops": product_rate,
        "share_of_matrix_rate": rates["ours"] * config.flops_per_token(batch["input_ids"].shape[1]) / product_rate,
    }


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with each row as one document, which is how the other sides read it."""
    return {name: batch[name] for name in ("input_ids", "targets")}


def set_up(shape: str, dtype_name: str, args: Arguments, peers: dict[str, Callable]):
    """Return (config, sides, batch, device, dtype) of one comparison."""
    preset, seq_len, n_rows = SHAPES[shape]
    config, device, dtype = ModelConfig.preset(preset), choose_device(args.device), DTYPES[dtype_name]
    seq_len, n_rows = args.seq_len or seq_len, args.batch_size or n_rows
    batch = make_batch(
        config, n_rows=n_rows, seq_len=seq_len, n_documents=min(args.documents_per_row, seq_len), device=device
    )
    torch.manual_seed(0)
    state = Transformer(config).state_dict()
    sides = {
        name: Side(*build(config, state), device=device, dtype=dtype) for name, build in {"ours": ours, **peers}.items()
    }
    return config, sides, batch, device, dtype


def profile(shape: str, dtype_name: str, args: Arguments) -> str:
    """Return the table of operators in three of our steps, by their own time."""
    _, sides, batch, device, _ = set_up(shape, dtype_name, args, {})
    side = sides["ours"]
    for _ in range(2):
        side.step(batch)
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            side.step(batch)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50)


# ---- the table ---------------------------------------------------------------------------------------------------


def table(results: list[dict], names: list[str]) -> str:
    """Return the results as text: tokens per second of each side, and the ratios."""
    header = ["shape", "dtype", *(f"{name} tok/s" for name in ["ours", *names]), *(f"ours/{name}" for name in names)]
    rows = [[*header, "share of matrix rate"]]
    for result in results:
        rates = [f"{result['tokens_per_s'][name]:,.0f}" for name in ["ours", *names]]
        ratios = [f"{result['ratio'][name]:.2f}x" for name in names]
        rows.append([result["shape"], result["dtype"], *rates, *ratios, f"{result['share_of_matrix_rate']:.0%}"])
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> list[dict]:
    """Measure, print the table, write the JSON; return the rows."""
    args = parse(Arguments, argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()  # as our trainer does; it applies to all sides, which share the process
    pairs = [(s, d) for s in args.shapes.split(",") if s for d in args.dtypes.split(",") if d]
    if args.profile:
        for shape, dtype_name in pairs:
            print(f"{shape}, {dtype_name}\n{profile(shape, dtype_name, args)}")
        return []
    peers = installed_peers(args.peers)
    results = [compare(shape, dtype_name, args, peers) for shape, dtype_name in pairs]
    print(table(results, list(peers)))
    write_json(args.output, {"arguments": dataclasses.asdict(args), "results": results})
    return results


if __name__ == "__main__":
    main()
