"""From text to token ids and back: byte-level BPE or SentencePiece, their files, and the chat format."""

from minillm.tokenizer.base import SPECIAL_TOKENS, TAG_TOKENS, Tokenizer, has_tokenizer, load_tokenizer
from minillm.tokenizer.chat import check_messages, encode_chat, encode_chats, encode_started
from minillm.tokenizer.extend import add_tokens, token_names, with_chat
from minillm.tokenizer.sentencepiece_bpe import train_sentencepiece
from minillm.tokenizer.train import bytes_per_token, record_texts, train_bpe

__all__ = [
    "SPECIAL_TOKENS",
    "TAG_TOKENS",
    "Tokenizer",
    "add_tokens",
    "bytes_per_token",
    "check_messages",
    "encode_chat",
    "encode_chats",
    "encode_started",
    "has_tokenizer",
    "load_tokenizer",
    "record_texts",
    "token_names",
    "train_bpe",
    "train_sentencepiece",
    "with_chat",
]
