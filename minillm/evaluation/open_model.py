"""The model that the command line names, ready to answer: weights, tokenizer, adapters, positions."""

from pathlib import Path

import torch

from minillm.model.hf import load_model
from minillm.tokenizer import load_tokenizer
from minillm.training.hardware import keep_freed_memory
from minillm.training.outputs import add_adapters
from minillm.training.precision import choose_device, choose_dtype
from minillm.training.routing import describe_parameters
from minillm.training.weights import check_tokenizer, find_weights, preset_config, pth_config, scale_positions

STAGES = ("pretrain", "full_sft", "rlhf", "reason")  # by --model_mode


def open_model(args):
    """Return model (evaluation mode, on its device), tokenizer and the path of the weights; print what was opened.

    Args:
        args: ``OpenArguments``; where ``from_weight`` is empty, ``model_mode`` names the stage. A stage is looked for
            at the width of the flags, unless there is only one.

    Raises:
        UserError: no such weights, tokenizer or adapter, or they do not belong together.
    """
    name = args.from_weight or STAGES[args.model_mode]
    is_stage = "/" not in name and not Path(name).exists()
    runs = [path.parent for path in Path(args.save_dir).glob(f"{name}_*/config.json")] if is_stage else []
    sparse = [path for path in runs if path.name.endswith("_moe")]
    runs = sparse if args.has_experts else [path for path in runs if path not in sparse] or sparse
    if args.hidden_size is None and len(runs) == 1:
        path = runs[0]  # the only width there is: no need to name it
    else:
        width = preset_config(args).hidden_size
        path = find_weights(name, save_dir=args.save_dir, hidden_size=width, has_experts=args.has_experts)
    folder = path if path.is_dir() else path.parent
    default = folder if (folder / "tokenizer.json").is_file() else Path(args.save_dir) / "tokenizer"
    tokenizer = load_tokenizer(args.tokenizer_path or default)
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = choose_dtype(args.dtype, device)
    config = pth_config(path, args, tokenizer) if path.suffix == ".pth" else None
    # An adapter is added in float32: what it changes is smaller than a bfloat16's last digit.
    model = load_model(path, device=device, dtype=torch.float32 if args.lora_name else dtype, config=config).eval()
    check_tokenizer(tokenizer, model, path)
    model.config = scale_positions(model.config, args)
    adapters = add_adapters(model, args.lora_name, save_dir=args.save_dir) if args.lora_name else []
    model.to(dtype)
    shown = " + ".join(map(str, [path, *adapters]))
    print(f"{shown}: parameters {describe_parameters(model)}; {device}, {dtype}")
    return model, tokenizer, path
