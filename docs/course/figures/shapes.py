"""A text's way through the model, with the shape of every tensor on it (chapter 12)."""

import torch

from minillm.config import ModelConfig
from minillm.model import Transformer, attention

T = 6
STREAM = 12  # where the residual stream runs
BLOCK = "model.layers.0."


def compute() -> dict:
    """Return the shapes that a forward pass of the demo's model shows, by name, and the parameters of its modules."""
    model = Transformer(ModelConfig.preset("demo")).eval()
    found: dict[str, list[int]] = {"input_ids": [1, T]}
    parameters = {}
    for name, module in model.named_modules():
        name = name.removeprefix(BLOCK)
        if next(module.children(), None) is None and not name.startswith("model.layers."):
            parameters[name] = sum(p.numel() for p in module.parameters())
            module.register_forward_hook(lambda module, inputs, output, name=name: found.update({name: output.shape}))
    attend = attention.attend

    def watched(q, k, v, plan):
        mixed = attend(q, k, v, plan)
        found.update(q=q.shape, k=k.shape, v=v.shape, mixed=mixed.shape)
        return mixed

    attention.attend = watched
    try:
        with torch.no_grad():
            found["logits"] = model(torch.zeros(1, T, dtype=torch.long)).shape
    finally:
        attention.attend = attend
    config = model.config
    sizes = {
        "T": T, "V": config.vocab_size, "D": config.hidden_size, "L": config.num_hidden_layers,
        "H": config.num_attention_heads, "H_{kv}": config.num_key_value_heads, "K": config.head_dim,
        "F": config.intermediate_size,
    }  # fmt: skip
    return {"sizes": sizes, "shapes": {name: list(shape) for name, shape in found.items()}, "parameters": parameters}


def draw(figure, numbers, theme) -> None:
    """Draw the stream from top to bottom on the left; what reads it and adds to it goes to the right and back."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    shapes, sizes, parameters = numbers["shapes"], numbers["sizes"], numbers["parameters"]
    figure.set_size_inches(figure.get_figwidth(), 6.3)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_xlim(0, 100)
    axes.set_ylim(-5, 101)

    def shape(name: str) -> str:
        return "(" + ", ".join(map(str, shapes[name])) + ")"

    def box(x: float, y: float, text: str, *, name: str = "", color: int = 0, width: float = 17, height: float = 8.2):
        count = f"\n{parameters[name]:,}" if name else ""
        style = {"boxstyle": "round,pad=0,rounding_size=1", "linewidth": 1.2, "edgecolor": theme.series[color]}
        axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor="none", **style))
        axes.text(x, y, text + count, ha="center", va="center", fontsize=8.5, linespacing=1.25)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
        style = {"arrowstyle": "-|>", "color": theme.muted, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
        axes.annotate("", end, start, arrowprops=style)
        middle = (start[0] + end[0]) / 2
        axes.text(middle, start[1] + 0.8, text, ha="center", va="bottom", fontsize=8, color=theme.muted)

    def add(y: float) -> None:
        circle = {"boxstyle": "circle,pad=0.15", "facecolor": theme.background, "edgecolor": theme.text}
        axes.text(STREAM, y, "+", ha="center", va="center", fontsize=13, bbox=circle)

    def branch(y: float, norm: str, middle: dict[str, str], inside: str, last: str, color: int, returns: float):
        """Draw a norm, the projections side by side, what is made of them, and the way back at ``returns``."""
        arrow((STREAM, y), (21.5, y))
        box(30, y, norm.replace("attention_", "attention_\n"), name=norm, color=5, height=10.5)
        places = [y + 10 * (n - (len(middle) - 1) / 2) for n in range(len(middle))][::-1]
        for place, (name, result) in zip(places, middle.items(), strict=True):
            arrow((38.5, y), (44.5, place))
            box(51, place, name.rpartition(".")[2], name=name, color=color, width=13)
            arrow((57.5, place), (75, place), shape(result))
        height = places[0] - places[-1] + 8.2
        box(84, y, inside, color=color, width=18, height=height)
        arrow((84, y - height / 2), (84, returns + 4.1))
        if "attn" in last:
            axes.text(85, (y - height / 2 + returns + 4.1) / 2, shape("mixed"), va="center", fontsize=8,
                      color=theme.muted)  # fmt: skip
        box(84, returns, last.rpartition(".")[2], name=last, color=color, width=18)
        arrow((75, returns), (STREAM + 2.2, returns), shape(last))
        add(returns)

    legend = "    ".join(f"${name} = {size}$" for name, size in sizes.items())
    axes.text(50, 101, legend, ha="center", va="top", fontsize=9, color=theme.muted)
    axes.text(STREAM, 95, f"input_ids {shape('input_ids')}", ha="center", va="center", fontsize=8.5)
    axes.plot([STREAM, STREAM], [93.4, -0.5], color=theme.text, linewidth=1.6, zorder=0)
    cover = {"facecolor": theme.background, "edgecolor": "none", "zorder": 0.5}
    axes.add_patch(Rectangle((STREAM - 8.5, 82.9), 17, 8.2, **cover))  # the stream begins behind this box
    box(STREAM, 87, "embed_tokens", name="model.embed_tokens", color=4)
    axes.text(STREAM - 1.2, 76.5, shape("model.embed_tokens"), ha="right", va="center", fontsize=8, color=theme.muted)
    # The block, as often as the model has it.
    axes.add_patch(Rectangle((0.3, 5.9), 99.4, 74.6, facecolor="none", edgecolor=theme.muted, linewidth=0.8,
                             linestyle=":"))  # fmt: skip
    axes.text(98.5, 79.5, f"× {sizes['L']}", ha="right", va="top", fontsize=11)
    heads = {f"self_attn.{name}_proj": name for name in "qkv"}
    attended = r"$\mathrm{softmax}(qk^T/\sqrt{K})\,v$"
    branch(64, "input_layernorm", heads, attended, "self_attn.o_proj", 0, 42)
    wide = {f"mlp.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up")}
    branch(27, "post_attention_layernorm", wide, r"silu(gate) $\cdot$ up", "mlp.down_proj", 1, 11.3)
    # Output; its matrix is the embedding.
    arrow((STREAM, -0.5), (21.5, -0.5))
    box(30, -0.5, "norm", name="model.norm", color=5)
    arrow((38.5, -0.5), (56, -0.5), shape("model.norm"))
    box(64.5, -0.5, "lm_head\n= embed_tokens", color=4)
    arrow((73, -0.5), (99, -0.5), f"logits {shape('logits')}")
