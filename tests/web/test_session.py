"""The chats of a tab: new, shown, deleted, asked, stopped, and kept over a reload."""

import threading
import time

import pytest

from minillm.errors import UserError
from minillm.serving.tools import Toolbox
from minillm.web.answer import Answer
from minillm.web.chats import Chat, to_json
from minillm.web.client import Client
from minillm.web.session import Session


def with_answers(*questions: str) -> Session:
    session = Session()
    for question in questions:
        session.new_chat()
        session.ask(question)
        reply(session, f"re {question}")
    return session


class Complete:
    """An answer that takes a moment to say that it is complete."""

    def __init__(self, text: str):
        self.text, self.question = text, ""

    @property
    def is_running(self) -> bool:
        time.sleep(0.01)
        return False

    def look(self) -> list[dict]:
        return [{"role": "assistant", "content": self.text}]


def reply(session: Session, text: str) -> None:
    session.send(lambda chat: Complete(text))
    session.collect()


def start(session: Session, server, **options) -> Answer:
    def ask(chat: Chat) -> Answer:
        request = {"model": "tiny", "messages": chat.prompt(n_earlier=0)}
        return Answer(Client(server.url), request, toolbox=Toolbox([]), **options)

    session.send(ask)
    return session.answer


def contents(session: Session) -> list[str]:
    return [message["content"] for message in session.chat.messages]


def test_new_chats_are_not_piled_up():
    session = with_answers("a")
    session.new_chat()
    session.new_chat()
    assert [chat.title for chat in session.chats] == ["", "a"]
    assert session.chat.title == ""
    session.show(session.chats[1])
    assert session.chat.title == "a"
    session.delete_chat()
    session.delete_chat()
    assert [chat.title for chat in session.chats] == [""]


def test_a_new_question_stops_the_answer_and_keeps_it(server):
    session = Session()
    session.ask("slow")
    answer = start(session, server)
    while not (answer.look() and answer.look()[0]["content"]):
        pass
    session.ask("next")
    assert [message["role"] for message in session.chat.messages] == ["user", "assistant", "user"]
    assert not session.answers
    session.ask("   ")
    assert len(session.chat.messages) == 3
    reply(session, "re next")
    reply(session, "once more, without a question")
    assert contents(session)[2:] == ["next", "re next"]


def test_answers_in_several_chats(server):
    session = Session()
    session.ask("one")
    start(session, server).wait(10)
    session.new_chat()
    session.ask("two")
    start(session, server).wait(10)
    session.collect()
    session.collect()
    assert session.n_complete == 2
    texts = [chat.messages[1]["content"] for chat in session.chats]
    assert ["two" in text for text in texts] == [True, False]


def test_answer_again_and_edit():
    session = with_answers("a")
    session.ask("b")
    reply(session, "re b")
    session.ask_again()
    assert contents(session) == ["a", "re a", "b"]
    reply(session, "again")
    assert contents(session) == ["a", "re a", "b", "again"]
    session.ask("A", turn=0)
    assert contents(session) == ["A"]


def test_a_reload():
    session = with_answers("a", "b", "c")
    session.show(session.chats[2])
    after = Session()
    after.restore(session.dump())
    assert [chat.title for chat in after.chats] == ["c", "b", "a"]
    assert after.chat.title == "a"
    session.new_chat()
    after = Session()
    after.restore(session.dump())
    assert after.chat.title == ""
    assert Session().dump() == ""


@pytest.mark.parametrize(
    "text", ["", "x", "[]", '{"file": 7, "shown": 0}', '{"file": "{}", "shown": 0}', '{"shown": 0}']
)
def test_a_tab_that_keeps_something_else(text):
    session = with_answers("a")
    session.restore(text)
    assert [chat.title for chat in session.chats] == ["a"]


def test_import():
    session = with_answers("old")
    assert session.add(to_json(with_answers("x", "y").chats)) == 2
    assert [chat.title for chat in session.chats] == ["y", "x", "old"]
    assert session.chat.title == "y"
    with pytest.raises(UserError, match="holds no chats"):
        session.add(to_json([Chat()]))


def test_threads_of_two_clicks_collect_an_answer_once():
    session = Session()
    session.ask("one")
    session.send(lambda chat: Complete("slowly"))
    threads = [threading.Thread(target=session.collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(session) == ["one", "slowly"]
    assert session.n_complete == 1


def test_a_second_run_of_the_page_waits_for_the_answer_that_the_first_one_starts():
    """Otherwise it would draw a question that nobody answers, and be the last to draw."""
    session, is_starting, may_go_on, shown = Session(), threading.Event(), threading.Event(), []

    def start_slowly(chat: Chat) -> Complete:
        is_starting.set()
        may_go_on.wait(10)
        return Complete("here")

    def second_run() -> None:
        session.send(lambda chat: Complete("a second answer"))
        shown.append(session.shown())

    session.ask("one")
    first = threading.Thread(target=session.send, args=(start_slowly,))
    second = threading.Thread(target=second_run)
    first.start()
    assert is_starting.wait(10)
    second.start()
    second.join(0.1)
    may_go_on.set()
    first.join()
    second.join()
    assert shown[0].answer.text == "here"


def test_a_click_elsewhere_before_the_question_is_sent():
    session = with_answers("old")
    session.ask("new")
    session.new_chat()
    reply(session, "re new")
    assert contents(session) == []
    session.show(session.chats[1])
    assert contents(session) == ["old", "re old", "new", "re new"]


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_reload_takes_over_the_answer_that_the_tab_does_not_have_yet(server, is_complete):
    session = Session()
    session.ask("hello" if is_complete else "slow")
    running, kept = start(session, server), session.dump()
    if is_complete:
        running.wait(10)
        session.collect()
    after = Session()
    after.restore(kept)
    assert after.answer is running
    while not after.answer.look()[0]["content"]:
        pass
    after.stop()
    assert [message["role"] for message in after.chat.messages] == ["user", "assistant"]
    assert contents(after)[1].startswith("You said: hello" if is_complete else "word0")
    again = Session()
    again.restore(after.dump())
    assert not again.answers, "the tab has it"


def test_an_answer_to_another_question_is_not_taken_over(server):
    session = Session()
    session.ask("first")
    kept = session.dump()
    session.ask("second", turn=0)
    start(session, server)
    after = Session()
    after.restore(kept)
    assert not after.answers


def test_answers_are_forgotten(server):
    session = Session()
    session.ask("hello")
    start(session, server, patience_s=0.1).wait(10)
    kept = session.dump()
    session.collect()
    end = time.monotonic() + 5
    while has_answer(kept) and time.monotonic() < end:
        time.sleep(0.05)
    assert not has_answer(kept)


def has_answer(kept: str) -> bool:
    after = Session()
    after.restore(kept)
    return after.answer is not None
