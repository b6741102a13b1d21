"""A conversation at the terminal, streamed."""

import contextlib
import re
import sys
import time
from collections.abc import Callable

from minillm.errors import UserError
from minillm.inference.generate import stream
from minillm.inference.thinking import ThinkingView, without_thinking

HELP = "/help shows this, /clear forgets the conversation, /quit or /exit ends"
ENDS = ("/exit", "/quit", "exit", "quit")
UNKNOWN = re.compile(r"/[a-z]+")  # one word alone: "/etc/hosts" and "/ means what?" are questions


def chat(
    model,
    encode: Callable[[list[dict]], list[int]],
    *,
    history_turns: int,
    max_new_tokens: int,
    thinking: str | None = None,
    opened: str = "",
    **options,
) -> None:
    """Read questions and stream answers until /exit, /quit, exit, end of input, or Ctrl-C at the prompt.

    Ctrl-C during an answer ends that answer only. /clear forgets the conversation.

    Args:
        encode: turns a list of messages, the last one the question, into prompt ids.
        history_turns: earlier questions with their answers that the model still sees. The oldest are
            forgotten when the conversation no longer fits into the model's positions.
        thinking: how a ``ThinkingView`` shows the thinking of a reasoning model, which it does not see again with the
            next question (``without_thinking``). None: answers are shown and kept as they are.
        opened: what the prompt has already of a reasoned answer.
        options: of :func:`~minillm.inference.generate.stream`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - its import gives input() line editing
    print(HELP)
    history: list[tuple[dict, dict]] = []
    while True:
        try:
            question = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command = question.strip().lower()
        if command in ENDS:
            return
        if command == "/clear":
            history.clear()
        elif command == "/help":
            print(HELP)
        elif UNKNOWN.fullmatch(command):
            print(f"unknown command {command}: {HELP}")
        elif command:
            asked = {"role": "user", "content": question}
            kept = history[-history_turns:] if history_turns else []
            try:
                ids = encode([*(turn for pair in kept for turn in pair), asked])
                while kept and len(ids) + max_new_tokens > model.config.max_position_embeddings:
                    kept = kept[1:]
                    ids = encode([*(turn for pair in kept for turn in pair), asked])
                view = ThinkingView(thinking, opened=opened) if thinking else None
                answer = _say(stream(model, ids, max_new_tokens=max_new_tokens, **options), view)
            except UserError as error:  # a question too long, say: the conversation goes on as it was
                print(f"error: {error}", file=sys.stderr)
                continue
            answer = without_thinking(opened + answer) if thinking else answer
            history = [*kept, (asked, {"role": "assistant", "content": answer})]


def _say(pieces, view: ThinkingView | None) -> str:
    """Print the pieces as they come, then the speed; return the answer."""
    shown: list[str] = []
    start = time.perf_counter()
    done = None
    try:
        while done is None:
            try:
                shown.append(next(pieces))
            except StopIteration as end:
                done = end.value
            else:
                print(view.push(shown[-1]) if view else shown[-1], end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(view.finish() if view else "")
    if done is not None:
        print(speed(len(done.ids), time.perf_counter() - start))
    return "".join(shown)


def speed(n_tokens: int, seconds: float) -> str:
    """Return the line that says how many tokens took how long."""
    return f"[{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / max(seconds, 1e-9):,.0f} tokens/s]"
