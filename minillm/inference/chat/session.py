"""``ChatSession``: what a chat knows and does: the model, the conversation, an answer, another answer."""

from collections.abc import Callable, Iterable

from minillm.errors import UserError
from minillm.inference.chat.conversation import Conversation, Exchange, split_exchanges, without_old_thoughts
from minillm.inference.chat.model import ChatModel
from minillm.inference.chat.output import ShownAnswer, show_answer, speed
from minillm.inference.generate import stream
from minillm.inference.thinking import ThinkingView, mend_cut
from minillm.terminal import dim

Reply = Callable[..., str]  # (messages, tools=None) -> text


class AnswerStopped(KeyboardInterrupt):
    """Ctrl-C has stopped an answer; ``text`` is what was said until then."""

    def __init__(self, text: str):
        self.text = text


def respond_once(reply: Reply, messages: list[dict]) -> Iterable[dict]:
    """Yield the messages that follow a question: here one answer. A loop that calls tools yields their results too."""
    yield _as_message(reply(messages))


def _as_message(text: str) -> dict:
    return {"role": "assistant", "content": text}


class ChatSession:
    """A chat without its prompt: it answers questions and prints the answers.

    Args:
        load: returns the ``ChatModel`` of a name and of a name of adapters, and prints both.
        history_turns: number of earlier questions and answers that stay in the prompt. The oldest ones are left out if
            the prompt and an answer exceed the model's positions.
        max_new_tokens: longest answer.
        thinking: how a ``ThinkingView`` shows thinking. Earlier thoughts are never in the prompt.
        system: the system message.
        tools: functions that the model may call, in OpenAI's form; ``respond`` runs them.
        respond: called with ``reply`` and the conversation up to the question; yields the messages that follow it, the
            last of which is the answer. Replace it to call tools between two replies.
        options: of :func:`~minillm.inference.generate.stream`.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        *,
        load: Callable[[str, str], ChatModel],
        history_turns: int,
        max_new_tokens: int,
        thinking: str = "dim",
        system: str = "",
        tools: list[dict] | None = None,
        respond: Callable[[Reply, list[dict]], Iterable[dict]] = respond_once,
        **options,
    ):
        self.chat_model, self.load = chat_model, load
        self.history_turns, self.max_new_tokens, self.options = history_turns, max_new_tokens, options
        self.thinking, self.thinks = thinking, True
        self.tools, self.respond = tools, respond
        self.conversation = Conversation(system=system, tools=tools)
        self.unanswered = ""  # the last question, if it has no answer
        self.saved_line = b""
        self.is_over = False

    def ask(self, question: str) -> None:
        """Answer a question, and add both to the conversation.

        An answer that Ctrl-C has stopped is kept as far as it goes. A question without any answer is not.

        Raises:
            UserError: such as a question that is too long; the conversation stays unchanged.
        """
        self.unanswered = question
        exchange = Exchange(messages=[{"role": "user", "content": question}])
        self._is_cut = False
        try:
            for message in self.respond(self.reply, [*self.conversation.messages, *exchange.messages]):
                exchange.messages.append(message)
        except AnswerStopped as stopped:
            exchange.messages.append(_as_message(stopped.text))
        last = exchange.messages[-1]
        if last["role"] != "user" and (last.get("content") or "").strip():
            exchange.is_whole = not self._is_cut
            self.conversation.exchanges.append(exchange)
            self.unanswered = ""

    def retry(self) -> None:
        """Answer the last question once more; the new answer replaces the old one.

        Raises:
            UserError: there is no question, or as for ``ask``.
        """
        exchanges = self.conversation.exchanges
        if self.unanswered:
            self.ask(self.unanswered)
            return
        if not exchanges or exchanges[-1].messages[0]["role"] != "user":
            raise UserError("there is no question yet: nothing to answer again")
        n_exchanges, replaced = len(exchanges), exchanges.pop()
        try:
            self.ask(replaced.messages[0]["content"])
        finally:
            if len(exchanges) < n_exchanges:
                exchanges.append(replaced)
                self.unanswered = ""

    def reply(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """Print the model's answer to ``messages`` and its speed; return its text, "" if it says nothing.

        Args:
            tools: functions that the model may call; default: those of the conversation.

        Raises:
            AnswerStopped: Ctrl-C; it carries the text.
            UserError: the prompt is too long, or its template does not accept it.
        """
        chat_model = self.chat_model
        start = "" if self.thinks else chat_model.direct_start
        opened = start or chat_model.opens_with
        pieces = stream(
            chat_model.model,
            self._prompt(messages, tools or self.conversation.tools, start),
            tokenizer=chat_model.tokenizer,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=chat_model.tokenizer.end_ids,
            **self.options,
        )
        view = None if chat_model.completes_text else ThinkingView(self.thinking, opened=opened)
        answer = show_answer(pieces, view)
        print(dim(self._outcome(answer)))
        text = opened + answer.text if answer.text.strip() else ""
        if answer.completion is None or answer.completion.finish_reason == "length":
            self._is_cut, text = True, mend_cut(text)
        if answer.completion is None:
            raise AnswerStopped(text)
        return text

    def _prompt(self, messages: list[dict], tools: list[dict] | None, start: str) -> list[int]:
        """Return the prompt's ids: as many of the last exchanges as ``history_turns`` allows and the model can read."""
        system, exchanges = split_exchanges(without_old_thoughts(messages))
        exchanges = exchanges[-self.history_turns - 1 :]
        n_positions = self.chat_model.model.config.max_position_embeddings
        while True:
            kept = [*system, *(message for exchange in exchanges for message in exchange)]
            ids = self.chat_model.encode(kept, tools=tools, start=start)
            if len(exchanges) == 1 or len(ids) + self.max_new_tokens <= n_positions:
                return ids
            exchanges = exchanges[1:]

    def _outcome(self, answer: ShownAnswer) -> str:
        """Return the line after an answer: its speed, and how it ended if that was not by itself."""
        if answer.completion is None:
            return "[stopped; /retry answers again]"
        if not answer.text.strip():
            return "[an empty answer; /retry answers again]"
        n_tokens = len(answer.completion.ids)
        line = speed(n_tokens, answer.seconds, first_seconds=answer.first_seconds)
        if answer.completion.finish_reason != "length":
            return line
        is_limit = n_tokens >= self.max_new_tokens
        n_positions = self.chat_model.model.config.max_position_embeddings
        limit = f"--max_new_tokens {n_tokens}" if is_limit else f"the model's {n_positions:,} positions"
        return f"{line[:-1]}; cut at {limit}]"
