"""Texts on which tokenizers disagree, to compare two of them: scripts, blanks, quotes, code, emoji, control characters.

A vocabulary decides which differences between two tokenizers can be seen at all. So the texts are made for a
vocabulary: random rows of hard fragments, and its own tokens in several contexts.
"""

import random
from collections.abc import Iterable

# Lists of fragments; a random row takes one of each of some lists, so that no kind crowds out the others.
FRAGMENTS = (
    (" ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u3000", "\u3000\u3000", "\u00a0", "\x0b"),
    ("'s", "'t", "'S", "'ll", "'VE", "’s", "’re", "don't", "I'm", "'small'", "'tis", "'the'"),
    ("'", '"', "’", "‘", "“", "”", "`", "''"),
    ("a", "abc", "Hello", "iPhone", "camelCase", "HTTPServer", "UPPER", "Σίσυφος", "é", "naïve", "Straße", "ﬁ", "ǅ"),
    ("你", "你好", "中国", "漢字", "々", "〇", "㐀", "𠀀", "豈", "ひらがな", "カタカナ", "한국어"),
    ("ไทย", "नमस्ते", "العربية", "עברית", "e\u0301"),
    ("1", "23", "4567", "3.14", "1,000", "①", "½", "٣", "Ⅷ", "0x1F", "2024年", "第3章"),
    ("，", "。", "！？", "……", "—", "「」", "（", "）", "、", ".", "...", "!", "?)", ":", ";", "-", "->", "==", "/*"),
    ("😀", "👍🏽", "👨\u200d👩\u200d👧", "❤\ufe0f", "🇨🇳", "€", "$", "№", "→", "∑", "\u200b", "\ufeff", "\ue000"),
    ("def f(x):\n    return x", "__init__", "#include <a.h>\n", "http://a.b/c?d=1&e=2", "a_b", "@x", "{}", "\\n"),
    ("<|im_end|>", "<|endoftext|>", "</s>", "<think>", "<0x0A>", "[INST]", "<unk>", "\x00", "\x7f", "\x1b[0m"),
)  # fmt: skip
CONTEXTS = (("", ""), ("a", "b"), ("你", "好"), (" ", " "), ("'", ""), ("1", "2"), ("。", "，"), ("\n", "\n"))


def hard_texts(
    tokens: Iterable[bytes] = (), *, n_random: int = 1500, n_tokens: int = 30_000, seed: int = 0
) -> list[str]:
    """Return the texts; the same arguments give the same ones.

    Args:
        tokens: of the vocabulary. Those that are not text on their own are left out.
        n_random: number of random rows.
        n_tokens: at most so many tokens get all contexts, the others only the first two.
    """
    generator = random.Random(seed)
    texts = ["", " ", "\n"]
    texts += [fragment for kind in FRAGMENTS for fragment in kind]
    texts += [
        f"{a}{b}" for kind in FRAGMENTS for other in FRAGMENTS for a, b in [(kind[0], other[-1]), (kind[-1], other[0])]
    ]
    for _ in range(n_random):
        row = [generator.choice(generator.choice(FRAGMENTS)) for _ in range(generator.randint(2, 9))]
        texts.append("".join(row))
    for number, token in enumerate(tokens):
        try:
            text = token.decode("utf-8")
        except UnicodeDecodeError:
            continue
        contexts = CONTEXTS if number < n_tokens else CONTEXTS[:2]
        texts += [before + text + after for before, after in contexts]
    return texts
