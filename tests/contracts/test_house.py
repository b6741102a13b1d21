"""The rules of the house: who imports whom, what an import costs, what every script looks like."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Package or module of minillm: what it may import of the others, beside itself and what is free for all.
FREE_FOR_ALL = ("errors", "terminal", "files", "precision", "hardware")
MAY_IMPORT = {
    **{name: set() for name in FREE_FOR_ALL},
    "kernels": set(),
    "config": set(),
    "model": {"config", "kernels"},
    "losses": {"kernels"},
    "lora": {"config", "model", "kernels"},
    "tokenizer": set(),
    "data": {"tokenizer"},
    "inference": {"model", "tokenizer", "data"},
    "distributed": set(),
    "hub": {"config", "model", "lora", "tokenizer", "distributed"},
    "checkpoints": {"hub", "lora", "distributed"},
    "reports": {"model", "lora", "data", "checkpoints"},
    "objectives": {"kernels", "losses", "lora", "tokenizer", "data", "distributed", "hub", "checkpoints", "reports"},
    "training": {"kernels", "model", "losses", "data", "distributed", "checkpoints", "objectives", "reports"},
    "cli": {"config", "losses", "lora", "tokenizer", "data", "distributed", "hub", "checkpoints"},
    "export": {"tokenizer", "hub"},
    "serving": {"config", "kernels", "model", "tokenizer", "data", "inference", "lora", "hub"},
    "evaluation": {"model", "losses", "tokenizer", "data", "inference", "serving", "hub", "cli"},
    "compare": {"reports"},
    "explain": {"model", "reports"},
    "web": {"data", "reports", "compare", "serving", "cli"},
    "plan": {"config", "kernels", "model", "losses", "lora", "distributed", "hub", "cli"},
}
MODULES = sorted((ROOT / "minillm").rglob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")
STAGES = [path for path in SCRIPTS if path.stem.startswith("train_") and path.stem != "train_tokenizer"]
TOP_LEVEL = {path.stem for path in SCRIPTS} | {"tests", "benchmarks", "dataset", "demo_world", "make_demo"}
TOP_LEVEL |= {"demo_report", "demo_table", "demo_tools", "demo_words", "make_persona"}
# What no extra of ours names, but code around language models easily pulls in.
NEVER_NEEDED = {"sentencepiece", "peft", "trl", "accelerate", "datasets", "pandas", "scipy", "sklearn", "tensorboard"}
IMPORT_NAMES = {"rouge-score": "rouge_score", "nvidia-ml-py": "pynvml", "lm-eval": "lm_eval",
                "prometheus-client": "prometheus_client"}  # fmt: skip


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, inside functions and under conditions too.

    ``from a.b import c`` counts as ``a.b.c`` where that is a module of ours, else as ``a.b``.
    """
    found = set()
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or (inner / "__init__.py").is_file()
                found.add(f"{base}.{alias.name}" if is_module else base)
    return found


def part_of(module: str) -> str | None:
    """Return which part of minillm a module belongs to; None for minillm itself and for others' modules."""
    words = module.split(".")
    return words[1] if words[0] == "minillm" and len(words) > 1 else None


# ---- imports go one way ------------------------------------------------------------------------------------------


def test_imports_go_one_way():
    for path in MODULES:
        imports, name = imports_of(path), name_of(path)
        here = part_of(name)
        outside = {imported for imported in imports if imported.split(".")[0] in TOP_LEVEL}
        assert not outside, f"{name}: the library must not import scripts, tests or tools: {outside}"
        if here is None:
            assert not imports, "minillm/__init__.py imports nothing"
        elif path.name != "__main__.py":  # a program, which may import what it likes
            assert here in MAY_IMPORT, f"{here} is new: give it a place in the order"
            parts = {part_of(other) for other in imports if other.split(".")[0] == "minillm"}
            parts -= {here, *FREE_FOR_ALL, None}
            assert parts <= MAY_IMPORT[here], f"{name} must not import {parts - MAY_IMPORT[here]}"


def test_losses_import_torch_alone():
    for path in MODULES:
        if part_of(name_of(path)) == "losses":
            roots = {name.split(".")[0] for name in imports_of(path)}
            assert roots - sys.stdlib_module_names <= {"torch", "minillm"}, path


def test_neither_modules_nor_packages_form_cycles():
    modules = {name_of(path): {n for n in imports_of(path) if n.startswith("minillm.")} for path in MODULES}
    for path in MODULES:  # a package's names live in its modules; importing them from itself is no cycle
        if path.name == "__init__.py":
            modules[name_of(path)] = {n for n in modules[name_of(path)] if not n.startswith(name_of(path) + ".")}
    parts: dict[str, set] = {}
    for name, imports in modules.items():
        if (here := part_of(name)) and not name.endswith(".__main__"):
            parts.setdefault(here, set()).update({part_of(n) for n in imports} - {here})
    for graph in (modules, parts):
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"imports form a cycle: {' -> '.join(error.args[1])}")


# ---- what an import needs and costs ------------------------------------------------------------------------------


def python(code: str, *flags: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter that finds the repository; fail with what it printed."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def metadata() -> dict:
    """The project's metadata: its only place is pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras_of(metadata: dict) -> dict[str, list[str]]:
    """Return the optional packages by extra, without the references of one extra to another."""
    extras = metadata["optional-dependencies"]
    return {name: [line for line in lines if not line.startswith("minillm[")] for name, lines in extras.items()}


def test_imports_need_no_optional_package_and_start_nothing(metadata, tmp_path):
    needed = {canonicalize_name(Requirement(line).name) for line in metadata["dependencies"]}
    extras = {Requirement(line).name for lines in extras_of(metadata).values() for line in lines}
    optional = {IMPORT_NAMES.get(name, name) for name in extras if canonicalize_name(name) not in needed} | NEVER_NEEDED
    assert {"transformers", "wandb", "matplotlib", "deepspeed", "pyarrow", "huggingface_hub", "rouge_score"} <= optional
    modules = [name_of(path) for path in MODULES if path.stem != "__main__"] + [path.stem for path in SCRIPTS]
    assert {"minillm.model", "minillm.data", "minillm.training.run", "minillm.evaluation"} <= set(modules)
    done = python(
        f"""
        import importlib, inspect, sys, threading

        class Hide:
            '''Finds what the usual finders find, but for the optional packages: these seem not to be installed.'''
            def __init__(self, finders):
                self.finders = finders
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {sorted(optional)}:
                    return None
                found = (finder.find_spec(name, path, target) for finder in self.finders)
                return next((spec for spec in found if spec is not None), None)

        sys.meta_path[:] = [Hide(list(sys.meta_path))]
        for name in {modules}:
            importlib.import_module(name)
        for name in {[path.stem for path in SCRIPTS]}:
            main = importlib.import_module(name).main
            assert str(inspect.signature(main, follow_wrapped=False)).startswith("(argv"), name
            parameters = inspect.signature(main).parameters
            assert list(parameters) == ["argv"] and parameters["argv"].default is None, (name, parameters)
        assert threading.active_count() == 1, threading.enumerate()
        """,
        cwd=tmp_path,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


def test_importing_minillm_is_quick():
    """``import minillm`` costs at most 0.3 s beyond torch; the requirement is a time, so this test takes the time."""

    def seconds() -> float:
        totals: dict[str, int] = {}
        for line in python("import minillm", "-X", "importtime").stderr.splitlines():
            if match := re.match(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)$", line):
                totals.setdefault(match[2], int(match[1]))  # microseconds, with what it imported
        return (totals["minillm"] - totals.get("torch", 0)) / 1e6

    assert any(seconds() <= 0.3 for _ in range(3))  # the first one that is not disturbed


# ---- the scripts -------------------------------------------------------------------------------------------------


def test_every_stage_holds_its_loop_in_plain_sight():
    """One loop over ``run.steps``, with the count of the loss used."""
    assert {f"train_{stage}.py" for stage in ("pretrain", "sft", "lora", "dpo", "distill", "reason")} <= {
        path.name for path in STAGES
    }
    for path in STAGES:
        loops = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.For)]
        (loop,) = [node for node in loops if ast.unparse(node.iter) == "run.steps(loader)"]
        text = ast.unparse(loop)
        assert "step.backward(loss_sum, n_targets)" in text, path.name
        assert "run.update(step)" in text, path.name


# ---- what is written down ----------------------------------------------------------------------------------------


def undocumented(path: Path) -> list[str]:
    """Return the public module, classes, functions and methods of a file that have no docstring."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [] if ast.get_docstring(tree) else [name_of(path)]
    for node in tree.body:
        members = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
        for member in members:
            if isinstance(member, kinds) and not node.name.startswith("_") and not member.name.startswith("_"):
                inside = "" if member is node else f"{node.name}."
                # main is the script, whose docstring is the module's; a module's forward is what its class does.
                if not ast.get_docstring(member) and member.name not in ("main", "forward", "backward"):
                    missing.append(f"{name_of(path)}.{inside}{member.name}")
    return missing


def test_everything_public_has_a_docstring():
    public = [*MODULES, *SCRIPTS, *(ROOT / "benchmarks").glob("*.py")]
    assert not [name for path in public for name in undocumented(path)]


def own_files() -> list[Path]:
    """Return every file of the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_on_one_machine():
    places = re.compile(r"(?<![\w.~$}/-])/(?:work|root|home|Users)/")
    hits = []
    for path in own_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        hits += [f"{path.relative_to(ROOT)}: {line.strip()[:120]}" for line in text.splitlines() if places.search(line)]
    assert not hits


def pins(name: str) -> dict[str, Requirement]:
    """Return the requirements of a file by their normalised names."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_pins_agree_with_the_metadata(metadata):
    extras = extras_of(metadata)
    core = pins("requirements.txt")
    everything = core | pins("requirements-docs.txt") | pins("requirements-dev.txt")
    needed = {canonicalize_name(Requirement(line).name) for line in metadata["dependencies"]}
    # Besides: the curves of the demo, and what builds the package without a network.
    assert set(core) == needed | {"matplotlib", "setuptools", "wheel"}
    assert {canonicalize_name(Requirement(line).name) for line in extras["dev"]} <= set(everything)
    assert {canonicalize_name(Requirement(line).name) for line in extras["docs"]} == set(pins("requirements-docs.txt"))
    for line in [*metadata["dependencies"], *(line for lines in extras.values() for line in lines)]:
        wanted = Requirement(line)
        if pin := everything.get(canonicalize_name(wanted.name)):
            (exact,) = pin.specifier
            assert exact.operator == "==", f"{pin} is no pin"
            assert exact.version in wanted.specifier, f"pyproject.toml wants {wanted}, the pin is {pin}"


def commands(name: str) -> list[str]:
    """Return the lines of a page's code blocks, without comments and runs of spaces."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = (re.sub(r"(^|\s)#.*", "", line) for block in blocks for line in block.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def test_both_readmes_give_the_same_commands():
    assert commands("README.md") == commands("README_zh.md") != []
