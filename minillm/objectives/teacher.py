"""The teacher of a distillation: a frozen model, or its best tokens kept on disk."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from minillm.distributed.engine import Engine
from minillm.errors import UserError
from minillm.hub.huggingface import load_model
from minillm.hub.names import find_weights
from minillm.hub.weights import other_format, preset_config, pth_config
from minillm.losses import forward_with_head, top_k_teacher
from minillm.objectives.column_cache import cached_columns, model_hash
from minillm.reports import announce
from minillm.tokenizer import has_tokenizer, load_tokenizer


class Teacher:
    """A frozen model that says how likely every next token is.

    Attributes:
        hash: of its weights and configuration.

    Raises:
        UserError: there are no such weights, or they were trained with another tokenizer: equal ids would mean
            different texts.
    """

    def __init__(self, args, engine: Engine, tokenizer):
        self.args, self.engine = args, engine
        path = find_teacher(args)
        config = pth_config(path, args, tokenizer) if path.suffix == ".pth" else None
        folder = path if path.is_dir() else path.parent
        if has_tokenizer(folder):
            theirs = load_tokenizer(folder)
            if theirs.content_hash != tokenizer.content_hash:
                raise UserError(
                    f"--teacher {args.teacher} has another tokenizer ({theirs.vocab_size} tokens) than the student "
                    f"({tokenizer.vocab_size}): logits compare over one vocabulary only; give both the same one, or "
                    f"let the teacher write texts and train on them with train_sft.py"
                )
            if engine.ranks.is_main and (difference := other_format(tokenizer, theirs)):
                print(
                    f"note: --teacher {args.teacher} was trained with {difference} than the student's: both read the "
                    f"student's, which the teacher may know less well",
                    file=sys.stderr,
                )
        self.model = load_model(path, device=engine.device, dtype=torch.float32, config=config).requires_grad_(False)
        self.hash = model_hash(self.model)
        # In training mode, as the student: both take the same way through the same kernels, and there is no dropout.
        self.model.train()
        if self.model.config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"--teacher {args.teacher} has embeddings for {self.model.config.vocab_size} tokens, the tokenizer has "
                f"{tokenizer.vocab_size}: it was trained with another one"
            )
        positions = self.model.config.max_position_embeddings
        if args.max_seq_len > positions:
            raise UserError(f"--max_seq_len {args.max_seq_len}: the teacher has {positions} positions, choose fewer")

    @torch.no_grad()
    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Return ``teacher_hidden`` (B, T, D) and ``teacher_weight`` (V, D) of a batch: their product is the logits."""
        hidden, weight = forward_with_head(self.model, batch, lambda hidden, weight: (hidden, weight))
        return {"teacher_hidden": hidden, "teacher_weight": weight}

    def add_to(self, rows, *, vocab_size: int):
        """Return ``rows`` with the columns of ``top_k_teacher``: ``teacher_ids``, ``teacher_log_probs`` (T, k) and
        ``teacher_log_rest`` (T, 1)."""
        args, engine = self.args, self.engine
        announce.check_rows(rows, allow=args.allow_rejected, flag="--data_path")  # before time is spent on it
        id_dtype = torch.int16 if vocab_size <= 1 << 15 else torch.int32

        def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            batch = engine.to_device(batch)
            with engine.autocast():
                ids, log_probs, log_rest = top_k_teacher(
                    **self.outputs(batch),
                    targets=batch["targets"],
                    k=args.top_k,
                    temperature=args.temperature,
                    vocab_size=vocab_size,
                )
            columns = {"teacher_ids": ids.to(id_dtype), "teacher_log_probs": log_probs.to(torch.float16)}
            return columns | {"teacher_log_rest": log_rest.float()}

        return engine.ranks.main_rank_first(
            lambda: cached_columns(
                rows,
                Path(args.teacher_cache or Path(args.save_dir) / ".teacher_cache"),
                identity={
                    "teacher": self.hash,
                    "top_k": args.top_k,
                    "temperature": args.temperature,
                    "vocab_size": vocab_size,
                    "dtype": str(engine.dtype).removeprefix("torch."),
                    "device": engine.device.type,
                    "columns": "ids, log-probabilities, log of the rest",
                },
                compute=compute,
                bytes_per_position=args.top_k * (id_dtype.itemsize + 2) + 4,
                max_gib=args.max_cache_gib,
                flag="--teacher_cache",
                batch_size=args.batch_size,
            )
        )


def find_teacher(args) -> Path:
    """Return what ``--teacher`` means; the flags describe the student, so any width will do if it is the only one."""
    config = preset_config(args)
    name = {"save_dir": args.save_dir, "hidden_size": config.hidden_size, "has_experts": bool(config.num_experts)}
    return find_weights(args.teacher, **name, any_width=True, flag="--teacher")
