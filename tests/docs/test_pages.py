"""The pages agree with the repository: links and anchors lead somewhere; commands, flags, files and symbols exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"]
PAGES += [*(ROOT / "dataset").glob("*.md")]
SOURCES = [path for folder in ("minillm", "tests", "benchmarks", "dataset") for path in (ROOT / folder).rglob("*.py")]
SOURCES += [*ROOT.glob("*.py"), *(ROOT / "docs").rglob("*.py")]
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```", re.M | re.S)
FILE_AND_SYMBOL = re.compile(r"`([\w/]+\.py)`, `(\w[\w.]*)(?<!\.py)`")
# What a page names although it is not here: the example of CONTRIBUTING, the files of the first design, data of users.
NOT_HERE = {"my_tools.py", "train_focal.py", "config.py", "hf.py"}
OF_LAUNCHERS = {
    "nproc_per_node", "nnodes", "rdzv_id", "rdzv_backend", "rdzv_endpoint", "max-restarts", "num_gpus",
}  # fmt: skip
OF_OTHERS = {"config", "help", "profile", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "requeue",
             "signal", "target", "n", "logdir", "model", "model_args", "include_path", "tasks"}  # fmt: skip


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find(name: str) -> list[Path]:
    """Return the source files that a page means by ``name``: a path from the root or from ``minillm``, or a name."""
    if "/" in name:
        return [base / name for base in (ROOT, ROOT / "minillm") if (base / name).is_file()]
    return [path for path in SOURCES if path.name == name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text_of(page))):
        if not target.startswith(("http:", "https:")):
            path, _, anchor = target.partition("#")
            aim = (page.parent / path).resolve() if path else page
            assert aim.exists(), target
            assert not anchor or anchor in anchors_of(aim), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_exist(page):
    text = text_of(page)
    named = set(re.findall(r"(?<![\w./-])((?:\w+/)*\w+\.py)\b", text)) - NOT_HERE
    assert not [name for name in named if not find(name) and "focal" not in name]
    for module in set(re.findall(r"-m (minillm[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_symbols_are_in_their_files(page):
    for name, symbol in FILE_AND_SYMBOL.findall(text_of(page)):
        word = re.compile(rf"\b{symbol.rpartition('.')[2]}\b")
        assert any(word.search(path.read_text(encoding="utf-8")) for path in find(name)), f"{name}: no {symbol}"


def known_flags() -> set[str]:
    """Return the fields of all classes and the parameters of every ``__main__``; the flags are among them."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
            elif isinstance(node, ast.FunctionDef) and path.name == "__main__.py":
                names |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return names


def test_flags_exist():
    known = known_flags() | OF_LAUNCHERS | OF_OTHERS
    for page in PAGES:
        flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(page)))
        assert not flags - known, page


# A command: an optional launcher with its own flags, then our program with the rest of the line.
PROGRAM = re.compile(
    r"\b(?:python|torchrun|deepspeed|streamlit run)(?: --?\w\S* [\w.:]+)* (-m minillm[\w.]*|[\w/]+\.py)\b(.*)"
)


@functools.cache
def class_definitions() -> dict[str, ast.ClassDef]:
    """Return the classes of all packages by name; those of ``minillm.cli`` have unique names."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "minillm").rglob("*.py")]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def flags_of(path: Path) -> set[str]:
    """Return the flags of a program: the fields of the class that it parses, or the parameters of its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = class_definitions() | {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parsed = [
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Name)
        and (getattr(node.func, "id", "") == "parse" or getattr(node.func, "attr", "") == "cli")
    ]
    flags, todo = set(), [name for name in parsed if name in own]
    if not todo:  # subcommands, which are functions; or a script whose main is elsewhere
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                flags |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
            if isinstance(node, ast.ImportFrom) and node.module == "minillm.web.app":
                flags |= flags_of(ROOT / "minillm/web/app.py")
    while todo:
        node = own[todo.pop()]
        flags |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
        todo += [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in own]
    return flags | {"config", "help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_program_has_the_flags_that_the_commands_give_it(page):
    for command in commands(page):
        for program, rest in PROGRAM.findall(command):
            if program.startswith("-m"):
                path = ROOT / program.removeprefix("-m ").replace(".", "/")
                path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            else:
                path = ROOT / program
            if path.name == "ch30_run.py":  # its flags are those of a stage's script
                path = ROOT / f"train_{rest.split()[0]}.py"
            takes_the_flags_of_another_program = path.name == "harness.py" and rest.startswith(" run ")
            if path.name not in NOT_HERE and path.exists() and not takes_the_flags_of_another_program:
                given = set(re.findall(r"(?<![\w-])--(\w[\w-]*)", rest.partition("#")[0]))
                assert not given - flags_of(path), command


def commands(page: Path) -> list[str]:
    """Return the commands of a page's code blocks, each in one line, without comments and runs of spaces."""
    blocks = [re.sub(r"\\\n", " ", block) for block in FENCE.findall(text_of(page))]
    lines = [re.sub(r"(^|\s)#.*", "", line) for block in blocks for line in block.splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def numbers_of_rows(page: Path) -> list[list[str]]:
    """Return the numbers in each row of a page's tables."""
    return [sorted(re.findall(r"\d[\d.,]*\d|\d", line)) for line in text_of(page).splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    "page",
    [
        "README",
        "dataset/README",
        "docs/faq",
        "docs/guide",
        "docs/tour",
        "docs/data",
        "docs/evaluation",
        "docs/export",
        "docs/serving",
        "docs/chat_templates",
        "docs/finetune-open-models",
        "docs/tools",
        "docs/web",
    ],
)
def test_both_languages_have_the_same_commands_and_tables(page):
    english, chinese = ROOT / f"{page}.md", ROOT / f"{page}_zh.md"
    assert commands(english) == commands(chinese)
    assert numbers_of_rows(english) == numbers_of_rows(chinese)


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "docs/architecture.md"])
def test_the_loop_is_that_of_the_script(page):
    (loop,) = re.findall(r"^```python\n(for step in .*?)^```", text_of(ROOT / page), flags=re.M | re.S)
    script = text_of(ROOT / "train_pretrain.py")
    assert " ".join(loop.split()) in " ".join(script.split())
