"""The Tokenizer object: exact bytes in, ids out, and a directory that transformers opens as it is.

Two encoders share one vocabulary. The *full* one is what lies on disk: a reader such as transformers
turns the text ``<|im_end|>`` into the control token. The *plain* one knows no added token, so text that
only looks like a control token stays text. ``encode`` always uses the plain one; control tokens enter
through ``token_id`` alone, which is why no content can ever end its own turn.
"""

import contextlib
import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import tokenizers

from minillm.errors import UserError
from minillm.tokenizer.chat_format import chat_format

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

# The files of a tokenizer directory. What was loaded is saved again byte for byte.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GENERATION = "generation_config.json"  # of the model in the same directory; it belongs to the model, so it is only read

MOST_IDS = 1 << 24  # far more than any vocabulary; tables with a place for each id are made

# The decoder of our SentencePiece tokenizers: blanks are written as blanks, nothing is stripped.
_BYTE_FALLBACK = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}


class Tokenizer:
    """Text to ids and back; made by ``train_bpe``, ``train_sentencepiece`` or ``load_tokenizer``, then never changed.

    ``files`` maps file names (see ``FILES``) to their text; only ``tokenizer.json`` is required.
    """

    def __init__(self, files: dict[str, str], *, origin: str = "this tokenizer", generation_ends: tuple[int, ...] = ()):
        self.files = dict(files)
        self.origin = origin
        self.generation_ends = generation_ends  # eos_token_id of the model's generation_config.json
        spec = _parse_json(files["tokenizer.json"], f"{origin}: tokenizer.json")
        self._full = _backend(spec, origin)
        # Without added tokens nothing in a text is special; without a post-processor nothing is added.
        self._plain = _backend({**spec, "added_tokens": [], "post_processor": None}, origin)
        settings = files.get("tokenizer_config.json", "{}")
        self._settings = _parse_json(settings, f"{origin}: tokenizer_config.json")
        added = self._full.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_level = _mentions_byte_level(spec.get("decoder")) or _mentions_byte_level(
            spec.get("pre_tokenizer")
        )
        # Where a text is the bytes of its tokens in a row, decode() joins them itself: the library's own byte
        # fallback turns *every* byte of a broken character into U+FFFD, Python and TextDecoder do not.
        self._joins_bytes = self._byte_level or spec.get("decoder") == _BYTE_FALLBACK

    # ---- text to ids ----

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; the text of a special token in it stays ordinary text.

        ``encode(a + "\\n" + b) == encode(a) + encode("\\n") + encode(b)`` for our own tokenizers.
        Raises UserError for a lone surrogate, which has no UTF-8 form.
        """
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise bad_text(text) from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, in parallel on all cores (inside Rust)."""
        texts = list(texts)
        try:
            encodings = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                self.encode(text)  # the guilty text raises its own error
            raise
        return [encoding.ids for encoding in encodings]

    # ---- ids to text ----

    def decode(self, ids, *, skip_special_tokens: bool = False) -> str:
        """Text of ``ids``; bytes that are not a whole character become U+FFFD, never an error.

        ``skip_special_tokens`` leaves out control and spare tokens; tags such as ``<think>`` are shown. Ids above the
        vocabulary say nothing: embeddings are often padded to a round number, and a model may draw one of those.
        """
        ids = [i for i in map(int, ids) if i < self.vocab_size]
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special_ids]
        if not self._joins_bytes:
            return self._full.decode(ids, skip_special_tokens=False)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact UTF-8 bytes that one token stands for; a character may spread over several tokens."""
        table = self._bytes_table
        if not 0 <= token_id < len(table):
            raise UserError(f"token id {token_id} is outside the vocabulary: 0 to {len(table) - 1}")
        return table[token_id]

    @cached_property
    def _bytes_table(self) -> list[bytes]:
        table = [b""] * self.vocab_size  # ids that no token owns (holes of foreign vocabularies) say nothing
        to_byte = byte_level_alphabet()
        for token, token_id in self._full.get_vocab(with_added_tokens=True).items():
            if token_id in self._added:
                table[token_id] = token.encode("utf-8")
            elif self._byte_level:  # a token with other characters is meant as it stands, as in the library
                is_bytes = set(token) <= to_byte.keys()
                table[token_id] = bytes(map(to_byte.get, token)) if is_bytes else token.encode("utf-8")
            elif byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
                table[token_id] = bytes([int(byte[1], 16)])  # SentencePiece byte fallback
            else:
                table[token_id] = token.replace("\u2581", " ").encode("utf-8")  # SentencePiece blank
        return table

    # ---- the vocabulary ----

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids: the largest id plus one."""
        size = max(self._full.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < size <= MOST_IDS:
            raise UserError(f"{self.origin}: tokenizer.json makes {size} ids; there must be from 1 to {MOST_IDS}")
        return size

    def token_id(self, token: str) -> int:
        """Id of one token by its name, such as ``"<|im_end|>"``; UserError when there is none."""
        token_id = self._full.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self.origin} has no token '{token}' among its {self.vocab_size}")
        return token_id

    def has_token(self, token: str) -> bool:
        """Whether ``token_id(token)`` would succeed."""
        return self._full.token_to_id(token) is not None

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control and spare tokens (tags are ordinary output and not among them)."""
        return self._special_ids

    @cached_property
    def eos_token_id(self) -> int:
        """The token that a document ends with.

        Where the directory names a bos_token, the eos_token next to it is meant: MiniMind, Llama, Mistral and DeepSeek
        write ``bos text eos``. Where it names none, as Qwen's, or both are one token, as in ours, documents stand
        between two ``<|endoftext|>``; the eos_token of Qwen's chat models ends a turn there, not a document.
        """
        name = _token_name(self._settings.get("eos_token"))
        name = name if name is not None and self.has_token(name) else None
        if name is None or self._bos_name is None:
            name = "<|endoftext|>" if self.has_token("<|endoftext|>") else name
        if name is None:
            raise UserError(
                f"{self.origin} has no '<|endoftext|>' and no eos_token in tokenizer_config.json: add one"
            )
        return self.token_id(name)

    @cached_property
    def bos_token_id(self) -> int:
        """The token that a document begins with: the directory's bos_token, else the one that it ends with."""
        return self.eos_token_id if self._bos_name is None else self.token_id(self._bos_name)

    @property
    def _bos_name(self) -> str | None:
        name = _token_name(self._settings.get("bos_token"))
        return name if name is not None and self.has_token(name) else None

    def document(self, ids: list[int]) -> list[int]:
        """Return a whole document, ``[bos, *ids, eos]``: so it is trained on, validated and measured."""
        return [self.bos_token_id, *ids, self.eos_token_id]

    def open_document(self, ids: list[int]) -> list[int]:
        """Return the beginning of a document, ``[bos, *ids]``, for a model to continue."""
        return [self.bos_token_id, *ids]

    @cached_property
    def pad_token_id(self) -> int:
        """Id to fill unused positions with; nothing is ever learned from it."""
        name = _token_name(self._settings.get("pad_token"))
        return self.token_id(name) if name is not None and self.has_token(name) else self.eos_token_id

    @property
    def im_start_id(self) -> int:
        """Return the id of the token that begins a turn."""
        return self.token_id("<|im_start|>")

    @property
    def im_end_id(self) -> int:
        """Return the id of the token that ends a turn."""
        return self.token_id("<|im_end|>")

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, each once: the end of a document, that of a turn where there is one, those that the
        model's generation_config.json names, and the one that its chat template writes behind an answer."""
        names = [_token_name(self._settings.get("eos_token")), "<|im_end|>", "<|endoftext|>"]
        with contextlib.suppress(UserError):  # no template that works: chat says so, and texts do not need one
            names.append(chat_format(self).end_token)
        ids = [self.token_id(name) for name in names if name is not None and self.has_token(name)]
        more = [end for end in self.generation_ends if end < self.vocab_size]
        return tuple(dict.fromkeys([self.eos_token_id, *ids, *more]))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of what decides the ids of a text: model, pre-tokenizer, normaliser, added tokens."""
        spec = json.loads(self.files["tokenizer.json"])
        for unused in ("truncation", "padding", "post_processor"):
            spec.pop(unused, None)
        return _hash(spec)

    @property
    def document_hash(self) -> str:
        """SHA-256 (hex) of what decides the ids of a document: ``content_hash``, and what begins and ends it."""
        return _hash([self.content_hash, self.bos_token_id, self.eos_token_id])

    @property
    def template_hash(self) -> str:
        """SHA-256 (hex) of what a chat template makes of a conversation: its text, and the names it may write.

        Wherever the template lies, in ``chat_template.jinja`` or in ``tokenizer_config.json``.
        """
        template = self.files.get("chat_template.jinja") or self._settings.get("chat_template")
        names = {key: _token_name(value) for key, value in self._settings.items() if key.endswith("_token")}
        return _hash([template or None, {key: name for key, name in names.items() if name is not None}])

    @property
    def encoding_hash(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a conversation and their mask: ``document_hash``,
        ``template_hash``, and the tokens that end an answer."""
        return _hash([self.document_hash, self.template_hash, sorted(self.end_ids)])

    def save(self, path: str | Path) -> None:
        """Write the directory that ``load_tokenizer`` and transformers' AutoTokenizer open.

        Each file appears whole or not at all. Raises UserError when the directory cannot be written.
        """
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, text in self.files.items():
                partial = path / f".{name}.tmp"
                try:
                    partial.write_text(text, encoding="utf-8")
                    partial.replace(path / name)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the tokenizer to '{path}': {error.strerror}; choose another directory"
            ) from None

    def __repr__(self) -> str:
        return f"Tokenizer({self.origin!r}, vocab_size={self.vocab_size})"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a directory with a ``tokenizer.json`` (ours, or any fast Hugging Face one), or that file.

    Raises UserError when it is missing or broken. Chat encoding needs a chat template, or the ChatML tokens
    ``<|im_start|>`` and ``<|im_end|>``; that is checked when a chat is encoded. Tags such as ``<think>`` that a foreign
    tokenizer lacks as single tokens are encoded as plain text there.
    """
    path = Path(path)
    directory = path.parent if path.name == "tokenizer.json" else path
    main_file = directory / "tokenizer.json"
    if not main_file.is_file():
        found = "there is no tokenizer.json in it" if directory.exists() else "the directory does not exist"
        raise UserError(
            f"no tokenizer at '{path}': {found}; train one with train_tokenizer.py, or give a Hugging Face "
            "directory with a (fast) tokenizer.json"
        )
    try:
        present = [name for name in FILES if (directory / name).is_file()]
        files = {name: (directory / name).read_text(encoding="utf-8") for name in present}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer in '{directory}': {error}") from None
    return Tokenizer(files, origin=str(directory), generation_ends=_generation_ends(directory / GENERATION))


def _generation_ends(path: Path) -> tuple[int, ...]:
    """Return the ids that end a text according to a model's generation_config.json; none where it is missing."""
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
        raise UserError(
            f"{origin}: tokenizer.json is not a tokenizer ({error}); train or copy it again"
        ) from None


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
    """The name of a special token in tokenizer_config.json, written as a string or as an object."""
    name = entry.get("content") if isinstance(entry, dict) else entry
    return name if isinstance(name, str) else None


def byte_level_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet: each byte has one visible character, so that a vocabulary file is readable text.

    Printable Latin-1 bytes stand for themselves; the 68 others move to U+0100 and on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def bad_text(text) -> UserError:
    """The error for a text that the library refused: no text at all, or one with a lone surrogate."""
    if not isinstance(text, str):
        return UserError(f"cannot tokenise {type(text).__name__}: text (str) is needed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return UserError(
            f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "has no UTF-8 form; remove it, or repair the file's \\u escapes"
        )
    return UserError("the tokenizer refused a text of valid characters")
