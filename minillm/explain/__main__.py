"""Follows a text through tokenizer, every layer and the output layer to the next token.

    python -m minillm.explain "The cat"
    python -m minillm.explain "2+3=" --from_weight pretrain --language zh --output out/explain.html

In the terminal: tokens; every part with shapes, parameters, FLOPs, bytes, time and the length of the stream; the next
token. The page also has the attention of every layer and head.
"""

from pathlib import Path

import torch

from minillm.cli.command_line import parse, script
from minillm.cli.explain_arguments import ExplainArguments
from minillm.errors import UserError
from minillm.explain.page import as_page
from minillm.explain.text import as_text
from minillm.explain.trace import trace
from minillm.files import replace_text
from minillm.hub.open import open_from_arguments
from minillm.tokenizer import encode_chat


@script
def main(argv: list[str] | None = None) -> None:
    """Print the explanation and write its page."""
    args = parse(ExplainArguments, argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    model, tokenizer, _ = open_from_arguments(args)
    if args.chat:
        messages = [{"role": "user", "content": args.text}]
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
    else:
        ids = tokenizer.open_document(tokenizer.encode(args.text))
    limit = min(args.max_tokens, model.config.max_position_embeddings)
    if len(ids) > limit:
        raise UserError(f"the text has {len(ids)} tokens, and {limit} can be shown: shorten it, or raise --max_tokens")
    trace(model, ids)  # the first pass also pays for memory and threads; the second one is timed
    found = trace(model, ids)
    print(as_text(found, tokenizer, model.config, args.language))
    if args.output != "none":
        path = Path(args.output or Path(args.save_dir) / "explain.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, as_page(found, tokenizer, model.config, args.language))
        print(f"\n{path}")


if __name__ == "__main__":
    main()
