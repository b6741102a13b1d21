"""A chat in the terminal, with streamed answers."""

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
UNKNOWN_COMMAND = re.compile(r"/[a-z]+")  # a single word: "/etc/hosts" and "/ means what?" are questions


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

    Ctrl-C during an answer ends only this answer. /clear forgets the conversation.

    Args:
        encode: turns a list of messages, of which the last is the question, into prompt ids.
        history_turns: number of earlier questions and answers that stay in the prompt. The oldest ones are dropped when
            the conversation exceeds the model's positions.
        thinking: how a ``ThinkingView`` shows a reasoning model's thinking, which is removed from the history
            (``without_thinking``). None: answers are shown and stored unchanged.
        opened: beginning of a reasoned answer that the prompt already contains.
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
        elif UNKNOWN_COMMAND.fullmatch(command):
            print(f"unknown command {command}: {HELP}")
        elif command:
            user_turn = {"role": "user", "content": question}
            context = history[-history_turns:] if history_turns else []
            try:
                ids = encode([*(turn for pair in context for turn in pair), user_turn])
                while context and len(ids) + max_new_tokens > model.config.max_position_embeddings:
                    context = context[1:]
                    ids = encode([*(turn for pair in context for turn in pair), user_turn])
                view = ThinkingView(thinking, opened=opened) if thinking else None
                answer = _print_answer(stream(model, ids, max_new_tokens=max_new_tokens, **options), view)
            except UserError as error:  # such as a question that is too long: the conversation stays unchanged
                print(f"error: {error}", file=sys.stderr)
                continue
            answer = without_thinking(opened + answer) if thinking else answer
            history = [*context, (user_turn, {"role": "assistant", "content": answer})]


def _print_answer(pieces, view: ThinkingView | None) -> str:
    """Print the pieces as they arrive, then the speed; return the answer."""
    answer: list[str] = []
    start = time.perf_counter()
    completion = None
    try:
        while completion is None:
            try:
                answer.append(next(pieces))
            except StopIteration as end:
                completion = end.value
            else:
                print(view.push(answer[-1]) if view else answer[-1], end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(view.finish() if view else "")
    if completion is not None:
        print(speed(len(completion.ids), time.perf_counter() - start))
    return "".join(answer)


def speed(n_tokens: int, seconds: float) -> str:
    """Return a line with the number of tokens, the time and the rate."""
    return f"[{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / max(seconds, 1e-9):,.0f} tokens/s]"
