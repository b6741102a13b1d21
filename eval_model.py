"""Try and measure a trained model.

    python eval_model.py                                     # chat with out/full_sft_*
    python eval_model.py --model_mode 0                      # complete text with out/pretrain_*
    python eval_model.py --prompts questions.txt --output answers.json
    python eval_model.py --perplexity valid.jsonl --task_file tasks.jsonl
    python eval_model.py --task_file chats.jsonl --text_metrics   # loss, BLEU and ROUGE of answers too
    python eval_model.py --lora_name cooking                 # out/full_sft_* with the adapter out/lora/cooking_*
    python eval_model.py --rope_scaling yarn:4 --rope_original_len 512   # 2,048 tokens with a model trained on 512

Without a file to work on it opens a chat (a completion prompt in mode 0); /clear forgets, /exit ends.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from minillm.data import read_records
from minillm.errors import UserError
from minillm.evaluation import answer_loss, bleu, exact_match, perplexity, rouge
from minillm.inference import SamplingOptions, complete
from minillm.inference.chat import chat, speed
from minillm.model.hf import load_model
from minillm.tokenizer import check_messages, encode_chat, load_tokenizer
from minillm.training.arguments import EvalArguments
from minillm.training.command_line import parse, script
from minillm.training.hardware import keep_freed_memory
from minillm.training.outputs import add_adapters
from minillm.training.precision import choose_device, choose_dtype
from minillm.training.routing import describe_parameters
from minillm.training.weights import check_tokenizer, find_weights, preset_config, pth_config, scale_positions

STAGES = ("pretrain", "full_sft", "rlhf", "reason")  # by --model_mode


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(EvalArguments, argv)
    sampling = {name: getattr(args, name) for name in SamplingOptions.__dataclass_fields__}
    SamplingOptions(**sampling)  # complains now, not after the weights are read
    prompts = read_prompts(args) if args.prompts else None
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, tokenizer, weights = open_model(args)
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
    if args.task_file:
        results |= measure_tasks(args, model, tokenizer)
    if prompts:
        results["prompts"] = answer_prompts(args, model, tokenizer, prompts, options)
        results["sampling"] = sampling | {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.output:
        write_json(results, Path(args.output))
    if args.perplexity or args.task_file or args.prompts:
        return
    if not sys.stdin.isatty():
        print("no terminal: chat skipped")
        return
    chat(
        model,
        lambda turns: encode_prompt(args, tokenizer, turns),
        history_turns=args.history_turns if args.model_mode else 0,
        **options,
    )


# ---- the model -----------------------------------------------------------------------------------


def open_model(args: EvalArguments):
    """Return model (evaluation mode, on its device), tokenizer and the path of the weights."""
    name = args.from_weight or STAGES[args.model_mode]
    is_stage = "/" not in name and not Path(name).exists()
    runs = [path.parent for path in Path(args.save_dir).glob(f"{name}_*/config.json")] if is_stage else []
    sparse = [path for path in runs if path.name.endswith("_moe")]
    runs = sparse if args.has_experts else [path for path in runs if path not in sparse] or sparse
    if args.hidden_size is None and len(runs) == 1:
        path = runs[0]  # the only width there is: no need to name it
    else:
        width = preset_config(args).hidden_size
        path = find_weights(name, save_dir=args.save_dir, hidden_size=width, has_experts=args.has_experts)
    folder = path if path.is_dir() else path.parent
    default = folder if (folder / "tokenizer.json").is_file() else Path(args.save_dir) / "tokenizer"
    tokenizer = load_tokenizer(args.tokenizer_path or default)
    device = choose_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = choose_dtype(args.dtype, device)
    config = pth_config(path, args, tokenizer) if path.suffix == ".pth" else None
    # An adapter is added in float32: what it changes is smaller than a bfloat16's last digit.
    model = load_model(path, device=device, dtype=torch.float32 if args.lora_name else dtype, config=config).eval()
    check_tokenizer(tokenizer, model, path)
    model.config = scale_positions(model.config, args)
    adapters = add_adapters(model, args.lora_name, save_dir=args.save_dir) if args.lora_name else []
    model.to(dtype)
    shown = " + ".join(map(str, [path, *adapters]))
    print(f"{shown}: parameters {describe_parameters(model)}; {device}, {dtype}")
    return model, tokenizer, path


def encode_prompt(args: EvalArguments, tokenizer, prompt: str | list[dict]) -> list[int]:
    """Return the ids before the answer: a conversation in the chat modes, plain text in mode 0."""
    if args.model_mode == 0:
        text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
        return [tokenizer.bos_token_id, *tokenizer.encode(text)]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if args.system and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": args.system}, *turns]
    return encode_chat(tokenizer, turns, add_generation_prompt=True)[0]


# ---- measuring -----------------------------------------------------------------------------------


def measure_perplexity(args: EvalArguments, model, tokenizer) -> dict:
    """Measure --perplexity, print it, and return it as it goes into --output."""
    start = time.perf_counter()
    result = perplexity(
        model,
        read_records(args.perplexity),
        tokenizer,
        max_seq_len=args.max_seq_len or None,
        batch_size=args.batch_size,
    )
    print(f"\nperplexity of {args.perplexity}\n{result.table()}")
    print(speed(result.n_targets, time.perf_counter() - start))
    return result.as_dict()


def measure_tasks(args: EvalArguments, model, tokenizer) -> dict:
    """Measure --task_file, print the figures, and return them by name as they go into --output."""
    start = time.perf_counter()
    records = list(read_records(args.task_file))
    result = exact_match(model, tokenizer, records, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    seconds = time.perf_counter() - start
    print(f"\nexact match on {args.task_file}\n{result.table()}")
    print(f"[{len(result.answers):,} answers in {seconds:.1f} s]")
    if not args.text_metrics:
        return {"exact_match": result.as_dict()}
    loss = answer_loss(model, tokenizer, records, batch_size=args.batch_size)
    answers, expected = [each.answer for each in result.answers], [each.expected for each in result.answers]
    words, phrases = rouge(answers, expected), bleu(answers, expected)
    print(f"loss of the expected answers: {loss.nats_per_token:.4f} nats/token over {loss.n_targets:,} tokens")
    print(f"ROUGE-1 {words.rouge_1:.3f}, ROUGE-2 {words.rouge_2:.3f}, ROUGE-L {words.rouge_l:.3f}")
    print(f"BLEU {phrases.bleu:.2f} ({phrases.signature})")
    found = {"answer_loss": loss.as_dict(), "rouge": asdict(words), "bleu": asdict(phrases)}
    return {"exact_match": result.as_dict()} | found


# ---- answering -----------------------------------------------------------------------------------


def read_prompts(args: EvalArguments) -> list[str | list[dict]]:
    """Return the prompts of ``--prompts``: its lines, or its jsonl records without their last answer."""
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {args.prompts}: cannot be read as UTF-8 text ({error})") from None
    prompts: list[str | list[dict]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not args.prompts.endswith(".jsonl"):
            prompts.append(line)
        elif line.strip():
            try:
                prompts.append(parse_prompt(json.loads(line)))
            except (ValueError, TypeError, LookupError) as error:  # UserError is a ValueError
                raise UserError(f"--prompts {args.prompts}, line {number}: {error}") from None
    if not prompts:
        raise UserError(f"--prompts {args.prompts}: holds no prompt; write one per line")
    return prompts


def parse_prompt(record: dict) -> str | list[dict]:
    """Return the text or the conversation of one record, which is left open for an answer."""
    key = next((key for key in ("prompt", "text", "conversations", "messages") if key in record), None)
    if key is None:
        raise UserError("a prompt needs one of the keys prompt, text, conversations, messages")
    prompt = record[key]
    if not isinstance(prompt, str):
        check_messages(prompt, need_answer=False)
        prompt = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        check_messages(prompt, need_answer=False)
    return prompt


def answer_prompts(args: EvalArguments, model, tokenizer, prompts, options: dict) -> list[dict]:
    """Answer --prompts in batches, print the answers as they come, and return them."""
    encoded = [encode_prompt(args, tokenizer, prompt) for prompt in prompts]
    answers, n_tokens, start = [], 0, time.perf_counter()
    for first in range(0, len(prompts), args.batch_size):
        batch = slice(first, first + args.batch_size)
        for prompt, done in zip(prompts[batch], complete(model, encoded[batch], **options), strict=True):
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            print(f"\n> {shown}\n{done.text}")
            n_tokens += len(done.ids)
            outcome = {"answer": done.text, "finish_reason": done.finish_reason, "n_tokens": len(done.ids)}
            answers.append({"prompt": prompt} | outcome)
    print(speed(n_tokens, time.perf_counter() - start))
    return answers


def write_json(results: dict, path: Path) -> None:
    """Write ``results`` under a temporary name, then rename: the file is whole or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
