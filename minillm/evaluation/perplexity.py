"""Measures how well a model predicts texts: in nats per token, and in bits per byte, to compare different tokenizers.

A text of n tokens has n + 1 targets, because it is encoded as a document, as in training.

    input    bos  t1  t2  ...  tn
    target   t1   t2  t3  ...  eos

Shapes: B windows, T positions, D hidden, V vocabulary.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.data.schema import Record
from minillm.errors import UserError
from minillm.losses.cross_entropy import IGNORE_INDEX
from minillm.losses.log_probs import linear_log_probs
from minillm.terminal import progress

TEXTS_AT_ONCE = 4096  # tokenised and sorted together, so that a large file needs little memory


@dataclass(kw_only=True)
class Perplexity:
    """Sums over texts, and the figures that follow from them."""

    loss_sum: float = 0.0
    """Σ −log p(target), nats."""
    n_targets: int = 0
    """Tokens of the texts, plus one end of document per text."""
    n_bytes: int = 0
    """UTF-8 bytes of the texts; the end of a document counts none."""
    n_texts: int = 0
    log_prob: float | None = 0.0
    """Σ of the texts' exact log-probabilities, nats; None unless every text came with one."""
    by_kind: dict[str, "Perplexity"] = field(default_factory=dict)
    """The same per kind of text, where records say theirs."""

    @property
    def nats_per_token(self) -> float:
        """Return the mean loss per target."""
        return self.loss_sum / self.n_targets

    @property
    def perplexity(self) -> float:
        """Return exp(nats per token)."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Σ loss / ln 2 / bytes; None if all texts are empty."""
        return self.loss_sum / math.log(2) / self.n_bytes if self.n_bytes else None

    @property
    def floor(self) -> float | None:
        """−Σ log p / targets, in nats per token: the best possible loss on average. None if not known."""
        return None if self.log_prob is None else -self.log_prob / self.n_targets

    @property
    def gap(self) -> float | None:
        """Return the loss above the floor, nats per token; None if the floor is not known."""
        return None if self.log_prob is None else (self.loss_sum + self.log_prob) / self.n_targets

    @property
    def gap_bits_per_byte(self) -> float | None:
        """Return the loss above the floor, bits per byte; None if the floor is not known."""
        if self.log_prob is None or not self.n_bytes:
            return None
        return (self.loss_sum + self.log_prob) / math.log(2) / self.n_bytes

    def as_dict(self) -> dict:
        """Return sums and ratios as plain numbers, nested by kind, for JSON."""
        names = ("n_texts", "n_targets", "n_bytes", "nats_per_token", "perplexity", "bits_per_byte")
        values = {name: getattr(self, name) for name in (*names, "floor", "gap", "gap_bits_per_byte")}
        if self.by_kind:
            values["by_kind"] = {kind: part.as_dict() for kind, part in sorted(self.by_kind.items())}
        return values

    def table(self) -> str:
        """Return a table as text: a line per kind, then one for all."""
        lines = [f"{'kind':<20} {'texts':>8} {'targets':>10} {'nats/token':>11} {'bits/byte':>10}"]
        with_floor = self.log_prob is not None or any(p.log_prob is not None for p in self.by_kind.values())
        if with_floor:
            lines[0] += f" {'floor':>8} {'gap':>8} {'gap b/B':>8}"
        for kind, part in [*sorted(self.by_kind.items()), ("all", self)]:
            line = f"{kind:<20} {part.n_texts:>8,} {part.n_targets:>10,} {part.nats_per_token:>11.4f}"
            line += f" {_number(part.bits_per_byte):>10}"
            if with_floor:
                line += "".join(f" {_number(x):>8}" for x in (part.floor, part.gap, part.gap_bits_per_byte))
            lines.append(line)
        return "\n".join(lines)

    def _add(self, text: "_Text", loss_sum: float) -> None:
        self.loss_sum += loss_sum
        self.n_targets += len(text.ids) - 1
        self.n_bytes += text.n_bytes
        self.n_texts += 1
        known = self.log_prob is not None and text.log_prob is not None
        self.log_prob = self.log_prob + text.log_prob if known else None


class _Text(NamedTuple):
    ids: list[int]  # begin, tokens, end
    n_bytes: int
    kind: str | None
    log_prob: float | None


class _Window(NamedTuple):
    text: int  # which text
    inputs: list[int]
    targets: list[int]
    first_scored: int  # the targets before this one were scored by the window before


def perplexity(
    model,
    texts: Iterable[str | dict | Record],
    tokenizer,
    *,
    max_seq_len: int | None = None,
    batch_size: int = 16,
    overlap: int | None = None,
) -> Perplexity:
    """Return the summed loss of ``model`` on ``texts``; each text is scored separately.

    Args:
        texts: strings, or records ``{"text", "kind"?, "log_prob"?}`` as dicts or from ``read_records``: the
            loss is grouped by ``kind`` (one that is not a string by its JSON), and compared with the floor where all of
            a group's records have ``log_prob`` (nats, end included).
        tokenizer: the model's own.
        max_seq_len: longest window T in tokens; None: 1,024, or the model's positions if these are fewer.
        batch_size: windows per forward pass; it only affects speed and memory.
        overlap: a text longer than a window is split into several; each repeats this many inputs of the one before as
            context (None: half a window). Every target counts exactly once, and its context is the text back to the
            start of its window: at least ``overlap`` tokens.

    Losses are computed in at least float32 and summed in float64.

    Raises:
        UserError: no texts; a record without text; a window longer than the model's positions; a tokenizer
            with ids outside the model's vocabulary.
    """
    positions, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    max_seq_len = min(1024, positions) if max_seq_len is None else max_seq_len
    overlap = max_seq_len // 2 if overlap is None else overlap
    if not 1 <= max_seq_len <= positions:
        raise UserError(f"max_seq_len {max_seq_len}: the model has positions for 1 to {positions} tokens")
    if not 0 <= overlap < max_seq_len:
        raise UserError(f"overlap {overlap}: must be at least 0 and below max_seq_len {max_seq_len}")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: must be at least 1")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {vocab_size}: "
            "use the model's own tokenizer"
        )
    total = Perplexity()
    was_training = model.training
    model.eval()
    try:
        records = enumerate(texts)
        while chunk := list(islice(records, TEXTS_AT_ONCE)):
            encoded = _encode(chunk, tokenizer)
            losses = _text_losses(model, encoded, max_seq_len, overlap, batch_size)
            for text, loss_sum in zip(encoded, losses, strict=True):
                total._add(text, loss_sum)
                if text.kind is not None:
                    total.by_kind.setdefault(text.kind, Perplexity())._add(text, loss_sum)
    finally:
        model.train(was_training)
    if not total.n_texts:
        raise UserError("there are no texts to measure perplexity on")
    return total


def _encode(chunk: list[tuple[int, str | dict | Record]], tokenizer) -> list[_Text]:
    fields = [_fields(record) for _, record in chunk]
    for (number, _), (text, _, _) in zip(chunk, fields, strict=True):
        if not isinstance(text, str):
            raise UserError(f"record {number} has no text: perplexity needs records with 'text', a string")
    all_ids = tokenizer.encode_batch([text for text, _, _ in fields])
    return [
        _Text(tokenizer.document(ids), len(text.encode()), kind, log_prob)
        for ids, (text, kind, log_prob) in zip(all_ids, fields, strict=True)
    ]


def _fields(record: str | dict | Record) -> tuple[str | None, str | None, float | None]:
    """Return text, kind of text and exact log-probability of any form of record."""
    if isinstance(record, str):
        return record, None, None
    if isinstance(record, Record):
        return record.text, _kind(record.extra.get("kind")), record.log_prob
    return record.get("text"), _kind(record.get("kind")), record.get("log_prob")


def _kind(value) -> str | None:
    """Return ``kind`` as a string: a record may have any value, but the names of groups are hashed and sorted."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _windows(text: int, ids: list[int], max_seq_len: int, overlap: int) -> Iterator[_Window]:
    """Cut one text into windows; each target is scored in exactly one of them."""
    inputs, targets = ids[:-1], ids[1:]
    start = scored = 0
    while scored < len(targets):
        end = min(start + max_seq_len, len(targets))
        yield _Window(text, inputs[start:end], targets[start:end], scored - start)
        scored, start = end, end - overlap


@torch.inference_mode()
def _text_losses(model, texts: list[_Text], max_seq_len: int, overlap: int, batch_size: int) -> list[float]:
    """Return the summed loss of each text in nats, computed in batches of windows of similar length."""
    windows = [w for n, text in enumerate(texts) for w in _windows(n, text.ids, max_seq_len, overlap)]
    windows.sort(key=lambda window: len(window.inputs), reverse=True)  # the largest batch first: it must fit
    sums = [0.0] * len(texts)
    device = next(model.parameters()).device
    for first in progress(range(0, len(windows), batch_size), desc="measuring", unit="batch"):
        batch = windows[first : first + batch_size]
        for window, loss_sum in zip(batch, _window_losses(model, batch, device), strict=True):
            sums[window.text] += loss_sum
    return sums


def _window_losses(model, windows: list[_Window], device) -> list[float]:
    """Return each window's loss summed over its scored targets, in nats."""
    longest = max(len(window.inputs) for window in windows)
    input_ids = torch.zeros(len(windows), longest, dtype=torch.long)  # (B, T)
    targets = torch.full_like(input_ids, IGNORE_INDEX)
    document_ids = torch.full_like(input_ids, -1)  # padding
    for row, (_, inputs, window_targets, first_scored) in enumerate(windows):
        input_ids[row, : len(inputs)] = torch.tensor(inputs)
        targets[row, first_scored : len(inputs)] = torch.tensor(window_targets[first_scored:])
        document_ids[row, : len(inputs)] = 0
    input_ids, targets = input_ids.to(device), targets.to(device)

    def head(hidden: Tensor, output_weight: Tensor | None) -> Tensor:
        return linear_log_probs(hidden, output_weight, targets)  # (B, T)

    log_probs = model(input_ids, document_ids=document_ids.to(device), head=head)
    if log_probs.dim() == 3:  # a wrapped output layer ignores head: logits (B, T, V)
        log_probs = linear_log_probs(log_probs, None, targets)
    # On the CPU, because not every device has float64.
    return (-log_probs.cpu().double().sum(dim=1)).tolist()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
