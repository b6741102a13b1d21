"""Where a model comes from: a new one from a preset, or the weights that ``--from_weight`` names."""

from pathlib import Path

import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.model import Transformer
from minillm.model.hf import load_model
from minillm.tokenizer import load_tokenizer
from minillm.training.arguments import TrainArguments


def find_weights(name: str, *, save_dir: str, hidden_size: int) -> Path:
    """Return the directory or ``.pth`` file that ``name`` means.

    ``name`` is a path, or a stage such as ``pretrain``, which means ``SAVE_DIR/pretrain_<hidden_size>``.

    Raises:
        UserError: nothing is there; the message lists the run directories that exist.
    """
    stage_directory = Path(save_dir) / f"{name}_{hidden_size}"
    for path in (Path(name), stage_directory):
        if path.is_file() and path.suffix == ".pth":
            return path
        if path.is_dir() and (path / "config.json").is_file():
            return path
    found = sorted(p.parent.name for p in Path(save_dir).glob("*/config.json"))
    raise UserError(
        f"no weights '{name}': neither {name} nor {stage_directory} holds a model; "
        f"in {save_dir}/ there are: {', '.join(found) or 'none'} (train one first, or give --from_weight a directory)"
    )


def find_tokenizer(args: TrainArguments) -> str:
    """Return the tokenizer directory: ``--tokenizer_path``, else that of ``--from_weight``, else SAVE_DIR/tokenizer."""
    if args.tokenizer_path:
        return args.tokenizer_path
    if args.from_weight:
        weights = find_weights(args.from_weight, save_dir=args.save_dir, hidden_size=preset_config(args).hidden_size)
        if (weights / "tokenizer.json").is_file():
            return str(weights)
    return str(Path(args.save_dir) / "tokenizer")


def preset_config(args: TrainArguments, **more) -> ModelConfig:
    """Return the configuration that ``--preset`` and the shape flags describe."""
    return ModelConfig.preset(args.preset, **args.model_overrides(), **more)


def create_model(args: TrainArguments, tokenizer) -> Transformer:
    """Return the float32 model to train, on the CPU: new (weights drawn from ``--seed``), or from ``--from_weight``.

    Raises:
        UserError: the weights are missing, their vocabulary is smaller than the tokenizer's, or a row is
            longer than the model's positions.
    """
    config = preset_config(
        args, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    if not args.from_weight:
        _check_positions(config, args)
        torch.manual_seed(args.seed)
        return Transformer(config)
    path = find_weights(args.from_weight, save_dir=args.save_dir, hidden_size=config.hidden_size)
    model = load_model(path, device="cpu", dtype=torch.float32, **({"config": config} if path.suffix == ".pth" else {}))
    check_tokenizer(tokenizer, model, path)
    _check_positions(model.config, args)
    return model


def check_tokenizer(tokenizer, model: Transformer, path: Path) -> None:
    """Raise ``UserError`` unless ``tokenizer`` is the one that the weights at ``path`` were trained with.

    With another one of the same size every id would mean another text, and nothing else would say so.
    """
    if model.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the weights {path} have embeddings for "
            f"{model.config.vocab_size}; give --tokenizer_path the tokenizer these weights were trained with"
        )
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).content_hash != tokenizer.content_hash:
        raise UserError(
            f"the tokenizer ({tokenizer.vocab_size} tokens) is not the one that lies beside the weights in {folder}: "
            f"leave --tokenizer_path out, or give it that directory"
        )


def _check_positions(config: ModelConfig, args: TrainArguments) -> None:
    if args.max_seq_len > config.max_position_embeddings:
        raise UserError(
            f"--max_seq_len {args.max_seq_len}: the model has {config.max_position_embeddings} positions; "
            f"choose at most that"
        )
