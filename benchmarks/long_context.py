"""How well does a model predict with longer contexts than in training, with and without scaled positions?

    python benchmarks/long_context.py --model_path out/demo/pretrain_128 --data_path dataset/demo/pretrain_valid.jsonl

All lengths and scalings are measured on the same targets, the last ones of each piece of text; the length is the number
of tokens that the model sees up to the last target. So columns and rows of the table differ only in scaling and length.
Pieces are cut from texts that are long enough. If these give too few pieces, all texts are joined with end-of-text
tokens between them: more context can then help little, and the table shows at which length it begins to harm.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, write_json
from minillm.cli.command_line import parse, require, script
from minillm.cli.eval_arguments import EvalArguments
from minillm.data import read_records
from minillm.errors import UserError
from minillm.hub.huggingface import load_model
from minillm.hub.weights import check_tokenizer, scale_positions
from minillm.model import Transformer
from minillm.tokenizer import load_tokenizer

KINDS = ("none", "linear", "dynamic", "yarn")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured."""

    model_path: str = "out/demo/pretrain_128"
    """A run directory. The default exists after `make demo`."""
    data_path: str = "dataset/demo/pretrain_valid.jsonl"
    """Texts to predict: .jsonl, .jsonl.gz, .parquet or .txt."""
    lengths: str = "64,128,256,512,1024,2048"
    """Tokens that the model sees, with commas."""
    scalings: str = "none,linear,dynamic,yarn"
    """Which to compare, with commas; each one's own factor is allowed: yarn:4,yarn:8."""
    factor: float = 0.0
    """Factor of the scalings that name none (0: the longest length / the trained length)."""
    rope_original_len: int = 0
    """Tokens of the rows trained on (0: that of run.yaml next to the model, else the model's positions)."""
    n_pieces: int = 32
    """Pieces of text."""
    n_scored: int = 32
    """Targets per piece, the last ones."""
    batch_size: int = 4
    """Pieces per forward pass."""
    num_threads: int = 0
    """CPU threads (0: torch's default)."""
    output: str = "out/benchmarks/long_context.json"
    """JSON file for the figures; a picture goes next to it as .png (empty: none)."""

    @property
    def n_tokens(self) -> list[int]:
        """Return the lengths as numbers, ascending."""
        try:
            return sorted({int(word) for word in self.lengths.split(",")})
        except ValueError:
            raise UserError(f"--lengths {self.lengths}: must be whole numbers with commas, e.g. 64,128") from None

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("n_pieces", "n_scored", "batch_size"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.factor == 0 or 1 <= self.factor < math.inf, f"--factor {self.factor}: must be 0 or at least 1")
        shortest = self.n_tokens[0]
        message = f"--lengths {self.lengths}: must be at least --n_scored {self.n_scored}, so that all targets are seen"
        require(shortest >= self.n_scored, message)
        for word in self.scalings.split(","):
            kind = word.partition(":")[0]
            require(kind in KINDS, f"--scalings {self.scalings}: {word!r} is none of {', '.join(KINDS)}")
        require(Path(self.model_path).is_dir(), f"--model_path {self.model_path}: does not exist; run make demo first")
        require(Path(self.data_path).is_file(), f"--data_path {self.data_path}: no such file")


def trained_length(args: Arguments, model: Transformer) -> int:
    """Return the tokens per row that the model was trained on, as far as that is known."""
    if args.rope_original_len:
        return args.rope_original_len
    try:
        content = yaml.safe_load((Path(args.model_path) / "run.yaml").read_text(encoding="utf-8"))
        return int(content["arguments"]["max_seq_len"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return model.config.max_position_embeddings


def cut_pieces(texts: list[str], tokenizer, *, n_tokens: int, n_pieces: int) -> tuple[Tensor, bool]:
    """Return pieces (N, n_tokens + 1) that do not overlap, N ≤ n_pieces, and whether texts had to be joined for them.

    Raises:
        UserError: all texts together are shorter than one piece.
    """
    encoded = [tokenizer.open_document(ids) for ids in tokenizer.encode_batch(texts)]
    pieces = _cut(encoded, n_tokens + 1)
    joined = len(pieces) < n_pieces
    if joined:
        pieces = _cut([[token for ids in encoded for token in ids]], n_tokens + 1)
    if not pieces:
        n_all = sum(map(len, encoded))
        raise UserError(f"--lengths: the texts have {n_all} tokens in all, a piece {n_tokens + 1}; choose shorter ones")
    return torch.tensor(pieces[:n_pieces]), joined


def _cut(sequences: list[list[int]], size: int) -> list[list[int]]:
    return [ids[start : start + size] for ids in sequences for start in range(0, len(ids) - size + 1, size)]


@torch.inference_mode()
def mean_loss(model: Transformer, pieces: Tensor, *, n_tokens: int, n_scored: int, batch_size: int) -> float:
    """Return nats per target over the last ``n_scored`` targets of each piece, seen through ``n_tokens`` tokens."""
    loss_sum = 0.0
    for batch in pieces.split(batch_size):  # (B, longest + 1)
        input_ids, targets = batch[:, -n_tokens - 1 : -1], batch[:, -n_scored:]  # (B, T), (B, n_scored)

        def head(hidden: Tensor, output_weight: Tensor, targets: Tensor = targets) -> Tensor:
            logits = F.linear(hidden[:, -n_scored:], output_weight).float()  # (B, n_scored, V)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")

        loss_sum += model(input_ids, head=head).double().sum().item()
    return loss_sum / (len(pieces) * n_scored)


def measure(args: Arguments) -> dict:
    """Return what was measured: nats per target by scaling and length, and what they belong to."""
    model, tokenizer = load_model(args.model_path).eval(), load_tokenizer(args.model_path)
    check_tokenizer(tokenizer, model, Path(args.model_path))
    original, plain = trained_length(args, model), model.config
    texts = [record.text for record in read_records(args.data_path) if record.text]
    pieces, joined = cut_pieces(texts, tokenizer, n_tokens=args.n_tokens[-1], n_pieces=args.n_pieces)
    factor = args.factor or max(1.0, args.n_tokens[-1] / original)
    nats: dict[str, dict[int, float]] = {}
    for word in args.scalings.split(","):
        name = word if word == "none" or ":" in word else f"{word}:{factor:g}"
        flags = EvalArguments(rope_scaling=name, rope_original_len=0 if name == "none" else original)
        model.config = scale_positions(plain, flags)
        nats[name] = {
            length: mean_loss(
                model, pieces, n_tokens=length, n_scored=args.n_scored, batch_size=args.batch_size
            )
            for length in args.n_tokens
        }  # fmt: skip
    described = {"pieces": len(pieces), "joined": joined, "targets": len(pieces) * args.n_scored}
    return {"trained_length": original, "data": described, "nats_per_token": nats}


def table(result: dict) -> str:
    """Return perplexities, a line per length and a column per scaling."""
    nats = result["nats_per_token"]
    lengths = list(next(iter(nats.values())))
    lines = [["tokens", *nats]]
    for length in lengths:
        mark = " (trained)" if length == result["trained_length"] else ""
        lines.append([f"{length:,}{mark}", *(f"{math.exp(by_length[length]):.2f}" for by_length in nats.values())])
    return format_table(lines)


def draw(result: dict, path: Path) -> None:
    """Draw perplexity against length, a line per scaling.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for (name, by_length), marker in zip(result["nats_per_token"].items(), "os^Dvx*" * 9, strict=False):
        axis.plot(list(by_length), [math.exp(x) for x in by_length.values()], f"{marker}-", label=name)
    axis.axvline(result["trained_length"], color="grey", linestyle=":", label="trained length")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")  # plain positions can be off by a multiple
    axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(by_length), [f"{length:,}" for length in by_length])
    axis.set_xlabel("tokens seen")
    axis.set_ylabel("perplexity")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    result = measure(args)
    data = result["data"]
    print(
        f"{args.model_path}, trained on {result['trained_length']:,} tokens: perplexity of {data['targets']:,} targets "
        f"in {data['pieces']} pieces{' of joined texts' if data['joined'] else ''}\n{table(result)}"
    )
    write_json(args.output, {"arguments": vars(args), **result})
    if args.output:
        picture = Path(args.output).with_suffix(".png")
        try:
            draw(result, picture)
            print(f"written: {picture}")
        except ImportError:
            print("no picture: drawing needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
