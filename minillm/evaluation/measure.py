"""What eval_model.py measures: each function prints its figures and returns them for ``--output``."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.cli.command_line import require
from minillm.cli.eval_arguments import EvalArguments
from minillm.data import read_records
from minillm.errors import UserError
from minillm.evaluation.answer_loss import answer_loss
from minillm.evaluation.exact_match import exact_match
from minillm.evaluation.perplexity import perplexity
from minillm.evaluation.preference import like_chosen, preference_accuracy
from minillm.evaluation.reasoning import evaluate_reasoning
from minillm.evaluation.sample_answers import write_whole
from minillm.evaluation.suites.report import describe, draw_radar, line, markdown
from minillm.evaluation.suites.run import check_suite, random_model, run_suite
from minillm.evaluation.suites.table import SUITES, Suite, find_files, suites_with_files
from minillm.evaluation.text_metrics import bleu, rouge
from minillm.evaluation.tool_match import tool_match
from minillm.files import sha256
from minillm.inference.chat import speed

WAYS = {"thinking": "thinking first", "direct": "answering at once", "sampled": "thinking first, several answers each"}


def measure_perplexity(args: EvalArguments, model, tokenizer) -> dict:
    """Measure --perplexity, print the table, and return the figures for --output."""
    start = time.perf_counter()
    result = perplexity(
        model,
        read_records(args.perplexity, columns=args.columns),
        tokenizer,
        max_seq_len=args.max_seq_len or None,
        batch_size=args.batch_size,
    )
    print(f"\nperplexity of {args.perplexity}\n{result.table()}")
    print(speed(result.n_targets, time.perf_counter() - start))
    return result.as_dict()


def measure_reasoning(args: EvalArguments, model, tokenizer, sampling: dict) -> dict:
    """Measure --task_file with thinking, without, and with --n_samples answers each; print and return the figures."""
    records, results = list(read_records(args.task_file, columns=args.columns)), {}
    ways = {"thinking": {}, "direct": {"think": False}}
    if args.n_samples > 1:
        generator = torch.Generator().manual_seed(args.seed)
        ways["sampled"] = sampling | {"n_samples": args.n_samples, "generator": generator}
    limits = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    for name, way in ways.items():
        start = time.perf_counter()
        score = evaluate_reasoning(model, tokenizer, records, **limits, **way)
        print(f"\n{args.task_file}, {WAYS[name]}\n{score.table()}")
        print(f"[{len(score.answers) * score.n_samples:,} answers in {time.perf_counter() - start:.1f} s]")
        results[name] = score.as_dict()
    return results


def measure_preference(args: EvalArguments, model, tokenizer) -> dict:
    """Measure --pairs_file, print the figures, and return them for --output."""
    records = list(read_records(args.pairs_file, columns=args.columns))
    score = preference_accuracy(model, tokenizer, records, batch_size=args.batch_size)
    print(f"\npreferences of {args.pairs_file}\n{score.table()}")
    if not args.answer_pairs:
        return score.as_dict()
    limits = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    answers = like_chosen(model, tokenizer, records, **limits)
    share = sum(answer.like_chosen for answer in answers) / len(answers)
    print(f"{share:.1%} of {len(answers):,} free answers are more like the chosen reply than the rejected one")
    return score.as_dict() | {"like_chosen": share, "answers": [asdict(answer) for answer in answers]}


def measure_tasks(args: EvalArguments, model, tokenizer) -> dict:
    """Measure --task_file, print the figures, and return them by name for --output."""
    start = time.perf_counter()
    records = list(read_records(args.task_file, columns=args.columns))
    if any(turn.get("tool_calls") for record in records for turn in record.messages or ()):
        return _measure_tools(args, model, tokenizer, records)
    result = exact_match(model, tokenizer, records, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    seconds = time.perf_counter() - start
    print(f"\nexact match on {args.task_file}\n{result.table()}")
    print(f"[{len(result.answers):,} answers in {seconds:.1f} s]")
    if not args.text_metrics:
        return {"exact_match": result.as_dict()}
    loss = answer_loss(model, tokenizer, records, batch_size=args.batch_size)
    answers = [answer.answer for answer in result.answers]
    expected = [answer.expected for answer in result.answers]
    rouge_scores, bleu_score = rouge(answers, expected), bleu(answers, expected)
    print(f"loss of the expected answers: {loss.nats_per_token:.4f} nats/token over {loss.n_targets:,} tokens")
    print(f"ROUGE-1 {rouge_scores.rouge_1:.3f}, ROUGE-2 {rouge_scores.rouge_2:.3f}, ROUGE-L {rouge_scores.rouge_l:.3f}")
    print(f"BLEU {bleu_score.bleu:.2f} ({bleu_score.signature})")
    return {
        "exact_match": result.as_dict(),
        "answer_loss": loss.as_dict(),
        "rouge": asdict(rouge_scores),
        "bleu": asdict(bleu_score),
    }


def _measure_tools(args: EvalArguments, model, tokenizer, records: list) -> dict:
    """Measure a task file with calls: the calls, and the answers after them."""
    require(not args.text_metrics, f"--text_metrics compares plain answers; {args.task_file} has calls: leave it out")
    start = time.perf_counter()
    limits = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    result = tool_match(model, tokenizer, records, **limits)
    seconds = time.perf_counter() - start
    print(f"\ncalls on {args.task_file}\n{result.calls.table()}")
    print(f"\nexact match after them\n{result.answers.table()}")
    print(f"[{len(records):,} answers in {seconds:.1f} s]")
    return {"tool_calls": result.calls.as_dict(), "exact_match": result.answers.as_dict()}


def suites_to_measure(args: EvalArguments) -> list[Suite]:
    """Return the suites of --suite, all of them read once. Of zh, en and all, those without files are left out.

    Raises:
        UserError: an unknown suite; no files of one that was named, or of any; a wrong record; too few examples.
    """
    if not args.suite:
        return []
    with_files, note = suites_with_files(args.suite, args.suite_dir)
    if note:
        print(note)
    for suite in with_files:
        check_suite(suite, args.suite_dir, n_shot=args.n_shot, limit=args.suite_limit)
    return with_files


def measure_suites(args: EvalArguments, model, tokenizer, suites: list[Suite], results: dict) -> dict:
    """Measure the suites, print a table, and return the figures by name.

    With --output the results so far are written after each suite: the JSON file, and next to it a Markdown table and a
    picture. ``results`` are the other results for the JSON file.
    """
    output = Path(args.output) if args.output else None
    untrained = random_model(model, seed=args.seed) if args.suite_random else None
    how = {"n_shot": args.n_shot, "limit": args.suite_limit, "max_new_tokens": args.max_new_tokens}
    how |= {"chat": args.model_mode != 0}
    identity = {"model": _identity(model, tokenizer, args, results["weights"])} | how | {"random": args.suite_random}
    settings_of = {suite.name: identity | {"files": _hashes(suite, args.suite_dir)} for suite in suites}
    scores = _finished(output, identity, settings_of) if args.suite_resume else {}
    print(f"\n{line()}")
    for suite in suites:
        if suite.name not in scores:
            start = time.perf_counter()
            options = how | {"data_dir": args.suite_dir, "batch_size": args.batch_size}
            score = run_suite(suite.name, model, tokenizer, **options).as_dict()
            score |= {"settings": settings_of[suite.name], "seconds": time.perf_counter() - start}
            if untrained is not None:
                score["random"] = run_suite(suite.name, untrained, tokenizer, **options).as_dict(questions=False)
            scores = _in_order(scores | {suite.name: score})
        print(line(suite.title, scores[suite.name]), flush=True)
        if output:
            text = json.dumps(results | {"suites": scores}, ensure_ascii=False, indent=2) + "\n"
            write_whole(output, text, announce=False)
    print(describe(scores))
    if output:
        title = f"{results['weights']}, {args.n_shot} examples"
        write_whole(output.with_suffix(".md"), markdown(title, {SUITES[name].title: s for name, s in scores.items()}))
        try:
            draw_radar(output.with_suffix(".png"), {Path(results["weights"]).name: scores})
            print(f"wrote {output.with_suffix('.png')}")
        except ImportError:
            print("no picture: drawing needs matplotlib: pip install matplotlib")
    return scores


def _finished(output: Path | None, identity: dict, settings_of: dict[str, dict]) -> dict[str, dict]:
    """Return the suites of an earlier result file with the same model and settings, and the same files if asked again.

    Args:
        identity: of the model and how it is asked. settings_of: of the suites that are asked, with their files.
    """
    if output is None or not output.is_file():
        return {}
    try:
        suites = json.loads(output.read_text(encoding="utf-8")).get("suites", {})
        found = {name: dict(score["settings"]) for name, score in suites.items() if name in SUITES}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"--output {output}: not a result file; remove it or leave out --suite_resume") from None
    same = [name for name, settings in found.items() if settings == settings_of.get(name, settings | identity)]
    if others := [name for name in found if name not in same]:
        print(f"{output}: not kept, from another model, other settings or other files: {', '.join(others)}")
    return _in_order({name: suites[name] for name in same})


def _in_order(scores: dict[str, dict]) -> dict[str, dict]:
    return {name: scores[name] for name in SUITES if name in scores}


def _hashes(suite: Suite, suite_dir: str) -> dict[str, str]:
    files = find_files(suite, suite_dir)
    return {str(path.relative_to(suite_dir)): sha256(path) for path in (*files.questions, *files.examples)}


def _identity(model, tokenizer, args: EvalArguments, weights: str) -> dict:
    """Return what tells two models apart without reading all of them: the beginning of each tensor, with adapters."""
    digest = hashlib.sha256(json.dumps(model.config.to_hf(), sort_keys=True).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    hashes = {"model": digest.hexdigest(), "tokenizer": tokenizer.encoding_hash}
    return {"weights": weights, "hashes": hashes, "lora_name": args.lora_name, "dtype": args.dtype}
