"""Finds the files of a model or an adapter by name: a stage, a run, a path, a checkpoint, or a model on a hub."""

import functools
import importlib
import importlib.util
import json
import os
import re
from pathlib import Path

from minillm.config import PRESETS
from minillm.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
OTHER_HUB_FILES = ("original/*", "onnx/*", "consolidated*")  # the same weights in other layouts
STARTS_FROM = {"full_sft": "pretrain", "rlhf": "full_sft", "reason": "rlhf", "distill": "pretrain"}
MAKES = {
    "pretrain": "train_pretrain.py", "full_sft": "train_sft.py", "rlhf": "train_dpo.py", "reason": "train_reason.py",
    "distill": "train_distill.py",
}  # fmt: skip
DEMO = "out/demo"  # the runs of `make demo`
DEMO_WIDTH = PRESETS["demo"]["hidden_size"]  # hidden size of its models, except a smaller one for comparison
OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX"}
ADAPTER = "adapter_config.json"


def run_name(stage: str, *, hidden_size: int, has_experts: bool) -> str:
    """Return the name of a run's directory: ``<stage>_<hidden_size>``, and ``_moe`` at the end for experts."""
    return f"{stage}_{hidden_size}{'_moe' if has_experts else ''}"


def is_model(path: Path) -> bool:
    """Return whether ``path`` is a model directory or a ``.pth`` file."""
    if path.is_file():
        return path.suffix == ".pth"
    return (path / "config.json").is_file() and not is_adapter(path)


def is_adapter(path: Path) -> bool:
    """Return whether ``path`` is the directory of an adapter."""
    return (path / ADAPTER).is_file()


# ---- weights -----------------------------------------------------------------------------------------------------


def find_weights(
    name: str,
    *,
    save_dir: str,
    hidden_size: int,
    has_experts: bool = False,
    any_width: bool = False,
    flag: str = "--from_weight",
) -> Path:
    """Return the directory or ``.pth`` file that ``name`` means.

    ``name`` is a path, the name of a directory in ``save_dir`` (``full_sft_512``), a stage such as ``pretrain``, or a
    model on a hub (``Qwen/Qwen3-0.6B``), which is downloaded. A stage means ``SAVE_DIR/pretrain_<hidden_size>``, with
    ``_moe`` if ``has_experts``: a directory, or a ``.pth`` file. A directory ``checkpoints`` means its newest intact
    checkpoint. If ``out/`` has no run of a stage, the run in ``out/demo/`` is used.

    Args:
        any_width: if no run of a stage has ``hidden_size``, use the only run of another width.
        flag: the flag that gave the name, for messages.

    Raises:
        UserError: there are no such weights, or the name belongs to something else; the message says to what.
    """
    stage_directory = Path(save_dir) / run_name(name, hidden_size=hidden_size, has_experts=has_experts)
    candidates = [Path(name).expanduser(), Path(save_dir) / name, stage_directory, Path(f"{stage_directory}.pth")]
    runs = runs_of(name, save_dir=save_dir, has_experts=has_experts) if any_width else []
    if len(runs) == 1:
        candidates.append(runs[0])
    for path in candidates:
        if is_model(path):
            return path
        if path.name == "checkpoints" and (newest := _newest_checkpoint(path)):
            return newest
    for path in [*candidates, *_unfinished_runs(name, save_dir)]:
        if problem := _describe_other(path, flag=flag):
            raise UserError(f"{flag} {name}: {problem}")
    if is_hub_name(name, save_dir=save_dir):
        return download(name, flag=flag)
    if save_dir == "out" and has_run(name, DEMO):  # after `make demo`, or after commands without --data_path
        width = DEMO_WIDTH if any_width else hidden_size
        return find_weights(
            name, save_dir=DEMO, hidden_size=width, has_experts=has_experts, any_width=any_width, flag=flag
        )
    models = [path.name for path in _models_in(Path(save_dir))]
    if save_dir == "out":
        models += [str(path) for path in _models_in(Path(DEMO))]
    advice = f"python {MAKES[name]} makes them" if name in MAKES else "train one first"
    raise UserError(
        f"no weights '{name}': neither {name} nor {stage_directory} holds a model; in {save_dir}/ there are: "
        f"{', '.join(models) or 'none'} ({advice}, or give {flag} one of these names, a directory or a .pth)"
    )


def has_run(name: str, save_dir: str) -> bool:
    """Return whether ``save_dir`` has a finished run of the stage ``name``, of any width, or one with this name."""
    return bool(name) and (is_model(Path(save_dir, name)) or bool(runs_of(name, save_dir=save_dir)))


def runs_of(stage: str, *, save_dir: str, has_experts: bool = False) -> list[Path]:
    """Return a stage's finished runs of any width. Without ``has_experts``: runs without experts, if there are any."""
    runs = [path for path in _models_in(Path(save_dir)) if _is_run_of(stage, path)]
    runs_with_experts = [path for path in runs if path.name.endswith("_moe")]
    if has_experts:
        return runs_with_experts
    return [path for path in runs if path not in runs_with_experts] or runs_with_experts


def how_to_make(stage: str, *, save_dirs: list[str]) -> str:
    """Return the commands that make a run of ``stage``, including earlier stages of which ``save_dirs`` have no run."""
    commands, earlier_stage = [f"`python {MAKES[stage]}`"], STARTS_FROM.get(stage)
    while earlier_stage and not any(has_run(earlier_stage, directory) for directory in save_dirs):
        commands.insert(0, f"`python {MAKES[earlier_stage]}`")
        earlier_stage = STARTS_FROM.get(earlier_stage)
    return ", then ".join(commands)


def describe_unfinished(stage: str, save_dir: str, *, flag: str) -> str | None:
    """Return a message about an interrupted run of ``stage`` in ``save_dir``, with advice; None if there is none."""
    return next((_describe_other(path, flag=flag) for path in _unfinished_runs(stage, save_dir)), None)


def _unfinished_runs(stage: str, save_dir: str) -> list[Path]:
    runs = [path.parent for path in sorted(Path(save_dir).glob("*/checkpoints")) if _is_run_of(stage, path.parent)]
    return [run for run in runs if not is_model(run) and _newest_checkpoint(run / "checkpoints")]


def _is_run_of(stage: str, path: Path) -> bool:
    return bool(re.fullmatch(re.escape(stage) + r"_\d+(_moe)?", path.name))


def _models_in(directory: Path) -> list[Path]:
    return [path.parent for path in sorted(directory.glob("*/config.json")) if is_model(path.parent)]


def _newest_checkpoint(directory: Path) -> Path | None:
    return max((path for path in directory.glob("step-*") if is_model(path) and _is_complete(path)), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has all files of its manifest with their sizes; a resume also compares the hashes."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _describe_other(path: Path, *, flag: str) -> str | None:
    """Return what ``path`` is, if not a model, and what to do with it; None if it does not exist or is unknown."""
    advice = "give a Hugging Face directory (config.json, *.safetensors)"
    if path.is_file():
        if kind := OTHER_FORMATS.get(path.suffix.lower()):
            return f"is a {kind} file, which cannot be read: {advice}"
        if path.suffix in (".safetensors", ".bin"):
            return f"is a file of weights alone: give its directory, {path.parent}, with a config.json"
        return None
    if not path.is_dir():
        return None
    if is_adapter(path):
        return f"{path} is an adapter, not a model: eval_model.py takes it as --lora_name {path}; give {flag} its model"
    if newest := _newest_checkpoint(path / "checkpoints"):
        return f"{path} is an interrupted run: resume it with --from_resume, or use its checkpoint {flag} {newest}"
    if path.name == "checkpoints":
        return f"{path} holds no intact checkpoint step-* of a model: {advice}"
    if models := _models_in(path):
        return f"{path} holds several things: give one of its models, {', '.join(map(str, models))}"
    for suffix, kind in OTHER_FORMATS.items():
        if any(path.glob(f"*{suffix}")):
            return f"{path} holds {kind} weights, which cannot be read: {advice}"
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return f"{path} has no config.json: copy that file too"
    if any(path.glob("tokenizer*")) or any(path.glob("*.model")):
        return f"{path} holds only a tokenizer, for --tokenizer_path; weights need config.json, *.safetensors"
    return None


# ---- adapters ----------------------------------------------------------------------------------------------------


def find_adapter(name: str, *, save_dir: str, model_suffix: str = "", flag: str = "--lora_name") -> Path:
    """Return the directory or ``.pth`` file of the adapter ``name``.

    Args:
        name: a path, the name of a directory in ``SAVE_DIR/lora`` (``cooking_512``), or with ``model_suffix`` the name
            that ``train_lora.py --lora_name`` had (``cooking``).
        model_suffix: the end of the directory's name for the adapted model: ``_<hidden_size>``, and ``_moe`` for
            experts.
        flag: the flag that gave the name, for messages.

    If ``out/`` has no such adapter, the one in ``out/demo/`` is used.

    Raises:
        UserError: there is no such adapter (the message lists those that exist), or the name belongs to something else.
    """
    directory = Path(save_dir) / "lora"
    candidates = [Path(name).expanduser(), directory / name, directory / f"{name}{model_suffix}"]
    if save_dir == "out":
        candidates += [Path(DEMO, "lora", name), Path(DEMO, "lora", f"{name}{model_suffix}")]
    for path in candidates:
        if (path.is_file() and path.suffix == ".pth") or is_adapter(path):
            return path
    for path in [*candidates, Path(save_dir) / name]:
        if is_model(path):
            model_flag = "--model" if flag == "--adapter" else "--from_weight"
            raise UserError(f"{flag} {name}: {path} is a model, not an adapter: give it to {model_flag}")
        checkpoints = sorted(path.glob(f"checkpoints/step-*/{ADAPTER}"))
        if checkpoints:
            newest = checkpoints[-1].parent
            raise UserError(
                f"{flag} {name}: {path} is an interrupted run: resume it with --from_resume, or use its checkpoint "
                f"{flag} {newest}"
            )
    adapters = sorted(path.parent.name for path in directory.glob(f"*/{ADAPTER}"))
    if save_dir == "out":
        adapters += [str(path.parent) for path in sorted(Path(DEMO, "lora").glob(f"*/{ADAPTER}"))]
    raise UserError(
        f"no adapter '{name}': neither {name} nor {candidates[2]} holds one; in {directory}/ there are: "
        f"{', '.join(adapters) or 'none'} (train_lora.py makes one)"
    )


def adapters_called(name: str, *, save_dir: str) -> list[Path]:
    """Return the adapters that ``name`` may mean: a path, or adapters in SAVE_DIR/lora, with or without their width."""
    directory = Path(save_dir, "lora")
    of_any_width = [path for path in sorted(directory.glob("*")) if _is_run_of(name, path)]
    return [path for path in (Path(name), directory / name, *of_any_width) if is_adapter(path)]


# ---- hubs --------------------------------------------------------------------------------------------------------


def is_hub_name(name: str, *, save_dir: str) -> bool:
    """Return whether ``name`` looks like ``org/model`` on a hub and not like a local path."""
    organisation = name.partition("/")[0]
    is_local = Path(organisation).exists() or organisation in (Path(save_dir).name, "out")
    return bool(HUB_NAME.fullmatch(name)) and not is_local and not name.endswith((".pth", *OTHER_FORMATS))


@functools.cache
def download(name: str, *, flag: str) -> Path:
    """Return the local directory of a hub's model; download it if it is not in the cache.

    Hugging Face (or ``HF_ENDPOINT``) is tried first, then ModelScope, if their packages are installed.

    Raises:
        UserError: neither package is installed, or neither can download the model; the message gives the commands.
    """
    local = f"out/{name.rpartition('/')[2]}"
    problems = []
    for package in ("huggingface_hub", "modelscope"):
        if importlib.util.find_spec(package) is None:
            problems.append(f"{package} is not installed")
            continue
        try:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{flag} {name}: asking {package}", flush=True)
            path = _download_from(package, name)
        except Exception as error:  # the network and these packages may raise anything
            problems.append(f"{package}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
            continue
        if is_model(path):
            return path
        problems.append(_describe_other(path, flag=flag) or f"{path} has no config.json")
    raise UserError(
        f"{flag} {name}: no such directory here, and it could not be downloaded ({'; '.join(problems)}); on a machine "
        f"with a network: `pip install huggingface_hub && hf download {name} --local-dir {local}` (or `pip install "
        f"modelscope && modelscope download --model {name} --local_dir {local}`), then {flag} {local}"
    )


def _download_from(package: str, name: str) -> Path:
    snapshot_download = importlib.import_module(package).snapshot_download
    settings = {"ignore_patterns": list(OTHER_HUB_FILES)}
    path = Path(snapshot_download(name, allow_patterns=list(HUB_FILES), **settings))
    if not any(path.glob("*.safetensors")):  # older models have only pickled weights
        path = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"], **settings))
    return path
