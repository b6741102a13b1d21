"""Chapter 30: a model that repeats itself, one that never stops, and one that is asked in another format.

python docs/course/code/ch30_answers.py repeats | stops | template
"""

import sys

import torch
from ch30_run import ask, train, world

from minillm.hub import open_model
from minillm.inference import complete
from minillm.tokenizer import load_tokenizer


def repeats() -> None:
    """Continue a text greedily, with a penalty, with a draw; print how many groups of four tokens are different."""
    train("pretrain", "--max_steps", "200", quiet=True)
    model, tokenizer = open_model("out/pretrain_32", device="cpu")
    prompt = tokenizer.open_document(tokenizer.encode("the red fox"))
    for name, options in {
        "greedy": {"temperature": 0},
        "repetition_penalty 1.3": {"temperature": 0, "repetition_penalty": 1.3},
        "temperature 1": {"temperature": 1.0},
    }.items():
        generator = torch.Generator().manual_seed(0)
        ids = complete(model, [prompt], max_new_tokens=56, eos_token_id=(), generator=generator, **options)[0].ids
        groups = [tuple(ids[n : n + 4]) for n in range(len(ids) - 3)]
        print(f"{name}, different groups of four: {len(set(groups)) / len(groups):.2f}")
        print(f"  {tokenizer.decode(ids, skip_special_tokens=True)[-100:]!r}")


def stops() -> None:
    """Wait for the end token of documents, then for that of answers."""
    train("sft", quiet=True)
    tokenizer = load_tokenizer("out/full_sft_32")
    for name in ("<|endoftext|>", "<|im_end|>"):
        ask(f"waiting for {name}", ends=(tokenizer.token_id(name),))


def template() -> None:
    """Ask in the format of another model, then in the own one."""
    train("sft", quiet=True)
    ask("User: and Assistant:", prompt=lambda tokenizer, asked: tokenizer.encode(f"User: {asked}\nAssistant: "))
    ask("the own template")


if __name__ == "__main__":
    with world():
        {"repeats": repeats, "stops": stops, "template": template}[sys.argv[1]]()
