"""A sentence as tokens, with more and more merges (chapter 2)."""

from minillm.tokenizer import train_bpe

TEXT = "the cat sat on 26 mats 猫"
ENGLISH = ["the cat sat on the mat", "the dog sat on the cat", "the cat and the dog"] * 20
CHINESE = ["猫坐在垫子上", "狗坐在猫上", "猫和狗"] * 20
N_BYTES = 267  # tokens without any merge: the 256 bytes and 11 special tokens
CHAR = 1.0  # width of a character
GAP = 0.55


def compute() -> dict:
    """Return the tokens of the sentence, as they are shown, by the number of merges."""
    rows = []
    for n_merges in (0, 4, 8, 16, 32):
        tokenizer = train_bpe(iter(ENGLISH + CHINESE), vocab_size=N_BYTES + n_merges)
        ids = tokenizer.encode(TEXT)
        tokens = [tokenizer.token_bytes(token) for token in ids]
        rows.append({"merges": n_merges, "tokens": [[_shown(token), len(token)] for token in tokens]})
    return {"rows": rows}


def draw(figure, numbers, theme) -> None:
    """Draw a row of boxes per vocabulary; the darker a box, the more bytes it stands for."""
    rows = numbers["rows"]
    figure.set_size_inches(figure.get_figwidth(), 2.7)
    axes = figure.add_subplot()
    axes.axis("off")
    width = max(sum(len(text) * CHAR + GAP for text, _ in row["tokens"]) for row in rows)
    for line, row in enumerate(rows):
        x = 0.0
        for text, n_bytes in row["tokens"]:
            size = len(text) * CHAR
            share = min(0.08 + 0.08 * n_bytes, 0.5)
            axes.add_patch(_box(x, -line - 0.36, size, 0.72, theme.shade(share)))
            axes.text(x + size / 2, -line, text, family="DejaVu Sans Mono", fontsize=9, ha="center", va="center")
            x += size + GAP
        axes.text(-1.2, -line, f"+{row['merges']}", ha="right", va="center", color=theme.muted)
        axes.text(width + 1.2, -line, str(len(row["tokens"])), ha="left", va="center", color=theme.series[0])
    axes.set_xlim(-4, width + 3.5)
    axes.set_ylim(-len(rows) + 0.5, 0.5)


def _shown(token: bytes) -> str:
    """Return a token as text in which spaces can be seen; bytes that are not ASCII as hexadecimal numbers."""
    return token.decode().replace(" ", "␣") if token.isascii() else token.hex(" ").upper()


def _box(x: float, y: float, width: float, height: float, color: str):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.2", facecolor=color, edgecolor="none"
    )
