"""The pages in headless Chromium: typed, read, stopped, reloaded, in two tabs, on a phone, in the dark."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.web.ports import hold_port

pytest.importorskip("streamlit", reason="the pages need streamlit: pip install streamlit")
api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright: pip install playwright")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = {"width": 390, "height": 844}
PATIENCE_S = 60  # only a test that fails waits that long

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


class Page:
    """``web_demo.py`` as its users start it, next to a ``serve_api.py`` that is the fake server.

    Attributes:
        url: of the page. server: address of the server that the page starts. runs: directory of the training runs.
    """

    def __init__(self, directory: Path):
        shutil.copy(ROOT / "web_demo.py", directory)
        shutil.copytree(ROOT / ".streamlit", directory / ".streamlit")
        shutil.copy(Path(__file__).with_name("fake_server.py"), directory / "serve_api.py")
        self.runs = directory / "out"
        self.runs.mkdir()
        self._holders = [hold_port(), hold_port()]
        ports = [holder.getsockname()[1] for holder in self._holders]
        self.url, self.server = (f"http://127.0.0.1:{port}" for port in ports)
        self.process = subprocess.Popen(
            [sys.executable, "web_demo.py", "--port", str(ports[0]), "--server", self.server],
            env=os.environ | {"PYTHONPATH": str(ROOT), "STREAMLIT_SERVER_HEADLESS": "true"},
            cwd=directory,
        )
        wait_until(lambda: answers(f"{self.url}/_stcore/health"))

    def seen(self, name: str) -> int:
        """Return what the server counts: ``n_requests`` or ``n_vanished``."""
        return json.load(urllib.request.urlopen(f"{self.server}/seen", timeout=5))[name]

    def end(self) -> None:
        """Press Ctrl-C in the terminal."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE_S)
        for holder in self._holders:
            holder.close()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("page"))
    assert not answers(f"{page.server}/health"), "a server is started when somebody comes"
    yield page
    if page.process.poll() is None:
        page.end()


@pytest.fixture(scope="module")
def url(page) -> str:
    return page.url


@pytest.fixture(scope="module")
def browser():
    api.expect.set_options(timeout=PATIENCE_S * 1000)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
    api.expect.set_options(timeout=5000)


@pytest.fixture(scope="module")
def visitor(browser):
    """Where tabs are opened; they share what the browser has loaded, but no chats."""
    context = new_visitor(browser, locale="en-US")
    yield context
    context.close()


def new_visitor(browser, **options):
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_S * 1000)
    return context


@pytest.fixture
def tab(visitor, page):
    """A new tab; the server, which the first one starts, is there."""
    tab = visitor.new_page()
    tab.errors = []
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.goto(page.url)
    wait_until(lambda: answers(f"{page.server}/health"))
    yield tab
    assert not tab.errors
    tab.close()


def ask(tab, question: str) -> None:
    box = tab.get_by_test_id("stChatInputTextArea")
    box.fill(question)
    box.press("Enter")


def messages(tab):
    return tab.get_by_test_id("stChatMessage")


def expect_answer(tab, text: str | re.Pattern, *, number: int = -1) -> None:
    api.expect(messages(tab).nth(number)).to_contain_text(text)


def expect_whole_answer(tab, text: str) -> None:
    """Wait until an answer does not grow any more: what is clicked before is drawn anew."""
    expect_answer(tab, text)
    api.expect(tab.get_by_role("button", name="Answer again")).to_be_visible()


def test_a_conversation_and_a_reload(tab, page):
    ask(tab, "Hello there")
    expect_answer(tab, "You said: Hello there (1 messages, tiny)")
    ask(tab, "你好")
    expect_answer(tab, "You said: 你好 (3 messages, tiny)")
    api.expect(messages(tab)).to_have_count(4)
    n_requests = page.seen("n_requests")
    tab.reload()
    expect_answer(tab, "You said: 你好 (3 messages, tiny)")
    api.expect(messages(tab)).to_have_count(4)
    assert page.seen("n_requests") == n_requests, "a reload asks nothing"


def test_a_reload_while_an_answer_grows(tab, page):
    n_vanished = page.seen("n_vanished")
    ask(tab, "slow one")
    expect_answer(tab, "word1")
    n_requests = page.seen("n_requests")
    tab.reload()
    expect_answer(tab, "word1")
    assert page.seen("n_vanished") == n_vanished, "it goes on"
    assert page.seen("n_requests") == n_requests
    tab.get_by_role("button", name="Stop").click()
    expect_whole_answer(tab, "stopped")
    assert "word0 word1" in messages(tab).last.inner_text()


def test_stop_keeps_the_text_and_a_click_elsewhere_does_not_stop(tab, page):
    n_vanished = page.seen("n_vanished")
    ask(tab, "slow one")
    expect_answer(tab, "word3")
    tab.get_by_text("中文").click()  # runs the whole page again
    api.expect(tab.get_by_role("button", name="停止")).to_be_visible()
    shown = messages(tab).last.inner_text()
    expect_answer(tab, f"word{len(shown.split())}")  # as many words, and the name of the picture: new ones have come
    assert page.seen("n_vanished") == n_vanished
    tab.get_by_role("button", name="新对话").click()  # where another answer comes meanwhile
    ask(tab, "aside")
    expect_answer(tab, "You said: aside (1 messages, tiny)")
    api.expect(tab.get_by_text("word0")).to_have_count(0)
    tab.get_by_role("button", name="slow one").click()
    expect_answer(tab, "word1")
    assert page.seen("n_vanished") == n_vanished
    tab.get_by_role("button", name="停止").click()
    expect_answer(tab, "已停止")
    wait_until(lambda: page.seen("n_vanished") == n_vanished + 1)
    assert "word0 word1" in messages(tab).last.inner_text()
    ask(tab, "next")
    expect_answer(tab, "You said: next (3 messages, tiny)")
    api.expect(messages(tab)).to_have_count(4)


def test_two_tabs_share_nothing(tab, url):
    ask(tab, "slow in the first tab")
    expect_answer(tab, "word1")
    other = tab.context.new_page()
    other.goto(url)
    api.expect(other.get_by_text("What would you like to ask?")).to_be_visible()
    ask(other, "only here")
    expect_answer(other, "You said: only here (1 messages, tiny)")
    api.expect(other.get_by_text("first tab")).to_have_count(0)
    shown = messages(tab).last.inner_text()  # it goes on
    api.expect(messages(tab).last).not_to_have_text(shown)
    api.expect(tab.get_by_text("only here")).to_have_count(0)
    tab.get_by_role("button", name="Stop").click()
    other.close()


def test_tokens_and_thoughts(tab):
    tab.get_by_text("Probabilities of the tokens").click()
    ask(tab, "think")
    expect_whole_answer(tab, "You said: think")
    thoughts = messages(tab).last.get_by_text("Thoughts")
    api.expect(messages(tab).last.get_by_text("Let me see.")).to_be_hidden()
    thoughts.click()
    api.expect(messages(tab).last.get_by_text("Let me see.")).to_be_visible()
    messages(tab).last.get_by_text("Tokens", exact=True).click()
    token = messages(tab).last.locator(".tokens .t").first

    def points_at_it() -> bool:
        token.hover()  # and again, if what unfolds above has moved it away
        return token.locator(".o").is_visible()

    wait_until(points_at_it)
    assert "60.65%" in token.locator(".o").inner_text()


def test_a_phone_in_the_dark(browser, url):
    context = new_visitor(
        browser, viewport=PHONE, is_mobile=True, has_touch=True, locale="zh-CN", color_scheme="dark"
    )  # fmt: skip
    tab = context.new_page()
    tab.goto(url)
    api.expect(tab.get_by_text("想问点什么？")).to_be_visible()
    ask(tab, "x" * 200)
    expect_answer(tab, "(1 messages, tiny)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    box = tab.get_by_test_id("stChatInput").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= PHONE["width"]
    assert box["y"] + box["height"] <= PHONE["height"]
    colours = tab.get_by_test_id("stApp").evaluate(
        "element => [getComputedStyle(element).backgroundColor, getComputedStyle(element).color]"
    )
    dark, light = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert dark < 150 < 600 < light
    context.close()


def test_a_run_is_shown_while_it_runs(tab, page, url):
    directory = page.runs / "pretrain_8"
    directory.mkdir()
    (directory / "run.yaml").write_text('{"stage": "pretrain", "resolved": {"total_steps": 1000}}')
    with open(directory / "metrics.jsonl", "w") as file:
        for step in (10, 20):
            row = {"step": step, "split": "train", "loss": 30 / step, "lr": 1e-3, "seconds": step, "tokens": step}
            file.write(json.dumps(row) + "\n")
            file.flush()
            if step == 10:
                tab.goto(f"{url}/runs")
            api.expect(tab.get_by_text(f"step {step} of 1,000")).to_be_visible()
    api.expect(tab.locator(".vega-embed canvas, .vega-embed svg").first).to_be_visible()


def test_the_server_ends_with_the_page(tab, page):
    api.expect(tab.get_by_text("What would you like to ask?")).to_be_visible()
    assert answers(f"{page.server}/health")
    page.end()
    assert not answers(f"{page.server}/health")
