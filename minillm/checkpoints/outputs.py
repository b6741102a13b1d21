"""What a run writes of its model and reads back: all of it, or its adapter alone."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minillm.errors import UserError
from minillm.files import system_errors, use_umask
from minillm.hub.adapters import adapter_directory
from minillm.hub.huggingface import load_model, save_model
from minillm.hub.names import run_name
from minillm.lora import save_lora
from minillm.lora.more.base import BASE
from minillm.lora.more.state import load_trained_state, trained_state

TRAINED = "trained.safetensors"


class WholeModel:
    """A run of a stage that trains all weights: ``SAVE_DIR/<stage>_<hidden_size>``, a Hugging Face directory."""

    is_adapter = False
    is_large = True  # too large for one rank to write, where ranks hold parts of it
    tags = "library_name: transformers\npipeline_tag: text-generation"
    usage = "Opens as it is with `transformers.AutoModelForCausalLM.from_pretrained`."

    def directory(self, args, stage: str, config) -> Path:
        """Return the run's directory: ``--run_name``, or a name of stage and width."""
        if args.run_name:
            return Path(args.save_dir) / args.run_name
        has_experts = bool(config.num_experts)
        return Path(args.save_dir) / run_name(stage, hidden_size=config.hidden_size, has_experts=has_experts)

    def export(self, model, path: Path, *, tokenizer, dtype: torch.dtype) -> None:
        """Write what is to be used."""
        save_model(model, path, tokenizer=tokenizer, dtype=dtype)

    def write_checkpoint(self, model, path: Path, *, tokenizer) -> None:
        """Write what is needed to go on, exactly."""
        save_model(model, path, tokenizer=tokenizer, dtype=torch.float32)

    def read_checkpoint(self, model, path: Path) -> None:
        """Read it back into ``model``."""
        model.load_state_dict(load_model(path, device="cpu", dtype=torch.float32).state_dict())

    def settings(self) -> dict:
        """Return what must match to resume."""
        return {}


class AdapterAlone(WholeModel):
    """A run that trains an adapter: ``SAVE_DIR/lora/<lora_name>_<hidden_size>``, a directory as peft's."""

    is_adapter = True
    is_large = False
    base: str | None = None
    usage = (
        "An adapter: `python eval_model.py --lora_name` uses it, `peft.PeftModel.from_pretrained` loads it, and "
        "`python -m minillm.lora merge` adds it to its model for good."
    )

    def __init__(self, args):
        self.args = args

    @property
    def tags(self) -> str:
        """Return the head of the model card; it names the adapted model."""
        base = f"\nbase_model: {json.dumps(self.base, ensure_ascii=False)}" if self.base else ""
        return f"library_name: peft{base}"

    def directory(self, args, stage: str, config) -> Path:
        """Return the run's directory."""
        if args.run_name:
            raise UserError(f"--run_name {args.run_name}: an adapter is named by --lora_name")
        return adapter_directory(args.lora_name, save_dir=args.save_dir, config=config)

    def export(self, model, path: Path, *, tokenizer, dtype: torch.dtype) -> None:
        """Write the adapter; it stays float32, being small. Added tokens are saved next to it."""
        save_lora(model, path)
        _save_grown(tokenizer, path)
        self.base = json.loads((path / BASE).read_text(encoding="utf-8"))["base"]

    def write_checkpoint(self, model, path: Path, *, tokenizer) -> None:
        """Write the adapter as others read it, and once more as it is trained."""
        save_lora(model, path)
        _save_grown(tokenizer, path)
        with system_errors():
            save_file(trained_state(model), path / TRAINED)
        use_umask(path / TRAINED)

    def read_checkpoint(self, model, path: Path) -> None:
        """Read it back into ``model``."""
        load_trained_state(model, load_file(path / TRAINED))

    def settings(self) -> dict:
        """Return what must match to resume."""
        args = self.args
        adapter = asdict(args.lora_config)
        del adapter["init_std"]  # matters at the start alone
        return {"from_weight": args.from_weight, "base_dtype": args.base_dtype, "loraplus_ratio": args.loraplus_ratio,
                "balance_gradients": getattr(args, "balance_gradients", False),
                **{f"adapter's {key}": str(value) for key, value in adapter.items()}}  # fmt: skip


def _save_grown(tokenizer, path: Path) -> None:
    """Save a tokenizer with added tokens, which the model's own directory lacks."""
    if tokenizer is not None and tokenizer.grown_from is not None:
        tokenizer.save(path)
