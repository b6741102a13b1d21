"""What a command without ``--data_path`` does: the first known data in ``dataset/``, else the demo world.

The choices are values beneath the flags and ``--config``. What can be made on the spot is made by the first process of
each machine, under temporary names; the others wait for it. ``choose`` says in one line what was chosen.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from minillm.data.known_names import DEMO_DATA, find_known_data
from minillm.errors import UserError
from minillm.training.names import DEMO, MAKES, is_model, run_name, runs_of

ROOT = Path(__file__).resolve().parents[2]  # of the repository
STARTS_FROM = {"sft": "pretrain", "lora": "full_sft", "dpo": "full_sft", "reason": "rlhf", "distill": "pretrain"}
RUNS = {"pretrain": "pretrain", "sft": "full_sft", "dpo": "rlhf", "reason": "reason", "distill": "distill"}
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

    own_data = find_known_data(stage, directory=_near("dataset"))
    values = {"data_path": own_data} if own_data else _demo_settings(stage)
    notes = [f"data {own_data}" if own_data else f"data {DEMO_DATA} (the demo world), settings {_demo_config(stage)}"]
    if stage == "lora" and own_data:
        name = Path(own_data).name.partition(".")[0].removeprefix("lora_")
        values["lora_name"] = name or "lora"
    weights = None
    if stage in STARTS_FROM:
        flag = "teacher" if stage == "distill" else "from_weight"
        wanted = {"save_dir": given("save_dir"), "hidden_size": given("hidden_size")}
        weights = _weights(given(flag), STARTS_FROM[stage], **wanted)
        if weights:
            values[flag] = str(weights)
            notes.append(f"{flag.replace('from_weight', 'weights')} {weights}")
    if not own_data:
        _demo_data()
    if stage == "tokenizer":
        values["save_dir"] = given("save_dir") or ("out" if own_data else DEMO)
        notes.append(f"results in {values['save_dir']}/")
        return _say(values, notes)
    values["save_dir"] = given("save_dir") or ("out" if own_data else _demo_save_dir(stage, values, weights, given))
    if stage == "pretrain" and not given("tokenizer_path") and not given("from_weight"):
        values["tokenizer_path"] = _tokenizer(values["save_dir"], own_data)
        notes.append(f"tokenizer {values['tokenizer_path']}")
    notes.append(f"results in {values['save_dir']}/")
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


def _weights(name, stage: str, *, save_dir: str | None, hidden_size) -> Path | None:
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
        widths = [hidden_size, 128 if directory == DEMO else 512]
        usual = [runs[key] for width in widths for key in (f"{name or stage}_{width}",) if key in runs]
        if usual or runs:
            return (usual or list(runs.values()))[0]
    if name:
        return None  # find_weights lists what there is
    kind = "pretrained" if stage == "pretrain" else stage
    searched = " or ".join(f"{directory}/" for directory in directories)
    raise UserError(f"no {kind} weights in {searched}: run `python {MAKES[stage]}` first")


def _demo_save_dir(stage: str, values: dict, weights: Path | None, given: Callable) -> str:
    """Return ``out/demo``, or ``out`` if the run there is finished or the weights are not the demo's."""
    if weights and not weights.is_relative_to(DEMO):
        return "out"
    width, has_experts = given("hidden_size") or values.get("hidden_size") or 128, bool(given("use_moe"))
    if weights and stage != "distill" and weights.is_dir():
        width, has_experts = _width_of(weights), weights.name.endswith("_moe")
    adapter = given("lora_name") or values.get("lora_name")
    name = given("run_name") or run_name(RUNS.get(stage, ""), hidden_size=width, has_experts=has_experts)
    if adapter:
        name = "lora/" + run_name(adapter, hidden_size=width, has_experts=has_experts)
    run = Path(DEMO, name)
    is_finished = (run / "config.json").is_file() or (run / "adapter_config.json").is_file()
    wanted = given("from_resume") or given("overwrite")
    return "out" if is_finished and not wanted else DEMO


def _width_of(weights: Path) -> int:
    return json.loads((weights / "config.json").read_text(encoding="utf-8"))["hidden_size"]


# ---- what is made on the spot ------------------------------------------------------------------------------------


def _near(path: str) -> str:
    """Return ``path`` under the current directory if it exists there, else under the repository."""
    return path if Path(path).exists() or not (ROOT / path).exists() else str(ROOT / path)


def _demo_config(stage: str) -> str:
    return _near(f"configs/demo/{stage}.yaml")


def _demo_settings(stage: str) -> dict:
    try:
        values = yaml.safe_load(Path(_demo_config(stage)).read_text(encoding="utf-8"))
    except OSError:
        raise UserError("no --data_path, and no demo: these need the repository; give --data_path a file") from None
    values.pop("teacher", None)
    values.pop("from_weight", None)
    return values


def _demo_data() -> None:
    """Make the demo world where it is missing, with the sizes of ``make demo``."""
    if not (ROOT / "dataset" / "make_demo.py").is_file():
        raise UserError("no --data_path, and no dataset/make_demo.py to make the demo world: give --data_path a file")
    _make(
        Path(DEMO_DATA, "meta.json"),  # the last file that is written
        lambda: _call([str(ROOT / "dataset" / "make_demo.py"), "--out_dir", DEMO_DATA]),
        "making the demo world",
    )


def _tokenizer(save_dir: str, own_data: str | None) -> str:
    """Return the tokenizer of ``save_dir``, ``out/`` or (for the demo world) the demo; trained now if there is none."""
    directories = [save_dir, "out", *([] if own_data else [DEMO])]
    for directory in directories:
        if Path(directory, "tokenizer", "tokenizer.json").is_file():
            return f"{directory}/tokenizer"
    final = Path(save_dir, "tokenizer")
    data = ["--data_path", own_data] if own_data else ["--config", _demo_config("tokenizer")]

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
