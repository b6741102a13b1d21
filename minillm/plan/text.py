"""Formats a plan as text.

Sizes are binary: 1 GiB is 2^30 bytes.
"""

from typing import Any

from minillm.plan.engines import ENGINES
from minillm.plan.gpus import CONTEXT, GAPS, USABLE
from minillm.plan.memory import PARTS

GIB = 2**30


def format_plan(plan: dict[str, Any]) -> str:
    """Return the pages of a plan (``report.make_plan``): model, operations, memory, engines, GPUs, advice."""
    sections = (_model, _flops, _memory, _engines, _gpus, _advice)
    return "\n\n".join(section(plan) for section in sections)


def format_table(rows: list[list[str]]) -> str:
    """Return rows of cells as text: the first column left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join("  " + line.rstrip() for line in lines)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f}"


def _model(plan: dict) -> str:
    numbers, args = plan["parameters"], plan["arguments"]
    rows = [["parameters", f"{numbers['total']:,}"]]
    if numbers["active"] != numbers["total"]:
        rows.append(["active per token", f"{numbers['active']:,}"])
    rows.append(["trained", f"{numbers['trained']:,}"])
    rows.append(["tokens per update", f"{plan['tokens_per_update']:,}"])
    how = "" if args["tokens"] else " (20 per parameter: Hoffmann et al., 2022; --tokens sets another number)"
    return f"MODEL\n{format_table(rows)}\n  to train on: {plan['tokens']:,.0f} tokens{how}"


def _flops(plan: dict) -> str:
    flops, args = plan["flops_per_token"], plan["arguments"]
    frozen = " (of frozen weights no gradient is made)" if args["lora_rank"] else ""
    rows = [
        ["forward", f"{flops['forward']:,.0f}", ""],
        ["  matrices of the blocks", f"{flops['matrices']:,.0f}", "2 per parameter that the token meets"],
        ["  attention", f"{flops['attention']:,.0f}", "4·H·K·T per block, as if every query met all T keys"],
        ["  output layer", f"{flops['output']:,.0f}", "2·V·D"],
        ["training", f"{flops['training']:,.0f}", f"{flops['training'] / flops['forward']:.2f} x forward{frozen}"],
    ]
    if args["gradient_checkpointing"]:
        done = flops["training"] + flops["recomputed"]
        rows.append(
            ["  with recomputation", f"{done:,.0f}", f"{done / flops['forward']:.2f} x forward: blocks run twice"]
        )
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip() for row in rows]
    note = (
        f"  Causal rows of one document need {flops['attention_needed']:.1%} of that attention, packed short documents "
        f"less. A GPU's\n  kernel computes little more in 16 bits, and with a document mask, in float32, "
        f"{flops['attention_computed']:.0%}; ours on a\n  CPU {flops['attention_computed_cpu']:.1%}. "
        f"MFU counts all of it (PaLM, appendix B)."
    )
    return f"FLOPS PER TOKEN, rows of {args['max_seq_len']} tokens\n" + "\n".join(lines) + "\n" + note


def _memory(plan: dict) -> str:
    memory = plan["memory"]
    ways = [memory["kept"], memory["recomputed"]]
    columns = [moment for way in ways for moment in way.values()]
    names = ["", *(name for way in ways for name in way)]
    rows = [names, *([part, *(_size(moment[part]) for moment in columns)] for part in (*PARTS, "total"))]
    peaks = [max(moment["total"] for moment in way.values()) for way in ways]
    on_cpu = [_size(size) for size in memory["cpu"].values()]
    text = (
        f"MEMORY OF ONE PROCESS on a GPU, products in {memory['dtype']}, GiB of tensors at three moments of a step\n"
        f"(left: activations kept; right: --gradient_checkpointing)\n{format_table(rows)}\n"
        f"  The peak is the largest moment: {_size(peaks[0])} GiB, with gradient checkpointing {_size(peaks[1])} GiB.\n"
        f"  On a CPU in {memory['cpu_dtype']}: {on_cpu[0]} GiB and {on_cpu[1]} GiB of tensors. The process grows to "
        f"1.1 to 1.5\n  times that, with checkpointing up to 2.3 times, because its heap has gaps.\n"
        f"  activations: {', '.join(f'{name} {_size(size)}' for name, size in memory['activations'].items())}; "
        f"logits: of one chunk\n  of the loss; casts: autocast's copies of weights; transient: what operations hold."
    )
    if memory["snapshot"]:
        text += (
            f"\n  Host memory of the main rank: {_size(memory['snapshot'])} GiB while a checkpoint is written "
            f"(--async_save: 12 bytes per parameter)."
        )
    return text


def _engines(plan: dict) -> str:
    parts = ("weights", "gradients", "optimizer", "gathered", "buffers", "peak_kept", "peak_recomputed", "host")
    heads = ["", *(part for part in parts[:5]), "peak", "checkpointing", "host"]
    rows = [heads]
    for engine, figures in plan["engines"].items():
        rows.append([ENGINES[engine], *(_size(figures[part]) for part in parts)])
    ranks = plan["arguments"]["ranks"]
    return (
        f"ENGINES with {ranks} rank{'s' * (ranks > 1)}, GiB per rank\n{format_table(rows)}\n"
        f"  peak: with activations, logits and the rest; host: in the computer's memory instead of the GPU's."
    )


def _gpus(plan: dict) -> str:
    args = plan["arguments"]
    rows = [["", "GiB", "dtype", "TFLOP/s", "hours", *ENGINES]]
    for name, gpu in plan["gpus"].items():
        cells = []
        for figures in gpu["engines"].values():
            most = figures["largest_batch_size"]
            cells.append(f"{most}" if figures["fits"] else f"({most})" if most else "no")
        speed = [f"{gpu['memory'] / GIB:.1f}", gpu["dtype"], f"{gpu['peak_flops'] / 1e12:.0f}", f"{gpu['hours']:,.1f}"]
        rows.append([name, *speed, *cells])
    ranks = args["ranks"]
    return (
        f"GPUS: hours for {plan['tokens']:,.0f} tokens on {ranks} GPU{'s' * (ranks > 1)}, and the largest micro-batch\n"
        f"{format_table(rows)}\n"
        f"  In brackets: --batch_size {args['batch_size']} does not fit, so many rows do. no: not even one row.\n"
        f"  Assumed: MFU {args['mfu']:.0%} of the data sheet's peak (--mfu); {USABLE:.0%} of the memory can be used; "
        f"besides the tensors\n  {CONTEXT / GIB:.0f} GiB for CUDA and {GAPS:.0%} for gaps. Hours leave out "
        f"communication, validation and saving."
    )


def _advice(plan: dict) -> str:
    return "\n".join(["ADVICE", *(f"  {line}" for line in plan["recommendation"])])
