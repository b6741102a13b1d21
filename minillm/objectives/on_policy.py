"""On-policy distillation: the student's own answers, for the teacher to judge.

A student that only sees a teacher's texts never learns what to do after its own mistakes. Agarwal et al., On-Policy
Distillation of Language Models (GKD, 2024), algorithm 1: in a share of the steps the student answers the prompts
itself, and learns the teacher's distribution on these answers.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from minillm.data.batches import collate, example_row
from minillm.data.packing import IGNORE_INDEX, best_fit
from minillm.distributed.engine import Engine
from minillm.errors import UserError
from minillm.objectives.objective import Batch


class OnPolicy:
    """Replaces the micro-batches of some steps by the student's answers to their prompts.

    Which steps, and what is drawn in them, follows from the seed, the step and the rank alone: a resumed run draws the
    same. It happens before the step's targets are counted.

    Args:
        student: the model that answers. args: of the run. engine: for ranks and dtype.
        generate: as ``minillm.inference.generate``.
    """

    def __init__(self, student: nn.Module, tokenizer, args, engine: Engine, generate: Callable):
        self.student, self.tokenizer, self.args = student, tokenizer, args
        self.engine, self.generate = engine, generate
        if engine.is_sharded:  # ranks answer for different times, and a rank's weights come from all of them
            raise UserError(f"--on_policy with --parallel {args.parallel}: use ddp, or DeepSpeed's stages 1 and 2")

    def __call__(self, micro_batches: list[Batch], *, step: int) -> list[Batch]:
        """Return what to train on: the micro-batches of the data, or the student's answers, marked ``on_policy``."""
        args, ranks = self.args, self.engine.ranks
        all_ranks_draw_alike = np.random.default_rng([args.seed, step])
        if all_ranks_draw_alike.random() >= args.on_policy:
            return micro_batches
        seed = int(np.random.default_rng([args.seed, step, ranks.rank]).integers(1 << 62))
        generator = torch.Generator().manual_seed(seed)
        new = [answered for batch in micro_batches for answered in self._answered(batch, generator)]
        like = example_row(micro_batches[0])
        padding = collate([], n_rows=args.batch_size, like=like) | {"on_policy": torch.ones(())}
        n = max(ranks.gather(len(new)))  # every rank has as many, or they would wait for each other
        return new + [padding] * (n - len(new))

    @torch.no_grad()
    def _answered(self, batch: dict[str, Tensor], generator: torch.Generator) -> list[dict[str, Tensor]]:
        args, model = self.args, self.student
        rows = []
        prompts = prompts_of(batch)
        if prompts:
            was_training = model.training
            model.eval()
            with self.engine.autocast():
                answers = self.generate(
                    model,
                    prompts,
                    max_new_tokens=args.max_new_tokens,
                    temperature=args.sampling_temperature,
                    eos_token_id=self.tokenizer.end_ids,
                    generator=generator,
                )
            model.train(was_training)
            rows = packed(prompts, answers, max_seq_len=args.max_seq_len)
        like = example_row(batch)
        new = []
        for start in range(0, max(len(rows), 1), args.batch_size):
            some = rows[start : start + args.batch_size]
            new.append(collate(some, n_rows=args.batch_size, like=like) | {"on_policy": torch.ones(())})
        return new


def prompts_of(batch: dict[str, Tensor]) -> list[list[int]]:
    """Return, for every document of a batch that has targets, its ids before the last stretch of them.

    So a conversation ends with an open answer, and a text, all of which is target, is its first token alone.
    """
    prompts = []
    columns = (batch[name].numpy() for name in ("input_ids", "targets", "document_ids"))
    for ids, targets, documents in zip(*columns, strict=True):
        for document in range(int(documents.max()) + 1):
            here = documents == document
            is_target = targets[here] != IGNORE_INDEX
            if is_target.any():
                last = int(np.flatnonzero(is_target)[-1])
                before = np.flatnonzero(~is_target[: last + 1])
                begin = int(before[-1]) + 1 if len(before) else 0
                prompts.append(ids[here][: begin + 1].tolist())
    return prompts


def packed(prompts: list[list[int]], answers: list[list[int]], *, max_seq_len: int) -> list[dict[str, np.ndarray]]:
    """Return prompts with their answers as rows of at most ``max_seq_len`` pairs; the answers alone are targets."""
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = np.asarray((prompt + answer)[: max_seq_len + 1], np.int64)
        targets = np.where(np.arange(1, len(ids)) >= len(prompt), ids[1:], IGNORE_INDEX)
        texts.append((ids[:-1], targets))
    texts = [text for text in texts if len(text[0])]
    order, starts = best_fit(np.array([len(ids) for ids, _ in texts], np.int64), max_seq_len)
    rows = []
    for first, end in itertools.pairwise(starts):
        some = [texts[index] for index in order[first:end]]
        rows.append(
            {
                "input_ids": np.concatenate([ids for ids, _ in some]),
                "targets": np.concatenate([targets for _, targets in some]),
                "position_ids": np.concatenate([np.arange(len(ids)) for ids, _ in some]),
                "document_ids": np.repeat(np.arange(len(some)), [len(ids) for ids, _ in some]),
            }
        )
    return rows
