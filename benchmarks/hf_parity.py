"""Opens a trained directory with minillm and with transformers: are ids, logits and greedy text the same?

    python benchmarks/hf_parity.py --model_path out/demo/full_sft_128 --data_path dataset/demo/sft_test.jsonl

Both sides tokenise with their own template, then read and continue the same prompts. It prints the largest difference
of the logits, relative to the largest logit, and how many answers are equal. The exit code is 1 if a bound is broken.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import write_json
from minillm.cli.command_line import parse, require, script
from minillm.data import read_records
from minillm.errors import missing_package
from minillm.hub.huggingface import load_model
from minillm.inference import generate
from minillm.tokenizer import encode_chat, load_tokenizer

LOGITS_BOUND = 1e-5  # relative to the largest logit, float32


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is compared."""

    model_path: str = "out/demo/full_sft_128"
    """A run directory. The default exists after `make demo`."""
    data_path: str = "dataset/demo/sft_test.jsonl"
    """Conversations; all turns before the last one are the prompt."""
    n_prompts: int = 64
    """Prompts, taken at equal distances from the file."""
    max_new_tokens: int = 64
    """Greedy tokens per prompt."""
    output: str = "out/benchmarks/hf_parity.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("n_prompts", "max_new_tokens"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(Path(self.model_path).is_dir(), f"--model_path {self.model_path}: does not exist; run make demo first")


@torch.no_grad()
def compare(args: Arguments) -> dict:
    """Return the counts of equal prompts and answers, and the largest relative difference of the logits."""
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers", purpose="benchmarks/hf_parity.py", extra="bench") from None
    tokenizer, model = load_tokenizer(args.model_path), load_model(args.model_path).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).eval()
    records = [record.messages for record in read_records(args.data_path)]
    prompts = [messages[:-1] for messages in records[:: max(1, len(records) // args.n_prompts)]][: args.n_prompts]
    result = {"prompts": len(prompts), "equal_ids": 0, "equal_text": 0, "logits": 0.0}
    for messages in prompts:
        ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
        their_ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        result["equal_ids"] += ids == their_ids
        batch = torch.tensor([ids])
        expected = theirs(batch).logits
        difference = (model(batch) - expected).abs().max() / expected.abs().max()
        result["logits"] = max(result["logits"], difference.item())
        ends = theirs.generation_config.eos_token_id
        answer = generate(model, [ids], max_new_tokens=args.max_new_tokens, temperature=0, eos_token_id=ends)[0]
        reference = theirs.generate(batch, max_new_tokens=args.max_new_tokens, do_sample=False)[0, len(ids) :].tolist()
        result["equal_text"] += answer == reference and tokenizer.decode(answer) == their_tokenizer.decode(reference)
    return result


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    result = compare(args)
    print(
        f"{args.model_path}: of {result['prompts']} prompts {result['equal_ids']} have equal ids and "
        f"{result['equal_text']} equal greedy answers; logits differ by at most {result['logits']:.1e}"
    )
    write_json(args.output, {"arguments": vars(args), **result})
    if result["logits"] > LOGITS_BOUND or min(result["equal_ids"], result["equal_text"]) < result["prompts"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
