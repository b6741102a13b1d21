"""Does the server keep its answers apart under load? Each answer to many clients is compared with its single run.

    python benchmarks/serve_clients.py --n_clients 200 --seconds 60

A server (``serve_api.py``) runs in a process of its own. Every client asks one question after the other with the real
``openai`` client: greedy or sampled with a seed, whole or streamed, and some leave in the middle of an answer. Before,
this process has answered every question alone with ``minillm.inference``. Counted are the answers that differ, requests
that failed, and what the server still holds when all clients have gone: requests, pages, resident memory.

Exits with 1 if anything differs, is lost or left behind. Refusals because the queue is full are no failure: the client
asks again.
"""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks.common import format_table, write_json
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.errors import UserError, missing_package
from minillm.hub import open_model, save_model
from minillm.inference import complete
from minillm.model import Transformer
from minillm.serving.api.parsing import AnswerParser, join_deltas
from minillm.tokenizer import encode_chat, train_bpe
from minillm.tokenizer.chat_format import chat_format

ROOT = Path(__file__).resolve().parents[1]
WORDS = (
    "who",
    "are",
    "you",
    "what",
    "is",
    "your",
    "name",
    "where",
    "why",
    "小明",
    "苹果",
    "几个",
    "tell",
    "me",
    "more",
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is asked, and how often."""

    model_path: str = ""
    """A model directory (default: one of the demo's shape with random weights)."""
    n_clients: int = 200
    """Clients at the same time."""
    seconds: float = 60.0
    """How long they ask."""
    n_questions: int = 60
    """Different questions; every third one is sampled."""
    max_new_tokens: int = 32
    """Longest answer."""
    leaving: float = 0.1
    """Share of the requests whose client leaves before the end."""
    max_queue: int = 1000
    """Of the server."""
    num_threads: int = 1
    """CPU threads of the server's model; the clients need a core too."""
    output: str = "out/benchmarks/serve_clients.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("n_clients", "n_questions", "max_new_tokens", "max_queue", "num_threads"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(self.seconds > 0, f"--seconds {self.seconds}: must be positive")
        require(0 <= self.leaving < 1, f"--leaving {self.leaving}: must be 0 to below 1")


@dataclass(frozen=True)
class Question:
    """What a client asks, and the answer that it must get."""

    text: str
    seed: int | None
    answer: str


def make_model(directory: Path) -> Path:
    """Write a model of the demo's shape with random weights; return its directory."""
    tokenizer = train_bpe(iter([" ".join(WORDS)] * 3), vocab_size=310)
    torch.manual_seed(0)
    config = ModelConfig.preset("demo", vocab_size=tokenizer.vocab_size, initializer_range=0.2)
    save_model(Transformer(config), directory / "random", tokenizer=tokenizer)
    return directory / "random"


def make_questions(args: Arguments, path: Path) -> list[Question]:
    """Return the questions with the answers that the model gives alone."""
    model, tokenizer = open_model(path, device="cpu")
    rng, questions = random.Random(0), []
    for number in range(args.n_questions):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(1, 30)))
        seed = number if number % 3 == 0 else None
        ids = encode_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)[0]
        completion = complete(
            model,
            [ids],
            max_new_tokens=args.max_new_tokens,
            temperature=0 if seed is None else 1,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            eos_token_id=tokenizer.end_ids,
            tokenizer=tokenizer,
        )[0]
        parser = AnswerParser(opened=chat_format(tokenizer).opens_with, tools=None)  # random models write tags, too
        message = join_deltas(parser.push(completion.text) + parser.finish())
        questions.append(Question(text, seed, message["content"] or ""))
    return questions


@contextlib.contextmanager
def server(args: Arguments, path: Path) -> Iterator[tuple[str, int]]:
    """Run ``serve_api.py``; give its address and process number."""
    flags = {"model": path, "port": 0, "device": "cpu", "dtype": "float32"}
    flags |= {"max_queue": args.max_queue, "num_threads": args.num_threads}
    command = [sys.executable, str(ROOT / "serve_api.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            process.stdout.readline()
            address = process.stdout.readline().partition(" ")[0].strip()
            if not address:
                errors.seek(0)
                raise UserError(f"the server did not start: {errors.read()[-800:]}")
            yield address, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def resident_mib(process_id: int) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


async def ask_all(args: Arguments, questions: list[Question], address: str, process_id: int) -> dict:
    """Let the clients ask; return what came of it."""
    import httpx
    import openai

    counts, waits, memory = Counter(), [], []
    end = time.monotonic() + args.seconds
    http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120)
    client = openai.AsyncOpenAI(base_url=address, api_key="any", max_retries=0, http_client=http)

    async def ask(question: Question, rng: random.Random) -> None:
        options = {"model": "", "messages": [{"role": "user", "content": question.text}]}
        options |= {"temperature": 0 if question.seed is None else 1, "seed": question.seed}
        options["max_tokens"] = args.max_new_tokens
        began = time.monotonic()
        if rng.random() < 0.3:
            answer = await client.chat.completions.create(**options)
            text = answer.choices[0].message.content or ""
        else:
            leaves, text, first = rng.random() < args.leaving / 0.7, "", None
            async with await client.chat.completions.create(**options, stream=True) as chunks:
                async for chunk in chunks:
                    text += chunk.choices[0].delta.content or ""
                    if first is None and text:
                        first = time.monotonic() - began
                        waits.append(first)
                    if leaves and text:
                        counts["left"] += 1
                        return
        counts["right" if text == question.answer else "different"] += 1

    async def keep_asking(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            try:
                await ask(rng.choice(questions), rng)
            except openai.RateLimitError:
                counts["queue full"] += 1
                await asyncio.sleep(0.2)
            except Exception as error:
                counts["failed"] += 1
                print(f"client {number}: {error!r} ({error.__cause__!r})", file=sys.stderr)

    async def watch() -> None:
        while True:
            memory.append(resident_mib(process_id))
            await asyncio.sleep(args.seconds / 40)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(keep_asking(number) for number in range(args.n_clients)))
    watching.cancel()
    metrics = await left_behind(http, address)
    await http.aclose()
    quarter = len(memory) // 4
    return {
        "requests": sum(counts.values()),
        **{name: counts[name] for name in ("right", "different", "failed", "left", "queue full")},
        "median_first_token_s": median(waits) if waits else None,
        "memory_mib_after_a_quarter": median(memory[quarter : quarter + 5]),
        "memory_mib_at_the_end": median(memory[-5:]),
        **metrics,
    }


async def left_behind(http, address: str) -> dict:
    """Return the requests and pages that the server still holds, at most 5 s after the last answer."""
    for _ in range(50):
        page = (await http.get(address.removesuffix("/v1") + "/metrics")).text
        figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        held = {name: float(figures[f"minillm_{name}"]) for name in ("requests_running", "pages_in_use")}
        if not any(held.values()):
            break
        await asyncio.sleep(0.1)
    return held


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    try:
        import openai  # noqa: F401 - the clients
    except ImportError:
        raise missing_package("openai", purpose="benchmarks/serve_clients.py") from None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(args.model_path) if args.model_path else make_model(Path(directory))
        questions = make_questions(args, path)
        with server(args, path) as (address, process_id):
            figures = asyncio.run(ask_all(args, questions, address, process_id))
    rows = [[name, f"{value:.3g}" if isinstance(value, float) else str(value)] for name, value in figures.items()]
    print(format_table(rows))
    write_json(args.output, {"arguments": vars(args), "figures": figures, "cores": os.cpu_count()})
    if figures["different"] or figures["failed"] or figures["requests_running"] or figures["pages_in_use"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
