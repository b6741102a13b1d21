"""Writes a trained model for other programs.

    python -m minillm.export --from_weight full_sft --format gguf --dtype q8_0
    python -m minillm.export --from_weight full_sft --lora_name cooking --format hf --output out/cooking_merged
    python -m minillm.export --from_weight full_sft --format onnx --output out/onnx/model.onnx

docs/export.md tells what each format is for and how it was checked.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from minillm.cli.command_line import parse, script
from minillm.cli.eval_arguments import OpenArguments
from minillm.cli.export_arguments import SUFFIXES, ExportArguments
from minillm.config import PRESETS
from minillm.errors import UserError
from minillm.export.modelfile import modelfile
from minillm.files import replace_text
from minillm.hub.gguf import export_gguf
from minillm.hub.huggingface import save_model, save_pth
from minillm.hub.names import find_weights
from minillm.hub.onnx import export_onnx
from minillm.hub.open import open_from_arguments
from minillm.tokenizer import has_tokenizer, load_tokenizer

TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@script
def main(argv: list[str] | None = None) -> Path:
    """Write the model; return the path."""
    args = parse(ExportArguments, argv)
    width = args.hidden_size or PRESETS[args.preset]["hidden_size"]
    source = find_weights(
        args.from_weight, save_dir=args.save_dir, hidden_size=width, any_width=args.hidden_size is None
    )
    output = Path(args.output) if args.output else _default_output(args, source)
    _check_output(output, args)
    try:
        notes = WRITERS[args.format](args, source, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; choose another --output") from error
    print(f"saved {output} ({args.chosen_dtype})")
    for note in notes:
        print(f"note: {note}")
    return output


def _default_output(args: ExportArguments, source: Path) -> Path:
    name = source.stem if source.is_file() else source.resolve().name
    adapter = "_" + args.lora_name.replace("/", "_").replace(":", "_").replace(",", "_") if args.lora_name else ""
    return Path(args.save_dir) / "export" / f"{name}{adapter}{SUFFIXES.get(args.format, '')}"


def _check_output(output: Path, args: ExportArguments) -> None:
    """Raise UserError if something is in the way, before any work."""
    if args.format == "hf":
        if output.exists() and (output.is_file() or any(output.iterdir())):
            raise UserError(
                f"--output {output}: exists, and a directory is not replaced; choose a new one, or remove it"
            )
        return
    if output.is_dir():
        raise UserError(f"--output {output}: is a directory; name a file")
    for path in filter(None, [output, _companion(output, args.format)]):
        if path.exists() and not args.overwrite:
            raise UserError(f"--output {output}: {path} exists already; choose another name, or add --overwrite")


def _companion(output: Path, form: str) -> Path | None:
    """Return the file that is written next to ``output``; None if there is none of that format."""
    suffix = {"gguf": ".Modelfile", "pth": ".config.json"}.get(form)
    return output.with_suffix(suffix) if suffix else None


def _open(args: ExportArguments):
    """Return the model in float32 with its adapters merged, and its tokenizer."""
    names = {field.name for field in dataclasses.fields(OpenArguments)} & {
        field.name for field in dataclasses.fields(args)
    }
    values = {name: getattr(args, name) for name in names - {"dtype"}}
    model, tokenizer, _ = open_from_arguments(OpenArguments(**{"device": "cpu", **values}))
    return model, tokenizer


@contextlib.contextmanager
def _as_directory(args: ExportArguments, source: Path, output: Path) -> Iterator[Path]:
    """Yield a Hugging Face directory of the model: the source itself, or a temporary one next to the output."""
    is_complete = source.is_dir() and (source / "tokenizer.json").is_file()
    if is_complete and not args.lora_name and not args.rope_scaling and not args.tokenizer_path:
        yield source
        return
    model, tokenizer = _open(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as temporary:
        directory = Path(temporary) / output.stem
        save_model(model, directory, tokenizer=tokenizer)
        yield directory


def _write_gguf(args: ExportArguments, source: Path, output: Path) -> list[str]:
    with _as_directory(args, source, output) as directory:
        notes = export_gguf(
            directory,
            output,
            dtype=args.chosen_dtype,
            overwrite=args.overwrite,
            allow_token_differences=args.allow_token_differences,
        )
        text, note = modelfile(output, load_tokenizer(directory), directory)
    path = _companion(output, "gguf")
    replace_text(path, text)
    return [*notes, f"{path} is for `ollama create NAME -f {path}`; {note}"]


def _write_onnx(args: ExportArguments, source: Path, output: Path) -> list[str]:
    model, tokenizer = _open(args)
    folder = output.parent
    if has_tokenizer(folder) and load_tokenizer(folder).encoding_hash != tokenizer.encoding_hash and not args.overwrite:
        raise UserError(
            f"--output {output}: {folder} has the tokenizer of another model, and this model's would replace it; name "
            "a file in a directory of its own, or add --overwrite"
        )
    export_onnx(model, output, overwrite=args.overwrite)
    tokenizer.save(folder)
    return [f"the tokenizer is in {folder}"]


def _write_pth(args: ExportArguments, source: Path, output: Path) -> list[str]:
    model, tokenizer = _open(args)
    save_pth(model, output, dtype=TORCH_DTYPES[args.chosen_dtype])
    config = _companion(output, "pth")
    replace_text(config, json.dumps(model.config.to_hf(), indent=2) + "\n")
    return [f"{config} is its configuration; open it with --from_weight {output} --tokenizer_path {tokenizer.origin}"]


def _write_hf(args: ExportArguments, source: Path, output: Path) -> list[str]:
    model, tokenizer = _open(args)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as temporary:
        directory = Path(temporary) / "model"
        save_model(model, directory, tokenizer=tokenizer, dtype=TORCH_DTYPES[args.chosen_dtype])
        if output.is_dir():
            output.rmdir()  # empty
        directory.rename(output)
    return []


WRITERS = {"gguf": _write_gguf, "onnx": _write_onnx, "pth": _write_pth, "hf": _write_hf}


if __name__ == "__main__":
    main()
