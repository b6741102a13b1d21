"""``ChatSession``: what a chat knows and does: the model, the conversation, an answer, another answer."""

from collections.abc import Callable, Iterable

from minillm.errors import UserError
from minillm.inference.chat.conversation import Conversation, Exchange, split_exchanges, without_old_thoughts
from minillm.inference.chat.model import ChatModel
from minillm.inference.chat.output import ShownAnswer, show_answer, speed
from minillm.inference.generate import stream
from minillm.inference.thinking import ThinkingView, close_tags
from minillm.terminal import dim

Reply = Callable[[list[dict]], dict]


class AnswerStopped(KeyboardInterrupt):
    """Ctrl-C has stopped an answer; ``message`` is what was said until then."""

    def __init__(self, message: dict):
        self.message = message


def respond_once(reply: Reply, messages: list[dict]) -> Iterable[dict]:
    """Yield the messages that follow a question: here one answer. A loop that calls tools yields their results too."""
    yield reply(messages)


class ChatSession:
    """A chat without its prompt: it answers questions and prints the answers.

    Args:
        load: returns the ``ChatModel`` of a name and of a name of adapters, and prints both.
        history_turns: number of earlier questions and answers that stay in the prompt. The oldest ones are left out if
            the prompt and an answer exceed the model's positions.
        max_new_tokens: longest answer.
        thinking: how a ``ThinkingView`` shows thinking. Earlier thoughts are never in the prompt.
        system: the system message.
        respond: called with a function ``reply(messages) -> message``, which prints and returns one answer of the
            model, and with the conversation up to the question; yields the messages that follow. Replace it to call
            tools between two replies.
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
        respond: Callable[[Reply, list[dict]], Iterable[dict]] = respond_once,
        **options,
    ):
        self.chat_model, self.load = chat_model, load
        self.history_turns, self.max_new_tokens, self.options = history_turns, max_new_tokens, options
        self.thinking, self.thinks = thinking, True
        self.respond = respond
        self.conversation = Conversation(system=system)
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
            exchange.messages.append(stopped.message)
        last = exchange.messages[-1]
        if last["role"] == "assistant" and (last.get("content") or "").strip():
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

    def reply(self, messages: list[dict]) -> dict:
        """Print the model's answer to ``messages`` and its speed; return it as a message.

        Raises:
            AnswerStopped: Ctrl-C; it carries the message.
            UserError: the prompt is too long, or its template does not accept it.
        """
        chat_model = self.chat_model
        start = "" if self.thinks else chat_model.direct_start
        opened = start or chat_model.opens_with
        pieces = stream(
            chat_model.model,
            self._prompt(messages, start),
            tokenizer=chat_model.tokenizer,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=chat_model.tokenizer.end_ids,
            **self.options,
        )
        view = None if chat_model.completes_text else ThinkingView(self.thinking, opened=opened)
        answer = show_answer(pieces, view)
        print(dim(self._outcome(answer)))
        message = {"role": "assistant", "content": opened + answer.text if answer.text.strip() else ""}
        if answer.completion is None or answer.completion.finish_reason == "length":
            self._is_cut, message["content"] = True, close_tags(message["content"])
        if answer.completion is None:
            raise AnswerStopped(message)
        return message

    def _prompt(self, messages: list[dict], start: str) -> list[int]:
        """Return the prompt's ids: as many of the last exchanges as ``history_turns`` allows and the model can read."""
        system, exchanges = split_exchanges(without_old_thoughts(messages))
        exchanges = exchanges[-self.history_turns - 1 :]
        n_positions = self.chat_model.model.config.max_position_embeddings
        while True:
            kept = [*system, *(message for exchange in exchanges for message in exchange)]
            ids = self.chat_model.encode(kept, tools=self.conversation.tools, start=start)
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
