"""The flags of train_dpo.py: each range check, and what goes with what."""

import pytest

from minillm.cli.arguments import PreferenceArguments
from minillm.errors import UserError
from minillm.losses.preference import LOSS_TYPES, NEEDS_REFERENCE


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def test_defaults(file):
    args = PreferenceArguments(data_path=file)
    args.check()
    assert (args.from_weight, args.loss_type, args.beta, args.reference_kind) == ("full_sft", "sigmoid", 0.1, "copy")


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "kto"])
def test_every_loss_is_known_and_its_reference_too(file, loss_type):
    args = PreferenceArguments(data_path=file, loss_type=loss_type)
    args.check()
    assert (args.reference_kind is None) == (loss_type not in NEEDS_REFERENCE) == (loss_type in ("simpo", "orpo"))


def test_dropout_is_refused_only_where_it_moves_the_start(file):
    usual = {"data_path": file, "lora_name": "a", "lora_dropout": 0.1}
    PreferenceArguments(**usual).check()
    PreferenceArguments(**usual, lora_init="pissa", loss_type="orpo").check()
    PreferenceArguments(**(usual | {"lora_dropout": 0.0}), lora_init="pissa").check()


def test_the_reference_of_an_adapter_is_the_model_without_it(file):
    assert PreferenceArguments(data_path=file, lora_name="a").reference_kind == "adapter"
    assert PreferenceArguments(data_path=file, lora_name="a", reference="cached").reference_kind == "cached"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "--beta 0.0: must be positive"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5"),
        ({"lora_name": "a", "lora_dropout": 0.1, "lora_init": "pissa"}, "--lora_dropout 0.1 with --lora_init pissa"),
        ({"lora_name": "a", "lora_dropout": 0.1, "lora_init": "olora", "loss_type": "kto"}, "not start at its ref"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "goes with sigmoid, robust, simpo"),
        ({"gamma": 0.5}, "goes with --loss_type simpo"),
        ({"gamma": -1.0, "loss_type": "simpo"}, "--gamma -1.0"),
        ({"sft_weight": -1.0}, "--sft_weight -1.0"),
        ({"sft_weight": 1.0, "loss_type": "kto"}, "--sft_weight: goes with pairs"),
        ({"desirable_weight": 2.0}, "go with kto"),
        ({"reference": "copy", "loss_type": "orpo"}, "--loss_type orpo has none"),
        ({"reference": "adapter"}, "--reference adapter: goes with --lora_name"),
        ({"reference_cache": "somewhere"}, "goes with --reference cached"),
        ({"from_weight": ""}, "--from_weight is empty"),
        ({"lora_name": "a/b"}, "--lora_name 'a/b'"),
    ],
)
def test_what_is_out_of_range_or_of_no_use_is_named(file, changes, message):
    with pytest.raises(UserError) as error:
        PreferenceArguments(data_path=file, **changes).check()
    assert message in str(error.value)
