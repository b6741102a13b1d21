"""What one of several GPUs holds, by ZeRO stage: by the formula, and with all that a real step needs (chapter 15)."""

from minillm.config import ModelConfig
from minillm.plan.activations import Step
from minillm.plan.engines import layout, zero_bytes
from minillm.plan.gpus import find_gpu
from minillm.plan.memory import peak
from minillm.plan.parameters import count_parameters, meta_model

PARTS = ("weights", "gradients", "optimizer")
GIB = 2**30
N_PARAMETERS, RANKS = 7.5e9, 64  # of the paper's figure 1
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
STEP_RANKS = 8


def compute() -> dict:
    """Return bytes by part: the paper's formula by stage, and a step of a model of the shape of Llama 2 7B."""
    formula = {}
    for stage in range(4):
        parts = {"weight": 2.0, "gradient": 2.0, "optimizer": 12.0}
        only = [{name: size * (name == part) for name, size in parts.items()} for part in parts]
        sizes = [zero_bytes(N_PARAMETERS, stage=stage, ranks=RANKS, **part) / 1e9 for part in only]
        formula[f"ZeRO {stage}"] = dict(zip(PARTS, sizes, strict=True))
    config = ModelConfig(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
        intermediate_size=11008, tie_word_embeddings=False,
    )  # fmt: skip
    step = Step(config=config, batch_size=1, seq_len=2048, dtype="bfloat16", gradient_checkpointing=True, on_gpu=True)
    parameters = count_parameters(meta_model(config))
    steps = {}
    for engine in ENGINES:
        moment = peak(step, parameters, layout(engine, step, parameters, ranks=STEP_RANKS))
        sizes = {part: getattr(moment, part) / GIB for part in (*PARTS, "buffers")}
        steps[engine] = sizes | {"activations": moment.total / GIB - sum(sizes.values())}  # and what goes with them
    return {"formula": formula, "steps": steps, "memory": find_gpu("H100").memory / GIB}


def draw(figure, numbers, theme) -> None:
    """Draw bars of the formula on the left, of the step on the right."""
    figure.set_size_inches(figure.get_figwidth(), 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(4, 5))
    for axes, bars, title, unit in (
        (left, numbers["formula"], rf"$N = 7.5 \cdot 10^9$, $R = {RANKS}$", "GB"),
        (right, numbers["steps"], rf"Llama 2 7B, bf16, $R = {STEP_RANKS}$", "GiB"),
    ):
        highest = max(sum(parts.values()) for parts in bars.values())
        for place, parts in enumerate(bars.values()):
            below = 0.0
            for n, (name, size) in enumerate(parts.items()):
                axes.bar(place, size, bottom=below, width=0.72, color=theme.series[(0, 1, 2, 3, 4)[n]], label=name)
                below += size
            axes.text(place, below + 0.015 * highest, f"{below:.3g}", ha="center", va="bottom", fontsize=9.5)
        axes.set_xticks(range(len(bars)), list(bars), color=theme.text)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, highest * 1.12)
        axes.set_title(title)
        axes.set_ylabel(unit)
    right.axhline(numbers["memory"], color=theme.muted, linestyle="--", linewidth=1.2)
    right.text(4.5, numbers["memory"] + 1, "H100", ha="right", va="bottom", color=theme.muted, fontsize=9)
    handles, names = right.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=5)
