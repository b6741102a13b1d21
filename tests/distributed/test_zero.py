"""DeepSpeed's settings: read, and filled from the flags. The engine itself is in tests/contracts, on several ranks."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

from minillm.cli.arguments import LoRAArguments
from minillm.distributed.ranks import Ranks
from minillm.distributed.zero import ZeRO, build_locks, fill_in, read_settings
from minillm.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))


def filled(settings: dict, **changes) -> dict:
    """Fill ``settings`` for a run of 2 ranks with 3 micro-batches of 4 rows."""
    values = {
        "batch_size": 4, "accumulation_steps": 3, "world_size": 2, "grad_clip": 0.7, "dtype": torch.bfloat16,
        "short_weights": True, "hidden_size": 2000, "on_cuda": False,
    }  # fmt: skip
    return fill_in(copy.deepcopy(settings), **(values | changes))


def leaves(tree: dict, where: str = "") -> dict:
    """Return every value that is no dictionary, by its dotted name."""
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def test_there_is_a_file_for_each_stage():
    stages = {path.stem: read_settings(path)["zero_optimization"]["stage"] for path in CONFIGS}
    assert stages == {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_auto_of_every_file_is_filled(path):
    settings = read_settings(path)
    before = copy.deepcopy(settings)
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True))
    for dtype, short_weights, on_cuda in kinds:
        found = leaves(filled(settings, dtype=dtype, short_weights=short_weights, on_cuda=on_cuda))
        assert settings == before
        assert "auto" in leaves(settings).values()
        assert "auto" not in found.values()
        assert found["train_batch_size"] == 24
        assert found["train_micro_batch_size_per_gpu"] == 4
        assert found["gradient_accumulation_steps"] == 3
        assert found["gradient_clipping"] == 0.7
        assert found["zero_optimization.reduce_bucket_size"] == 4_000_000  # 2,000 squared
        if "zero3" in path.stem:
            assert found["zero_optimization.stage3_prefetch_bucket_size"] == 4_000_000
            assert found["zero_optimization.stage3_param_persistence_threshold"] == 20_000
        pinned = {name: value for name, value in found.items() if name.endswith("pin_memory")}
        assert len(pinned) == {"zero2_offload": 1, "zero3_offload": 2}.get(path.stem, 0)
        assert set(pinned.values()) <= {on_cuda}  # without a card there is nothing to copy to in the background


def test_a_narrow_model_has_no_tiny_buckets():
    found = leaves(filled(read_settings(CONFIGS[-1]), hidden_size=16))
    assert found["zero_optimization.reduce_bucket_size"] == 1 << 20
    assert found["zero_optimization.stage3_prefetch_bucket_size"] == 1 << 20


@pytest.mark.parametrize(
    ("dtype", "short_weights", "bf16", "fp16", "autocast"),
    [
        (torch.float32, True, False, False, None),
        (torch.float32, False, False, False, None),
        (torch.bfloat16, True, True, False, None),
        (torch.bfloat16, False, False, False, "bfloat16"),  # an adapter stays float32
        (torch.float16, True, False, True, None),
    ],
)
@pytest.mark.parametrize("settings", [{}, read_settings(CONFIGS[0])], ids=["nothing said", "auto"])
def test_one_dtype_is_chosen(settings, dtype, short_weights, bf16, fp16, autocast):
    chosen = filled(settings, dtype=dtype, short_weights=short_weights)
    assert chosen["bf16"]["enabled"] is bf16
    assert chosen["fp16"]["enabled"] is fp16
    assert chosen.get("torch_autocast", {}).get("dtype") == autocast
    assert chosen.get("torch_autocast", {}).get("enabled", False) == (autocast is not None)


def test_what_is_said_stays():
    said = {"gradient_clipping": 5.0, "bf16": {"enabled": False}, "zero_optimization": {"reduce_bucket_size": 77}}
    found = leaves(filled(said))
    assert found["gradient_clipping"] == 5.0
    assert found["bf16.enabled"] is False
    assert found["zero_optimization.reduce_bucket_size"] == 77
    assert found["train_batch_size"] == 24  # not said: the flags'


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("train_batch_size", 24), ("train_micro_batch_size_per_gpu", 4), ("gradient_accumulation_steps", 3)],
)
def test_a_batch_size_that_contradicts_the_flags_is_refused(name, wanted):
    with pytest.raises(UserError) as error:
        filled({name: 5})
    assert f"{name} is 5, the flags make it {wanted}" in str(error.value)
    assert "auto" in str(error.value)
    assert filled({name: wanted})[name] == wanted


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"steps_per_print": "auto"}, "steps_per_print"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage"),
    ],
)
def test_an_auto_without_a_rule_is_refused_with_those_that_have_one(settings, name):
    with pytest.raises(UserError) as error:
        filled(settings)
    message = str(error.value)
    assert f"{name} is auto" in message
    for known in ("train_batch_size", "gradient_clipping", "zero_optimization.offload_param.pin_memory"):
        assert known in message


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"note": "文", "zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert read_settings(path) == {"note": "文", "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; configs/deepspeed/ has one for each stage"),
        (b'{"zero_optimization": ', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'"zero3"', "expected a JSON object, found str"),
        (json.dumps({"optimizer": {"type": "Adam"}}).encode(), "leave out optimizer and scheduler"),
        (json.dumps({"scheduler": {}}).encode(), "leave out optimizer and scheduler"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, words):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_settings(path)
    assert f"--deepspeed_config {path}: {words}" in str(error.value)
    assert "\n" not in str(error.value)


def test_balanced_gradients_are_refused_where_the_norm_comes_before_them():
    pytest.importorskip("deepspeed")
    args = LoRAArguments(balance_gradients=True, deepspeed_config="configs/deepspeed/zero2_offload.json", device="cpu")
    with pytest.raises(UserError, match=r"--balance_gradients with offload_optimizer: .* use .*zero2\.json"):
        ZeRO(Ranks(), torch.device("cpu"), args=args)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(UserError, match="not readable"):
        read_settings(tmp_path)


def test_the_usual_file_is_found_from_any_directory(tmp_path, monkeypatch):
    usual = Path("configs/deepspeed/zero2.json")
    monkeypatch.chdir(Path(__file__).parents[2])
    expected = read_settings(usual)
    monkeypatch.chdir(tmp_path)
    assert read_settings(usual) == expected
    usual.parent.mkdir(parents=True)
    usual.write_text('{"mine": 1}')
    assert read_settings(usual) == {"mine": 1}


def test_locks_that_killed_builds_have_left_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build_locks() == []
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert build_locks() == [lock]
