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
    python eval_model.py --suite zh --suite_dir dataset/eval --output scores.json   # also en, all, or names: ceval,mmlu
    python eval_model.py --tools dataset/demo_tools.py --prompt "23*45"   # the model may call these functions
    python eval_model.py --lora_name cooking                 # out/full_sft_* with the adapter out/lora/cooking_*
    python eval_model.py --rope_scaling yarn:4 --rope_original_len 512   # 2,048 tokens with a model trained on 512

Without --from_weight it uses the stage of --model_mode in out/, else the demo's in out/demo/.
Without a prompt or a file it opens a chat (in mode 0 it completes texts); /help lists the commands.
"""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minillm.cli.command_line import parse, script
from minillm.cli.eval_arguments import EvalArguments
from minillm.data import Prompt, read_prompts
from minillm.errors import UserError
from minillm.evaluation import read_answer
from minillm.evaluation.measure import (
    measure_perplexity,
    measure_preference,
    measure_reasoning,
    measure_suites,
    measure_tasks,
    suites_to_measure,
)
from minillm.evaluation.sample_answers import write_whole
from minillm.hub.open import open_from_arguments
from minillm.inference import SamplingOptions, complete
from minillm.inference.chat import ChatModel, ChatSession, chat, speed
from minillm.inference.thinking import ThinkingView
from minillm.serving.tools import Toolbox, describe_message, load_tools, tool_loop


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(EvalArguments, argv)
    sampling = {name: getattr(args, name) for name in SamplingOptions.__dataclass_fields__}
    SamplingOptions(**sampling)  # reports invalid options before the weights are loaded
    prompts = [Prompt(content=text) for text in args.prompt]
    prompts += read_prompts(args.prompts, columns=args.columns) if args.prompts else []
    suites = suites_to_measure(args)
    toolbox = load_tools(args.tools) if args.tools else None
    measures = bool(args.perplexity or args.task_file or args.pairs_file or suites)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    chat_model = open_chat_model(args)
    model, tokenizer = chat_model.model, chat_model.tokenizer
    if not (prompts or measures or sys.stdin.isatty()):
        prompts = [Prompt(content=line.rstrip("\n")) for line in sys.stdin if line.strip()]
        if not prompts:
            print("no terminal and no questions on standard input: give --prompt TEXT or --prompts FILE")
    options = sampling | {
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "generator": torch.Generator().manual_seed(args.seed),
    }
    results: dict = {"weights": chat_model.name, "model_mode": args.model_mode, "lora_name": args.lora_name}
    if args.perplexity:
        results["perplexity"] = measure_perplexity(args, model, tokenizer)
    if args.task_file and args.model_mode == 3:
        results["reasoning"] = measure_reasoning(args, model, tokenizer, sampling)
    elif args.task_file:
        results |= measure_tasks(args, model, tokenizer)
    if args.pairs_file:
        results["preference"] = measure_preference(args, model, tokenizer)
    if suites:
        results["suites"] = measure_suites(args, model, tokenizer, suites, results)
    if prompts and toolbox:
        results["prompts"] = answer_with_tools(args, chat_model, prompts, options, toolbox)
    elif prompts:
        results["prompts"] = answer_prompts(args, chat_model, prompts, options)
    if prompts:
        results["sampling"] = sampling | {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if args.output:
        write_whole(Path(args.output), json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    if prompts or measures or not sys.stdin.isatty():
        return
    session = ChatSession(
        chat_model,
        load=lambda name, lora_name: open_chat_model(replace(args, from_weight=name, lora_name=lora_name)),
        history_turns=args.history_turns if args.model_mode else 0,
        thinking=args.thinking,
        system=args.system if args.model_mode else "",
        **({"tools": toolbox.schemas, "respond": partial(respond_with_tools, toolbox)} if toolbox else {}),
        **options,
    )
    del model, chat_model  # /model and /lora free the memory of the old model
    chat(session)


def open_chat_model(args: EvalArguments) -> ChatModel:
    """Open the model of the arguments and say what it is."""
    model, tokenizer, weights = open_from_arguments(args)
    text_only = args.model_mode == 0
    return ChatModel(
        model=model, tokenizer=tokenizer, name=str(weights), lora_name=args.lora_name, completes_text=text_only
    )


# ---- answering -----------------------------------------------------------------------------------


def answer_prompts(args: EvalArguments, chat_model: ChatModel, prompts: list[Prompt], options: dict) -> list[dict]:
    """Answer the prompts in batches, print each answer, and return all of them."""
    model, tokenizer = chat_model.model, chat_model.tokenizer
    options = options | {"tokenizer": tokenizer, "eos_token_id": tokenizer.end_ids}
    encoded = [encode_prompt(args, chat_model, prompt) for prompt in prompts]
    opened = chat_model.opens_with if args.model_mode == 3 else ""  # beginning of the answer in the prompt
    answers, n_tokens, start = [], 0, time.perf_counter()
    for first in range(0, len(prompts), args.batch_size):
        batch = slice(first, first + args.batch_size)
        for prompt, completion in zip(prompts[batch], complete(model, encoded[batch], **options), strict=True):
            output, answer = completion.text, {"answer": completion.text}
            if args.model_mode == 3:
                view = ThinkingView(args.thinking, opened=opened)
                output = view.push(completion.text) + view.finish()
                answer = read_answer(opened + completion.text)._asdict() | {"text": opened + completion.text}
            print(f"\n> {prompt.question}\n{output}")
            n_tokens += len(completion.ids)
            outcome = {"finish_reason": completion.finish_reason, "n_tokens": len(completion.ids)}
            asked = {"prompt": prompt.content} | ({"tools": prompt.tools} if prompt.tools else {})
            answers.append(asked | answer | outcome)
    print(speed(n_tokens, time.perf_counter() - start))
    return answers


def answer_with_tools(args: EvalArguments, chat_model: ChatModel, prompts, options, toolbox: Toolbox) -> list[dict]:
    """Answer the prompts one by one; print the calls, their results and the answer, and return all messages."""
    tokenizer = chat_model.tokenizer
    options = options | {"tokenizer": tokenizer, "eos_token_id": tokenizer.end_ids}

    def generate_reply(messages: list[dict], tools: list[dict]) -> str:
        return complete(chat_model.model, [chat_model.encode(messages, tools=tools)], **options)[0].text

    answers = []
    for prompt in prompts:
        messages = to_messages(args, prompt)
        print(f"\n> {messages[-1]['content']}")
        new_messages = []
        for message in tool_loop(generate_reply, messages, toolbox):
            print(describe_message(message), flush=True)
            new_messages.append(message)
        answers.append({"prompt": prompt.content, "answer": new_messages[-1]["content"], "messages": new_messages})
    return answers


def respond_with_tools(toolbox: Toolbox, reply, messages: list[dict]):
    """Yield the messages that follow a question in a chat; print the results of calls between the model's replies."""
    for message in tool_loop(reply, messages, toolbox):
        if message["role"] == "tool":
            print(describe_message(message))
        yield message


def encode_prompt(args: EvalArguments, chat_model: ChatModel, prompt: Prompt) -> list[int]:
    """Return the ids before the answer, in the chat modes with the flags' system message if the prompt has none."""
    if args.model_mode == 0 and prompt.tools:
        raise UserError(
            f"--model_mode 0 completes texts, which have no tools, and a prompt declares them: "
            f"{prompt.question[:60]!r}; remove the key tools, or choose --model_mode 1"
        )
    return chat_model.encode(to_messages(args, prompt), tools=prompt.tools)


def to_messages(args: EvalArguments, prompt: Prompt) -> list[dict]:
    """Return the turns of a prompt, in the chat modes with the flags' system message if it has none."""
    messages = prompt.turns
    if args.model_mode and args.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": args.system}, *messages]
    return messages


if __name__ == "__main__":
    main()
