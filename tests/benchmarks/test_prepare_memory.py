"""The benchmark of data preparation measures what it says."""

import pytest

from benchmarks import prepare_memory


def test_the_texts_hold_duplicates_and_the_peak_is_extrapolated(tmp_path, capsys):
    pytest.importorskip("rensa")
    argv = ["--sizes", "0.2,0.1", "--document_len", "200", "--work_dir", str(tmp_path)]
    result = prepare_memory.main([*argv, "--output", str(tmp_path / "figures.json")])
    small, large = result["cases"]
    assert 100_000 <= small["bytes"] < 110_000 <= 200_000 <= large["bytes"] < 210_000
    for case in (small, large):
        assert 0.02 < case["dropped"]["exact_duplicate"] / case["records"] < 0.09
        assert 0.02 < case["dropped"]["near_duplicate"] / case["records"] < 0.09
        assert 50e6 < case["peak_bytes"] < 2e9
    per_record = (large["peak_bytes"] - small["peak_bytes"]) / (large["records"] - small["records"])
    n_records = 10e9 * large["records"] / large["bytes"]
    expected = large["peak_bytes"] + per_record * (n_records - large["records"])
    assert result["expected_bytes"] == pytest.approx(expected)
    assert f"take {expected / 1e9:.1f} GB" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
