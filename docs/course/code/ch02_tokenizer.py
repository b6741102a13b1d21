"""Chapter 2: four merges by hand, what a tokenizer saves, and what it costs when the language is another one."""

from minillm.tokenizer.bpe import BytePairEncoding, learn_merges
from minillm.tokenizer.train import train_bpe

# 1. Three words and how often each occurs. The 256 bytes are the first tokens; each merge adds one.
counts = {b"low": 5, b"lower": 2, b"newest": 6}
tokens, merges = learn_merges(counts, vocab_size=256 + 4)
for token in tokens[256:]:
    print(f"merge: {token.decode()}")
bpe = BytePairEncoding(tokens, merges, pattern=r"\p{L}+")
for word in ("newest", "lowest", "猫"):
    print(f"tokens of {word}: {len(bpe.encode(word))}")

# 2. A tokenizer of English texts, on a text that it has seen and on one that it has not.
english = ["the cat sat on the mat", "the dog sat on the cat", "the cat and the dog"] * 20
chinese = ["猫坐在垫子上", "狗坐在猫上", "猫和狗"] * 20


def bytes_per_token(tokenizer, text: str) -> float:
    """Return how many bytes of the text one token stands for."""
    return len(text.encode("utf-8")) / len(tokenizer.encode(text))


of_english = train_bpe(iter(english), vocab_size=280)
of_both = train_bpe(iter(english + chinese), vocab_size=280)
print(f"English, bytes per token: {bytes_per_token(of_english, english[0]):.2f}")
print(f"Chinese with the English tokenizer, bytes per token: {bytes_per_token(of_english, chinese[0]):.2f}")
print(f"Chinese with a tokenizer of both, bytes per token: {bytes_per_token(of_both, chinese[0]):.2f}")

# 3. Nothing is lost, and every number is spelled digit by digit.
text = "猫 costs 2026 €\n"
print(f"decoded text is the text: {int(of_english.decode(of_english.encode(text)) == text)}")
print(f"tokens of 2026: {len(of_english.encode('2026'))}")
print(f"bytes of 猫: {len('猫'.encode())}, of which two are shown as {bpe.decode(bpe.encode('猫')[:2])}")
