"""What does a mixture of experts gain at the same work per token, and what does it cost in time?

    python benchmarks/moe.py --data_path texts.jsonl --valid_path held_out.jsonl --tokenizer_path out/tokenizer

There are two parts. *Training*: a dense model and a mixture of experts with the same number of active parameters (the
width of an expert is that of the dense layer divided by the experts per token) see the same rows for the same number of
steps, with several seeds of weights and order. The table has the validation loss, how even the load of the experts is
at the end, and tokens/s of the training steps; differences are taken seed by seed. *Layer*: our sorted experts against
two loops over the experts, forward and backward: *masked* is the formula itself, every expert on every token, with
weight zero if it was not chosen; *picked* gathers the tokens of one expert after the other, so it has the same number
of multiplications as ours. The sides take turns, and the ratio is the median of the ratios of each round.
"""

import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, median_ratio, turns, write_json
from minillm.cli.arguments import PretrainArguments
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.data import StepBatches, TextRows
from minillm.errors import UserError
from minillm.hardware import keep_freed_memory
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.model.moe import MoE
from minillm.precision import autocast, choose_device, choose_dtype
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import load_tokenizer
from minillm.training.optim import adamw
from minillm.training.run import Run

DEMO = {
    "data_path": "dataset/demo/pretrain_train.jsonl",
    "valid_path": "dataset/demo/pretrain_valid.jsonl",
    "tokenizer_path": "out/demo/tokenizer",
}
LAYER_EXPERTS = 8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is trained, and how often."""

    data_path: str = DEMO["data_path"]
    """Texts to train on, as for train_pretrain.py. The default exists after `make demo`."""
    valid_path: str = DEMO["valid_path"]
    """Held-out texts. The default exists after `make demo`."""
    tokenizer_path: str = DEMO["tokenizer_path"]
    """Directory of the tokenizer. The default exists after `make demo`."""
    cache_dir: str = "out/.token_cache"
    """Cache of tokenised data."""
    steps: int = 300
    """Optimizer updates of each model; 0: only the layer."""
    seeds: str = "1,2,3"
    """Comma list of seeds, of weights and order."""
    preset: str = "demo"
    """Shape of the dense model: small, base or demo."""
    hidden_size: int = 0
    """D (0: the preset's)."""
    num_hidden_layers: int = 0
    """Blocks (0: the preset's)."""
    num_experts: int = 4
    """E of the trained mixture."""
    num_experts_per_tok: int = 2
    """Experts that each token goes through."""
    n_shared_experts: int = 1
    """Experts that every token goes through as well (softmax: taken as 0)."""
    scoring_func: str = "sigmoid"
    """sigmoid or softmax."""
    max_seq_len: int = 128
    """T, positions per row."""
    batch_size: int = 8
    """Rows per update."""
    learning_rate: float = 3e-3
    """Peak; warmed up over 2% of the steps, then a cosine to a tenth."""
    dtype: str = "auto"
    """float32, bfloat16 or auto, as in training."""
    device: str = "cpu"
    """cpu or cuda."""
    rounds: int = 21
    """Rounds of the comparison of layers; 0: only training."""
    layer_tokens: int = 1024
    """Tokens that go through the layer in one round."""
    num_threads: int = 0
    """Threads of torch (0: torch's default)."""
    output: str = "out/benchmarks/moe.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range or a missing file."""
        for name in ("steps", "rounds", "num_threads", "hidden_size", "num_hidden_layers"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        for name in ("batch_size", "max_seq_len", "num_experts", "num_experts_per_tok", "layer_tokens"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        seeds = [seed for seed in self.seeds.split(",") if seed.strip()]
        whole = bool(seeds) and all(seed.strip().isdecimal() for seed in seeds)
        require(whole, f"--seeds {self.seeds}: must be whole numbers with commas, e.g. 1,2,3")
        for name, default in DEMO.items() if self.steps else ():
            value = getattr(self, name)
            if not all(Path(part.strip()).exists() for part in value.split(",")):
                more = "run make demo first, or name your own" if value == default else "name one that is"
                raise UserError(f"--{name} {value}: does not exist; {more}")


def shapes(args: Arguments, **more) -> dict[str, ModelConfig]:
    """Return the configurations ``dense`` and ``moe``, whose active parameters differ only by the routers.

    An expert's width is rounded to a multiple of 8, which grouped kernels need; the dense layer takes the sum.
    """
    given = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers") if getattr(args, name)}
    dense = ModelConfig.preset(args.preset, **given, **more)
    n_shared = args.n_shared_experts if args.scoring_func == "sigmoid" else 0
    n_active = args.num_experts_per_tok + n_shared
    width = 8 * max(1, round(dense.intermediate_size / n_active / 8))
    experts = {
        "num_experts": args.num_experts, "num_experts_per_tok": args.num_experts_per_tok, "n_shared_experts": n_shared,
        "scoring_func": args.scoring_func, "moe_intermediate_size": width,
    }  # fmt: skip
    if args.scoring_func == "softmax":
        experts["intermediate_size"] = width  # Mixtral has one width
    return {
        "dense": dataclasses.replace(dense, intermediate_size=n_active * width),
        "moe": dataclasses.replace(dense, **experts),
    }


# ---- training ----------------------------------------------------------------------------------------------------


def train_once(args: Arguments, config: ModelConfig, tokenizer, seed: int) -> dict:
    """Train one model; return its validation loss, the last row's balance, and tokens/s."""
    with tempfile.TemporaryDirectory() as directory:
        train_args = PretrainArguments(
            data_path=args.data_path, valid_path=args.valid_path, save_dir=directory, cache_dir=args.cache_dir,
            max_steps=args.steps, batch_size=args.batch_size, max_seq_len=args.max_seq_len, seed=seed,
            learning_rate=args.learning_rate, dtype=args.dtype, device=args.device, num_threads=args.num_threads,
            save_interval=0, save_minutes=0, log_interval=max(1, args.steps // 4),
        )  # fmt: skip
        with Run(train_args, stage="bench") as run:
            torch.manual_seed(seed)
            model = Transformer(config)
            rows = [
                TextRows(files, tokenizer, max_seq_len=args.max_seq_len, packing="best_fit", cache_dir=args.cache_dir)
                for files in (train_args.data_files, train_args.valid_files)
            ]
            loader = StepBatches(rows[0], **run.batching())
            valid_loader = StepBatches(rows[1], **run.batching(), shuffle=False)
            optimizer = adamw(run.wrap(model), learning_rate=args.learning_rate)
            model = run.start(optimizer, loader, valid_loader=valid_loader, tokenizer=tokenizer, loss=causal_lm_loss)
            for step in run.steps(loader):
                for batch in step:
                    with run.autocast():
                        loss_sum, n_targets = causal_lm_loss(model, batch, run.router_stats)
                    step.backward(loss_sum, n_targets)
                run.update(step)
            run.validate()
            row = [row for row in read_metrics(run.directory / "metrics.jsonl") if row["split"] == "train"][-1]
            balance = {name: row[name] for name in ("expert_load_max", "expert_entropy", "balance_loss") if name in row}
            progress = run.progress
            tokens_per_s = progress.tokens / progress.seconds
            return {"loss": progress.last_eval["loss"], "tokens_per_s": tokens_per_s} | balance


def compare_training(args: Arguments) -> dict:
    """Train both models with every seed, in turns; return the figures of each, and the differences by seed."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    configs = shapes(args, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_token_id)
    runs: dict[str, list[dict]] = {name: [] for name in configs}
    for index, seed in enumerate(int(seed) for seed in args.seeds.split(",") if seed.strip()):
        for name in turns(list(configs), index):
            runs[name].append({"seed": seed} | train_once(args, configs[name], tokenizer, seed))
    gains = [dense["loss"] - moe["loss"] for dense, moe in zip(runs["dense"], runs["moe"], strict=True)]
    rates = {name: [run["tokens_per_s"] for run in each] for name, each in runs.items()}
    return {
        "parameters": {name: config.num_parameters() for name, config in configs.items()},
        "active_parameters": {name: config.num_parameters(active=True) for name, config in configs.items()},
        "runs": runs,
        "loss_gain": gains,
        "loss_gain_mean": mean(gains),
        "loss_gain_stdev": stdev(gains) if len(gains) > 1 else None,
        "rate_ratio": median_ratio(rates["moe"], rates["dense"]),
    }


def training_table(result: dict) -> str:
    """Return the figures of training as text, means over the seeds."""
    header = ["model", "parameters", "active", "valid loss", "tok/s", "busiest x fair share", "entropy / ln E"]
    table = [header]
    for name, runs in result["runs"].items():
        balance = ["-", "-"]
        if "expert_entropy" in runs[0]:
            balance = [f"{mean(run[key] for run in runs):.3f}" for key in ("expert_load_max", "expert_entropy")]
        counts = [f"{result[key][name]:,}" for key in ("parameters", "active_parameters")]
        loss, rate = mean(run["loss"] for run in runs), median(run["tokens_per_s"] for run in runs)
        table.append([name, *counts, f"{loss:.4f}", f"{rate:,.0f}", *balance])
    spread = "" if result["loss_gain_stdev"] is None else f" +- {result['loss_gain_stdev']:.4f} (over seeds)"
    return (
        f"{format_table(table)}\nloss of dense - loss of moe: {result['loss_gain_mean']:.4f}{spread} nats; "
        f"speed of moe / dense: {result['rate_ratio']:.2f}x"
    )


# ---- the layer ---------------------------------------------------------------------------------------------------


def masked_loop(layer: MoE, x: Tensor) -> Tensor:
    """Return the output of ``layer`` for x (B, T, D): the sum over all experts of weight times output."""
    flat = x.reshape(-1, x.shape[-1])  # (N, D)
    _, scores, chosen, weights = layer.gate(flat)
    spread = torch.zeros_like(scores).scatter(1, chosen, weights)  # (N, E)
    out = 0.0
    for expert, (gate_up, down) in enumerate(zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True)):
        gate, up = F.linear(flat, gate_up).chunk(2, dim=-1)
        out = out + F.linear(F.silu(gate) * up, down) * spread[:, expert, None]
    out = out.to(x.dtype).view_as(x)
    return out if layer.shared_experts is None else out + layer.shared_experts(x)


def picked_loop(layer: MoE, x: Tensor) -> Tensor:
    """Return the output of ``layer`` for x (B, T, D), expert by expert: gather its tokens, multiply, add back."""
    flat = x.reshape(-1, x.shape[-1])  # (N, D)
    _, _, chosen, weights = layer.gate(flat)
    out = torch.zeros_like(flat)
    for expert, (gate_up, down) in enumerate(zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True)):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        gate, up = F.linear(flat[token], gate_up).chunk(2, dim=-1)
        output = F.linear(F.silu(gate) * up, down) * weights[token, choice][:, None]
        out = out.index_add(0, token, output.to(out.dtype))
    out = out.view_as(x)
    return out if layer.shared_experts is None else out + layer.shared_experts(x)


def compare_layers(args: Arguments) -> dict:
    """Time forward and backward of one layer of eight experts, each way; return seconds and how much faster ours is.

    Raises:
        UserError: they do not compute the same.
    """
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    config = dataclasses.replace(shapes(args)["moe"], num_experts=LAYER_EXPERTS)
    torch.manual_seed(0)
    layer = Transformer(dataclasses.replace(config, num_hidden_layers=1)).model.layers[0].mlp.to(device)
    x = torch.randn(1, args.layer_tokens, config.hidden_size).to(device).requires_grad_()
    sides = {
        "sorted": lambda: layer(x),
        "masked": lambda: masked_loop(layer, x),
        "picked": lambda: picked_loop(layer, x),
    }

    def once(forward) -> tuple[float, Tensor]:
        began = time.perf_counter()
        with autocast(device, dtype):
            out = forward()
        out.float().square().sum().backward()
        gradient = x.grad.sum().item()  # waits for the device
        seconds = time.perf_counter() - began
        layer.zero_grad(set_to_none=True)
        x.grad = None
        return seconds, torch.tensor([out.detach().double().norm().item(), gradient])

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    checks = {name: once(forward)[1] for name, forward in sides.items()}
    limit = 1e-4 if dtype == torch.float32 else 2e-2  # of the norm: half precision rounds the loop's sums elsewhere
    if any(abs(checks["sorted"][0] / check[0] - 1) > limit for check in checks.values()):
        raise UserError(f"the layers do not compute the same: {checks}")
    for index in range(args.rounds):
        for name in turns(list(sides), index):
            seconds[name].append(once(sides[name])[0])
    return {
        "experts": LAYER_EXPERTS,
        "tokens": args.layer_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": {name: median(each) for name, each in seconds.items()},
        "ratio": {name: median_ratio(seconds[name], seconds["sorted"]) for name in ("masked", "picked")},
    }


@script
def main(argv: list[str] | None = None) -> dict:
    """Measure, print the tables, write the JSON; return the figures."""
    args = parse(Arguments, argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    results: dict = {}
    if args.rounds:
        results["layer"] = layer = compare_layers(args)
        times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in layer["seconds"].items())
        print(f"layer of {layer['experts']} experts, {layer['tokens']} tokens, {layer['dtype']}, forward and backward:")
        print(f"{times}: " + ", ".join(f"{ratio:.2f}x as fast as {name}" for name, ratio in layer["ratio"].items()))
    if args.steps:
        results["training"] = compare_training(args)
        print(training_table(results["training"]))
    write_json(args.output, {"arguments": dataclasses.asdict(args), **results})
    return results


if __name__ == "__main__":
    main()
