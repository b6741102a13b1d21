"""Tokens are text and nothing else; the colour follows the probability."""

import math
from html.parser import HTMLParser

from minillm.web.tokens import mean_log_prob, tokens_html

TOKENS = [
    {"token": "<b>", "logprob": 0.0, "top_logprobs": [{"token": "<b>", "logprob": 0.0}]},
    {"token": " a\n", "logprob": math.log(0.5), "top_logprobs": [{"token": "z", "logprob": math.log(0.25)}]},
    {"token": "猫", "logprob": -9999.0},
]


class Reader(HTMLParser):
    """Collects tags and texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs).get("style")))

    def handle_data(self, data):
        self.texts.append(data)


def test_tokens():
    reader = Reader()
    reader.feed(tokens_html(TOKENS))
    styles = [style for tag, style in reader.tags if style]
    assert [style.split("(")[1].split(",")[0] for style in styles] == ["120", "60", "0"]
    # The <b> of the page marks the alternative that was taken; that of the model is text.
    assert [tag for tag, _ in reader.tags].count("b") == 3
    assert reader.texts[1:] == [
        "<b>", "100.00%  <b>",
        " a↵\n", " 50.00%  ␣a↵", "\n 25.00%  z",
        "猫", "  0.00%  猫",
    ]  # fmt: skip


def test_mean():
    assert mean_log_prob(TOKENS[:2]) == math.log(0.5) / 2
