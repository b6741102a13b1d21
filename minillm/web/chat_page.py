"""The chat page: chats at the side, the conversation, and an answer that grows while it is looked at."""

import re
import time
from collections.abc import Callable

from minillm.errors import UserError
from minillm.serving.tools import Toolbox
from minillm.web import chats, st
from minillm.web.answer import Answer
from minillm.web.chats import Chat
from minillm.web.client import Client
from minillm.web.session import Session, Shown
from minillm.web.settings import Settings, draw_settings
from minillm.web.tab_storage import exchange
from minillm.web.tokens import mean_log_prob, tokens_html

LOOK_EVERY_S = 0.1
_IMAGE = re.compile(r"!(?=\[)")


def draw_chat_page(t, client: Client, session: Session, tools: dict[str, Callable]) -> None:
    """Draw the page, then the answers that are being received until they are complete or something is clicked.

    Args:
        tools: functions that the visitor may offer to the model, by name.

    Raises:
        UserError: the server does not say which models it has.
    """
    models = client.models()
    with st.sidebar:
        _draw_chats(t, session)
        settings = draw_settings(t, models, list(tools))
        session.chat.system = st.text_area(
            t("system"), session.chat.system, key=f"system_{session.chat.id}", help=t("system_note"), height=80
        )
        _draw_files(t, session)
    session.send(lambda chat: _start(client, chat, settings, tools))
    shown = session.shown()
    if not shown.turns:
        st.header(t("greeting"))
    for number, turn in enumerate(shown.turns):
        _draw_turn(t, session, shown, number, turn)
    if shown.answer:
        st.bottom.button(t("stop"), key="stop", icon=":material/stop_circle:", on_click=session.stop)
    # What the tab keeps comes with a run of its own, which would break off the one with the first question.
    st.chat_input(
        t("write_here"), key="question", disabled=session.stored is None,
        on_submit=lambda: session.ask(st.session_state.question or ""),
    )  # fmt: skip
    _keep(session)
    _draw_growing_answers(t, session, shown)


def _start(client: Client, chat: Chat, settings: Settings, tools: dict[str, Callable]) -> Answer:
    request = settings.fields | {"messages": chat.prompt(n_earlier=settings.n_earlier)}
    return Answer(client, request, toolbox=Toolbox([tools[name] for name in settings.tools]))


def _draw_growing_answers(t, session: Session, shown: Shown) -> None:
    """Draw the answer of the chat that is shown again and again; then the page once more, with all there is to click.

    Answers in other chats grow too. A click breaks this loop off where it draws and runs the page from the top; the
    answers do not notice.

    Args:
        shown: what was drawn. Another ``n_complete`` tells that an answer is complete, even if the thread of an earlier
            click was the one to collect it.
    """
    box = st.chat_message("assistant").empty() if shown.answer else st.empty()
    while session.answers and session.n_complete == shown.n_complete:
        with box.container():
            if shown.answer:
                _draw_answer(t, shown.answer.look(), is_running=True)
        session.look()
        time.sleep(LOOK_EVERY_S)
        session.collect()
    if session.n_complete != shown.n_complete:
        st.rerun()


def _keep(session: Session) -> None:
    """Have the tab keep the chats; when the page is opened, take over what it kept before."""
    dump = session.dump() if session.stored is not None else None
    stored = exchange(dump, is_loaded=dump is not None)
    if session.stored is None and stored is not None:
        session.stored = stored
        session.restore(stored)
        st.rerun()


# ---- next to the conversation --------------------------------------------------------------------


def _draw_chats(t, session: Session) -> None:
    st.button(t("new_chat"), key="new_chat", icon=":material/add:", on_click=session.new_chat, width="stretch")
    for chat in session.chats:
        icon = ":material/hourglass_top:" if chat.id in session.answers else None
        kind = "secondary" if chat is session.chat else "tertiary"
        title = _plain(chat.title) or t("empty_chat")
        st.button(
            title, key=f"chat_{chat.id}", type=kind, icon=icon, on_click=session.show, args=(chat,), width="stretch"
        )


def _draw_files(t, session: Session) -> None:
    with st.expander(t("manage_chats")):
        st.caption(t("where_kept"))
        st.button(t("delete_chat"), key="delete_chat", icon=":material/delete:", on_click=session.delete_chat)
        file = chats.to_json(session.chats)
        st.download_button(t("export"), file, "minillm_chats.json", "application/json", key="export", on_click="ignore")
        st.file_uploader(t("import"), type="json", key="import", on_change=lambda: _import(session))
        if session.problem:
            st.error(session.problem)


def _import(session: Session) -> None:
    session.problem, file = "", st.session_state["import"]
    if file is not None:
        try:
            session.add(file.getvalue())
        except UserError as error:
            session.problem = str(error)


# ---- the conversation ----------------------------------------------------------------------------


def _draw_turn(t, session: Session, shown: Shown, number: int, turn: list[dict]) -> None:
    (question, *answer), is_last = turn, number == len(shown.turns) - 1
    with st.chat_message("user"):
        if session.editing == number:
            _draw_editor(t, session, number, question["content"])
        else:
            with st.container(horizontal=True):
                st.text(question["content"], width="stretch")
                st.button(
                    t("edit"), key=f"edit_{number}", icon=":material/edit:", type="tertiary",
                    on_click=lambda: setattr(session, "editing", number),
                )  # fmt: skip
    if is_last and shown.answer:
        return  # it grows below
    with st.chat_message("assistant"):
        _draw_answer(t, answer)
        again = st.empty()  # takes the button's place in earlier turns, where it would stay until the page is complete
        if is_last:
            again.button(
                t("regenerate"), key="again", icon=":material/refresh:", type="tertiary", on_click=session.ask_again
            )


def _draw_editor(t, session: Session, number: int, text: str) -> None:
    with st.form("editor"):
        st.text_area(t("edit"), text, key="edited", label_visibility="collapsed")
        st.caption(t("edit_note"))
        with st.container(horizontal=True):
            st.form_submit_button(
                t("ask_again"), type="primary", on_click=lambda: session.ask(st.session_state.edited, turn=number)
            )
            st.form_submit_button(t("cancel"), on_click=lambda: setattr(session, "editing", None))


def _draw_answer(t, messages: list[dict], *, is_running: bool = False) -> None:
    """Draw the messages of an answer: thoughts, text, calls of tools and their results, how it ended."""
    results = {message["tool_call_id"]: message["content"] for message in messages if message["role"] == "tool"}
    spoken = [message for message in messages if message["role"] == "assistant"]
    for message in spoken:
        is_growing = is_running and message is spoken[-1]
        if message.get("reasoning_content"):
            is_thinking = is_growing and not message.get("content")
            with st.expander(t("thinking" if is_thinking else "thoughts"), icon=":material/psychology:"):
                st.markdown(_safe(message["reasoning_content"]))
        if message.get("content"):
            st.markdown(_safe(message["content"]))
        for call in message.get("tool_calls") or []:
            _draw_call(t, call, results.get(call.get("id")), is_running=is_running)
    last = spoken[-1] if spoken else {}
    if is_running:
        if not any(last.get(name) for name in ("content", "reasoning_content", "tool_calls")):
            st.caption(t("waiting"))
    elif not last.get("content"):
        st.caption(t("no_answer"))
    if not is_running:
        _draw_info(t, last.get("info", {}))


def _draw_call(t, call: dict, result: str | None, *, is_running: bool) -> None:
    function = call["function"]
    with st.expander(t("called", name=_plain(function["name"])), icon=":material/build:"):
        st.code(function["arguments"], language="json", wrap_lines=True)
        if result is not None:
            st.caption(t("result"))
            st.code(result, language=None, wrap_lines=True)
        elif is_running:
            st.caption(t("running_tool"))


def _draw_info(t, info: dict) -> None:
    """Draw how an answer ended: its speed, why it is not whole, what went wrong, the probabilities of its tokens."""
    if info.get("error"):
        st.error(_plain(info["error"]))
    parts = []
    if info.get("n_tokens") and info.get("seconds"):
        rate = info["n_tokens"] / info["seconds"]
        first, model = info.get("first_s", 0.0), _plain(info.get("model", ""))
        parts.append(t("speed", n=info["n_tokens"], rate=rate, first=first, model=model))
    if info.get("finish_reason") in ("stopped", "length"):
        parts.append(t(info["finish_reason"]))
    if parts:
        st.caption(" · ".join(parts))
    if tokens := info.get("tokens"):
        with st.expander(t("tokens"), icon=":material/palette:"):
            st.caption(t("tokens_note", mean=mean_log_prob(tokens)))
            st.html(tokens_html(tokens))


def _safe(text: str) -> str:
    """Return a model's Markdown without images: loading one would tell another server what the model wrote."""
    return _IMAGE.sub(r"!\\", text)


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~$:])", r"\\\1", text)
