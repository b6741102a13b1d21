"""What users import is typed: mypy reads a user's code with all of the public interface."""

from pathlib import Path

from mypy import api

ROOT = Path(__file__).parents[2]


def check(path: Path, cache: Path) -> tuple[str, int]:
    """Return what mypy says, and its exit status."""
    said, error, status = api.run(["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), str(path)])
    return said + error, status


def test_typed_code_may_use_all_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    said, status = check(ROOT / "tests" / "contracts" / "public_interface.py", tmp_path)
    assert status == 0, said
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from minillm.config import ModelConfig\nsize: str = ModelConfig.preset('small').hidden_size\n")
    said, status = check(wrong, tmp_path)
    assert status == 1
    assert 'expression has type "int", variable has type "str"' in said
