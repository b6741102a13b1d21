"""What a command without ``--data_path`` does: the first known data in ``dataset/``, else the demo world.

The choices are values beneath the flags and ``--config``. What can be made on the spot is made by the first process of
each machine, under temporary names; the others wait for it. ``choose`` says in one line what was chosen.
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
    """Return the values of the arguments that a command without ``--data_path`` did not give.

    Args:
        stage: pretrain, sft, lora, dpo, reason, distill or tokenizer.
        argv: the flags; what they say is not chosen.
        from_file: the values of ``--config``, likewise.

    Raises:
        UserError: weights that the stage starts from are missing; the message names the command that makes them.
    """

    def given(name: str):
        return flag_value(argv, name, default=from_file.get(name))

    own_data = find_known_data(stage) or find_known_data(stage, directory=ROOT / "dataset")
    if own_data:
        values, notes = {"data_path": own_data}, [f"data {own_data}"]
    else:
        values, notes = _demo_settings(stage), [f"data {_demo_data()} (the demo world), settings {_demo_config(stage)}"]
    if stage == "lora" and own_data:
        name = Path(own_data).name.partition(".")[0].removeprefix("lora_")
        values["lora_name"] = name or "lora"
    weights = None
    if stage in WEIGHTS:
        flag = "teacher" if stage == "distill" else "from_weight"
        wanted = {"save_dir": given("save_dir"), "hidden_size": given("hidden_size")}
        weights = _weights(given(flag), WEIGHTS[stage], flag=f"--{flag}", **wanted)
        if weights:
            values[flag] = str(weights)
            notes.append(f"{flag.replace('from_weight', 'weights')} {weights}")
    if not own_data:
        _make_demo_data()
    is_of_the_demo = not own_data and (weights is None or weights.is_relative_to(DEMO))
    save_dir = values["save_dir"] = given("save_dir") or (DEMO if is_of_the_demo else "out")
    if stage == "tokenizer":
        return _say(values, [*notes, f"results in {save_dir}/tokenizer"])
    if stage == "pretrain" and not given("tokenizer_path") and not given("from_weight"):
        values["tokenizer_path"] = _tokenizer(save_dir, own_data)
        notes.append(f"tokenizer {values['tokenizer_path']}")
    model_suffix = _model_suffix(stage, values, given, weights=weights)
    values |= _free_name(stage, values, given, save_dir=save_dir, model_suffix=model_suffix, notes=notes)
    return _say(values, notes)


def flag_value(argv: list[str], name: str, default=None):
    """Return the word that follows ``--name`` in ``argv`` (True where none does), or ``default``."""
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            follows = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else True
            return value if equals else follows
    return default


# ---- weights and where results go --------------------------------------------------------------------------------


def _weights(name, stage: str, *, save_dir: str | None, hidden_size, flag: str) -> Path | None:
    """Return the weights to start from: a run of ``save_dir``, of ``out/`` or of the demo; None if ``name`` is a path.

    Raises:
        UserError: no name was given, and none of the directories has a run of ``stage``.
    """
    if name is not None and (not name or "/" in str(name) or is_model(Path(name))):
        return None
    directories = dict.fromkeys([save_dir or "out", "out", DEMO])
    for directory in directories:
        if is_model(Path(directory, name or stage)):
            return Path(directory, name or stage)
        runs = {path.name: path for path in runs_of(name or stage, save_dir=directory)}
        widths = [hidden_size, DEMO_WIDTH if directory == DEMO else 512]
        usual = [runs[key] for width in widths for key in (f"{name or stage}_{width}",) if key in runs]
        if usual or runs:
            return (usual or list(runs.values()))[0]
    if name:
        return None  # find_weights lists what there is
    kind = "pretrained" if stage == "pretrain" else stage
    problem = next(filter(None, (describe_unfinished(stage, directory, flag=flag) for directory in directories)), None)
    problem = problem or f"run {how_to_make(stage, save_dirs=list(directories))} first"
    raise UserError(f"no {kind} weights in {' or '.join(f'{directory}/' for directory in directories)}: {problem}")


def _model_suffix(stage: str, values: dict, given: Callable, *, weights: Path | None) -> str:
    """Return what follows a stage in a run's name: ``_<hidden_size>``, with ``_moe`` behind it for experts."""
    named = given("from_weight")
    is_shape = weights and stage != "distill"  # a student is not as wide as its teacher
    start = weights if is_shape else named and Path(named)
    if start and start.is_dir() and is_model(start):
        config = ModelConfig.from_hf(start)
        return run_name("", hidden_size=config.hidden_size, has_experts=bool(config.num_experts))
    preset = PRESETS.get(given("preset") or values.get("preset") or "small", {})
    width = given("hidden_size") or values.get("hidden_size") or preset.get("hidden_size")
    has_experts = preset.get("num_experts") or _is_on(given("use_moe")) or given("num_experts")
    return run_name("", hidden_size=width, has_experts=bool(has_experts))


def _free_name(stage: str, values: dict, given: Callable, *, save_dir: str, model_suffix: str, notes: list) -> dict:
    """Return the argument that names a free directory for this run; none where its usual directory will do.

    A directory that holds a finished run gets a neighbour: ``full_sft_128-2``, or the adapter ``identity-2``. That is
    where ``--from_resume`` looks as well: the unfinished run of these names comes first, then the last one.
    """
    is_tuned_as_adapter = stage == "lora" or given("lora_name")
    flag = "lora_name" if is_tuned_as_adapter else "run_name"
    if given(flag) or _is_on(given("overwrite")):
        return {}  # named by the user: Run says what is in the way
    name = values.get("lora_name", "lora") if is_tuned_as_adapter else RUNS[stage] + model_suffix

    def directory(name: str) -> Path:
        return Path(save_dir, "lora", name + model_suffix) if is_tuned_as_adapter else Path(save_dir, name)

    names = [name]
    while holds_a_run(directory(names[-1])):
        names.append(f"{name}-{len(names) + 1}")
    *taken, chosen = names
    unfinished = [name for name in taken if not (is_model(directory(name)) or is_adapter(directory(name)))]
    resumes = _is_on(given("from_resume")) or _is_on(given("auto_resume"))
    if unfinished:
        chosen = unfinished[-1]
    elif taken and (resumes or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0):
        chosen = taken[-1]
    reason = f" ({directory(taken[-1])} holds a finished run)" if taken and chosen == names[-1] else ""
    notes.append(f"results in {directory(chosen)}{reason}")
    return {flag: chosen} if chosen != name or is_tuned_as_adapter else {}


def _is_on(value) -> bool:
    """Return whether a flag of yes or no, as ``flag_value`` gives it, is set."""
    return str(value).lower() in ("true", "1", "yes")


# ---- what is made on the spot ------------------------------------------------------------------------------------


def _near(path: str) -> str:
    """Return ``path`` under the current directory if it exists there, else under the repository."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


def _demo_config(stage: str) -> str:
    return _near(f"configs/demo/{stage}.yaml")


def _demo_data() -> str:
    """Return the directory of the demo world: that of the current directory if it is there, else the repository's."""
    is_near = Path(DEMO_DATA, "meta.json").is_file() or Path.cwd() == ROOT
    return DEMO_DATA if is_near else str(ROOT / DEMO_DATA)


def _demo_settings(stage: str) -> dict:
    try:
        values = yaml.safe_load(Path(_demo_config(stage)).read_text(encoding="utf-8"))
    except OSError:
        raise UserError("no --data_path, and no demo: these need the repository; give --data_path a file") from None
    for name in ("teacher", "from_weight"):
        values.pop(name, None)
    for name in ("data_path", "valid_path", "replay_path"):
        if name in values:
            values[name] = values[name].replace(DEMO_DATA, _demo_data())
    return values


def _make_demo_data() -> None:
    """Make the demo world where it is missing, with the sizes of ``make demo``."""
    if not (ROOT / "dataset" / "make_demo.py").is_file():
        raise UserError("no --data_path, and no dataset/make_demo.py to make the demo world: give --data_path a file")
    _make(
        Path(_demo_data(), "meta.json"),  # the last file that is written
        lambda: _call([str(ROOT / "dataset" / "make_demo.py"), "--out_dir", _demo_data()]),
        "making the demo world",
    )


def _tokenizer(save_dir: str, own_data: str | None) -> str:
    """Return the tokenizer of ``save_dir``, ``out/`` or (for the demo world) the demo; trained now if there is none."""
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
        _call([str(ROOT / "train_tokenizer.py"), *data, "--save_dir", str(temporary)])
        if not final.exists():
            os.replace(temporary / "tokenizer", final)
        temporary.rmdir()

    _make(final / "tokenizer.json", train, f"training a tokenizer, {final}")
    return str(final)


def _make(target: Path, make: Callable[[], None], what: str) -> None:
    """Call ``make`` in this machine's first process unless ``target`` exists; the others wait until it does."""
    if target.is_file():
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{what} ...", flush=True)
        make()
        return
    end = time.monotonic() + MAX_WAIT_S
    while not target.is_file():
        if time.monotonic() > end:
            raise UserError(f"{target} did not appear within {MAX_WAIT_S} s: the first rank should have made it")
        time.sleep(0.2)


def _call(words: list[str]) -> None:
    """Run a script of the repository, alone: not as a rank of this process's job."""
    of_the_job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in of_the_job}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{Path(words[0]).name} failed: {reason}")


def _say(values: dict, notes: list[str]) -> dict:
    if os.environ.get("RANK", "0") == "0":
        print(f"no --data_path: {', '.join(notes)}", flush=True)
    return values
