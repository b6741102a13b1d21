import json
import random
from pathlib import Path

import pytest

from benchmarks import tokenizer_table
from minillm.tokenizer import train_bpe


@pytest.fixture
def flags(tmp_path):
    rng = random.Random(0)

    def words(letters: str, n: int) -> str:
        return " ".join("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(n))

    for name, letters in (("zh", "山水火木金天地人日月"), ("en", "etaoinshr")):
        lines = (json.dumps({"text": words(letters, 40)}, ensure_ascii=False) for _ in range(60))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for n in range(25):
        path = tmp_path / "code" / ("tests" if n == 7 else f"package_{n % 3}") / f"module_{n:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def f{n}(x):\n    return {words('xyz', 60)!r}\n", encoding="utf-8")
    given = {"zh": tmp_path / "zh.jsonl", "en": tmp_path / "en.jsonl", "code": tmp_path / "code"}
    given |= {"vocab_sizes": "300,500", "bytes_per_kind": 3000, "rounds": 2, "output": tmp_path / "deep" / "table.json"}
    return {name: str(value) for name, value in given.items()}


def run(flags: dict[str, str]) -> None:
    tokenizer_table.main([word for name, value in flags.items() for word in (f"--{name}", value)])


def test_two_tables_and_json(flags, capsys):
    pytest.importorskip("sentencepiece")
    run(flags)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    reach, times = ([line[1:] for line in lines if line[:1] == ["300"]][n] for n in (0, 1))
    assert len(reach) == 6
    assert all(cell.endswith("x") for cell in times)
    assert len(times) == 4
    written = json.loads(Path(flags["output"]).read_text())
    assert written["results"].keys() == {"300", "500"}
    for small, large in zip(
        *(written["results"][n]["bytes_per_token"]["bpe"].values() for n in ("300", "500")), strict=True
    ):
        assert 1 < small < large, "a larger vocabulary reaches further"
    for seconds in written["results"]["500"]["seconds_learning"].values():
        assert len(seconds) == 2


def test_what_is_measured_was_not_learned_from(flags):
    kept, held_out = tokenizer_table.split(flags["zh"], 3000)
    assert held_out
    assert not set(kept) & set(held_out)
    code, _ = tokenizer_table.split(flags["code"], 3000)
    assert all(text.startswith("def f") for text in code)
    assert not any("def f7(" in text for text in tokenizer_table.texts_at(flags["code"])), "no tests"


def test_bytes_per_token_is_the_quotient_of_the_sums():
    tokenizer = train_bpe(iter(["aa bb"] * 3), vocab_size=269)
    texts = ["aa", "ccc bb"]
    n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert tokenizer_table.bytes_per_token(tokenizer, {"en": texts}) == {"en": 8 / n_tokens}


def test_a_disagreement_ends_it(flags, monkeypatch, capsys):
    pytest.importorskip("sentencepiece")
    other = {**tokenizer_table.TRAINERS, "by hand": lambda texts, **more: train_bpe(texts, split_han=True, **more)}
    monkeypatch.setattr(tokenizer_table, "TRAINERS", other)
    with pytest.raises(SystemExit):
        run({**flags, "vocab_sizes": "300"})
    assert "the library and bpe.py do not agree" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bytes_per_kind": "90000"}, "give more text, in 20 records at least, or ask for less"),
        ({"vocab_sizes": "9000"}, "gave only"),
        ({"vocab_sizes": "two"}, "--vocab_sizes two: must be whole numbers"),
        ({"code": "/no/such"}, "--code /no/such: does not exist"),
        ({"rounds": "0"}, "--rounds 0: must be at least 1"),
        ({"gpt2": __file__}, "two files are needed"),
    ],
)
def test_bad_input(flags, capsys, change, message):
    with pytest.raises(SystemExit):
        run({**flags, **change})
    assert message in capsys.readouterr().err
