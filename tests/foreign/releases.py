"""The chat templates of published models, as the package trl ships them, each with a small tokenizer made here.

trl has two files for many models: the template of the release, and a variant for training that marks the answers with
``{% generation %}``, from which transformers makes a mask. Both are compared with ours.

    from tests.foreign.releases import CONVERSATIONS, compare, open_release, release_names
    release = open_release("qwen3", tmp_path)
    compare(release, *CONVERSATIONS["two turns"])
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from minillm.errors import UserError
from minillm.tokenizer import Tokenizer, encode_chat, load_tokenizer
from minillm.tokenizer.chat_format import chat_format
from tests.foreign.layouts import THINK, Layout, make_tokenizer

# Names of control tokens, as they stand in templates.
CONTROL_TOKEN = re.compile(
    r'<\|[\w"]+\|?>|<\w+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_\w+>|\[gMASK\]|\[/?INST\]|<sop>|<image>|</s>'
)
EMPTY = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a release has besides its template, and how trl's mask differs from ours."""

    ends: tuple[str, ...] = ()
    """Tokens that eos_token_id of the release's generation_config.json names."""
    before: tuple[str, ...] = ()
    """What trl marks at the beginning of an answer, although the prompt has it already; longer ones first."""
    after: tuple[str, ...] = ("", "\n")
    """What trl marks after the end token. A model ends with that token and never writes this."""
    reason: str = ""
    """Why the masks differ."""


NEWLINE = "trl marks the newline after the end token"
HEADER = "trl marks the header, which the prompt already has"
OPENING = "trl marks the opening of the thinking, which the prompt already has"
GLM_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")
GEMMA4_ENDS = ("<turn|>", "<|tool_response>")
FACTS = {
    "deepseekv3": Facts(before=("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"), reason=HEADER),
    "deepseek_r1_distill": Facts(before=("<｜Assistant｜><think>\n", "<｜Assistant｜>"), reason=HEADER),
    **{name: Facts(ends=GEMMA4_ENDS) for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")},
    "diffusion_gemma": Facts(ends=GEMMA4_ENDS, reason=NEWLINE),
    "gemma": Facts(reason=NEWLINE),
    "gemma3": Facts(reason=NEWLINE),
    "glm4moe": Facts(ends=GLM_ENDS),
    "gptoss": Facts(ends=("<|return|>", "<|call|>"), before=("<|start|>assistant",), reason=HEADER),
    "lfm2": Facts(reason=NEWLINE),
    "lfm2_v2": Facts(reason=NEWLINE),
    "muse_glimmer": Facts(before=("<|start|>assistant",), reason=HEADER),
    **{
        f"nemotron_3{name}": Facts(before=("<think>\n",), reason=f"{NEWLINE}; {OPENING}")
        for name in ("_nano", "_super", "_ultra", "_5_lightning")
    },
    "phi3": Facts(after=("\n", "\n<eos>"), reason=f"{NEWLINE} and the token that ends the document"),
    "phi3_5": Facts(after=("\n", "\n<eos>"), reason=f"{NEWLINE} and the token that ends the document"),
    "qwen2_5": Facts(before=("\n",), reason=f"{NEWLINE}; trl marks the newline of the header"),
    "qwen2_5_vl": Facts(reason=NEWLINE),
    "qwen3": Facts(reason=NEWLINE),
    "qwen3_instruct_2507": Facts(reason=NEWLINE),
    "qwen3_vl": Facts(reason=NEWLINE),
    "qwen3_5_nothink": Facts(before=(EMPTY,), reason=f"{NEWLINE}; {OPENING}"),
    **{
        name: Facts(before=("<think>\n",), reason=f"{NEWLINE}; {OPENING}")
        for name in ("qwen3_5_think", "qwen3_6", "qwen3_8")
    },
}  # fmt: skip
# The variant writes another text than the release, so only the last answers of a conversation can be compared.
REWRITTEN = {
    "qwen3": "the variant keeps the think blocks of all answers",
    "qwen3_5_nothink": "the variant keeps the think blocks of all answers",
    "qwen3_5_think": "the variant keeps the think blocks of all answers",
    "qwen3_6": "the variant keeps the think blocks of all answers",
    "qwen3_8": "the variant keeps the think blocks of all answers",
}
# These take a content only as a list of parts (text and images); ours passes texts.
IMAGES = ("idefics3", "llava_next", "smolvlm")


@dataclass
class Release:
    """A template with its tokenizer, ours and transformers'."""

    name: str
    ours: Tokenizer
    theirs: object
    """transformers' tokenizer of the same directory."""
    variant: str | None
    """trl's template for training; None if there is none."""
    facts: Facts = field(default_factory=Facts)

    @cached_property
    def end_ids(self) -> set[int]:
        """Ids that end an answer."""
        return set(self.ours.end_ids)


def templates_directory() -> Path:
    """Return the directory of trl's templates, without importing trl's trainers."""
    from importlib.util import find_spec

    return Path(find_spec("trl").origin).parent / "chat_templates"


def release_names() -> list[str]:
    """Return the names of all templates of releases in the installed trl."""
    names = (path.stem for path in templates_directory().glob("*.jinja"))
    return sorted(name for name in names if not name.endswith("_training"))


def open_release(name: str, directory: Path, *, variant: bool = False) -> Release:
    """Return the release with a tokenizer that has the control tokens of its template.

    Args:
        variant: use trl's template for training as the template of the tokenizer.
    """
    import transformers

    facts = FACTS.get(name, Facts())
    source = (templates_directory() / f"{name}.jinja").read_text(encoding="utf-8")
    training = templates_directory() / f"{name}_training.jinja"
    training_source = training.read_text(encoding="utf-8") if training.exists() else None
    tokens = [token for token in (*CONTROL_TOKEN.findall(source), *facts.ends) if token not in THINK]
    special = tuple(dict.fromkeys(["<bos>", "<eos>", *tokens]))
    template = training_source if variant else source
    layout = Layout(cut="bytes", special=special, bos="<bos>", eos="<eos>", template=template, tags=THINK)
    path = make_tokenizer(layout, Path(directory) / f"{name}{'_training' * variant}")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    if facts.ends:
        ends = {"eos_token_id": theirs.convert_tokens_to_ids(list(facts.ends))}
        (path / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    return Release(name=name, ours=load_tokenizer(path), theirs=theirs, variant=training_source, facts=facts)


# ---- conversations -----------------------------------------------------------------------------------------------


def say(role: str, content: str, **more) -> dict:
    """Return a message."""
    return {"role": role, "content": content} | more


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Return a conversation of questions and answers in turn."""
    messages = [say(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]
    return ([say("system", system)] if system is not None else []) + messages


TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "the word"}},
            "required": ["word"],
        },
    },
}
CALL = {"type": "function", "id": "callabcde", "function": {"name": "lookup", "arguments": {"word": "fox"}}}
CALL_AS_TEXT = {"type": "function", "id": "callabcde", "function": {"name": "lookup", "arguments": '{"word": "fox"}'}}


def with_call(call: dict = CALL, content: str = "") -> list[dict]:
    """Return a conversation with a call of a tool and its result."""
    return [
        say("user", "q"),
        say("assistant", content, tool_calls=[call]),
        say("tool", "7", name="lookup", tool_call_id="callabcde"),
        say("assistant", "seven"),
    ]


# Name: messages, tools.
CONVERSATIONS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn": (turns("Hi", "Hello!"), None),
    "two turns": (turns("Hi", "Hello!", "1 + 1?", "2"), None),
    "blanks": (turns(" Hi\n", "\n Hello! \n"), None),
    "chinese": (turns("你是谁？", "我是一个助手。\n\n  - 一\n  - 二"), None),
    "system": (turns("Hi", "Hello!", system="Be kind."), None),
    "late system": ([*turns("Hi", "Hello!"), say("system", "Be brief."), *turns("x", "y")], None),
    "thinking": (turns("q", "<think>\nw\n</think>\n\nHello"), None),
    "reasoning": ([say("user", "q"), say("assistant", "Hello", reasoning_content="w")], None),
    "reasoning twice": (
        [
            say("user", "q"), say("assistant", "Hello", reasoning_content="w"),
            say("user", "r"), say("assistant", "Ho", reasoning_content="v"),
        ],
        None,
    ),
    "call": (with_call(), None),
    "call as text": (with_call(CALL_AS_TEXT), None),
    "call after words": (with_call(content="Let me see."), None),
    "tools": (with_call(), [TOOL]),
    "tools with a system": ([say("system", "Be kind."), *with_call()], [TOOL]),
}  # fmt: skip


# ---- comparison --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What ours and theirs make of a conversation."""

    ids_equal: bool
    mask_equal: bool | None
    """None: there is no variant to compare with."""
    learned: tuple[str, ...]
    """The texts of our targets."""
    refused: str = ""
    """Our error; then the rest is empty."""
    difference: str = ""
    """What differs, for a failing test."""


def compare(release: Release, messages: list[dict], tools: list[dict] | None) -> Comparison:
    """Return the comparison of our ids and mask with transformers'."""
    try:
        ids, mask = encode_chat(release.ours, messages, tools=tools)
    except UserError as error:
        return Comparison(False, None, (), refused=str(error))
    options = {"tools": tools, "return_dict": True}
    taken = with_arguments(messages, chat_format(release.ours).arguments)
    their_ids = release.theirs.apply_chat_template(taken, **options)["input_ids"]
    learned = tuple(release.theirs.decode(ids[start:end]) for start, end in stretches(mask))
    added = ids[len(their_ids) :]  # an end token that the template writes only when another question follows
    ids_equal = ids[: len(their_ids)] == their_ids and (not added or (len(added) == 1 and added[0] in release.end_ids))
    if release.variant is None:
        return Comparison(ids_equal, None, learned)
    marked = release.theirs.apply_chat_template(
        with_arguments(messages, "object"), **options, return_assistant_tokens_mask=True, chat_template=release.variant
    )
    expected = expected_stretches(release, marked["input_ids"], marked["assistant_masks"])
    found = [ids[start:end] for start, end in stretches(mask)]
    if marked["input_ids"] != ids:
        if release.name not in REWRITTEN:
            return Comparison(ids_equal, False, learned, difference="the variant writes another text")
        expected, found = expected[-1:], found[-1:]
    difference = "" if expected == found else repr(list(map(release.theirs.decode, expected)))
    return Comparison(ids_equal, expected == found, learned, difference=difference)


def with_arguments(messages: list[dict], form: str) -> list[dict]:
    """Return the messages with the arguments of calls as "text" or as an "object"; "any" changes nothing."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if form == "object" and isinstance(arguments, str):
                call["function"]["arguments"] = json.loads(arguments)
            if form == "text" and not isinstance(arguments, str):
                call["function"]["arguments"] = json.dumps(arguments)
    return messages


def stretches(mask: list[int]) -> list[tuple[int, int]]:
    """Return where each run of ones begins and ends."""
    edges = [place for place in range(len(mask) + 1) if [0, *mask, 0][place] != [0, *mask, 0][place + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def expected_stretches(release: Release, ids: list[int], mask: list[int]) -> list[list[int]]:
    """Return the ids of the answers that trl marks, without what ``Facts`` says that trl marks too much."""
    expected = []
    for start, end in stretches(mask):
        first_end = next((place for place in range(start, end) if ids[place] in release.end_ids), end - 1)
        after = release.theirs.decode(ids[first_end + 1 : end])
        assert after in release.facts.after, after
        text = release.theirs.decode(ids[start:end])
        before = next((before for before in release.facts.before if text.startswith(before)), "")
        # A token with characters of both the header and the answer belongs to the answer.
        while before and before.startswith(token := release.theirs.decode(ids[start : start + 1])):
            before = before.removeprefix(token)
            start += 1
        expected.append(ids[start : first_end + 1])
    return expected
