"""The flags that DESIGN promises, and each range check."""

import dataclasses
import inspect

import pytest

from minillm.cli.arguments import PretrainArguments, SFTArguments, TrainArguments
from minillm.cli.eval_arguments import EvalArguments
from minillm.errors import UserError

FLAGS = {
    "save_dir", "data_path", "valid_path", "tokenizer_path", "from_weight", "from_resume", "epochs", "max_steps",
    "batch_size", "global_batch_size", "accumulation_steps", "learning_rate", "lr_scheduler", "warmup_ratio",
    "weight_decay", "grad_clip", "max_seq_len", "hidden_size", "num_hidden_layers", "dtype", "device", "compile",
    "gradient_checkpointing", "num_workers", "log_interval", "eval_interval", "save_interval", "keep_last", "use_wandb",
    "wandb_project", "seed", "dry_run", "preset",
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


@pytest.mark.parametrize("cls", [TrainArguments, PretrainArguments, SFTArguments])
def test_the_known_flags_are_there(cls):
    assert {field.name for field in dataclasses.fields(cls)} >= FLAGS


def test_defaults_that_others_rely_on(file):
    args = PretrainArguments(data_path=file)
    args.check()
    assert (args.save_dir, args.dtype, args.device) == ("out", "auto", "auto")
    assert (args.from_weight, args.token_cache) == ("", "out/.token_cache")
    assert SFTArguments(data_path=file).from_weight == "pretrain"
    assert PretrainArguments(data_path=file, cache_dir="elsewhere").token_cache == "elsewhere"


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("epochs", 0, "positive, e.g. 0.5 or 2"), ("warmup_steps", -1, "at least 0"), ("patience", -1, "at least 0"),
        ("max_steps", -1, "at least 0"), ("batch_size", 0, "at least 1"),
        ("accumulation_steps", 0, "at least 1"), ("global_batch_size", -8, "at least 0"),
        ("max_seq_len", 0, "at least 1"), ("max_seq_len", -5, "at least 1"), ("warmup_ratio", -0.1, "at least 0"),
        ("warmup_ratio", 1.5, "between 0 and 1"), ("min_lr_ratio", 1.01, "between 0 and 1"),
        ("decay_ratio", 2.0, "between 0 and 1"), ("weight_decay", -1e-3, "at least 0"),
        ("grad_clip", -1.0, "at least 0"),
        ("num_workers", -1, "at least 0"), ("num_threads", -1, "at least 0"), ("log_interval", 0, "at least 1"),
        ("eval_interval", -1, "at least 0"), ("save_interval", -1, "at least 0"), ("keep_last", 0, "at least 1"),
        ("adam_beta1", 1.1, "between 0 and 1"), ("adam_beta2", -0.1, "between 0 and 1"),
        ("learning_rate", 0.0, "positive"), ("learning_rate", -1.0, "positive"),
        ("learning_rate", float("nan"), "positive"),
        ("grad_clip", float("nan"), "at least 0"), ("warmup_ratio", float("nan"), "at least 0"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_its_limit(file, name, value, limit):
    with pytest.raises(UserError, match=f"^--{name} {value}: must .*{limit}$"):
        PretrainArguments(data_path=file, **{name: value}).check()


@pytest.mark.parametrize("name", ["data_path", "valid_path"])
def test_a_missing_file_is_named_among_those_that_exist(file, tmp_path, name):
    missing = str(tmp_path / "missing.jsonl")
    files = {"data_path": file} | {name: f"{file}, {missing}"}
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        PretrainArguments(**files).check()


@pytest.mark.parametrize("path", ["", " , "])
def test_no_data_file_at_all_is_refused(path):
    with pytest.raises(UserError, match="--data_path"):
        PretrainArguments(data_path=path).check()


def test_several_files_with_commas(file):
    args = PretrainArguments(data_path=f"{file}, {file},", valid_path=file)
    args.check()
    assert args.data_files == [file, file]
    assert args.valid_files == [file]


def test_model_overrides_hold_what_was_given(file):
    args = PretrainArguments(data_path=file, hidden_size=64, use_qk_norm=True)
    assert args.model_overrides() == {"hidden_size": 64, "tie_word_embeddings": True, "use_qk_norm": True}


@pytest.mark.parametrize(
    "said, meant",
    [
        ("", None), ("none", ("default", 1.0)), ("yarn:4", ("yarn", 4.0)), ("dynamic:2.5", ("dynamic", 2.5)),
        ("linear:1", ("linear", 1.0)),
    ],
)  # fmt: skip
def test_rope_scaling_is_a_type_and_a_factor(file, said, meant):
    for args in (PretrainArguments(data_path=file, rope_scaling=said), EvalArguments(rope_scaling=said)):
        args.check()
        assert args.rope_type_and_factor == meant


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rope_scaling": "ntk:4"}, "--rope_scaling ntk:4: .* linear, dynamic, yarn"),
        ({"rope_scaling": "4"}, "--rope_scaling 4: .* linear, dynamic, yarn"),
        ({"rope_scaling": "default:1"}, "--rope_scaling default:1: must be none or"),
        ({"rope_scaling": "yarn"}, "--rope_scaling yarn: .* at least 1 .*yarn:4"),
        ({"rope_scaling": "yarn:"}, "--rope_scaling yarn:: .* at least 1"),
        ({"rope_scaling": "linear:0.5"}, "linear:0.5: .* at least 1"),
        ({"rope_scaling": "dynamic:two"}, "dynamic:two: .* at least 1"),
        ({"rope_scaling": "dynamic:inf"}, "dynamic:inf: .* at least 1"),
        ({"rope_scaling": "dynamic:nan"}, "dynamic:nan: .* at least 1"),
        ({"rope_scaling": "yarn:4", "rope_original_len": -1}, "--rope_original_len -1: must be at least 0"),
        ({"rope_original_len": 256}, "--rope_original_len 256: goes with a --rope_scaling"),
        ({"rope_scaling": "none", "rope_original_len": 256}, "--rope_original_len 256: goes with"),
    ],
)
def test_rope_scaling_that_cannot_be(file, values, message):
    for args in (PretrainArguments(data_path=file, **values), EvalArguments(**values)):
        with pytest.raises(UserError, match=message):
            args.check()


def test_every_field_has_a_help_text():
    """tyro takes the help from the field docstrings: one that lacks it shows an empty line."""
    for cls in (TrainArguments, PretrainArguments):
        lines = inspect.getsource(cls).splitlines()
        for name in cls.__annotations__:
            (index,) = [i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")]
            assert lines[index + 1].strip().startswith('"""'), f"{cls.__name__}.{name}"
