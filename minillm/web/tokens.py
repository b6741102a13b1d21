"""The tokens of an answer as HTML: each coloured by its probability, with the alternatives one tap away."""

import math
from html import escape

STYLE = """<style>
.tokens{line-height:2;white-space:pre-wrap;overflow-wrap:anywhere;padding-bottom:7.5em}
.tokens .t{position:relative;border-radius:.25em;padding:.12em 0;cursor:pointer;outline-offset:1px}
.tokens .o{display:none;position:absolute;left:0;top:1.9em;z-index:9;padding:.4em .7em;border-radius:.4em;
white-space:pre;font:13px/1.5 ui-monospace,monospace;background:#1c1f26;color:#f2f2f2;box-shadow:0 2px 8px #0006}
.tokens .t:hover .o,.tokens .t:focus .o{display:block}
.tokens .o b{color:#7fd48a}
</style>"""


def tokens_html(tokens: list[dict]) -> str:
    """Return coloured tokens.

    Args:
        tokens: OpenAI's ``logprobs.content``: ``token``, ``logprob`` (nats), perhaps ``top_logprobs`` of the same form.
    """
    return f'{STYLE}<div class="tokens">{"".join(map(_token, tokens))}</div>'


def _token(token: dict) -> str:
    options = token.get("top_logprobs") or []
    if all(option["token"] != token["token"] for option in options):
        options = [token, *options]
    lines = "\n".join(_option(option, is_chosen=option["token"] == token["token"]) for option in options)
    hue = round(120 * probability(token))  # red 0, yellow 60, green 120
    # A line break ends the line after a sign that shows it.
    text = escape(token["token"]).replace("\n", "↵\n")
    return (
        f'<span class="t" tabindex="0" style="background:hsla({hue},75%,45%,.35)">{text}'
        f'<span class="o">{lines}</span></span>'
    )


def _option(option: dict, *, is_chosen: bool) -> str:
    text = f"{probability(option):7.2%}  {escape(_visible(option['token']))}"
    return f"<b>{text}</b>" if is_chosen else text


def probability(token: dict) -> float:
    """Return the probability of a token, from its logarithm."""
    return math.exp(min(0.0, token["logprob"]))


def mean_log_prob(tokens: list[dict]) -> float:
    """Return the mean log-probability of the tokens in nats."""
    return sum(token["logprob"] for token in tokens) / len(tokens)


def _visible(text: str) -> str:
    """Return a token with its white space visible."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
