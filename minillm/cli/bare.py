"""Defaults for a bare command, one without ``--data_path``: the first known data in ``dataset/``, else the demo data.

Flags and ``--config`` override these defaults. Missing demo data and tokenizers are made at once, by the first process
of each machine and under temporary names; the other processes wait. ``choose`` prints one line with its choices.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from minillm.checkpoints.directory import holds_a_run
from minillm.config import PRESETS, ModelConfig
from minillm.data.sources.known_names import DEMO_DATA, find_known_data
from minillm.errors import UserError
from minillm.hub.names import (
    DEMO,
    DEMO_WIDTH,
    STARTS_FROM,
    describe_unfinished,
    how_to_make,
    is_adapter,
    is_model,
    run_name,
    runs_of,
)

ROOT = Path(__file__).resolve().parents[2]  # of the repository
RUNS = {"pretrain": "pretrain", "sft": "full_sft", "dpo": "rlhf", "reason": "reason", "distill": "distill"}
WEIGHTS = {stage: STARTS_FROM[run] for stage, run in RUNS.items() if run in STARTS_FROM} | {"lora": "full_sft"}
MAX_WAIT_S = 3600


def choose(stage: str, argv: list[str], from_file: dict) -> dict:
    """Return values for arguments that a command without ``--data_path`` does not give.

    Args:
        stage: pretrain, sft, lora, dpo, reason, distill or tokenizer.
        argv: the flags; arguments that they give are not chosen.
        from_file: the values of ``--config``, likewise.

    Raises:
        UserError: the weights that the stage starts from are missing; the message names the command that makes them.
    """

    def given(name: str):
        return flag_value(argv, name, default=from_file.get(name))

    own_data = find_known_data(stage) or find_known_data(stage, directory=ROOT / "dataset")
    if own_data:
        values, notes = {"data_path": own_data}, [f"data {own_data}"]
    else:
        values, notes = _demo_settings(stage), [f"data {_demo_data()} (the demo), settings {_demo_config(stage)}"]
    if stage == "lora" and own_data:
        name = Path(own_data).name.partition(".")[0].removeprefix("lora_")
        values["lora_name"] = name or "lora"
    weights = None
    if stage in WEIGHTS:
        flag = "teacher" if stage == "distill" else "from_weight"
        weights = _weights(
            given(flag),
            WEIGHTS[stage],
            save_dir=given("save_dir"),
            hidden_size=given("hidden_size"),
            flag=f"--{flag}",
        )
        if weights:
            values[flag] = str(weights)
            notes.append(f"{flag.replace('from_weight', 'weights')} {weights}")
    if not own_data:
        _make_demo_data()
    is_demo = not own_data and (weights is None or weights.is_relative_to(DEMO))
    save_dir = values["save_dir"] = given("save_dir") or (DEMO if is_demo else "out")
    if stage == "tokenizer":
        _print_choices([*notes, f"results in {save_dir}/tokenizer"])
        return values
    if stage == "pretrain" and not given("tokenizer_path") and not given("from_weight"):
        values["tokenizer_path"] = _tokenizer(save_dir, own_data)
        notes.append(f"tokenizer {values['tokenizer_path']}")
    model_suffix = _model_suffix(stage, values, given, weights=weights)
    values |= _free_name(stage, values, given, save_dir=save_dir, model_suffix=model_suffix, notes=notes)
    _print_choices(notes)
    return values


def flag_value(argv: list[str], name: str, default=None):
    """Return the value of ``--name`` in ``argv`` (True for a flag without a value), or ``default``."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            if equals:
                return value
            has_value = i + 1 < len(argv) and not argv[i + 1].startswith("--")
            return argv[i + 1] if has_value else True
    return default


# ---- weights and where results go --------------------------------------------------------------------------------


def _weights(name, stage: str, *, save_dir: str | None, hidden_size, flag: str) -> Path | None:
    """Return the weights to start from: a run in ``save_dir``, ``out/`` or the demo; None if ``name`` is a path.

    Raises:
        UserError: no name is given, and none of the directories has a run of ``stage``.
    """
    if name is not None and (not name or "/" in str(name) or is_model(Path(name))):
        return None
    directories = dict.fromkeys([save_dir or "out", "out", DEMO])
    for directory in directories:
        if is_model(Path(directory, name or stage)):
            return Path(directory, name or stage)
        runs = {path.name: path for path in runs_of(name or stage, save_dir=directory)}
        usual_names = [f"{name or stage}_{width}" for width in (hidden_size, DEMO_WIDTH if directory == DEMO else 512)]
        usual_runs = [runs[run] for run in usual_names if run in runs]
        if runs:
            return (usual_runs or list(runs.values()))[0]
    if name:
        return None  # find_weights reports the error, with a list of the runs
    kind = "pretrained" if stage == "pretrain" else stage
    unfinished = (describe_unfinished(stage, directory, flag=flag) for directory in directories)
    problem = next(filter(None, unfinished), None)
    problem = problem or f"run {how_to_make(stage, save_dirs=list(directories))} first"
    raise UserError(f"no {kind} weights in {' or '.join(f'{directory}/' for directory in directories)}: {problem}")


def _model_suffix(stage: str, values: dict, given: Callable, *, weights: Path | None) -> str:
    """Return the end of a run's name, after the stage: ``_<hidden_size>``, and ``_moe`` for experts."""
    from_weight = given("from_weight")
    if weights and stage != "distill":  # a student's width differs from its teacher's
        start_dir = weights
    else:
        start_dir = Path(from_weight) if from_weight else None
    if start_dir and start_dir.is_dir() and is_model(start_dir):
        config = ModelConfig.from_hf(start_dir)
        return run_name("", hidden_size=config.hidden_size, has_experts=bool(config.num_experts))
    preset = PRESETS.get(given("preset") or values.get("preset") or "small", {})
    width = given("hidden_size") or values.get("hidden_size") or preset.get("hidden_size")
    has_experts = preset.get("num_experts") or _is_on(given("use_moe")) or given("num_experts")
    return run_name("", hidden_size=width, has_experts=bool(has_experts))


def _free_name(stage: str, values: dict, given: Callable, *, save_dir: str, model_suffix: str, notes: list) -> dict:
    """Return the argument that names a free directory for this run; empty if its usual directory is free.

    If the usual directory holds a finished run, a number is added: ``full_sft_128-2``, or the adapter ``identity-2``.
    An unfinished run with one of these names is used first. ``--from_resume`` then takes the last finished run.
    """
    trains_adapter = stage == "lora" or given("lora_name")
    flag = "lora_name" if trains_adapter else "run_name"
    if given(flag) or _is_on(given("overwrite")):
        return {}  # named by the user: Run reports an existing run there
    usual_name = values.get("lora_name", "lora") if trains_adapter else RUNS[stage] + model_suffix

    def directory(name: str) -> Path:
        return Path(save_dir, "lora", name + model_suffix) if trains_adapter else Path(save_dir, name)

    names = [usual_name]
    while holds_a_run(directory(names[-1])):
        names.append(f"{usual_name}-{len(names) + 1}")
    *used_names, free_name = names
    unfinished = [name for name in used_names if not (is_model(directory(name)) or is_adapter(directory(name)))]
    resumes = _is_on(given("from_resume")) or _is_on(given("auto_resume"))
    was_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if unfinished:
        chosen = unfinished[-1]
    elif used_names and (resumes or was_restarted):
        chosen = used_names[-1]
    else:
        chosen = free_name
    reason = f" ({directory(used_names[-1])} holds a finished run)" if used_names and chosen == free_name else ""
    notes.append(f"results in {directory(chosen)}{reason}")
    return {flag: chosen} if chosen != usual_name or trains_adapter else {}


def _is_on(value) -> bool:
    """Return whether the value of a boolean flag, as ``flag_value`` returns it, is true."""
    return str(value).lower() in ("true", "1", "yes")


# ---- demo data and tokenizers, made if missing -------------------------------------------------------------------


def _demo_config(stage: str) -> str:
    """Return the demo's configuration file: below the current directory if it exists there, else in the repository."""
    path = f"configs/demo/{stage}.yaml"
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


def _demo_data() -> str:
    """Return the directory of the demo data: below the current directory if it exists there, else in the repository."""
    is_here = Path(DEMO_DATA, "meta.json").is_file() or Path.cwd() == ROOT
    return DEMO_DATA if is_here else str(ROOT / DEMO_DATA)


def _demo_settings(stage: str) -> dict:
    try:
        values = yaml.safe_load(Path(_demo_config(stage)).read_text(encoding="utf-8"))
    except OSError:
        raise UserError("no --data_path, and the demo is only in the repository: give --data_path a file") from None
    for name in ("teacher", "from_weight"):
        values.pop(name, None)
    for name in ("data_path", "valid_path", "replay_path"):
        if name in values:
            values[name] = values[name].replace(DEMO_DATA, _demo_data())
    return values


def _make_demo_data() -> None:
    """Make the demo data if it is missing, with the sizes of ``make demo``."""
    if not (ROOT / "dataset" / "make_demo.py").is_file():
        raise UserError("no --data_path, and no dataset/make_demo.py to make the demo data: give --data_path a file")
    _make_once(
        Path(_demo_data(), "meta.json"),  # the last file that is written
        lambda: _run_script([str(ROOT / "dataset" / "make_demo.py"), "--out_dir", _demo_data()]),
        "making the demo data",
    )


def _tokenizer(save_dir: str, own_data: str | None) -> str:
    """Return the tokenizer of ``save_dir``, ``out/`` or (for the demo data) the demo; train one if there is none."""
    directories = [save_dir, "out", *([] if own_data else [DEMO])]
    for directory in directories:
        if Path(directory, "tokenizer", "tokenizer.json").is_file():
            return f"{directory}/tokenizer"
    final = Path(save_dir, "tokenizer")
    data = ["--data_path", own_data]
    if not own_data:
        settings = _demo_settings("tokenizer")
        data = ["--config", _demo_config("tokenizer")]
        data += [word for name in ("data_path", "valid_path") for word in (f"--{name}", settings[name])]

    def train() -> None:
        temporary = Path(save_dir, f".tokenizer-{os.getpid()}")
        _run_script([str(ROOT / "train_tokenizer.py"), *data, "--save_dir", str(temporary)])
        if not final.exists():
            os.replace(temporary / "tokenizer", final)
        temporary.rmdir()

    _make_once(final / "tokenizer.json", train, f"training a tokenizer, {final}")
    return str(final)


def _make_once(target: Path, make: Callable[[], None], activity: str) -> None:
    """Call ``make`` in this machine's first process unless ``target`` exists; the other processes wait for it."""
    if target.is_file():
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{activity} ...", flush=True)
        make()
        return
    deadline = time.monotonic() + MAX_WAIT_S
    while not target.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"{target} did not appear within {MAX_WAIT_S} s: the first rank should have made it")
        time.sleep(0.2)


def _run_script(command: list[str]) -> None:
    """Run a script of the repository in its own process, which is not a rank of this job."""
    rank_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in rank_variables}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{Path(command[0]).name} failed: {reason}")


def _print_choices(notes: list[str]) -> None:
    """Print one line with the choices, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"no --data_path: {', '.join(notes)}", flush=True)
