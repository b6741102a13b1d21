"""How fast is greedy decoding? Ours against transformers' ``generate`` with a static cache, and against itself.

    python benchmarks/generate.py --shapes demo,small --batch_sizes 1,16

Random weights, the same on both sides, prompts of one length (transformers would pad others). The sides take turns; a
ratio is the median of the rounds' own ratios, above 1 where ours is faster. ``engine`` is the serving engine with all
requests at once, ``compiled`` the same with compiled decode steps (the compilation is not timed), ``int8`` that with
weights in eight bits, whose answers are its own. The last column is the share of the memory bandwidth that batch 1 of
``compiled`` reaches: bytes of the weights read per second, over what a plain sum over a large array reads on this
machine, in the same process.
"""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, median_ratio, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.errors import missing_package
from minillm.inference import generate
from minillm.model import Transformer
from minillm.serving import Engine
from minillm.serving.int8 import to_int8


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is decoded."""

    shapes: str = "demo,small"
    """Presets, comma list: demo (0.9M), small (26M), base (104M)."""
    batch_sizes: str = "1,16"
    """Comma list."""
    prompt_len: int = 32
    """Tokens per prompt."""
    max_new_tokens: int = 128
    """Greedy tokens per prompt."""
    rounds: int = 5
    """Rounds; each runs every side once."""
    num_threads: int = 2
    """Threads of torch."""
    dtype: str = "float32"
    """Of weights and cache: float32 or bfloat16."""
    compile: bool = True
    """Two more sides: the engine with compiled decoding (the compilation is not timed), and with int8 weights too."""
    output: str = "out/benchmarks/generate.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("prompt_len", "max_new_tokens", "rounds", "num_threads"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.dtype in ("float32", "bfloat16"), f"--dtype {self.dtype}: give float32 or bfloat16")


def their_model(model: Transformer):
    """Return the same model in transformers."""
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers", purpose="benchmarks/generate.py", extra="bench") from None
    config = transformers.LlamaConfig(**model.config.to_hf())
    theirs = transformers.LlamaForCausalLM(config).to(next(model.parameters()).dtype).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def sides(args: Arguments, model: Transformer, prompts: list[list[int]]) -> dict[str, Callable[[], list[list[int]]]]:
    """Return what each side does: answer the prompts, ids only."""
    theirs, n = their_model(model), args.max_new_tokens

    def transformers_generate() -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0,
            eos_token_id=None, cache_implementation="static", disable_compile=True,
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()

    pages = len(prompts) * -(-(args.prompt_len + n) // 16)
    settings = {"n_pages": pages, "max_batch": len(prompts), "max_batch_tokens": 4096}
    engines = {"engine": Engine(model, **settings)}
    if args.compile:
        in_int8 = copy.deepcopy(model)
        to_int8(in_int8)
        engines["compiled"] = Engine(model, compile=True, **settings)
        engines["int8"] = Engine(in_int8, compile=True, **settings)

    def answer(engine: Engine) -> list[list[int]]:
        requests = [engine.submit(prompt, max_new_tokens=n, eos_token_id=()) for prompt in prompts]
        engine.run()
        return [request.new_ids for request in requests]

    return {
        "transformers": transformers_generate,
        "generate": lambda: generate(model, prompts, max_new_tokens=n, temperature=0, eos_token_id=()),
        **{name: partial(answer, engine) for name, engine in engines.items()},
    }


def bandwidth(n_bytes: int = 2**29) -> float:
    """Return the bytes per second that a sum over ``n_bytes`` reads, the best of five."""
    numbers, best = torch.ones(n_bytes // 4), 0.0
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, n_bytes / (time.perf_counter() - began))
    return best


@torch.no_grad()
def compare(args: Arguments, shape: str, batch_size: int) -> dict:
    """Return tokens per second and ratios of all sides."""
    torch.manual_seed(0)
    config = ModelConfig.preset(shape)
    model = Transformer(config).eval().to(getattr(torch, args.dtype))
    prompts = torch.randint(config.vocab_size, (batch_size, args.prompt_len)).tolist()
    runs = sides(args, model, prompts)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers = {name: run() for name, run in runs.items()}  # warm
    for index in range(args.rounds):
        for name in turns(list(runs), index):
            began = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - began)
    n_tokens = batch_size * args.max_new_tokens
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    read = sum(sizes) / median(seconds.get("compiled", seconds["generate"])) * args.max_new_tokens
    return {
        "shape": shape,
        "batch_size": batch_size,
        "tokens_per_s": {name: n_tokens / median(times) for name, times in seconds.items()},
        "ratio": {name: median_ratio(seconds["transformers"], seconds[name]) for name in runs},
        "same_ids": {name: answers[name] == answers["transformers"] for name in runs if name != "int8"},
        "bandwidth_share": read / bandwidth() if batch_size == 1 else None,
    }


@script
def main(argv: list[str] | None = None) -> None:
    """Compare all shapes and batch sizes; print and write a table."""
    args = parse(Arguments, argv)
    torch.set_num_threads(args.num_threads)
    results = [
        compare(args, shape, int(size)) for shape in args.shapes.split(",") for size in args.batch_sizes.split(",")
    ]
    names = list(results[0]["ratio"])
    rows = [["shape", "batch", *(f"{name} tok/s" for name in names), *names[1:], "same ids", "bandwidth"]]
    for r in results:
        share = r["bandwidth_share"]
        rows.append([
            r["shape"], str(r["batch_size"]), *(f"{r['tokens_per_s'][name]:,.0f}" for name in names),
            *(f"{r['ratio'][name]:.2f}x" for name in names[1:]), str(all(r["same_ids"].values())),
            "" if share is None else f"{share:.0%}",
        ])  # fmt: skip
    print(format_table(rows))
    write_json(args.output, {"arguments": vars(args), "results": results})


if __name__ == "__main__":
    main()
