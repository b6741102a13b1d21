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
        assert session.take_question()
        session.chat.messages.append({"role": "assistant", "content": f"re {question}"})
    return session


def start(session: Session, server) -> Answer:
    request = {"model": "tiny", "messages": session.chat.prompt(n_earlier=0)}
    answer = Answer(Client(server.url), request, toolbox=Toolbox([]))
    session.receive(answer)
    return answer


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
    assert session.take_question()
    assert not session.take_question()
    assert not session.answers
    session.ask("   ")
    assert not session.take_question()
    assert len(session.chat.messages) == 3


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
    session.chat.messages.append({"role": "assistant", "content": "re b"})
    session.ask_again()
    assert [message["content"] for message in session.chat.messages] == ["a", "re a", "b"]
    assert session.take_question()
    session.ask("A", turn=0)
    assert [message["content"] for message in session.chat.messages] == ["A"]


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


class Complete:
    """An answer that takes a moment to say that it is complete."""

    @property
    def is_running(self) -> bool:
        time.sleep(0.05)
        return False

    def look(self) -> list[dict]:
        return [{"role": "assistant", "content": "slowly"}]


def test_threads_of_two_clicks_collect_an_answer_once():
    session = Session()
    session.ask("one")
    session.receive(Complete())
    threads = [threading.Thread(target=session.collect) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [message["role"] for message in session.chat.messages] == ["user", "assistant"]
    assert session.n_complete == 1
