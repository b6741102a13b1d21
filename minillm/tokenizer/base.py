"""The Tokenizer object: text to ids and back, saved as a directory that transformers opens.

Two encoders share one vocabulary. The *full* encoder is the one on disk: in transformers it turns the text
``<|im_end|>`` into the control token. The *plain* encoder has no added tokens, so text that looks like a control token
stays text. ``encode`` always uses the plain one. Control tokens come only from ``token_id``; so no content of a message
can end its turn.
"""

import contextlib
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import tokenizers

from minillm.errors import UserError
from minillm.files import replace_text
from minillm.tokenizer.chat_format import chat_format
from minillm.tokenizer.sentencepiece_model import MODEL, convert_model

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
SPECIAL_TOKENS = CONTROL_TOKENS + TAG_TOKENS

# The files of a tokenizer directory. A loaded file is saved unchanged, byte for byte.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GENERATION = "generation_config.json"  # of the model in the same directory: only read, never written

MAX_IDS = 1 << 24  # far more than any vocabulary; some tables have an entry for each id

# The decoder of our SentencePiece tokenizers: it keeps spaces and strips nothing.
_BYTE_FALLBACK = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}


class Tokenizer:
    """Text to ids and back. ``train_bpe``, ``train_sentencepiece`` and ``load_tokenizer`` make one; it never changes.

    Args:
        files: file name (see ``FILES``) to text; only ``tokenizer.json`` is required.
        origin: where it comes from, for error messages.
        generation_ends: ``eos_token_id`` of the model's generation_config.json.

    Attributes:
        grown_from: the tokenizer without the tokens of ``--add_tokens`` (``extend.py``); None if none were added.
    """

    grown_from: "Tokenizer | None" = None

    def __init__(self, files: dict[str, str], *, origin: str = "this tokenizer", generation_ends: tuple[int, ...] = ()):
        self.files = dict(files)
        self.origin = origin
        self.generation_ends = generation_ends
        spec = _parse_json(files["tokenizer.json"], f"{origin}: tokenizer.json")
        self._full = _backend(spec, origin)
        # Without added tokens no text is special; without a post-processor nothing is added to a text.
        plain_model = _without_added_pieces(spec)
        self._plain = _backend({**spec, "model": plain_model, "added_tokens": [], "post_processor": None}, origin)
        settings = files.get("tokenizer_config.json", "{}")
        self._settings = _parse_json(settings, f"{origin}: tokenizer_config.json")
        _parse_json(files.get("special_tokens_map.json", "{}"), f"{origin}: special_tokens_map.json")
        added = self._full.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_level = _mentions_byte_level(spec.get("decoder")) or _mentions_byte_level(spec.get("pre_tokenizer"))
        # If a text is the concatenation of its tokens' bytes, decode() joins them itself: the library's byte fallback
        # turns *every* byte of a broken character into U+FFFD; Python and TextDecoder do not.
        self._joins_bytes = self._byte_level or spec.get("decoder") == _BYTE_FALLBACK

    # ---- text to ids ----

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; the name of a special token in it stays ordinary text.

        For our own tokenizers ``encode(a + "\\n" + b) == encode(a) + encode("\\n") + encode(b)``.

        Raises:
            UserError: ``text`` has a lone surrogate, which has no UTF-8 form.
        """
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise bad_text(text) from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, computed in parallel on all cores (in Rust)."""
        texts = list(texts)
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                self.encode(text)  # raises the error for the bad text
            raise
        return [encoding.ids for encoding in encodings]

    # ---- ids to text ----

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids``. Bytes that are not a complete character become U+FFFD, never an error.

        ``skip_special_tokens`` drops control and spare tokens, but not tags such as ``<think>``. Ids beyond the
        vocabulary are dropped: embeddings are often padded to a round number, and a model may sample such an id.
        """
        ids = [i for i in map(int, ids) if i < self.vocab_size]
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special_ids]
        if not self._joins_bytes:
            return self._full.decode(ids, skip_special_tokens=False)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the exact UTF-8 bytes of one token; a character may consist of several tokens."""
        table = self._bytes_table
        if not 0 <= token_id < len(table):
            raise UserError(f"token id {token_id} is outside the vocabulary: 0 to {len(table) - 1}")
        return table[token_id]

    @cached_property
    def _bytes_table(self) -> list[bytes]:
        table = [b""] * self.vocab_size  # some vocabularies have ids without a token: no bytes
        to_byte = byte_level_alphabet()
        for token, token_id in self._full.get_vocab(with_added_tokens=True).items():
            if token_id in self._added:
                table[token_id] = token.encode("utf-8")
            elif self._byte_level:  # a token with other characters stands for its own text, as in the library
                is_bytes = set(token) <= to_byte.keys()
                table[token_id] = bytes(map(to_byte.get, token)) if is_bytes else token.encode("utf-8")
            elif byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
                table[token_id] = bytes([int(byte[1], 16)])  # SentencePiece byte fallback
            else:
                table[token_id] = token.replace("\u2581", " ").encode("utf-8")  # SentencePiece's space
        return table

    # ---- the vocabulary ----

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: the largest id plus one."""
        size = max(self._full.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < size <= MAX_IDS:
            raise UserError(f"{self.origin}: tokenizer.json has {size} ids; allowed are 1 to {MAX_IDS}")
        return size

    def token_id(self, token: str) -> int:
        """Return the id of a token by its name, such as ``"<|im_end|>"``; UserError if there is none."""
        token_id = self._full.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self.origin} has no token '{token}' among its {self.vocab_size} tokens")
        return token_id

    def has_token(self, token: str) -> bool:
        """Return whether the vocabulary has this token."""
        return self._full.token_to_id(token) is not None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control and spare tokens; tags such as ``<think>`` are ordinary output and not among them."""
        return self._special_ids

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends a document.

        If the directory names a bos_token (MiniMind, Llama, Mistral, DeepSeek), it is the eos_token: a document is
        ``bos text eos``. If it names none (Qwen), it is ``<|endoftext|>``, which also begins a document, as in our own
        tokenizers: the eos_token of Qwen's chat models ends a turn, not a document.
        """
        name = self._configured_token("eos_token")
        if (name is None or self._bos_name is None) and self.has_token("<|endoftext|>"):
            name = "<|endoftext|>"
        if name is None:
            raise UserError(f"{self.origin} has no '<|endoftext|>' and no eos_token in tokenizer_config.json: add one")
        return self.token_id(name)

    @cached_property
    def bos_token_id(self) -> int:
        """The token that begins a document: the directory's bos_token, else the token that ends a document."""
        return self.eos_token_id if self._bos_name is None else self.token_id(self._bos_name)

    @property
    def _bos_name(self) -> str | None:
        return self._configured_token("bos_token")

    def _configured_token(self, key: str) -> str | None:
        """Return the token that tokenizer_config.json names under ``key``; None if the vocabulary has no such token."""
        name = _token_name(self._settings.get(key))
        return name if name is not None and self.has_token(name) else None

    def document(self, ids: list[int]) -> list[int]:
        """Return a complete document, ``[bos, *ids, eos]``, as used in training, validation and evaluation."""
        return [self.bos_token_id, *ids, self.eos_token_id]

    def open_document(self, ids: list[int]) -> list[int]:
        """Return the beginning of a document, ``[bos, *ids]``, for a model to continue."""
        return [self.bos_token_id, *ids]

    @cached_property
    def pad_token_id(self) -> int:
        """The id that fills unused positions; it is never a target."""
        name = self._configured_token("pad_token")
        return self.eos_token_id if name is None else self.token_id(name)

    @property
    def im_start_id(self) -> int:
        """The id of the token that begins a turn."""
        return self.token_id("<|im_start|>")

    @property
    def im_end_id(self) -> int:
        """The id of the token that ends a turn."""
        return self.token_id("<|im_end|>")

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, each once: the ends of a document and of a turn, those that the model's
        generation_config.json names, and the one that its chat template writes after an answer."""
        names = [_token_name(self._settings.get("eos_token")), "<|im_end|>", "<|endoftext|>"]
        with contextlib.suppress(UserError):  # no usable template: encoding a chat reports it, texts need none
            names.append(chat_format(self).end_token)
        ids = [self.token_id(name) for name in names if name is not None and self.has_token(name)]
        generation_ends = [token_id for token_id in self.generation_ends if token_id < self.vocab_size]
        return tuple(dict.fromkeys([self.eos_token_id, *ids, *generation_ends]))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a text: model, pre-tokenizer, normaliser, added tokens."""
        spec = json.loads(self.files["tokenizer.json"])
        for unused in ("truncation", "padding", "post_processor"):
            spec.pop(unused, None)
        return _hash(spec)

    @property
    def document_hash(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a document: ``content_hash``, begin and end tokens."""
        return _hash([self.content_hash, self.bos_token_id, self.eos_token_id])

    @property
    def template_hash(self) -> str:
        """SHA-256 (hex) of the chat template and the token names that it may write.

        It does not depend on the file of the template, ``chat_template.jinja`` or ``tokenizer_config.json``.
        """
        template = self.files.get("chat_template.jinja") or self._settings.get("chat_template")
        names = {key: _token_name(value) for key, value in self._settings.items() if key.endswith("_token")}
        return _hash([template or None, {key: name for key, name in names.items() if name is not None}])

    @property
    def encoding_hash(self) -> str:
        """SHA-256 (hex) of everything that decides the ids of a conversation and their mask: ``document_hash``,
        ``template_hash``, and the tokens that end an answer."""
        return _hash([self.document_hash, self.template_hash, sorted(self.end_ids)])

    def save(self, path: str | Path) -> None:
        """Write a directory for ``load_tokenizer`` and transformers' AutoTokenizer. Each file is written atomically.

        Raises:
            UserError: the directory is not writable.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, text in self.files.items():
                replace_text(path / name, text)
        except OSError as error:
            raise UserError(
                f"cannot write the tokenizer to '{path}': {error.strerror}; choose another directory"
            ) from None

    def __repr__(self) -> str:
        return f"Tokenizer({self.origin!r}, vocab_size={self.vocab_size})"


def has_tokenizer(directory: str | Path) -> bool:
    """Return whether a directory holds a tokenizer that ``load_tokenizer`` opens."""
    return any((Path(directory) / name).is_file() for name in ("tokenizer.json", MODEL))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a directory with a ``tokenizer.json`` (ours, or any fast tokenizer of Hugging Face), or the file itself.

    A directory with ``tokenizer.model`` alone is converted (``sentencepiece_model.py``); the result is saved with
    tokenizer.json.

    To encode chats, a tokenizer needs a chat template, or the ChatML tokens ``<|im_start|>`` and ``<|im_end|>``;
    ``encode_chat`` checks this. Tags such as ``<think>`` that are not single tokens of the tokenizer are encoded as
    plain text.

    Raises:
        UserError: a file is missing or broken.
    """
    path = Path(path)
    directory = path.parent if path.name in ("tokenizer.json", MODEL) else path
    if not has_tokenizer(directory):
        reason = (
            f"there is no tokenizer.json or {MODEL} in it" if directory.exists() else "the directory does not exist"
        )
        raise UserError(
            f"no tokenizer at '{path}': {reason}; train one with train_tokenizer.py, or give "
            f"--tokenizer_path a Hugging Face directory with a (fast) tokenizer.json, or with SentencePiece's {MODEL}"
        )
    try:
        names = [name for name in FILES if (directory / name).is_file()]
        files = {name: (directory / name).read_text(encoding="utf-8") for name in names}
        if "tokenizer.json" not in files:
            older = directory / "added_tokens.json"
            files |= {older.name: older.read_text(encoding="utf-8")} if older.is_file() else {}
            files = convert_model((directory / MODEL).read_bytes(), str(directory / MODEL), files)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer in '{directory}': {error}") from None
    return Tokenizer(files, origin=str(directory), generation_ends=_generation_ends(directory / GENERATION))


def _generation_ends(path: Path) -> tuple[int, ...]:
    """Return ``eos_token_id`` of a model's generation_config.json as a tuple; empty if there is no such file."""
    if not path.is_file():
        return ()
    try:
        ends = _parse_json(path.read_text(encoding="utf-8"), str(path)).get("eos_token_id")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in ends if type(end) is int and end >= 0)


def _backend(spec: dict, origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
    except Exception as error:  # the Rust side raises plain Exception
        raise UserError(f"{origin}: tokenizer.json is not a tokenizer ({error}); train or copy it again") from None


def _without_added_pieces(spec: dict) -> dict:
    """Return the model of a tokenizer.json in which no text is an added token.

    Byte-pair encoding reaches a token only by merges. A unigram model finds every piece in a text, so there the added
    tokens get names that no text has.
    """
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        return model
    added = {token["content"] for token in spec.get("added_tokens", ())}
    vocabulary = [[f"\0{piece}" if piece in added else piece, score] for piece, score in model["vocab"]]
    return {**model, "vocab": vocabulary}


def _parse_json(text: str, name: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is broken JSON ({error}); train or copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{name} holds {type(value).__name__}, not a JSON object; train or copy it again")
    return value


def _hash(value) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8", errors="surrogatepass")).hexdigest()


def _mentions_byte_level(part: dict | None) -> bool:
    return part is not None and '"ByteLevel"' in json.dumps(part)


def _token_name(entry) -> str | None:
    """Return the name of a special token in tokenizer_config.json, which is a string or an object."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet, character to byte: a visible character for each byte, so that vocabulary files are text.

    A printable byte of Latin-1 is its own character; the other 68 bytes get the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def bad_text(text) -> UserError:
    """Return the error for a text that the library refused: it is not a string, or has a lone surrogate."""
    if not isinstance(text, str):
        return UserError(f"cannot tokenise {type(text).__name__}: a text (str) is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return UserError(
            f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "has no UTF-8 form; remove it, or repair the file's \\u escapes"
        )
    return UserError("the tokenizer refused a text of valid characters")
