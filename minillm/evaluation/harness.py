"""Our models in lm-evaluation-harness, and our suites as its tasks.

    python -m minillm.evaluation.harness tasks --suite zh --suite_dir dataset/eval --output out/lm_eval
    python -m minillm.evaluation.harness run --model minillm --model_args path=out/full_sft_512 \\
        --include_path out/lm_eval --tasks minillm_ceval
    python -m minillm.evaluation.harness run --model minillm --model_args path=out/full_sft_512 --tasks hellaswag

``run`` takes all flags of ``lm_eval``; it only makes the model ``minillm`` known first. Its own HF model needs
``add_bos_token=True`` to give the same numbers: a document begins with a bos here.
"""

import json
import sys
from pathlib import Path

from minillm.cli.command_line import script
from minillm.errors import UserError, missing_package
from minillm.evaluation.likelihood import AnswerIds, encode_answers, score_answers, truncate_prompt
from minillm.evaluation.questions import Question
from minillm.evaluation.suites.run import evenly_spaced
from minillm.evaluation.suites.table import Suite, read_suite, suites_with_files
from minillm.hub.open import open_model
from minillm.inference import complete

TASKS = Path(__file__).parents[2] / "configs" / "lm_eval"


def register():
    """Make the model ``minillm`` known to lm-evaluation-harness, and return its class.

    Arguments of the model (``--model_args``): ``path``, ``device``, ``dtype``, ``lora_name``, ``tokenizer_path``,
    ``save_dir`` as of ``open_model``; ``batch_size``; ``max_gen_toks``, the longest answer.

    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401 - its own models stay known too
        from lm_eval.api.model import LM
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise missing_package("lm-eval", purpose="lm-evaluation-harness", extra="eval") from None
    if "minillm" in MODEL_REGISTRY:
        return MODEL_REGISTRY["minillm"]

    @register_model("minillm")
    class MinillmModel(LM):
        """A model of ours: log-likelihoods by ``likelihood.py``, answers by ``inference``."""

        def __init__(
            self, path: str, *, batch_size=16, max_gen_toks=256, max_batch_size=None, device="auto", **options
        ):
            super().__init__()
            self.model, self.tok = open_model(path, device=device or "auto", **options)
            self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
            self.max_gen_toks = int(max_gen_toks)
            self.limit = self.model.config.max_position_embeddings

        def loglikelihood(self, requests, disable_tqdm=False):
            pairs = [_without_trailing_space(*request.args) for request in requests]
            numbers_of: dict[str, list[int]] = {}  # answers of the same prompt are one group
            for number, (prompt, _) in enumerate(pairs):
                numbers_of.setdefault(prompt, []).append(number)
            texts = [[pairs[number] for number in numbers] for numbers in numbers_of.values()]
            groups = [truncate_prompt(group, limit=self.limit)[0] for group in encode_answers(self.tok, texts)]
            scored = score_answers(self.model, groups, batch_size=self.batch_size, with_greedy=True)
            results = {}
            for numbers, likelihoods in zip(numbers_of.values(), scored, strict=True):
                for number, likelihood in zip(numbers, likelihoods, strict=True):
                    results[number] = (likelihood.log_likelihood, likelihood.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[number].args, results[number])
            return [results[number] for number in range(len(requests))]

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            groups, owners = [], []
            for number, request in enumerate(requests):
                windows = get_rolling_token_windows(
                    token_list=self.tok.encode(request.args[0]),
                    prefix_token=self.tok.bos_token_id,
                    max_seq_len=self.limit,
                    context_len=1,
                )
                for context, ids in map(make_disjoint_window, windows):
                    groups.append([AnswerIds([*context, *ids], len(context))])
                    owners.append(number)
            sums = [0.0] * len(requests)
            for number, (likelihood,) in zip(
                owners, score_answers(self.model, groups, batch_size=self.batch_size), strict=True
            ):
                sums[number] += likelihood.log_likelihood
            for request, total in zip(requests, sums, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return sums

        def generate_until(self, requests, disable_tqdm=False):
            numbers_of: dict[str, list[int]] = {}  # prompts with the same settings share batches
            for number, request in enumerate(requests):
                numbers_of.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
            texts: dict[int, str] = {}
            for numbers in numbers_of.values():
                options = self._options(dict(requests[numbers[0]].args[1]))
                longest = self.limit - options["max_new_tokens"]
                prompts = {n: self.tok.open_document(self.tok.encode(requests[n].args[0])) for n in numbers}
                prompts = {n: [ids[0], *ids[1:][-(longest - 1) :]] for n, ids in prompts.items()}
                order = sorted(numbers, key=lambda n: len(prompts[n]))
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    answers = complete(self.model, [prompts[n] for n in batch], **options)
                    texts |= {n: answer.text for n, answer in zip(batch, answers, strict=True)}
            for number, request in enumerate(requests):
                self.cache_hook.add_partial("generate_until", request.args, texts[number])
            return [texts[number] for number in range(len(requests))]

        def _options(self, settings: dict) -> dict:
            """Return the options of ``complete`` for the harness's names."""
            until = settings.pop("until", None) or []
            n_new = int(settings.pop("max_gen_toks", self.max_gen_toks))
            if not 0 < n_new < self.limit - 1:
                raise UserError(f"max_gen_toks {n_new}: the model reads {self.limit} tokens, prompt included: lower it")
            is_sampled = settings.pop("do_sample", False)
            temperature = float(settings.pop("temperature", 1.0 if is_sampled else 0.0))
            sampling = {name: settings.pop(name) for name in ("top_p", "top_k", "min_p") if name in settings}
            if settings:
                raise UserError(f"generation settings that minillm does not know: {', '.join(settings)}; remove them")
            return {
                "max_new_tokens": n_new,
                "temperature": temperature if is_sampled else 0.0,
                "stop": [until] if isinstance(until, str) else [text for text in until if text],
                "eos_token_id": self.tok.end_ids,
                "tokenizer": self.tok,
                **(sampling if is_sampled else {}),
            }

    return MinillmModel


def write_tasks(suites: list[Suite], *, data_dir: str | Path, output: str | Path, limit: int = 0) -> list[str]:
    """Write the suites as tasks for ``--include_path``: for each its questions, examples and YAML; return the names.

    ``limit`` questions of each, evenly spaced; 0: all.

    Raises:
        UserError: a suite without files, or a wrong record in them.
    """
    output = Path(output).resolve()
    names = []
    for suite in suites:
        questions, examples, _ = read_suite(suite, data_dir)
        output.mkdir(parents=True, exist_ok=True)
        for name, records in (
            (suite.name, evenly_spaced(questions, limit)),
            (f"{suite.name}_examples", examples or questions),
        ):
            lines = [json.dumps(_record(suite, question), ensure_ascii=False) + "\n" for question in records]
            (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        task = (TASKS / f"{suite.name}.yaml").read_text(encoding="utf-8").replace("DATA/", f"{output}/")
        (output / f"{suite.name}.yaml").write_text(task, encoding="utf-8")
        names.append(f"minillm_{suite.name}")
    return names


def _record(suite: Suite, question: Question) -> dict:
    record = {"id": question.id, "question": question.question, "subject": question.subject}
    record["subject_name"] = suite.prompt.name_of(question.subject)
    if question.choices:
        return record | {"choices": list(question.choices), "answer": question.answer}
    return record | {"final": question.final}


def _without_trailing_space(prompt: str, answer: str) -> tuple[str, str]:
    """Return the pair with the blanks at the end of the prompt moved to the answer, as the harness's own models do."""
    stripped = prompt.rstrip()
    return stripped, prompt[len(stripped) :] + answer


@script
def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        register()
        from lm_eval.__main__ import cli_evaluate

        sys.argv = ["lm_eval", *argv]
        return cli_evaluate()
    if argv[:1] == ["tasks"]:
        import tyro

        tyro.cli(tasks, args=argv[1:], prog="python -m minillm.evaluation.harness tasks", use_underscores=True)
        return None
    raise UserError("python -m minillm.evaluation.harness: give run (with the flags of lm_eval) or tasks")


def tasks(*, suite: str, suite_dir: Path, output: Path, suite_limit: int = 0) -> None:
    """Write suites as tasks of lm-evaluation-harness.

    Args:
        suite: zh, en, all (of those that have files), or names with commas between them.
        suite_dir: directory with the files of the suites.
        output: directory for the tasks, for --include_path.
        suite_limit: only this many questions of each, evenly spaced (0: all).
    """
    try:
        suites, note = suites_with_files(suite, suite_dir)
        names = write_tasks(suites, data_dir=suite_dir, output=output, limit=suite_limit)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; choose another --output") from None
    if note:
        print(note, file=sys.stderr)
    print("\n".join(names))


if __name__ == "__main__":
    main()
