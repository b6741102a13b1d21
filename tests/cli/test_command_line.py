"""Flags over a configuration file over the defaults, and one clear line for what cannot be meant."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from minillm.cli.arguments import PretrainArguments, SFTArguments
from minillm.cli.command_line import parse, require, script
from minillm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Toy:
    path: str
    rate: float = 1.0
    size: int | None = None
    count: int = 2
    quiet: bool = False
    loud: bool = True
    shape: Literal["round", "square"] = "round"
    fuse: Literal["auto", "0", "1"] = "auto"


@pytest.fixture
def config(tmp_path):
    """Call it with the text of a YAML file; returns the two words that name it."""

    def config(text):
        path = tmp_path / "toy.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False), (["--quiet"], True), (["--quiet", "1"], True), (["--quiet", "0"], False),
        (["--quiet", "true"], True), (["--quiet", "false"], False), (["--quiet", "True"], True),
        (["--quiet", "FALSE"], False), (["--quiet=1"], True), (["--quiet=false"], False), (["--quiet", "no"], False),
    ],
)  # fmt: skip
def test_booleans_bare_as_digits_and_as_words(words, expected):
    for after in ([], ["--count", "5"], ["--loud", "0"]):  # what follows is neither swallowed nor lost
        args = parse(Toy, ["--path", "p", *words, *after])
        assert args.quiet is expected
        assert args.count == (5 if after[:1] == ["--count"] else 2)
        assert args.loud is (after[:1] != ["--loud"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"), (["--fuse"], "1"), (["--fuse", "1"], "1"), (["--fuse=0"], "0"), (["--fuse", "auto"], "auto"),
        (["--fuse", "true"], "1"), (["--fuse", "No"], "0"), (["--fuse=auto"], "auto"),
    ],
)  # fmt: skip
def test_a_switch_may_be_automatic(words, expected):
    for after in ([], ["--count", "5"]):
        args = parse(Toy, ["--path", "p", *words, *after])
        assert (args.fuse, args.count) == (expected, 5 if after else 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", "1"), ("false", "0"), ("1", "1"), ("0", "0"), ("auto", "auto"), ("'1'", "1"), ("2", None), ("on", "1")],
)
def test_a_switch_of_an_older_file_is_true_or_false(config, text, expected):
    argv = [*config(f"fuse: {text}\n"), "--path", "p"]
    if expected is None:
        with pytest.raises(UserError, match="not one of auto, 0, 1"):
            parse(Toy, argv)
    else:
        assert parse(Toy, argv).fuse == expected
        assert parse(Toy, [*argv, "--fuse", "auto"]).fuse == "auto"


def test_compile_is_a_switch(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    argv = ["--data_path", str(tmp_path / "a.jsonl")]
    assert [parse(PretrainArguments, [*argv, *more]).compile for more in ([], ["--compile"])] == ["auto", "1"]


def test_a_boolean_of_another_word_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Toy, ["--path", "p", "--quiet", "perhaps"])
    assert end.value.code == 2
    assert "perhaps" in capsys.readouterr().err


def test_flags_over_the_file_over_the_defaults(config):
    words = config("path: from_file\nrate: 0.5\ncount: 7\nquiet: true\n")
    args = parse(Toy, [*words, "--count", "9", "--quiet", "0"])
    assert (args.path, args.rate, args.count, args.quiet, args.shape) == ("from_file", 0.5, 9, False, "round")
    assert parse(Toy, ["--count=9", f"--config={words[1]}"]).count == 9  # wherever it stands, however it is written


def test_what_neither_file_nor_flags_give_is_asked_for(config, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Toy, config("count: 3\n"))
    assert end.value.code == 2
    assert "--path" in capsys.readouterr().err
    assert parse(Toy, [*config("count: 3\n"), "--path", "given"]).path == "given"
    assert parse(Toy, [*config(""), "--path", "given"]).count == 2  # an empty file sets nothing


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("rate: 1e-3", "rate", 1e-3), ("rate: 5e4", "rate", 5e4), ("rate: 2", "rate", 2.0), ("size: 12", "size", 12),
        ("size: null", "size", None), ("count: 1000.0", "count", 1000), ("shape: square", "shape", "square"),
    ],
)  # fmt: skip
def test_yaml_values_become_their_fields_type(config, text, field, value):
    """YAML 1.1 reads 1e-3, without a point, as a string."""
    found = getattr(parse(Toy, [*config(text), "--path", "p"]), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: red", ["unknown field colour", "known: ", "shape"]), ("rate: fast", ["rate", "'fast'", "float"]),
        ("count: 1.5", ["count", "1.5", "int"]), ("count: true", ["count", "True", "int"]),
        ("size: tall", ["size", "'tall'", "int"]), ("quiet: 3", ["quiet", "3", "true or false"]),
        ("path: 3", ["path", "3", "quote"]), ("shape: oval", ["shape", "'oval'", "round, square"]),
        ("- a\n- b", ["name: value", "list"]), ("a: [1,", ["not valid YAML"]), ("count:", ["count", "None", "int"]),
        ("count: .inf", ["count", "inf", "int"]), ("1: 2", ["unknown field 1"]), ("path: é", ["UTF-8"]),
    ],
)  # fmt: skip
def test_what_a_file_cannot_mean_is_one_line(config, text, words):
    argv = config(text)
    if "é" in text:
        Path(argv[1]).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        parse(Toy, argv)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [argv[1], *words]), error.value


def test_a_missing_configuration_file(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--config {tmp_path}/no.yaml: no such file")):
        parse(Toy, ["--config", f"{tmp_path}/no.yaml"])
    with pytest.raises(UserError, match="needs a file name"):
        parse(Toy, ["--path", "p", "--config"])


def test_wrong_flags_are_usage_errors_and_help_is_none(capsys):
    for argv, code in [(["--nonsense", "1"], 2), (["--path", "p", "--count", "many"], 2), (["--help"], 0)]:
        with pytest.raises(SystemExit) as end:
            parse(Toy, argv)
        assert end.value.code == code
    shown = capsys.readouterr().out
    assert "--count" in shown


def test_the_real_arguments_with_dashes_underscores_and_a_file(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("")
    (tmp_path / "c.yaml").write_text(f"data_path: {data}\nlearning_rate: 1e-3\npacking: none\nuse_wandb: true\n")
    config = ["--config", str(tmp_path / "c.yaml")]
    args = parse(PretrainArguments, [*config, "--max_seq_len", "31", "--dry_run", "--gradient-checkpointing"])
    assert (args.learning_rate, args.packing, args.use_wandb) == (1e-3, "none", True)
    assert (args.max_seq_len, args.dry_run, args.gradient_checkpointing) == (31, True, True)
    assert parse(SFTArguments, ["--data_path", str(data), "--tie_word_embeddings", "0"]).tie_word_embeddings is False
    with pytest.raises(UserError, match="--max_seq_len 0"):  # check() runs on what the file and the flags gave
        parse(PretrainArguments, [*config, "--max_seq_len", "0"])


def test_help_shows_the_field_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse(PretrainArguments, ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Rows per optimizer update over all ranks" in shown
    assert "--global_batch_size" in shown


def test_script_turns_a_user_error_into_one_line_and_code_2(capsys):
    @script
    def main(argv=None):
        """What it does."""
        require(argv != ["bad"], "value 7: must be 3")
        return argv

    assert main(["fine"]) == ["fine"]
    assert main.__doc__ == "What it does."
    with pytest.raises(SystemExit) as end:
        main(["bad"])
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: value 7: must be 3\n")


def test_script_lets_bugs_show_themselves():
    @script
    def main(argv=None):
        raise ValueError("a bug, not the user's doing")

    with pytest.raises(ValueError, match="a bug"):
        main()


@pytest.mark.parametrize(
    "text", ["a: 2024-99-99", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "[" * 1500, "a: !!float []"]
)
def test_values_that_the_yaml_library_trips_over(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: not valid YAML"):
        parse(PretrainArguments, ["--config", str(tmp_path / "c.yaml")])


def test_yaml_integers_of_any_size_and_choices_that_may_be_left_out(tmp_path):
    data = tmp_path / "a.txt"
    data.write_text("some words")

    def parsed(text):
        (tmp_path / "c.yaml").write_text(f"data_path: {data}\n{text}")
        return parse(PretrainArguments, ["--config", str(tmp_path / "c.yaml")])

    assert parsed("seed: 9007199254740993").seed == 2**53 + 1  # which no float holds
    with pytest.raises(UserError, match=r"learning_rate: 10+ is not of type float"):
        parsed(f"learning_rate: {10**400}")
    assert parsed("use_moe: true\nscoring_func: softmax").scoring_func == "softmax"
    assert parsed("scoring_func: null").scoring_func is None
    with pytest.raises(UserError, match=r"scoring_func: 5 is not one of softmax, sigmoid"):
        parsed("scoring_func: 5")


@pytest.mark.parametrize(("words", "code", "said"), [("raise KeyboardInterrupt", 130, "interrupted\n"),
                                                     ("print('x' * 100_000, flush=True)", 141, "")])  # fmt: skip
def test_ctrl_c_and_a_closed_pipe_end_without_a_trace(words, code, said):
    source = f"from minillm.errors import script\n@script\ndef main(argv=None):\n    {words}\nmain()"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", source], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, said)


def test_text_survives_a_locale_of_ascii_alone():
    source = "from minillm.errors import script\n@script\ndef main(argv=None):\n    print(input(), chr(0x4f60))\nmain()"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", source], input="好\n".encode(), env=environment, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, "好 你\n"), done.stderr
    environment = os.environ | {"PYTHONIOENCODING": "gbk"}
    source = source.replace("input()", "chr(0x1f600)")
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True)
    assert (done.returncode, done.stdout.decode("gbk")) == (0, "\\U0001f600 你\n"), done.stderr


def test_a_wrong_flag_ends_a_bare_command_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minillm.cli.command_line.choose", lambda *_: pytest.fail("something was chosen"))
    for flags in (["--dat_path", "x"], ["--hidden_size", "abc"]):
        with pytest.raises(SystemExit) as ended:
            parse(PretrainArguments, flags)
        assert ended.value.code == 2
    assert not list(tmp_path.iterdir())


def test_the_arguments_of_a_runs_own_file_are_taken(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    arguments = {"data_path": str(tmp_path / "text.jsonl"), "learning_rate": 0.002}
    content = {"command": "python ...", "arguments": arguments, "versions": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert parse(PretrainArguments, ["--config", str(tmp_path / "run.yaml")]).learning_rate == 0.002
