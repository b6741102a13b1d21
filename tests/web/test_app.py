"""The pages as Streamlit draws them, without a browser: what is asked, shown and clicked."""

import json
import shutil

import pytest

pytest.importorskip("streamlit", reason="the pages need streamlit: pip install streamlit")

from streamlit.testing.v1 import AppTest

from minillm.web.session import Session

PROGRAM = """
from web_demo import main
main(["--server", {url!r}, "--start_server", "0", "--save_dir", {directory!r}])
"""


@pytest.fixture(autouse=True)
def no_components(monkeypatch):
    """Spare the search for components in all installed packages: a second for each page that is opened."""
    monkeypatch.setattr("streamlit.components.v2.manifest_scanner.scan_component_manifests", list)


@pytest.fixture
def open_page(server, tmp_path):
    """Call it with the session of a tab: the chat page is drawn there."""

    def open_page(session: Session) -> AppTest:
        app = AppTest.from_string(PROGRAM.format(url=server.url, directory=str(tmp_path)), default_timeout=30)
        app.session_state["session"] = session
        return app.run()

    return open_page


@pytest.fixture
def app(open_page) -> AppTest:
    """The chat page of a new tab, which has told that it keeps nothing."""
    return open_page(Session(stored=""))


def texts(app: AppTest) -> list[str]:
    """Return what the conversation shows: each question, and the text of each answer."""
    assert not app.exception
    shown = []
    for message in app.chat_message:
        parts = message.text if message.name == "user" else message.markdown
        shown += [part.value for part in parts]
    return shown


def ask(app: AppTest, question: str) -> AppTest:
    app.chat_input[0].set_value(question).run()
    return app


def click(app: AppTest, key: str) -> AppTest:
    app.button(key=key).click().run()
    return app


def test_a_conversation(app, server):
    assert app.header[0].value == "What would you like to ask?"
    ask(app, "Hello, *you* <b>")
    assert texts(app) == ["Hello, *you* <b>", "You said: Hello, *you* <b> (1 messages, tiny)"]
    ask(app, "again")
    assert texts(app)[-1] == "You said: again (3 messages, tiny)"
    assert "12 tokens" in app.chat_message[-1].caption[0].value
    assert len(server.requests) == 2
    # A click elsewhere asks nothing anew.
    app.selectbox(key="model").set_value("cook").run()
    assert len(server.requests) == 2
    click(app, "again")
    assert texts(app)[-1] == "You said: again (3 messages, cook)"
    assert len(server.requests) == 3


def test_nothing_is_asked_before_the_tab_has_told_what_it_keeps(open_page):
    assert open_page(Session()).chat_input[0].disabled
    assert not open_page(Session(stored="")).chat_input[0].disabled


def test_a_reload_before_the_tab_keeps_the_answer(open_page, server):
    session = Session(stored="")
    session.ask("hello")
    kept = session.dump()
    shown = texts(open_page(session))
    after = Session(stored=kept)
    after.restore(kept)
    assert texts(open_page(after)) == shown == ["hello", "You said: hello (1 messages, tiny)"]
    assert len(server.requests) == 1


def test_any_question_can_be_edited(app):
    for question in ("one", "two", "three"):
        ask(app, question)
    click(app, "edit_1")
    app.text_area(key="edited").set_value("TWO")
    next(button for button in app.button if button.label == "Ask again").click().run()
    assert texts(app)[2:] == ["TWO", "You said: TWO (3 messages, tiny)"]
    click(app, "edit_0")
    next(button for button in app.button if button.label == "Cancel").click().run()
    assert texts(app)[0] == "one"


def test_several_chats(app):
    ask(app, "first")
    click(app, "new_chat")
    assert texts(app) == []
    ask(app, "second")
    first = next(button for button in app.button if button.label == "first")
    first.click().run()
    assert texts(app)[0] == "first"
    click(app, "delete_chat")
    assert texts(app)[0] == "second"


def test_every_setting_reaches_the_server(app, server):
    app.slider(key="temperature").set_value(0.0)
    app.slider(key="top_p").set_value(0.5)
    app.slider(key="top_k").set_value(7)
    app.slider(key="min_p").set_value(0.25)
    app.slider(key="repetition_penalty").set_value(1.5)
    app.slider(key="n_earlier").set_value(0)
    app.number_input(key="max_tokens").set_value(33)
    app.number_input(key="seed").set_value(11)
    app.text_area[0].set_value("Be brief.").run()
    ask(app, "a")
    ask(app, "b")
    assert server.requests[-1] == {
        "model": "tiny", "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5, "max_tokens": 33,
        "seed": 11, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}],
    }  # fmt: skip


def token_views(app: AppTest) -> list[str]:
    return [html.proto.body for html in app.get("html") if "tokens" in html.proto.body]


def test_tokens_on_demand(app, server):
    ask(app, "a")
    assert not token_views(app)
    app.toggle(key="show_tokens").set_value(True).run()
    ask(app, "b")
    assert server.requests[-1]["logprobs"] is True
    (view,) = token_views(app)
    assert "&lt;b&gt;&amp;↵" in view


def test_tools_are_offered_and_their_calls_shown(app, server):
    ask(app, "tool")
    assert "tools" not in server.requests[0]
    app.multiselect(key="tools").set_value(["calculate"]).run()
    ask(app, "tool again")
    assert [tool["function"]["name"] for tool in server.requests[1]["tools"]] == ["calculate"]
    (call,) = [expander for expander in app.expander if "Called" in expander.label]
    assert [code.value for code in call.code] == ['{"expression": "6*7"}', "42"]
    assert texts(app)[-1] == "The tool says 42."
    ask(app, "and now?")  # the calls and results are part of the conversation
    assert [message["role"] for message in server.requests[-1]["messages"][2:]] == [
        "user", "assistant", "tool", "assistant", "user",
    ]  # fmt: skip


def test_thoughts_are_folded(app):
    ask(app, "think")
    (thoughts,) = [expander for expander in app.expander if expander.label == "Thoughts"]
    assert thoughts.markdown[0].value == "Let me see."
    assert not thoughts.proto.expanded


@pytest.mark.parametrize("question, message", [("refuse", "9 tokens too many"), ("error", "ran out of memory")])
def test_errors_are_shown_and_asked_again(app, server, question, message):
    ask(app, question)
    assert message in app.error[0].value
    click(app, "again")
    assert len(server.requests) == 2
    ask(app, "fine")
    assert texts(app)[-1].startswith("You said: fine")


def test_what_a_model_writes_is_no_program(app):
    ask(app, "html")
    text = texts(app)[1]
    assert "!\\[x]" in text, "no picture is loaded from elsewhere"
    assert not app.chat_message[1].markdown[0].allow_html


def test_chinese(app):
    app.segmented_control(key="lang").set_value("zh").run()
    assert app.header[0].value == "想问点什么？"
    assert app.button(key="new_chat").label == "新对话"


def test_export_and_import(app):
    ask(app, "keep me")
    content = {"chats": [{"messages": [{"role": "user", "content": "imported"}]}]}
    app.file_uploader(key="import").set_value(("a.json", json.dumps(content).encode(), "application/json")).run()
    assert texts(app)[0] == "imported"
    app.file_uploader(key="import").set_value(("b.json", b"{", "application/json")).run()
    assert "not JSON" in app.error[0].value
    assert texts(app)[0] == "imported"


def test_no_server(free_port, tmp_path):
    url = f"http://127.0.0.1:{free_port}"
    app = AppTest.from_string(PROGRAM.format(url=url, directory=str(tmp_path)), default_timeout=30).run()
    assert not app.exception
    assert f"no server answers at {url}" in app.code[0].value
    assert app.button[-1].label == "Try again"


def test_a_server_that_wants_a_key(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MINILLM_API_KEY", raising=False)
    server.api_key = "secret"
    app = AppTest.from_string(PROGRAM.format(url=server.url, directory=str(tmp_path)), default_timeout=30).run()
    assert not app.exception
    assert "with the variable MINILLM_API_KEY, or with --api_key" in app.error[0].value
    assert "wrong API key" in app.code[0].value


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--server", "nonsense"], "'nonsense' is not the address of a server"),
        (["--tools", "missing.py"], "--tools missing.py: no such file"),
        (["--port", "0"], "--port 0: must lie between 1 and 65535"),
        (["--wrong", "1"], "wrong flags: --wrong 1; the terminal says more"),
    ],
)
def test_wrong_flags(flags, message):
    """``streamlit run web_demo.py -- FLAGS`` checks them when the first visitor comes."""
    app = AppTest.from_string(f"from web_demo import main\nmain({flags})", default_timeout=30).run()
    assert not app.exception
    assert message in app.error[0].value


# ---- training runs -------------------------------------------------------------------------------


def draw_runs(directory: str) -> None:
    """Draw the page of runs; AppTest reads this function's text."""
    from pathlib import Path

    from minillm.web.runs_page import draw_runs_page
    from minillm.web.session import Session
    from minillm.web.words import Words

    draw_runs_page(Words("en"), Path(directory), Session())


def runs(directory) -> AppTest:
    app = AppTest.from_function(draw_runs, args=(str(directory),), default_timeout=30).run()
    assert not app.exception
    return app


def write_run(directory, *, n_rows: int = 5) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": 10 * (i + 1), "split": "train", "loss": 5 / (i + 1), "lr": 1e-3, "grad_norm": 1.0,
         "tokens": 1000 * i, "seconds": 2.0 * (i + 1), "tokens_per_s": 500.0}
        for i in range(n_rows)
    ]  # fmt: skip
    rows.append({"step": 10 * n_rows, "split": "valid", "loss": 2.0, "tokens": 1000 * n_rows, "seconds": 2.0 * n_rows})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines + '{"step": 60, "spl')  # the next one is being written
    summary = {
        "unit": "documents", "records": 100, "rejected": 2, "rejected_files": ["a.rejected.jsonl"], "targets_lost": 0,
        "reasons": [{"count": 2, "reason": "no text", "first": "line 7"}], "cut": 0, "usable": 98, "pairs": 900,
        "rows": 10, "fill": 0.9, "targets": 900, "files": [{"path": "a.jsonl"}],
    }  # fmt: skip
    content = {"stage": "pretrain", "resolved": {"total_steps": 100}, "data": {"summary": summary}}
    (directory / "run.yaml").write_text(json.dumps(content))
    answers = [{"step": step, "question": "1+1", "answer": f"at {step}", "expected": "2"} for step in (10, 20)]
    (directory / "samples.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def test_no_runs(tmp_path):
    assert "no training run" in runs(tmp_path).info[0].value
    assert "no training run" in runs(tmp_path / "missing").info[0].value


def test_a_run(tmp_path):
    write_run(tmp_path / "pretrain_8")
    app = runs(tmp_path)
    assert "step 50 of 100, 0:10 left" in app.get("progress")[0].proto.text
    assert app.dataframe[0].value["lowest loss"][0] == "2.0000 at step 50"
    charts = [json.loads(chart.proto.spec) for chart in app.get("vega_lite_chart")]
    titles = {chart["title"] for chart in charts}
    assert titles > {"training loss, nats per token", "validation loss, nats per token", "learning rate"}
    samples = app.dataframe[1].value
    assert list(samples.iloc[0]) == ["1+1", "at 20", "at 10", "2"]
    assert "2 rejected (2.0%)" in app.code[0].value
    assert "no text" in app.code[0].value
    # The next row is there: the page shows it when it is drawn again.
    write_run(tmp_path / "pretrain_8", n_rows=6)
    assert "step 60 of 100" in app.run().get("progress")[0].proto.text


def test_two_runs_are_compared(tmp_path):
    write_run(tmp_path / "a" / "pretrain_8")
    write_run(tmp_path / "b", n_rows=10)
    app = runs(tmp_path)
    app.multiselect(key="which_runs").set_value(["a/pretrain_8", "b"]).run()
    assert not app.exception
    assert len(app.get("progress")) == 2
    spec = json.loads(app.get("vega_lite_chart")[0].proto.spec)
    assert spec["encoding"]["color"]["scale"]["domain"] == ["a/pretrain_8", "b"]


def test_damaged_files(tmp_path):
    write_run(tmp_path / "bad")
    (tmp_path / "bad" / "run.yaml").write_text("a: [")
    (tmp_path / "bad" / "samples.jsonl").write_text('{"step": 1}\n[]\n')
    (tmp_path / "bad" / "monitor.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.yaml").write_text("stage: full_sft")
    app = runs(tmp_path)
    app.multiselect(key="which_runs").set_value(["bad", "new"]).run()
    assert not app.exception
    shutil.rmtree(tmp_path / "new")  # while the page is open
    app.run()
    assert not app.exception
