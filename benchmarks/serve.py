"""What do continuous batches, prompts in parts, speculation and compiled steps gain? And llama.cpp on the same model?

    python benchmarks/serve.py --shape small

One model with random weights, unless a run directory is given; sides take turns, and a ratio is the median of the
rounds' own ratios, above 1 where the second side of a pair is faster.

    clients      so many requests with prompts of different lengths: one at a time against all at once, tokens/s
    first token  long prompts arrive while others answer: read as a whole against read in parts; the longest pause in an
                 answer, and the time to the first token (median, 95th percentile)
    repeats      greedy answers to texts that repeat, without and with prompt lookup (batch 1); the guesses kept
    llama.cpp    (where llama_cpp is installed) greedy answers, one at a time, from the GGUF of the same model: its f32
                 against ours, its q8_0 against ours in int8
"""

import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, median_ratio, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.hub import load_model, save_model
from minillm.hub.gguf import export_gguf
from minillm.model import Transformer
from minillm.serving import Engine, PromptLookup
from minillm.serving.int8 import to_int8
from minillm.tokenizer import load_tokenizer, train_bpe


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is served."""

    model_path: str = ""
    """A run directory; empty: random weights of --shape."""
    shape: str = "small"
    """Preset of the random model: demo, small or base."""
    n_clients: int = 32
    """Requests at once."""
    max_new_tokens: int = 64
    """Greedy tokens per answer."""
    rounds: int = 3
    """Rounds; each runs every side once."""
    num_threads: int = 2
    """Threads of torch, and of llama.cpp."""
    compile: bool = True
    """Also with compiled decode steps (the compilation is not timed)."""
    output: str = "out/benchmarks/serve.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("n_clients", "max_new_tokens", "rounds", "num_threads"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")


def tokenizer_of(vocab_size: int):
    """Return a tokenizer with so many tokens, trained on random words; other programs want one that fits the model."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (40_000, 5), dtype=torch.uint8, generator=generator)
    return train_bpe((bytes(word.tolist()).decode() for word in letters), vocab_size=vocab_size)


def prompts_of(model, n: int, *, shortest: int = 16, longest: int = 96) -> list[list[int]]:
    """Return ``n`` random prompts of evenly spread lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, n).long()[torch.randperm(n, generator=generator)].tolist()
    return [torch.randint(model.config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def alternate(sides: dict, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side, a number per round; each runs once before, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for index in range(rounds):
        for name in turns(list(sides), index):
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def measure_clients(args: Arguments, model) -> dict:
    """Compare one request at a time with all at once; the pages of one run are not found by the next."""
    prompts = prompts_of(model, args.n_clients)
    settings = {"n_pages": args.n_clients * 12, "max_batch_tokens": 512}
    engines = {"one at a time": Engine(model, max_batch=1, **settings), "all at once": Engine(model, **settings)}
    if args.compile:
        engines["one at a time, compiled"] = Engine(model, max_batch=1, compile=True, **settings)
        engines["all at once, compiled"] = Engine(model, compile=True, **settings)
    answers, n_runs = {}, dict.fromkeys(engines, 0)

    def side(name: str):
        def run() -> None:
            n_runs[name] += 1  # another first token, so that no prefix is there already
            own = [[n_runs[name], *prompt[1:]] for prompt in prompts]
            requests = [engines[name].submit(p, max_new_tokens=args.max_new_tokens, eos_token_id=()) for p in own]
            engines[name].run()
            answers.setdefault(name, [request.new_ids for request in requests])

        return run

    seconds = alternate({name: side(name) for name in engines}, args.rounds)
    n_tokens = args.n_clients * args.max_new_tokens
    return {
        "tokens_per_s": {name: n_tokens / median(times) for name, times in seconds.items()},
        "ratio": {name: median_ratio(seconds["one at a time"], seconds[name]) for name in engines},
        "same_ids": {name: ids == answers["one at a time"] for name, ids in answers.items()},
    }


def measure_first_token(args: Arguments, model) -> dict:
    """Compare prompts read as a whole with prompts in parts of 64 tokens, while others answer."""
    short = prompts_of(model, args.n_clients // 2 or 1)
    long_len = min(1024, model.config.max_position_embeddings // 2)
    long = prompts_of(model, 4, shortest=long_len, longest=long_len)
    found = {}
    for name, budget in (("whole prompts", 4096), ("parts of 64", 64)):
        engine = Engine(model, n_pages=args.n_clients * 12 + 4 * (long_len // 16 + 8), max_batch_tokens=budget)
        answering = [engine.submit(p, max_new_tokens=args.max_new_tokens, eos_token_id=()) for p in short]
        while not all(request.new_ids for request in answering):
            engine.step()
        submitted, first, pauses = time.perf_counter(), [], []
        last = dict.fromkeys(answering, submitted)
        waiting = [engine.submit(p, max_new_tokens=2, eos_token_id=()) for p in long]
        while engine.has_work:
            pieces, now = engine.step(), time.perf_counter()
            for piece in pieces:
                if piece.request in waiting and piece.request not in last:
                    first.append(now - submitted)
                elif piece.request in answering:
                    pauses.append(now - last[piece.request])
                last[piece.request] = now
        found[name] = {
            "longest_pause_s": max(pauses),
            "median_pause_s": median(pauses),
            "first_token_median_s": median(first),
            "first_token_95_s": quantiles(first, n=20)[-1],
        }
    return found


def measure_repeats(args: Arguments, model) -> dict:
    """Compare plain decoding with prompt lookup on prompts that hold the same stretch three times."""
    prompts = [prompt[:24] * 3 for prompt in prompts_of(model, 4, shortest=24, longest=24)]
    lookup = Engine(model, max_batch=1, n_pages=64, drafter=PromptLookup())
    engines = {"plain": Engine(model, max_batch=1, n_pages=64), "prompt lookup": lookup}
    answers = {}

    def side(name: str):
        def run() -> None:
            settings = {"max_new_tokens": args.max_new_tokens, "eos_token_id": ()}
            requests = [engines[name].submit(prompt, **settings) for prompt in prompts]
            engines[name].run()
            answers[name] = [request.new_ids for request in requests]

        return run

    seconds = alternate({name: side(name) for name in engines}, args.rounds)
    return {
        "ratio": median_ratio(seconds["plain"], seconds["prompt lookup"]),
        "kept": lookup.stats.n_accepted / max(lookup.stats.n_drafted, 1),
        "tokens_per_step": lookup.stats.n_new_tokens / lookup.stats.n_steps,
        "same_ids": answers["plain"] == answers["prompt lookup"],
    }


def measure_llama_cpp(args: Arguments, model, tokenizer) -> dict | None:
    """Compare with llama.cpp, greedy, one request at a time; None where it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    prompts, n = prompts_of(model, 4), args.max_new_tokens
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, directory, tokenizer=tokenizer)
        theirs = {}
        for dtype in ("f32", "q8_0"):
            path = Path(directory) / f"{dtype}.gguf"
            export_gguf(directory, path, dtype=dtype)
            threads = {"n_threads": args.num_threads, "n_threads_batch": args.num_threads}
            theirs[f"llama.cpp {dtype}"] = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, **threads)

    def run_theirs(name: str) -> None:
        for prompt in prompts:
            tokens = theirs[name].generate(prompt, temp=0.0, repeat_penalty=1.0)
            for _ in range(n):
                next(tokens)

    def run_ours(name: str) -> None:
        for prompt in prompts:
            ours[name].submit(prompt, max_new_tokens=n, eos_token_id=())
        ours[name].run()

    settings = {"max_batch": 1, "n_pages": 64}
    ours = {"ours": Engine(model, **settings)}
    pairs = {"ours": "llama.cpp f32"}
    if args.compile:
        in_int8 = copy.deepcopy(model)
        to_int8(in_int8)
        ours["ours, compiled"] = Engine(model, compile=True, **settings)
        ours["ours, int8"] = Engine(in_int8, compile=True, **settings)
        pairs |= {"ours, compiled": "llama.cpp f32", "ours, int8": "llama.cpp q8_0"}
    sides = {name: partial(run_theirs, name) for name in theirs} | {name: partial(run_ours, name) for name in ours}
    seconds = alternate(sides, args.rounds)
    return {
        "tokens_per_s": {name: len(prompts) * n / median(times) for name, times in seconds.items()},
        "ratio": {name: median_ratio(seconds[theirs], seconds[name]) for name, theirs in pairs.items()},
    }


@script
def main(argv: list[str] | None = None) -> None:
    """Measure all parts; print and write them."""
    args = parse(Arguments, argv)
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    if args.model_path:
        model, tokenizer = load_model(args.model_path).eval(), load_tokenizer(args.model_path)
    else:
        model = Transformer(ModelConfig.preset(args.shape)).eval()
        tokenizer = tokenizer_of(model.config.vocab_size)
    results = {"clients": measure_clients(args, model)}
    clients = results["clients"]
    rows = [["", "tokens/s", "ratio", "same ids"]]
    for name, rate in clients["tokens_per_s"].items():
        rows.append([name, f"{rate:,.0f}", f"{clients['ratio'][name]:.2f}x", str(clients["same_ids"][name])])
    print(f"{args.n_clients} clients\n{format_table(rows)}\n", flush=True)
    results["first_token"] = measure_first_token(args, model)
    rows = [["", "longest pause", "median pause", "first token", "95 %"]]
    for name, figures in results["first_token"].items():
        rows.append([name, *(f"{value * 1e3:,.0f} ms" for value in figures.values())])
    print(f"four long prompts while {args.n_clients // 2} answer\n{format_table(rows)}\n", flush=True)
    results["repeats"] = repeats = measure_repeats(args, model)
    print(
        f"prompt lookup: {repeats['ratio']:.2f}x, {repeats['kept']:.0%} of the guesses kept, "
        f"{repeats['tokens_per_step']:.1f} tokens per step, same ids {repeats['same_ids']}\n",
        flush=True,
    )
    results["llama_cpp"] = against = measure_llama_cpp(args, model, tokenizer)
    if against is None:
        print("llama.cpp: not installed (pip install llama-cpp-python)")
    else:
        rows = [["", "tokens/s", "ratio"]]
        for name, rate in against["tokens_per_s"].items():
            ratio = against["ratio"].get(name)
            rows.append([name, f"{rate:,.0f}", "" if ratio is None else f"{ratio:.2f}x"])
        print(format_table(rows))
    write_json(args.output, {"arguments": vars(args), "results": results})


if __name__ == "__main__":
    main()
