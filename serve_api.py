"""Serve a trained model with OpenAI's API: for the openai client, Open-WebUI, FastGPT and many others.

    python serve_api.py                                      # out/full_sft_*, at http://127.0.0.1:8000/v1
    python serve_api.py --model out/rlhf_512 --port 8080
    python serve_api.py --lora cooking=cooking --lora law=out/lora/law_512     # adapters, by name as models
    MINILLM_API_KEY=... python serve_api.py --host 0.0.0.0   # for other machines

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Who are you?"}], "stream": true}'

Standard error has one JSON line per request; /health and /metrics are for whoever watches the server. Ctrl-C lets the
running answers finish. docs/serving.md has clients, proxies and containers.
"""

import signal
import sys

import torch

from minillm.cli.command_line import parse, require, script
from minillm.cli.serve_arguments import ServeArguments
from minillm.hub import open_model
from minillm.hub.adapters import find_adapters
from minillm.inference import SamplingOptions
from minillm.model.sizes import describe_parameters
from minillm.serving import DraftModel, Engine, PromptLookup
from minillm.serving.api import create_app
from minillm.serving.api.server import serve
from minillm.serving.int8 import to_int8


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(ServeArguments, argv)
    sampling = SamplingOptions(temperature=args.temperature, top_p=args.top_p)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    how = {"device": args.device, "dtype": args.dtype, "save_dir": args.save_dir}
    model, tokenizer = open_model(args.model, tokenizer_path=args.tokenizer_path, flag="--model", **how)
    drafter = None
    if args.draft:
        is_lookup = args.draft == "lookup"
        drafter = PromptLookup() if is_lookup else DraftModel(open_model(args.draft, flag="--draft", **how)[0])
    size = describe_parameters(model)  # in int8, the weights are no parameters any more
    is_int8, is_cuda = args.quantization == "int8", next(model.parameters()).is_cuda
    if is_int8:
        require(not is_cuda, "--quantization int8: is for a CPU; add --device cpu, or leave it out")
        to_int8(model)
    compiles = is_cuda or is_int8 if args.compile == "auto" else args.compile == "1"
    engine = Engine(
        model,
        tokenizer,
        n_pages=args.n_pages or None,
        page_len=args.page_len,
        max_batch=args.max_batch,
        max_batch_tokens=args.max_batch_tokens,
        max_queue=args.max_queue,
        drafter=drafter,
        compile=compiles,
    )
    for name, adapter in args.adapters:
        ((path, _),) = find_adapters(model, adapter, save_dir=args.save_dir)
        engine.add_adapter(name, path)
    app = create_app(
        engine,
        model_name=args.model_name or model.origin.rstrip("/").rpartition("/")[2],
        api_key=args.key,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens or None,
        max_body_bytes=int(args.max_body_mb * 2**20),
        cors_origins=args.cors_origins,
        log_content=args.log_content,
    )

    def announce(port: int) -> None:
        dtype = f"{next(model.parameters()).dtype}{', weights in int8' if is_int8 else ''}"
        print(f"{model.origin}: parameters {size}; {engine.device}, {dtype}")
        names = [card["id"] for card in app.state.service.models()]
        print(f"http://{args.host}:{port}/v1  models: {', '.join(names)}", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1") and not args.key:
            print(f"warning: other machines can reach {args.host}, and there is no --api_key", file=sys.stderr)

    serve(app, host=args.host, port=args.port, grace_s=args.grace_s, on_start=announce)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a late Ctrl-C has nothing left to end
    print("ended")


if __name__ == "__main__":
    main()
