"""The tokenizer in a GGUF file: what llama.cpp needs to give the same ids as ours.

llama.cpp has its own tokenizers, and a file can only choose among them:

* ``gpt2``, byte-level BPE. Vocabulary and merges are in the file, but the rules that cut a text into pieces are not:
  the file names a set of rules that llama.cpp knows (``tokenizer.ggml.pre``), those of a published model.
* ``llama``, SentencePiece: merges the neighbours whose union has the best score; unknown characters become bytes.

With another tokenizer a text has other ids, and the model answers worse without any error. So nothing is concluded from
names: for each set of rules we build a tokenizer that does what llama.cpp will do, and both encode thousands of hard
texts and all tokens (``hard_texts.py``). The first rules without a difference are used.

Our own byte-level tokenizers cut differently from every published model: "'s" is a piece only at the end of a word, and
Chinese characters stand apart from letters. ``tekken`` cuts less often than ours, except after blanks; where it does
not cut, no merge crosses. It also looks a piece up as a whole before it merges: so "'s" is found although the merges
that would also apply inside "'small" are left out. One difference remains (``BLANKS``). It is reported, and the proof
covers all other texts.
"""

import json
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from minillm.errors import UserError
from minillm.hub.gguf_file import Value
from minillm.hub.hard_texts import hard_texts
from minillm.tokenizer.base import Tokenizer, byte_level_alphabet
from minillm.tokenizer.chat_format import chat_format
from minillm.tokenizer.template import template_source

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
BLANK = "\u2581"  # SentencePiece's sign for a space
QUOTES = ("'", "’")
# Tokens that llama.cpp knows by name as the end of an answer.
KNOWN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<|end|>", "<end_of_turn>",
              "<|eom_id|>", "<EOT>", "<｜end▁of▁sentence｜>", "<eos>")  # fmt: skip
MAX_PROBED_CONTROLS = 64

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+"
    r"|[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*"
)
_SIGNS_AND_BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Rules(NamedTuple):
    """How llama.cpp cuts a text into pieces."""

    name: str  # in tokenizer.ggml.pre
    patterns: tuple[str, ...]  # each cuts the pieces of the one before; Oniguruma's syntax
    whole_pieces: bool = False  # a piece that is a token is not merged


RULES = (
    Rules("gpt-2", (_GPT2,)),
    Rules("qwen2", (_WORD + r"|\p{N}" + _SIGNS_AND_BLANKS,)),
    Rules("llama-bpe", (_WORD + r"|\p{N}{1,3}" + _SIGNS_AND_BLANKS,), whole_pieces=True),
    Rules("chatglm-bpe", (_WORD + r"|\p{N}{1,3}" + _SIGNS_AND_BLANKS,)),
    Rules("smollm", (r"\p{N}", _GPT2)),
    Rules("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK)),
    Rules("tekken", (_CASED_WORD + r"|\p{N}" + _SIGNS_AND_BLANKS.replace(r"\n]*", r"\n/]*"),), whole_pieces=True),
)
TEKKEN = RULES[-1]


class KnownDifference(NamedTuple):
    """Texts that get other ids in llama.cpp, whatever the file says. The proof covers all others."""

    description: str
    applies: Callable[[str], bool]


def _contains(pattern: str) -> Callable[[str], bool]:
    """Return a function that tells whether a text matches; Python's own expressions do not know ``\\p{Han}``."""
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    return lambda text: bool(text) and "".join(piece for piece, _ in split.pre_tokenize_str(text)) != text


BLANKS = KnownDifference(
    "of two or more blanks directly before a digit or a Chinese character, llama.cpp encodes the last one separately",
    _contains(r"[^\S\n]{2,}(?=[\p{N}\p{Han}])"),
)
CONTRACTIONS = KnownDifference(
    "a contraction with a capital letter directly behind it ('sA), half of one ('v alone), or a quote directly behind "
    "a combining mark is cut in another place",
    _contains(r"['’](?:[sStTmMdD]|[lL][lL]|[vV][eE]|[rR][eE])(?=[A-Z])|['’][lLvVrR](?!\p{L})|\p{M}['’]"),
)
NOT_NORMAL = KnownDifference(
    "llama.cpp does not bring characters into Unicode's normal form NFC",
    lambda text: unicodedata.normalize("NFC", text) != text,
)
SPACE_SIGN = KnownDifference(
    f"llama.cpp takes the character {BLANK} (U+2581) for a space",
    lambda text: BLANK in text,
)
# Tokenizers that put a blank before the first piece alone (Mistral), if there is none yet.
FIRST_BLANK = KnownDifference(
    "llama.cpp puts a blank before a text, also if it begins with one or follows a control token",
    lambda text: text.startswith((" ", BLANK)),
)
NO_FIRST_BLANK = KnownDifference(
    "llama.cpp puts no blank before a text that does not follow a control token; a chat follows one",
    lambda text: False,
)

KNOWN_DIFFERENCES = (BLANKS, CONTRACTIONS, NOT_NORMAL, SPACE_SIGN, FIRST_BLANK, NO_FIRST_BLANK)


def tokenizer_settings(
    tokenizer: Tokenizer, notes: list[str], *, vocab_size: int, allow_differences: bool = False
) -> dict[str, Value]:
    """Return the settings of a GGUF file that describe ``tokenizer``; what differs in llama.cpp is added to ``notes``.

    Args:
        vocab_size: of the model; ids without a token get names that no text contains.
        allow_differences: if no rules give the same ids, take those with the fewest differences.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it would give other ids to some texts.
    """
    # Written by the library, so that old spellings of merges are gone.
    full = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"])
    spec = json.loads(full.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            f"{tokenizer.origin}: llama.cpp has no tokenizer of this kind ({model['type']}); it has byte-level BPE and "
            f"SentencePiece's BPE with bytes for unknown characters"
        )
    names, types = _vocabulary(tokenizer, spec, vocab_size)
    candidates = _byte_level_candidates if '"ByteLevel"' in json.dumps(spec["decoder"]) else _sentencepiece_candidates
    candidate = _prove(tokenizer, full, candidates(tokenizer, spec, names, types), notes, allow_differences)
    settings: dict[str, Value] = {
        **candidate.settings,
        "tokenizer.ggml.tokens": candidate.names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        **_ends(tokenizer, notes),
        **around_a_text(tokenizer, notes),
    }
    if unknown := [token_id for token_id, kind in enumerate(types) if kind == UNKNOWN]:
        settings["tokenizer.ggml.unknown_token_id"] = unknown[0]
    if template := template_source(tokenizer.files, tokenizer.origin):
        settings["tokenizer.chat_template"] = template[1]
    return settings


def _vocabulary(tokenizer: Tokenizer, spec: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the token of each id as tokenizer.json writes it, and its type."""
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = [f"[PAD{token_id}]" for token_id in range(max(vocab_size, tokenizer.vocab_size))]
    types = [UNUSED] * len(names)
    for name, token_id in spec["model"]["vocab"].items():
        names[token_id] = name
        is_byte = len(name) == 6 and name.startswith("<0x") and spec["model"].get("byte_fallback")
        types[token_id] = BYTE if is_byte else NORMAL
    for token_id, token in added.items():
        names[token_id] = token["content"]
        types[token_id] = CONTROL if token["special"] else USER_DEFINED
        if token["content"] == spec["model"].get("unk_token"):
            types[token_id] = UNKNOWN
    return names, types


# ---- what llama.cpp will do ------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """A way to describe the tokenizer, and a tokenizer that does what llama.cpp does with that description."""

    settings: dict[str, Value]
    names: list[str]  # of the tokens, as the file spells them
    encode: Callable[[list[str]], list[list[int]]]  # of texts without control tokens
    differences: tuple[KnownDifference, ...]


def _byte_level_candidates(tokenizer: Tokenizer, spec: dict, names: list[str], types: list[int]) -> list[_Candidate]:
    """Return the candidates of a byte-level BPE, the most wanted first."""
    merges = [tuple(merge) for merge in spec["model"]["merges"]]
    known = (NOT_NORMAL,) if (spec["normalizer"] or {}).get("type") == "NFC" else ()
    without_contractions = [merge for merge in merges if not _makes_contraction(*merge)]
    trials = [(rules, merges, known) for rules in RULES]
    trials.append((TEKKEN, without_contractions, (*known, BLANKS, CONTRACTIONS)))
    return [_byte_level(rules, spec, names, merges, known) for rules, merges, known in trials]


def _byte_level(rules: Rules, spec: dict, names: list[str], merges: list[tuple], known: tuple) -> _Candidate:
    backend = tokenizers.Tokenizer(models.BPE(spec["model"]["vocab"], merges, ignore_merges=rules.whole_pieces))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    settings: dict[str, Value] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rules.name}
    if merges:
        settings["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    return _Candidate(settings, names, _batch(backend), known)


def _makes_contraction(left: str, right: str) -> bool:
    """Return whether a merge makes a quote and letters, such as "'s" or "’ve"."""
    to_byte = byte_level_alphabet()
    text = bytes(to_byte[character] for character in left + right).decode("utf-8", errors="replace")
    return text.startswith(QUOTES) and text[1:].isalpha()


def _sentencepiece_candidates(tokenizer: Tokenizer, spec: dict, names: list[str], types: list[int]) -> list[_Candidate]:
    """Return the candidates of a SentencePiece BPE: with a blank before a text, and without."""
    if not spec["model"].get("byte_fallback"):
        raise UserError(
            f"{tokenizer.origin}: llama.cpp's SentencePiece encodes unknown characters as bytes, this one does not"
        )
    has_spaces = any(" " in name for name in spec["model"]["vocab"])  # ours: real spaces
    spelled = [name.replace(" ", BLANK) if kind == NORMAL else name for name, kind in zip(names, types, strict=True)]
    if len(set(spelled)) < len(spelled):
        raise UserError(
            f"{tokenizer.origin}: tokens that differ only in a space and {BLANK} (U+2581), or twice the same"
        )
    # A token with a character that is no token by itself is never made here, as this character becomes bytes first.
    # llama.cpp would make it. Under another name it does not.
    characters = set(spelled)
    for token_id, name in enumerate(spelled):
        if types[token_id] == NORMAL and len(name) > 1 and not characters.issuperset(name):
            spelled[token_id], types[token_id] = f"[UNREACHABLE{token_id}]", UNUSED
    # The earlier a union is learned, the better its score; what no merge makes comes last.
    first_rank: dict[str, int] = {}
    for left, right in spec["model"]["merges"]:
        first_rank.setdefault((left + right).replace(" ", BLANK), len(first_rank))
    scores = [-float(first_rank.get(name, len(names))) for name in spelled]
    known = (SPACE_SIGN,) if has_spaces else ()
    if (spec["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
        candidates = [
            _sentencepiece(spelled, types, scores, True, (*known, FIRST_BLANK)),
            _sentencepiece(spelled, types, scores, False, (*known, NO_FIRST_BLANK)),
        ]
        is_for_chats = template_source(tokenizer.files, tokenizer.origin) is not None
        return candidates[::-1] if is_for_chats else candidates
    return [_sentencepiece(spelled, types, scores, prefix, known) for prefix in (False, True)]


def _sentencepiece(
    names: list[str], types: list[int], scores: list[float], adds_prefix: bool, known: tuple[KnownDifference, ...]
) -> _Candidate:
    """Return the candidate; its backend has every pair that makes a token as a merge, the best scores first."""
    pieces = {name: token_id for token_id, name in enumerate(names)}
    by_score = sorted(pieces, key=lambda name: -scores[pieces[name]])
    is_text = {name: types[token_id] not in (BYTE, UNUSED) for name, token_id in pieces.items()}
    merges = [
        (name[:cut], name[cut:])
        for name in by_score
        if is_text[name]
        for cut in range(1, len(name))
        if is_text.get(name[:cut]) and is_text.get(name[cut:])
    ]
    backend = tokenizers.Tokenizer(models.BPE(pieces, merges, byte_fallback=True))
    to_blanks = normalizers.Replace(" ", BLANK)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), to_blanks]) if adds_prefix else to_blanks
    settings: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": adds_prefix,
    }
    return _Candidate(settings, names, _batch(backend), known)


def _batch(backend: tokenizers.Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


# ---- the proof -------------------------------------------------------------------------------------


def _prove(
    tokenizer: Tokenizer,
    full: tokenizers.Tokenizer,
    candidates: list[_Candidate],
    notes: list[str],
    allow_differences: bool,
) -> _Candidate:
    """Return the first candidate that gives our ids; see ``tokenizer_settings``."""
    texts = hard_texts()
    in_texts = hard_texts(tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size))
    wrong_texts: list[list[str]] = []
    for candidate in candidates:
        wrong = _wrong_texts(tokenizer, full, candidate, texts) or _wrong_texts(tokenizer, full, candidate, in_texts)
        if not wrong:
            break
        wrong_texts.append(wrong)
    else:
        fewest = min(wrong_texts, key=len)
        candidate = candidates[wrong_texts.index(fewest)]
        problem = f"{len(fewest)} of {len(texts)} hard texts get other ids in llama.cpp, such as {fewest[0][:40]!r}"
        if not allow_differences:
            raise UserError(
                f"{tokenizer.origin}: no tokenizer of llama.cpp gives the same ids. With the nearest, {problem}; the "
                f"model would see texts as it was not trained on them. To write it nevertheless: "
                f"allow_token_differences (--allow_token_differences)"
            )
        notes.append(problem)
    notes += [f"other ids than here: {known.description}" for known in candidate.differences]
    return candidate


def _wrong_texts(
    tokenizer: Tokenizer, full: tokenizers.Tokenizer, candidate: _Candidate, texts: list[str]
) -> list[str]:
    """Return the texts, not among the candidate's known differences, that get other ids in llama.cpp."""
    controls = full.get_added_tokens_decoder()
    expected = tokenizer.encode_batch(texts)
    if NO_FIRST_BLANK in candidate.differences and controls:  # then it is about texts behind a control token
        control = next(iter(controls.values())).content
        texts = [text for text in texts if text and not any(token.content in text for token in controls.values())]
        behind = full.encode_batch_fast([control + text for text in texts], add_special_tokens=False)
        expected = [encoding.ids[1:] for encoding in behind]
    wrong = [text for text, a, b in zip(texts, expected, candidate.encode(texts), strict=True) if a != b]
    wrong = [text for text in wrong if not any(known.applies(text) for known in candidate.differences)]
    if FIRST_BLANK not in candidate.differences:
        for text, ids in _texts_with_controls(full, candidate):
            if full.encode(text, add_special_tokens=False).ids != ids:
                wrong.append(text)
    return wrong


def _texts_with_controls(full: tokenizers.Tokenizer, candidate: _Candidate) -> list[tuple[str, list[int]]]:
    """Return texts with control tokens between words, and llama.cpp's ids: it cuts them out before anything else."""
    texts = []
    for token_id, token in list(full.get_added_tokens_decoder().items())[:MAX_PROBED_CONTROLS]:
        parts = ["你好 a", "b c", "\n d", "user\nHello"]
        ids = [piece for part in candidate.encode(parts) for piece in (token_id, *part)]
        texts.append(("".join(token.content + part for part in parts), ids))
    return texts


# ---- control tokens --------------------------------------------------------------------------------


def _ends(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Value]:
    """Return the ids that end an answer. llama.cpp has three places for them and knows some by name."""
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", "{}"))
    configured = settings.get("eos_token")
    configured = configured.get("content") if isinstance(configured, dict) else configured
    is_token = isinstance(configured, str) and tokenizer.has_token(configured)
    ends = {"eos": tokenizer.token_id(configured) if is_token else tokenizer.eos_token_id}
    try:
        end_of_turn = chat_format(tokenizer).end_token
    except UserError:  # no usable template: a model for texts
        end_of_turn = None
    if end_of_turn is not None:
        ends["eot"] = tokenizer.token_id(end_of_turn)
    known = {tokenizer.token_id(name) for name in KNOWN_ENDS if tokenizer.has_token(name)} | set(ends.values())
    others = [token_id for token_id in tokenizer.end_ids if token_id not in known]
    if others:
        ends.setdefault("eot" if "eot" not in ends else "eom", others.pop(0))
    if others:
        names = ", ".join(tokenizer.decode([token_id]) for token_id in others)
        notes.append(f"llama.cpp has no place for more ends of an answer: give {names} as stop text")
    return {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in ends.items()}


def around_a_text(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Value]:
    """Return whether a text begins with bos and ends with eos, as tokenizer.json's post-processor says."""
    full = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"])
    alone, within = (full.encode("a", add_special_tokens=adds).ids for adds in (False, True))
    adds_bos = len(within) > len(alone) and within[0] == tokenizer.bos_token_id
    adds_eos = len(within) > len(alone) + adds_bos and within[-1] in tokenizer.end_ids
    if within != [tokenizer.bos_token_id] * adds_bos + alone + within[len(within) - adds_eos :]:
        notes.append("tokenizer.json adds tokens to a text that llama.cpp cannot add")
    return {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}
