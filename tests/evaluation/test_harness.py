"""lm-evaluation-harness on the same questions: through our model, and through its own HF model on our directory."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import lm_eval_parity
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.evaluation import harness, run_suite
from minillm.evaluation.suites import SUITES
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.tokenizer import train_bpe
from tests.evaluation.suite_files import make_originals
from tests.evaluation.test_suites import prompt_of

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore")
BOUND = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a model, the suites' files and the tasks made of them; nothing is looked for on a network."""
    import datasets

    folder = tmp_path_factory.mktemp("harness")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    tokenizer = train_bpe(iter(["答案：A 答案：B Question: Answer: A\n the law of sums"] * 4), vocab_size=320)
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(**shape, max_position_embeddings=320, initializer_range=0.3))
    save_model(model, folder / "model", tokenizer=tokenizer)
    make_originals(folder / "eval")
    harness.main(["tasks", "--suite", "all", "--suite_dir", str(folder / "eval"), "--output", str(folder / "tasks")])
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def ours(folder):
    return harness.register()(str(folder / "model"), batch_size=3, device="cpu")


def hugging_face(folder, **more):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", batch_size=1, **more)


@pytest.fixture(scope="module")
def theirs(folder):
    return hugging_face(folder, add_bos_token=True)


@pytest.fixture(scope="module")
def evaluate(folder):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def evaluate(model, *suites, n_shot=0):
        tasks = [f"minillm_{name}" for name in suites]
        return simple_evaluate(model, tasks=tasks, num_fewshot=n_shot, task_manager=manager, bootstrap_iters=0)

    return evaluate


CHOICES = [
    name for name, suite in SUITES.items() if suite.style != "number" and name not in ("gaokao_mcq", "tal_math_zh")
]


@pytest.mark.parametrize("n_shot", [0, 1])
def test_equal_log_likelihoods_and_choices(folder, ours, theirs, evaluate, n_shot):
    """With examples only the suites that have a file of them and one subject: a task has no subjects."""
    names = ["mmlu", "cmmlu"] if n_shot else CHOICES
    results = [evaluate(model, *names, n_shot=n_shot) for model in (ours, theirs)]
    for name in names:
        # What the harness makes of the first question equals what we ask.
        asked = results[0]["samples"][f"minillm_{name}"][0]["arguments"]
        assert [tuple(pair) for pair in asked] == prompt_of(name, folder / "eval", n_shot=n_shot)
        score = run_suite(name, ours.model, ours.tok, data_dir=folder / "eval", n_shot=n_shot)
        for result in results:
            samples = result["samples"][f"minillm_{name}"]
            values = lm_eval_parity._differences(score, samples)
            assert values["largest_difference"] <= BOUND, (name, values)
            assert (values["other_choices"], values["other_choices_per_byte"]) == (0, 0)
            figures = result["results"][f"minillm_{name}"]
            assert figures["acc,none"] == pytest.approx(score.accuracy)
            if SUITES[name].style != "blank":  # there the harness counts the bytes of the prompts
                assert figures["acc_bytes,none"] == pytest.approx(score.accuracy_normalized)
    for one, other in zip(*(result["samples"]["minillm_mmlu"] for result in results), strict=True):
        assert [answer[1] for answer in one["filtered_resps"]] == [answer[1] for answer in other["filtered_resps"]]


def test_a_difference_is_seen(folder, ours, evaluate):
    """The comparison itself: a model with other weights, and an answer that is off by one token."""
    score = run_suite("arc_easy", ours.model, ours.tok, data_dir=folder / "eval")
    samples = evaluate(ours, "arc_easy")["samples"]["minillm_arc_easy"]
    torch.manual_seed(1)
    other = Transformer(ours.model.config).eval()
    changed = run_suite("arc_easy", other, ours.tok, data_dir=folder / "eval")
    assert lm_eval_parity._differences(score, samples)["largest_difference"] <= BOUND
    assert lm_eval_parity._differences(changed, samples)["largest_difference"] > 0.1


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_greedy_and_rolling(folder, ours, theirs):
    """Answers that the model would give itself, trailing blanks, an empty prompt; texts of several windows."""
    prompt = "Question: the law"
    own = ours.generate_until(requests((prompt, {"max_gen_toks": 3, "until": []})))[0]
    pairs = [
        (prompt, own),
        (prompt, " of"),
        ("the law of  ", "sums"),
        ("", "the law"),
        ("答案：", "A"),
        (prompt, " sums"),
    ]
    for mine, other in zip(ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs)), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=BOUND)
        assert mine[1] == other[1]
    texts = [("the law of sums",), ("答案：A Question: " * 60,), ("a",)]
    mine = ours.loglikelihood_rolling(requests(*texts))
    # With add_bos_token the harness puts a second bos in front of a text, and scores the first.
    other = hugging_face(folder).loglikelihood_rolling(requests(*texts))
    assert mine == pytest.approx(other, rel=1e-6)


def test_generation(folder, ours, theirs, evaluate):
    settings = {"until": ["\n\n", "Question"], "max_gen_toks": 12, "do_sample": False}
    arguments = [(text, dict(settings)) for text in ("Question: a\nAnswer:", "the law", "答案：" * 200, "x")]
    mine = ours.generate_until(requests(*arguments))
    theirs_one_by_one = theirs.generate_until(requests(*((text, dict(settings)) for text, _ in arguments[:2])))
    for one, other in zip(mine, theirs_one_by_one, strict=False):
        assert one.replace("\ufffd", "") == other.replace("\ufffd", "")
    numbers = evaluate(ours, "gsm8k", "cmath")["samples"]
    assert [sample["target"] for sample in numbers["minillm_gsm8k"]] == ["24"]
    assert [sample["target"] for sample in numbers["minillm_cmath"]] == ["7", "4"]
    for bad, words in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 400}, "max_gen_toks 400")):
        with pytest.raises(UserError, match=words):
            ours.generate_until(requests(("a", bad)))


def test_command_lines(folder, tmp_path, monkeypatch, capsys):
    from lm_eval.api.registry import get_model

    harness.main(["tasks", "--suite", "piqa,mmlu", "--suite_dir", str(folder / "eval"), "--output", str(tmp_path / "t"),
                  "--suite_limit", "1"])  # fmt: skip
    assert capsys.readouterr().out.split() == ["minillm_piqa", "minillm_mmlu"]
    harness.main(["tasks", "--suite", "zh", "--suite_dir", str(folder / "eval"), "--output", str(tmp_path / "zh")])
    shown = capsys.readouterr()
    assert shown.out.split() == ["minillm_ceval", "minillm_cmmlu", "minillm_cmath"]
    assert "of: gaokao_mcq, tal_math_zh (" in shown.err  # no release has them
    assert len((tmp_path / "t/mmlu.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["harness"])
    argv = ["--model", "minillm", "--model_args", f"path={folder / 'model'}", "--device", "cpu"]
    called = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: called.append(sys.argv))  # it reads all its own tasks
    harness.main(["run", *argv])
    assert called == [["lm_eval", "run", *argv]]
    assert get_model("minillm") is harness.register()
    for argv in ([], ["tasks", "--suite", "none", "--suite_dir", str(folder), "--output", str(tmp_path)]):
        with pytest.raises(SystemExit) as end:
            harness.main(argv)
        assert end.value.code == 2
    assert "no suite 'none'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        harness.main(
            ["tasks", "--suite", "piqa", "--suite_dir", str(folder / "eval"), "--output", str(tmp_path / "file/x")]
        )
    assert end.value.code == 2
    assert "Not a directory; choose another --output" in capsys.readouterr().err


def test_the_benchmark(folder, capsys, tmp_path):
    argv = [
        "--model_path",
        str(folder / "model"),
        "--suite_dir",
        str(folder / "eval"),
        "--output",
        str(tmp_path / "x.json"),
    ]
    lm_eval_parity.main([*argv, "--suite", "piqa,ceval"])
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith(("piqa", "ceval"))]) == 4
    assert json.loads((tmp_path / "x.json").read_text())["suites"]["ceval"]["hf"]["other_choices"] == 0


def test_every_suite_has_a_task():
    assert {path.stem for path in harness.TASKS.glob("*.yaml")} == set(SUITES)
