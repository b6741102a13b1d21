"""Try out and measure a trained model.

    python eval_model.py                                     # chat with out/full_sft_*
    python eval_model.py --model_mode 0                      # complete text with out/pretrain_*
    python eval_model.py --prompt "Who are you?"             # several: --prompt A --prompt B, or one per line on stdin
    python eval_model.py --prompts questions.txt --output answers.json
    python eval_model.py --perplexity valid.jsonl --task_file tasks.jsonl
    python eval_model.py --task_file chats.jsonl --text_metrics   # loss, BLEU and ROUGE of answers too
    python eval_model.py --model_mode 2 --pairs_file pairs.jsonl     # which reply of a pair is more probable
    python eval_model.py --model_mode 3                      # chat with out/reason_*, its thinking dimmed
    python eval_model.py --model_mode 3 --task_file problems.jsonl --n_samples 8   # with thinking and without, pass@k
    python eval_model.py --lora_name cooking                 # out/full_sft_* with the adapter out/lora/cooking_*
    python eval_model.py --rope_scaling yarn:4 --rope_original_len 512   # 2,048 tokens with a model trained on 512

Without --from_weight it uses the stage of --model_mode in out/, else the demo's in out/demo/.
Without a prompt or a file it opens a chat (in mode 0 it completes texts); /help lists the commands.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.cli.command_line import parse, script
from minillm.cli.eval_arguments import EvalArguments
from minillm.data import read_prompts, read_records
from minillm.evaluation import (
    answer_loss,
    bleu,
    evaluate_reasoning,
    exact_match,
    like_chosen,
    perplexity,
    preference_accuracy,
    read_answer,
    rouge,
)
from minillm.evaluation.sample_answers import write_whole
from minillm.hub.open import open_from_arguments
from minillm.inference import SamplingOptions, complete
from minillm.inference.chat import chat, speed
from minillm.inference.thinking import ThinkingView
from minillm.tokenizer import encode_chat
from minillm.tokenizer.chat_format import chat_format

WAYS = {"thinking": "thinking first", "direct": "answering at once", "sampled": "thinking first, several answers each"}


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(EvalArguments, argv)
    sampling = {name: getattr(args, name) for name in SamplingOptions.__dataclass_fields__}
    SamplingOptions(**sampling)  # reports invalid options before the weights are loaded
    prompts = [*args.prompt, *(read_prompts(args.prompts, columns=args.columns) if args.prompts else [])]
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, tokenizer, weights = open_from_arguments(args)
    if not (prompts or args.perplexity or args.task_file or args.pairs_file or sys.stdin.isatty()):
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
        if not prompts:
            print("no terminal and no questions on standard input: give --prompt TEXT or --prompts FILE")
    options = sampling | {
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "eos_token_id": tokenizer.end_ids,
        "generator": torch.Generator().manual_seed(args.seed),
        "tokenizer": tokenizer,
    }
    results: dict = {"weights": str(weights), "model_mode": args.model_mode, "lora_name": args.lora_name}
    if args.perplexity:
        results["perplexity"] = measure_perplexity(args, model, tokenizer)
    if args.task_file and args.model_mode == 3:
        results["reasoning"] = measure_reasoning(args, model, tokenizer, sampling)
    elif args.task_file:
        results |= measure_tasks(args, model, tokenizer)
    if args.pairs_file:
        results["preference"] = measure_preference(args, model, tokenizer)
    if prompts:
        results["prompts"] = answer_prompts(args, model, tokenizer, prompts, options)
        results["sampling"] = sampling | {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.output:
        write_whole(Path(args.output), json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    if prompts or args.perplexity or args.task_file or args.pairs_file or not sys.stdin.isatty():
        return
    if args.model_mode == 3:
        options |= {"thinking": args.thinking, "opened": chat_format(tokenizer).opens_with}
    chat(
        model,
        lambda turns: encode_prompt(args, tokenizer, turns),
        history_turns=args.history_turns if args.model_mode else 0,
        **options,
    )


# ---- the prompt ----------------------------------------------------------------------------------


def encode_prompt(args: EvalArguments, tokenizer, prompt: str | list[dict]) -> list[int]:
    """Return the ids before the answer: a conversation in the chat modes, plain text in mode 0."""
    if args.model_mode == 0:
        text = prompt if isinstance(prompt, str) else "\n".join(turn.get("content") or "" for turn in prompt)
        return tokenizer.open_document(tokenizer.encode(text))
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if args.system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": args.system}, *turns]
    return encode_chat(tokenizer, turns, add_generation_prompt=True)[0]


# ---- measuring -----------------------------------------------------------------------------------


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


# ---- answering -----------------------------------------------------------------------------------


def answer_prompts(args: EvalArguments, model, tokenizer, prompts, options: dict) -> list[dict]:
    """Answer the prompts in batches, print each answer, and return all of them."""
    encoded = [encode_prompt(args, tokenizer, prompt) for prompt in prompts]
    opened = chat_format(tokenizer).opens_with if args.model_mode == 3 else ""  # beginning of the answer in the prompt
    answers, n_tokens, start = [], 0, time.perf_counter()
    for first in range(0, len(prompts), args.batch_size):
        batch = slice(first, first + args.batch_size)
        for prompt, completion in zip(prompts[batch], complete(model, encoded[batch], **options), strict=True):
            question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            output, answer = completion.text, {"answer": completion.text}
            if args.model_mode == 3:
                view = ThinkingView(args.thinking, opened=opened)
                output = view.push(completion.text) + view.finish()
                answer = read_answer(opened + completion.text)._asdict() | {"text": opened + completion.text}
            print(f"\n> {question}\n{output}")
            n_tokens += len(completion.ids)
            outcome = {"finish_reason": completion.finish_reason, "n_tokens": len(completion.ids)}
            answers.append({"prompt": prompt} | answer | outcome)
    print(speed(n_tokens, time.perf_counter() - start))
    return answers


if __name__ == "__main__":
    main()
