"""The flags of train_distill.py: each range check, and what goes with what."""

import pytest

from minillm.cli.arguments import DistillArguments
from minillm.errors import UserError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def test_defaults(file):
    args = DistillArguments(data_path=file, teacher="t")
    args.check()
    assert (args.alpha, args.temperature, args.divergence, args.top_k, args.on_policy) == (0.5, 1.0, "forward", 0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.1}, "--alpha 1.1: must lie between 0 and 1"),
        ({"on_policy": -0.1}, "--on_policy -0.1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be positive"),
        ({"sampling_temperature": 0.0}, "--sampling_temperature 0.0"),
        ({"max_cache_gib": 0.0}, "--max_cache_gib 0.0"),
        ({"top_k": -1}, "--top_k -1"),
        ({"hidden_weight": -1.0}, "--hidden_weight -1.0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"top_k": 4, "on_policy": 0.5}, "--on_policy needs the teacher"),
        ({"top_k": 4, "hidden_weight": 0.5}, "no hidden states"),
        ({"teacher_cache": "somewhere"}, "goes with --top_k"),
    ],
)
def test_what_is_out_of_range_or_of_no_use_is_named(file, changes, message):
    with pytest.raises(UserError) as error:
        DistillArguments(data_path=file, teacher="t", **changes).check()
    assert message in str(error.value)
