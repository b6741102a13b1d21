"""The demo's report: the numbers of the table and of the result files, in both languages; what is missing is named."""

import html.parser
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "dataset"))

import demo_report
import demo_words
from demo_report import PIPELINE, main, read_demo, samples_of, state_of
from demo_table import all_lines, lines_of
from demo_world import grammar

LANGUAGES = ("en", "zh")
EXACT = ("full_sft", "pretrain", "identity_sft_test", "rlhf", "reason_sft_test", "tools_sft_test")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_run(directory, *, steps=60, total=None, max_steps=0, **valid):
    rows = [
        {"step": n, "split": "train", "loss": 5 - n / steps, "lr": 1e-3, "tokens": 8 * n, "seconds": 0.5 * n}
        for n in range(1, steps + 1)
    ]
    rows += [{"step": n, "split": "valid", "loss": 4.0, "seconds": 0.5 * n} | valid for n in (steps // 2, steps)]
    write(directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "arguments": {"max_steps": max_steps},
        "resolved": {"total_steps": total or steps},
        "n_parameters": 918656,
    }
    write(directory / "run.yaml", yaml.safe_dump(content))


def answers(n, *, shift=0):
    rows = [
        {"question": f"q{i}<&", "expected": f"e{i}", "answer": f"a{i + shift}", "correct": bool(shift)}
        for i in range(n)
    ]
    return {"task_average": 0.25 + shift / 2, "accuracy": 0.125 + shift / 2, "answers": rows}


@pytest.fixture
def demo(tmp_path):
    """The files of a demo, without weights: all stages but the tools."""
    out, results = tmp_path / "out", tmp_path / "out" / "results"
    for stage in PIPELINE[:-1]:
        for name in (stage.run, *stage.others):
            usual = 400 if name in ("distill_64", "pretrain_64") else 60 if name == "rlhf_128" else 0
            floor = {"floor": 3.0} if name.startswith(("pretrain", "distill")) else {}
            write_run(out / name, max_steps=usual, **floor, bits_per_byte=0.5)
    write(out / "pretrain_128" / "config.json", {"vocab_size": 1024})
    for number, name in enumerate(EXACT[:-1]):
        write(results / f"{name}.json", {"exact_match": answers(8, shift=number % 2)})
    for number, name in enumerate(("full_sft_identity_test", "identity_identity_test")):
        write(results / f"{name}.json", {"exact_match": answers(8, shift=number)})
    for number, name in enumerate(("full_sft", "rlhf")):
        content = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        free = [{"answer": f"free {i}", "like_chosen": i % 2 == 0} for i in range(4)]
        content["preference"] = {"accuracy": 0.5 + number / 2, "like_chosen": 0.5, "answers": free}
        write(results / f"{name}.json", content)
    for number, name in enumerate(("direct", "reason")):
        rows = [
            {"question": f"mod:{i}", "expected": "7", "texts": [f"<think>{number}</think>"], "correct": [True]}
            for i in (1, 2)
        ]
        figures = {"accuracy": 0.075 + number / 2, "format_adherence": 1.0, "answers": rows}
        write(results / f"{name}.json", {"reasoning": {"thinking": figures}})
    pairs = [{"chosen": [{"role": "user", "content": f"who {i}?"}, {"role": "assistant", "content": f"Ming {i}."}]}
             for i in range(4)]  # fmt: skip
    pairs = [pair | {"rejected": [pair["chosen"][0], {"role": "assistant", "content": "Ming"}]} for pair in pairs]
    write(tmp_path / "data" / "dpo_test.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    meta = {"seed": 42, "records": {"pretrain_train": 3000, "sft_train": 7}}
    meta |= {"document_shares": {"facts": 1.0, "talk": 3.0}, "floor": {"facts": {"nats_per_byte": 0.123456}}}
    write(tmp_path / "data" / "meta.json", meta)
    return out


def page_of(demo, *flags) -> str:
    path = main(["--save_dir", str(demo), "--data_dir", str(demo.parent / "data"), *flags])
    return path.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """The texts of one language, without those of the other; and a check that tags close."""

    EMPTY = ("meta", "br", "img", "path", "polyline", "circle")

    def __init__(self, text, language):
        super().__init__()
        self.language, self.open, self.rows, self.hrefs, self.text = language, [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.EMPTY:
            self.open.append((tag, attributes.get("data-l", self.language) == self.language))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if "href" in attributes and all(shown for _, shown in self.open):
            self.hrefs.append(attributes["href"])

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if all(shown for _, shown in self.open) and not any(
            tag in ("title", "style", "script") for tag, _ in self.open
        ):
            self.text += data
            if any(tag in ("td", "th") for tag, _ in self.open):
                self.rows[-1][-1] += data


def figures(page: Page) -> list[list[str]]:
    """The rows of the table of all stages: metric, before, after."""
    first = next(n for n, row in enumerate(page.rows) if len(row) == 3)
    rows = page.rows[first + 1 :]
    end = next(n for n, row in enumerate(rows) if len(row) not in (1, 3))
    return [row for row in rows[:end] if len(row) == 3]


def test_the_numbers_are_those_of_the_table_and_of_the_files(demo):
    text = page_of(demo)
    lines = list(all_lines(demo))
    for language in LANGUAGES:
        rows = figures(Page(text, language))
        assert [row[1:] for row in rows] == [line.cells()[2:] for line in lines]
    metrics = [row[0] for row in figures(Page(text, "en"))]
    assert metrics == [line.metric for line in lines]
    assert ["calls, exact match", "-", "-"] in figures(Page(text, "en"))  # not measured, but in its place
    by_name = {(row[0], row[2]) for row in figures(Page(text, "en"))}
    for name, metric in (("full_sft", "tasks, exact match"), ("identity_sft_test", "tasks, exact match")):
        value = json.loads((demo / "results" / f"{name}.json").read_text())["exact_match"]["task_average"]
        assert (metric, f"{value:.1%}") in by_name
    assert len(list(lines_of(demo))) == len(lines) - 3  # of the tools


def test_both_languages_have_the_same_rows_and_words(demo):
    text = page_of(demo)
    english, chinese = (Page(text, language) for language in LANGUAGES)
    assert [len(row) for row in english.rows] == [len(row) for row in chinese.rows]
    numbers = [[re.findall(r"[\d.,:%]*\d", cell) for cell in row[1:]] for row in english.rows]
    assert numbers == [[re.findall(r"[\d.,:%]*\d", cell) for cell in row[1:]] for row in chinese.rows]
    assert {line.metric for line in all_lines(demo)} == set(demo_words.METRICS_ZH)
    assert set(demo_words.STAGES) == {stage.name for stage in PIPELINE} == {line.stage for line in all_lines(demo)}
    assert set(demo_words.OTHER_RUNS) == {name for stage in PIPELINE for name in stage.others}
    for name, pair in demo_words.WORDS.items():
        in_braces = [sorted(re.findall(r"\{(\w+)", text)) for text in pair]
        assert in_braces[0] == in_braces[1], name
        assert re.search(r"[\u4e00-\u9fff、]", pair[1]), name
    assert "各阶段汇总" in chinese.text
    assert "各阶段汇总" not in english.text
    assert not re.search(r"[\u4e00-\u9fff]", english.text.replace("中文", ""))


def test_a_missing_stage_is_named(demo):
    text = page_of(demo)
    english, chinese = (Page(text, language) for language in LANGUAGES)
    run = demo / "tools" / "full_sft_128"
    assert f"7. Tools missing: there is no run in {run}; make demo trains it" in [row[0] for row in english.rows]
    assert f"7. 工具调用 缺失：{run} 里没有训练记录；运行 make demo 来训练" in [row[0] for row in chinese.rows]


def test_a_shortened_stage_is_named_and_an_unfinished_one(demo):
    write_run(demo / "pretrain_128", steps=6, max_steps=6, floor=3.0)
    write_run(demo / "reason_128", steps=6, total=1750)
    (demo / "results" / "reason.json").unlink()
    (demo / "results" / "reason_sft_test.json").unlink()
    (demo / "pretrain_128" / "config.json").unlink()  # a run writes it at its end
    rows = [row[0] for row in Page(page_of(demo), "en").rows]
    assert "1. Pretraining shortened to 6 steps in 0:03" in rows
    assert "6. Reasoning not finished: step 6 of 1,750, not measured" in rows
    assert "4. DPO 60 steps in 0:30" in rows  # as many as its configuration says


def test_every_stage_knows_how_long_it_usually_is(demo):
    runs = read_demo(demo)
    for stage in PIPELINE[:-1]:
        assert state_of(runs[stage.run], stage.config)[1]
        for other in stage.others:
            assert state_of(runs[other], demo_report.CONFIG_OF_OTHERS[other])[1]


def test_samples_are_taken_evenly_with_what_was_said_before(demo):
    data = demo.parent / "data"
    by_name = {stage.name: samples_of(stage, demo, data) for stage in PIPELINE}
    tasks = by_name["lora"]
    assert [sample.question for sample in tasks] == [f"q{i}<&" for i in (0, 1, 3, 4, 6, 7)]
    assert [(sample.before.text, sample.after.text) for sample in tasks[:2]] == [("a0", "a1"), ("a1", "a2")]
    assert (tasks[0].before.is_right, tasks[0].after.is_right) == (False, True)
    pairs = by_name["dpo"]
    assert [(sample.question, sample.expected) for sample in pairs] == [(f"who {i}?", f"Ming {i}.") for i in range(4)]
    assert [sample.after.is_right for sample in pairs] == [True, False, True, False]
    assert by_name["reason"][0].after.text == "<think>1</think>"
    assert by_name["tools"] == by_name["pretrain"] == []  # no result; no weights
    others = answers(8)
    others["answers"][0]["question"] = "another question"
    write(demo / "results" / "full_sft_identity_test.json", {"exact_match": others})
    assert [sample.before is None for sample in samples_of(PIPELINE[2], demo, data)] == [True, *[False] * 5]
    (demo / "results" / "full_sft_identity_test.json").unlink()
    assert samples_of(PIPELINE[2], demo, data)[0].before is None
    assert "q0&lt;&amp;" in page_of(demo)


def test_calls_of_tools_are_shown_above_the_answer(demo):
    content = {"exact_match": answers(1, shift=1), "tool_calls": answers(1, shift=1)}
    content["tool_calls"]["answers"][0] |= {"answer": '[["clock", {}]]', "expected": "[]"}
    write(demo / "results" / "tools_tools_test.json", content)
    (sample,) = samples_of(PIPELINE[-1], demo, demo.parent / "data")
    assert (sample.after.text, sample.expected) == ('[["clock", {}]]\na1', "e0")


def test_times_add_up(demo):
    english = Page(page_of(demo, "--started", "1"), "en")
    times = [row for row in english.rows if len(row) == 5]
    assert [row[3] for row in times[1:-3]] == ["0:30"] * 9  # of 60 steps each
    assert times[-3] == ["Tools", *["–"] * 4]
    assert times[-2][3] == "4:30"
    assert int(times[-1][3].partition(":")[0]) > 400_000  # hours since 1970


def test_the_data_is_counted(demo):
    english = Page(page_of(demo), "en")
    assert ["pretrain_train", "3,000", "texts with their exact probability"] in english.rows
    assert ["facts", "25.0%", "0.1235"] in english.rows
    assert ["talks", "75.0%", "–"] in english.rows
    assert set(demo_words.KINDS) == set(grammar.KINDS)
    assert "Shortened: 3,000 texts for pretraining, where the demo has 190,000." in english.text
    assert "No distribution of tokens" in english.text


def test_the_page_needs_nothing_else_and_its_links_lead_somewhere(demo):
    text = page_of(demo)
    assert "http" not in text
    assert not re.search(r"<(img|link|iframe)|src=|@import|url\(", text)
    for language in LANGUAGES:
        hrefs = Page(text, language).hrefs
        chapters = [href for href in hrefs if href.endswith(".md")]
        assert len(chapters) == 2 + sum(len(stage.chapters) for stage in PIPELINE) + 1
        assert all((demo / href).is_file() and f"/{language}/" in href for href in chapters)
        assert all(f'id="{href[1:]}"' in text for href in hrefs if href.startswith("#"))


def test_without_any_run_it_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--save_dir", str(tmp_path)])
    assert ended.value.code == 2
    assert "make demo trains them" in capsys.readouterr().err
