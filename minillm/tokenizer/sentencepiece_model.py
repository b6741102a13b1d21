"""Converts a SentencePiece file, ``tokenizer.model``, to a tokenizer.json, without the package sentencepiece.

Releases such as Llama 2 come with this file, and some with it alone. It is a protobuf message: the pieces with their
scores, how the pieces were made (byte-pair encoding or a unigram language model), and how text is normalised.

The two libraries find the same pieces in different ways:

- SentencePiece merges the two neighbours whose *union* has the best score. tokenizers merges the *pair* that comes
  first in a list. So the list has every pair of pieces whose union is a piece, the union with the best score first.
- A unigram model needs no list: both choose the segmentation with the highest sum of scores.
"""

import base64
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from minillm.errors import UserError

MODEL = "tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
UNIGRAM, BPE = 1, 2  # kinds of models
SPACE = "\u2581"


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What the file says. The numbers in ``_parse`` are those of sentencepiece_model.proto."""

    pieces: list[_Piece]
    kind: int
    byte_fallback: bool
    charsmap: bytes
    """Table of the normaliser, as both libraries read it; empty: text stays as it is."""
    adds_space: bool
    """A text begins with a space."""
    joins_spaces: bool
    """Spaces around a text are removed, and several spaces become one."""
    names: dict[str, str]
    """bos_token, eos_token, unk_token and pad_token, if the model has them."""


def convert_model(content: bytes, origin: str, files: dict[str, str]) -> dict[str, str]:
    """Return the files of a tokenizer directory that has ``tokenizer.model`` and no tokenizer.json.

    Args:
        content: of ``tokenizer.model``.
        origin: its path, for error messages.
        files: the other files: tokenizer_config.json and added_tokens.json name further tokens. The result has
            ``tokenizer.json`` in addition, and tokenizer_config.json with the names of the model's control tokens.

    Raises:
        UserError: not a SentencePiece model, a model of another kind, or added tokens that do not follow its pieces.
    """
    model = _parse(content, origin)
    settings = _read_json(files, "tokenizer_config.json", origin)
    names = {key: name for key, name in model.names.items() if settings.get(key) is None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | names | settings
    older = _read_json(files, "added_tokens.json", origin)
    try:
        added = _added_tokens(model, settings, older, origin)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the added tokens in tokenizer_config.json or added_tokens.json next to {origin} are damaged ({error!r}): "
            "copy these files again"
        ) from None
    parts = _spaces(model, settings)
    spec = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": _sequence("normalizers", parts["normalizer"]),
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(settings, added),
        "decoder": _sequence("decoders", parts["decoder"]),
        "model": _bpe(model) if model.kind == BPE else _unigram(model),
    }  # fmt: skip
    # transformers' class for Llama builds its own normaliser; this one reads tokenizer.json as it is.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    others = {name: text for name, text in files.items() if name != "added_tokens.json"}
    return others | {
        "tokenizer.json": json.dumps(spec, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


# ---- the file ----------------------------------------------------------------------------------------------------


def _parse(content: bytes, origin: str) -> _Model:
    try:
        message = _fields(content)
        pieces = [_parse_piece(piece) for number, piece in message if number == 1]
        trainer, normalizer = (dict(_fields(_last(message, number, b""))) for number in (2, 3))
        model = _Model(
            pieces=pieces,
            kind=trainer.get(3, UNIGRAM),
            byte_fallback=bool(trainer.get(35, 0)),
            charsmap=normalizer.get(2, b""),
            adds_space=bool(normalizer.get(3, 1)),
            joins_spaces=bool(normalizer.get(4, 1)),
            names=_control_names(pieces, trainer),
        )
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{origin} is not a SentencePiece model ({error}): copy it again, or give the release's tokenizer.json"
        ) from None
    if not pieces or not all(piece.text for piece in pieces):
        raise UserError(f"{origin} is not a SentencePiece model: it has no pieces, or empty ones; copy it again")
    if model.kind not in (UNIGRAM, BPE):
        raise UserError(f"{origin} is a model of words or characters: only BPE and unigram models are supported")
    if any(piece.kind == UNUSED for piece in pieces):
        raise UserError(f"{origin} has pieces that are marked as unused: give the release's tokenizer.json")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise UserError(f"{origin} has a piece twice: copy it again")
    return model


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """Return (number, value) of each field of a protobuf message. Numbers of 32 and 64 bits stay bytes."""
    fields, position = [], 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        else:
            length = {1: 8, 5: 4}.get(wire_type)
            if wire_type == 2:
                length, position = _varint(message, position)
            if length is None or number == 0 or position + length > len(message):
                raise ValueError(f"it is damaged at byte {position}")
            value = message[position : position + length]
            position += length
        fields.append((number, value))
    return fields


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError(f"it is damaged at byte {position}")


def _last(message: list[tuple], number: int, default):
    return next((value for key, value in reversed(message) if key == number), default)


def _parse_piece(message: bytes) -> _Piece:
    fields = dict(_fields(message))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    return _Piece(fields.get(1, b"").decode("utf-8"), score, fields.get(3, NORMAL))


def _control_names(pieces: list[_Piece], trainer: dict) -> dict[str, str]:
    """Return the names of the control tokens; -1 as an id means that there is none."""
    ids = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    names = {}
    for key, (number, default) in ids.items():
        token_id = trainer.get(number, default)
        if 0 <= token_id < len(pieces) and pieces[token_id].kind in (UNKNOWN, CONTROL):
            names[key] = pieces[token_id].text
    return names


def _read_json(files: dict[str, str], name: str, origin: str) -> dict:
    try:
        value = json.loads(files.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{name} next to {origin} is broken JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} next to {origin} holds {type(value).__name__}, not a JSON object; copy it again")
    return value


# ---- tokenizer.json ----------------------------------------------------------------------------------------------


def _bpe(model: _Model) -> dict:
    ids = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
    mergeable = {piece.text: piece.score for piece in model.pieces if piece.kind in (NORMAL, USER_DEFINED)}
    unions = sorted(mergeable, key=lambda text: (-mergeable[text], ids[text]))
    return {
        "type": "BPE", "dropout": None, "unk_token": model.names.get("unk_token"),
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
        "byte_fallback": model.byte_fallback, "ignore_merges": False, "vocab": ids,
        "merges": [pair for union in unions for pair in _pairs(union, mergeable)],
    }  # fmt: skip


def _pairs(union: str, pieces: dict[str, float]) -> Iterator[list[str]]:
    for cut in range(1, len(union)):
        if union[:cut] in pieces and union[cut:] in pieces:
            yield [union[:cut], union[cut:]]


def _unigram(model: _Model) -> dict:
    unknown = next((token_id for token_id, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    return {
        "type": "Unigram", "unk_id": unknown, "byte_fallback": model.byte_fallback,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
    }  # fmt: skip


def _spaces(model: _Model, settings: dict) -> dict[str, list | dict | None]:
    """Return normaliser, pre-tokenizer and decoder: what happens to spaces.

    With ``"legacy": false`` in tokenizer_config.json a space is put before the first piece of a text only, and not
    after each control token, as in transformers.
    """
    normalizer: list[dict] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        normalizer.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.joins_spaces:
        normalizer.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        normalizer.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    adds_space = settings.get("add_prefix_space", model.adds_space)
    pre_tokenizer = None
    if settings.get("legacy", True):
        normalizer += [{"type": "Prepend", "prepend": SPACE}] * adds_space
        normalizer.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    else:
        scheme = "first" if adds_space else "never"
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    decoder = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * adds_space,
    ]
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}


def _sequence(key: str, parts: list[dict]) -> dict | None:
    return {"type": "Sequence", key: parts} if parts else None


def _added_tokens(model: _Model, settings: dict, older: dict, origin: str) -> list[dict]:
    """Return the entries of added tokens: those in the model, then those of the other files, by id."""
    entries: dict[int, dict] = {}
    for token_id, piece in enumerate(model.pieces):
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED):
            entries[token_id] = _entry(token_id, piece.text, special=piece.kind != USER_DEFINED)
    special_names = {_name(settings.get(key)) for key in settings if key.endswith("_token")}
    special_names |= {_name(token) for token in settings.get("additional_special_tokens") or ()}
    for text, token_id in older.items():
        entries[token_id] = _entry(token_id, text, special=text in special_names)
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
        entries[int(number)] = _entry(int(number), token["content"], special=bool(token.get("special"))) | flags
    n_pieces = len(model.pieces)
    for token_id, entry in entries.items():
        if token_id < n_pieces and model.pieces[token_id].text != entry["content"]:
            raise UserError(
                f"{origin} has {model.pieces[token_id].text!r} as token {token_id}, and the files next to it "
                f"{entry['content']!r}: take all files from one release"
            )
    last = max(entries, default=-1)
    missing = next((token_id for token_id in range(n_pieces, last + 1) if token_id not in entries), None)
    if missing is not None:
        raise UserError(
            f"{origin} has {n_pieces} pieces, and the added tokens next to it leave out the id {missing}: take all "
            "files from one release"
        )
    return [entries[token_id] for token_id in sorted(entries)]


def _entry(token_id: int, text: str, *, special: bool) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, **flags, "special": special}


def _name(entry) -> str | None:
    return entry.get("content") if isinstance(entry, dict) else entry


def _post_processor(settings: dict, added: list[dict]) -> dict | None:
    """Return what transformers adds around a text; our own encode() adds nothing."""
    is_llama = re.match("(Code)?Llama|PreTrained", str(settings.get("tokenizer_class")))
    ids = {entry["content"]: entry["id"] for entry in added}
    begin, end = _name(settings.get("bos_token")), _name(settings.get("eos_token"))
    first = [begin] if begin in ids and settings.get("add_bos_token", bool(is_llama)) else []
    last = [end] if end in ids and settings.get("add_eos_token", False) else []
    if not first and not last:
        return None

    def text(letter: str, segment: int) -> list[dict]:
        tokens = [[{"SpecialToken": {"id": name, "type_id": segment}} for name in names] for names in (first, last)]
        return [*tokens[0], {"Sequence": {"id": letter, "type_id": segment}}, *tokens[1]]

    tokens = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*first, *last}}
    pair = text("A", 0) + text("B", 1)
    return {"type": "TemplateProcessing", "single": text("A", 0), "pair": pair, "special_tokens": tokens}
