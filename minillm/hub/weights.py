"""Makes the model of a program: a new one from a preset, or one with the weights of ``--from_weight``.

``args`` are a program's arguments (``minillm.cli``): the shape of the model, and for training its data.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from minillm.config import PRESETS, ModelConfig
from minillm.distributed.launcher import on_first_rank
from minillm.errors import UserError
from minillm.hub.huggingface import load_model
from minillm.hub.names import DEMO, find_weights, run_name
from minillm.hub.pth import config_beside, infer_config
from minillm.hub.vocabulary import grow_vocabulary
from minillm.model import Transformer
from minillm.model.rope import original_length
from minillm.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, token_names, with_chat


def find_tokenizer(args, *, teacher: Path | None = None) -> str:
    """Return the tokenizer directory: ``--tokenizer_path``, else that of ``--from_weight``, else SAVE_DIR/tokenizer.

    Args:
        teacher: path of a teacher's weights. A new student shares its tokenizer, which precedes SAVE_DIR/tokenizer.
    """
    if args.tokenizer_path:
        return args.tokenizer_path
    weights = weights_of(args, preset_config(args)) if args.from_weight else teacher
    if weights is not None:
        model_dir = weights if weights.is_dir() else weights.parent
        if has_tokenizer(model_dir):
            return str(model_dir)
    return str(Path(args.save_dir) / "tokenizer")


def open_tokenizer(args, *, teacher: Path | None = None) -> Tokenizer:
    """Return the tokenizer of a run, with the tokens of ``--add_tokens`` and the template of ``--chat_template``.

    Args:
        args: ``TrainArguments``.
        teacher: as for ``find_tokenizer``.

    Raises:
        UserError: there is no tokenizer, or it cannot have these tokens or this template.
    """
    tokenizer = load_tokenizer(find_tokenizer(args, teacher=teacher))
    if not (args.add_tokens or args.chat_template):
        return tokenizer
    tokenizer, lines = with_chat(tokenizer, token_names(args.add_tokens), args.chat_template)
    if on_first_rank():
        print("\n".join(lines))
    return tokenizer


def preset_config(args, **overrides) -> ModelConfig:
    """Return the configuration that ``--preset``, ``--use_moe`` and the shape flags describe."""
    return ModelConfig.preset(args.preset, **(args.expert_defaults() | args.model_overrides() | overrides))


def weights_of(args, config: ModelConfig) -> Path:
    """Return the path of ``--from_weight`` for a model of the shape ``config`` (see ``find_weights``)."""
    return find_weights(
        args.from_weight,
        save_dir=args.save_dir,
        hidden_size=config.hidden_size,
        has_experts=bool(config.num_experts),
        any_width=args.hidden_size is None,
    )


def create_model(args, tokenizer, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return the model to train, on the CPU: a new one (random weights from ``--seed``), or that of ``--from_weight``.

    Args:
        dtype: of frozen weights; trained weights need float32.

    Raises:
        UserError: the weights are missing, their vocabulary is smaller than the tokenizer's, or a row is longer than
            the model's positions.
    """
    config = preset_config(
        args, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    if not args.from_weight:
        config = scale_positions(config, args)
        _check_positions(config, args)
        torch.manual_seed(args.seed)
        return Transformer(config).to(dtype)
    path = weights_of(args, config)
    usual_name = run_name(args.from_weight, hidden_size=config.hidden_size, has_experts=bool(config.num_experts))
    if on_first_rank() and "/" not in args.from_weight:
        if path.parent == Path(DEMO) != Path(args.save_dir):
            print(f"no {args.from_weight} weights in {args.save_dir}/: using the demo's, {path}")
        elif path.name not in (args.from_weight, usual_name):
            print(f"weights: {path}, the only {args.from_weight} in {args.save_dir}/")
    config_of_pth = pth_config(path, args, tokenizer) if path.suffix == ".pth" else None
    model = load_model(path, device="cpu", dtype=dtype, config=config_of_pth)
    model.origin = str(path)
    if config_of_pth is None:
        _check_shape(args, model.config, path)
    check_tokenizer(tokenizer.grown_from or tokenizer, model, path)
    grow_vocabulary(model, tokenizer)
    model.config = scale_positions(model.config, args)
    _check_positions(model.config, args)
    return model


def pth_config(path: Path, args, tokenizer) -> ModelConfig:
    """Return the shape of a ``.pth``: from its configuration next to it, else from its tensors and the flags.

    What the tensors do not tell comes from the flags, then from ``--preset``. The preset's number of heads is used only
    if its width is that of the weights: a wrong number of heads would load without an error and answer nonsense.

    Raises:
        UserError: the number of heads is unknown, a flag contradicts the tensors, or the architecture is unsupported.
    """
    if (file := config_beside(path)) is not None:
        return ModelConfig.from_hf(file)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    given = {name: value for name, value in args.model_overrides().items() if value != defaults.get(name)}
    fallback = PRESETS[args.preset] | args.expert_defaults()
    fallback |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return infer_config(path, given=given, fallback=fallback)


def scale_positions(config: ModelConfig, args) -> ModelConfig:
    """Return ``config`` with the positions of ``--rope_scaling``; unchanged without the flag.

    The model then has FACTOR times its original length. An existing scaling is replaced, not multiplied: the original
    length is ``--rope_original_len``, or the length without the existing scaling. The weights do not depend on this.

    Raises:
        UserError: the original length is more than the model has positions without scaling.
    """
    if args.rope_type_and_factor is None:
        return config
    rope_type, factor = args.rope_type_and_factor
    unscaled = original_length(config)
    if args.rope_original_len > unscaled:
        raise UserError(
            f"--rope_original_len {args.rope_original_len}: the model has {unscaled} positions without scaling; "
            f"give the length of the rows that it was trained on, at most {unscaled}"
        )
    original = args.rope_original_len or unscaled
    scaling = {"rope_type": rope_type, "factor": factor}
    if rope_type != "linear":  # linear divides all positions; it does not depend on the original length
        scaling["original_max_position_embeddings"] = original
    return dataclasses.replace(
        config,
        rope_scaling=None if rope_type == "default" else scaling,
        max_position_embeddings=int(original * factor),
    )


def check_tokenizer(tokenizer, model: Transformer, path: Path) -> None:
    """Raise ``UserError`` unless the weights at ``path`` were trained with ``tokenizer``.

    With another tokenizer of the same size every id would have another meaning, and no other check would notice.
    Another chat template, or other tokens around a document, are allowed, because a model can learn a new format; a
    message reports them.
    """
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the weights {path} have embeddings for "
            f"{model.config.vocab_size}; give --tokenizer_path the tokenizer of these weights"
        )
    model_dir = path if path.is_dir() else path.parent
    if not has_tokenizer(model_dir):
        return
    model_tokenizer = load_tokenizer(model_dir)
    if model_tokenizer.content_hash != tokenizer.content_hash:
        raise UserError(
            f"the tokenizer ({tokenizer.vocab_size} tokens) differs from the one next to the weights in {model_dir}: "
            f"leave --tokenizer_path out, or give it that directory"
        )
    difference = other_format(tokenizer, model_tokenizer)
    if difference and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"note: {tokenizer.origin} has {difference} than the weights in {model_dir}; its own is used from now on "
            f"(leave --tokenizer_path out to keep that of the weights)",
            file=sys.stderr,
        )


def other_format(tokenizer, other_tokenizer) -> str:
    """Return a description of how the formats of two tokenizers with one vocabulary differ; empty if they agree."""
    differences = []
    if tokenizer.document_hash != other_tokenizer.document_hash:
        differences.append("other tokens around a document")
    if tokenizer.template_hash != other_tokenizer.template_hash:
        differences.append("another chat template")
    return " and ".join(differences)


def _check_shape(args, config: ModelConfig, path: Path) -> None:
    """Raise ``UserError`` for a flag of the model's shape that the weights contradict."""
    with_default = ("tie_word_embeddings", "use_qk_norm")  # the user may not have given these
    given = {name: value for name, value in args.model_overrides().items() if name not in with_default}
    for name, value in given.items():
        if (stored := getattr(config, name)) != value:
            raise UserError(f"--{name} {value}: the weights {path} have {name} {stored}; leave the flag out")


def _check_positions(config: ModelConfig, args) -> None:
    if args.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: the model has {config.max_position_embeddings} positions; "
            f"choose at most that, or extend them (e.g. --rope_scaling yarn:4)"
        )
