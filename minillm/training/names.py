"""What a name of weights means: a stage, a run, a path, a checkpoint, or a model on a hub."""

import importlib.util
import os
import re
from pathlib import Path

from minillm.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja")
MAKES = {
    "pretrain": "train_pretrain.py", "full_sft": "train_sft.py", "rlhf": "train_dpo.py", "reason": "train_reason.py",
    "distill": "train_distill.py",
}  # fmt: skip
DEMO = "out/demo"  # where `make demo` puts its runs
OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX"}


def run_name(stage: str, *, hidden_size: int, has_experts: bool) -> str:
    """Return the name of a run's directory: ``<stage>_<hidden_size>``, with ``_moe`` behind it for experts."""
    return f"{stage}_{hidden_size}{'_moe' if has_experts else ''}"


def is_model(path: Path) -> bool:
    """Return whether ``path`` is a model directory or a ``.pth`` file."""
    if path.is_file():
        return path.suffix == ".pth"
    return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()


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
    ``_moe`` behind it if ``has_experts``. A directory ``checkpoints`` means its newest checkpoint.

    Args:
        any_width: take the only width of a stage in ``save_dir`` if it does not have ``hidden_size``.
        flag: the flag that gave the name, for messages.

    Raises:
        UserError: there are no such weights, or what has the name is not a model; the message says what it is.
    """
    stage_directory = Path(save_dir) / run_name(name, hidden_size=hidden_size, has_experts=has_experts)
    candidates = [Path(name).expanduser(), Path(save_dir) / name, stage_directory]
    widths = runs_of(name, save_dir=save_dir, has_experts=has_experts) if any_width else []
    if len(widths) == 1 and not is_model(stage_directory):
        candidates.append(widths[0])
    for path in candidates:
        if is_model(path):
            return path
        if path.name == "checkpoints" and (newest := _newest_checkpoint(path)):
            return newest
    for path in candidates:
        if problem := _what_it_is(path, flag=flag):
            raise UserError(f"{flag} {name}: {problem}")
    if is_hub_name(name, save_dir=save_dir):
        return download(name, flag=flag)
    models = sorted(path.parent.name for path in Path(save_dir).glob("*/config.json") if is_model(path.parent))
    makes = f"python {MAKES[name]} makes them" if name in MAKES else "train one first"
    raise UserError(
        f"no weights '{name}': neither {name} nor {stage_directory} holds a model; in {save_dir}/ there are: "
        f"{', '.join(models) or 'none'} ({makes}, or give {flag} one of these names, a directory or a .pth)"
    )


def has_run(stage: str, save_dir: str) -> bool:
    """Return whether ``save_dir`` has a finished run of ``stage``, of any width."""
    return bool(runs_of(stage, save_dir=save_dir))


def runs_of(stage: str, *, save_dir: str, has_experts: bool = False) -> list[Path]:
    """Return the runs of a stage, of every width; those without experts if there are any and none are asked for."""
    pattern = re.compile(re.escape(stage) + r"_\d+(_moe)?")
    runs = [path.parent for path in sorted(Path(save_dir).glob("*/config.json")) if pattern.fullmatch(path.parent.name)]
    sparse = [path for path in runs if path.name.endswith("_moe")]
    return sparse if has_experts else [path for path in runs if path not in sparse] or sparse


def _newest_checkpoint(directory: Path) -> Path | None:
    return max((path for path in directory.glob("step-*") if is_model(path)), default=None)


def _what_it_is(path: Path, *, flag: str) -> str | None:
    """Return what lies at ``path`` instead of a model, and what to do with it; None if that is not known."""
    if path.suffix in OTHER_FORMATS and path.is_file():
        kind = OTHER_FORMATS[path.suffix]
        return f"is a {kind} file, which is not read: give a Hugging Face directory (config.json, *.safetensors)"
    if path.is_file():
        if path.suffix in (".safetensors", ".bin"):
            return f"is a file of weights alone: give its directory, {path.parent}, with a config.json"
        return None
    if not path.is_dir():
        return None
    if (path / "adapter_config.json").is_file():
        return f"{path} is an adapter, not a model: give eval_model.py --lora_name {path}, and {flag} its model"
    if newest := _newest_checkpoint(path / "checkpoints"):
        return f"{path} is an interrupted run: resume it with --from_resume, or use its checkpoint {flag} {newest}"
    if _newest_checkpoint(path) is None and path.name == "checkpoints":
        return f"{path} holds no checkpoint step-*: give a model directory"
    for suffix, kind in OTHER_FORMATS.items():
        if any(path.glob(f"*{suffix}")):
            return f"{path} holds {kind} weights, which are not read: give a directory with config.json, *.safetensors"
    if (path / "tokenizer.json").is_file() and not any(path.glob("*.safetensors")):
        return f"{path} holds a tokenizer alone, give that to --tokenizer_path; weights need config.json, *.safetensors"
    return None


# ---- hubs --------------------------------------------------------------------------------------------------------


def is_hub_name(name: str, *, save_dir: str) -> bool:
    """Return whether ``name`` looks like ``org/model`` on a hub rather than like a path of this machine."""
    organisation = name.partition("/")[0]
    is_local = Path(organisation).exists() or organisation == Path(save_dir).name
    return bool(HUB_NAME.fullmatch(name)) and not is_local and not name.endswith((".pth", *OTHER_FORMATS))


def download(name: str, *, flag: str) -> Path:
    """Return the local directory of a hub's model, downloaded where it is not there yet.

    Hugging Face is asked first (at ``HF_ENDPOINT`` if that is set), then ModelScope, whichever is installed.

    Raises:
        UserError: neither package is installed, or neither reaches the model; the message has the commands.
    """
    local = f"models/{name.rpartition('/')[2]}"
    commands = f"hf download {name} --local-dir {local}   (or: modelscope download --model {name} --local_dir {local})"
    problems = []
    for package, fetch in (("huggingface_hub", _from_hugging_face), ("modelscope", _from_modelscope)):
        if importlib.util.find_spec(package) is None:
            problems.append(f"{package} is not installed")
            continue
        try:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{flag} {name}: asking {package}", flush=True)
            path = Path(fetch(name))
        except Exception as error:  # whatever a network or a foreign package does wrong
            problems.append(f"{package}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")
            continue
        if is_model(path):
            return path
        problems.append(_what_it_is(path, flag=flag) or f"{path} has no config.json")
    raise UserError(
        f"{flag} {name}: no such directory here, and it could not be downloaded ({'; '.join(problems)}); on a machine "
        f"with a network: {commands}, then {flag} {local}"
    )


def _from_hugging_face(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=list(HUB_FILES))


def _from_modelscope(name: str) -> str:
    from modelscope import snapshot_download

    return snapshot_download(name, allow_patterns=list(HUB_FILES))
