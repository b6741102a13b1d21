"""The figures of a plan, all in one dictionary: bytes, operations, hours."""

import dataclasses
from functools import cache
from typing import Any

from minillm.plan.activations import Step, kept_activations
from minillm.plan.arguments import PlanArguments
from minillm.plan.engines import ENGINES, layout, snapshot_bytes
from minillm.plan.flops import Flops, attention_shares, chinchilla_tokens, count_flops, hours
from minillm.plan.gpus import GPU, find_gpu
from minillm.plan.memory import moments, peak
from minillm.plan.parameters import Parameters, count_parameters, meta_model

WAYS = ("kept", "recomputed")  # activations without and with gradient checkpointing
MAX_ROWS = 4096  # end of the search for the largest micro-batch


def make_plan(args: PlanArguments) -> dict[str, Any]:
    """Return the figures of the plan, as ``--json`` prints them."""
    model = meta_model(args.config, lora_rank=args.lora_rank)
    parameters = count_parameters(model)
    flops = count_flops(model, args.max_seq_len, gradient_checkpointing=args.gradient_checkpointing)
    tokens = args.tokens or chinchilla_tokens(parameters.total)
    gpus = [find_gpu(name) for name in args.gpu_names]
    step = Step(
        config=args.config,
        batch_size=args.batch_size,
        seq_len=args.max_seq_len,
        accumulation_steps=args.micro_batches,
        dtype="bfloat16" if args.dtype == "auto" else args.dtype,
        gradient_checkpointing=args.gradient_checkpointing,
        lora_rank=args.lora_rank,
        base_dtype=args.base_dtype,
        on_gpu=True,
    )
    on_cpu = dataclasses.replace(step, on_gpu=False, dtype="float32" if args.dtype == "auto" else args.dtype)
    plan = {
        "arguments": dataclasses.asdict(args),
        "parameters": {name: getattr(parameters, name) for name in ("total", "active", "trained")},
        "flops_per_token": _flops(flops, args),
        "tokens": tokens,
        "tokens_per_update": step.n_positions * args.micro_batches * args.ranks,
        "memory": {
            "dtype": step.dtype,
            "activations": kept_activations(dataclasses.replace(step, gradient_checkpointing=False)),
            **{way: _moments(step, parameters, way) for way in WAYS},
            "cpu_dtype": on_cpu.dtype,
            "cpu": {way: _peak("ddp", on_cpu, parameters, 1, way) for way in WAYS},
            "snapshot": snapshot_bytes(parameters) if args.async_save else 0,
        },
        "engines": {engine: _engine(engine, step, parameters, args.ranks) for engine in ENGINES},
    }
    batch_sizes = _BatchSizes(step, parameters, args.ranks)
    plan["gpus"] = {gpu.name: _gpu(gpu, args, flops, tokens, batch_sizes) for gpu in gpus}
    return plan | {"recommendation": recommend(plan)}


def _flops(flops: Flops, args: PlanArguments) -> dict[str, float]:
    needed, computed = attention_shares(args.max_seq_len, on_gpu=True)
    blocks = attention_shares(args.max_seq_len, on_gpu=False)[1]
    shares = {"attention_needed": needed, "attention_computed": computed, "attention_computed_cpu": blocks}
    return dataclasses.asdict(flops) | {"forward": flops.forward} | shares


def _moments(step: Step, parameters: Parameters, way: str) -> dict[str, dict]:
    step = dataclasses.replace(step, gradient_checkpointing=way == "recomputed")
    by_name = moments(step, parameters, layout("ddp", step, parameters))
    return {name: dataclasses.asdict(moment) | {"total": moment.total} for name, moment in by_name.items()}


def _peak(engine: str, step: Step, parameters: Parameters, ranks: int, way: str) -> float:
    step = dataclasses.replace(step, gradient_checkpointing=way == "recomputed")
    return peak(step, parameters, layout(engine, step, parameters, ranks=ranks)).total


def _engine(engine: str, step: Step, parameters: Parameters, ranks: int) -> dict[str, float]:
    """Return the memory of a rank under an engine."""
    held = layout(engine, step, parameters, ranks=ranks)
    parts = {name: getattr(held, name) for name in ("weights", "gradients", "optimizer", "gathered", "buffers", "host")}
    return parts | {f"peak_{way}": _peak(engine, step, parameters, ranks, way) for way in WAYS}


class _BatchSizes:
    """The peak memory of a step for any number of rows, each computed once."""

    def __init__(self, step: Step, parameters: Parameters, ranks: int):
        way = WAYS[step.gradient_checkpointing]

        @cache
        def peak_of(engine: str, dtype: str, n_rows: int) -> float:
            changed = dataclasses.replace(step, dtype=dtype, batch_size=n_rows)
            return _peak(engine, changed, parameters, ranks, way)

        self.peak_of = peak_of

    def largest(self, gpu: GPU, engine: str, dtype: str) -> int:
        """Return the largest number of rows per micro-batch that fits; 0 if not even one does."""
        n_fit, n_too_many = 0, 1
        while n_too_many <= MAX_ROWS and gpu.needed(self.peak_of(engine, dtype, n_too_many)) <= gpu.memory:
            n_fit, n_too_many = n_too_many, 2 * n_too_many
        while n_too_many - n_fit > 1 and n_fit < MAX_ROWS:
            middle = (n_fit + n_too_many) // 2
            fits = gpu.needed(self.peak_of(engine, dtype, middle)) <= gpu.memory
            n_fit, n_too_many = (middle, n_too_many) if fits else (n_fit, middle)
        return n_fit


def _gpu(gpu: GPU, args: PlanArguments, flops: Flops, tokens: float, batch_sizes: _BatchSizes) -> dict[str, Any]:
    dtype = gpu.dtype(args.dtype)
    engines = {}
    for engine in ENGINES:
        needed = gpu.needed(batch_sizes.peak_of(engine, dtype, args.batch_size))
        rows = batch_sizes.largest(gpu, engine, dtype)
        engines[engine] = {"needed": needed, "fits": needed <= gpu.memory, "largest_batch_size": rows}
    peak_rate = gpu.peak(dtype)
    return {
        "memory": gpu.memory,
        "dtype": dtype,
        "peak_flops": peak_rate,
        "hours": hours(flops, tokens, peak=peak_rate, mfu=args.mfu, ranks=args.ranks),
        "engines": engines,
    }


def recommend(plan: dict[str, Any]) -> list[str]:
    """Return advice in a few sentences: the simplest engine that fits, and the smallest GPU for it."""
    args, gpus, advice = plan["arguments"], plan["gpus"], []
    options = {"ddp": "the whole model on each GPU", "fsdp": "--parallel fsdp", "zero3_offload": "ZeRO 3 and offload"}
    if args["ranks"] == 1:  # nothing can be sharded
        del options["fsdp"]
    for engine, way in options.items():
        fitting = [name for name in gpus if gpus[name]["engines"][engine]["fits"]]
        if fitting:
            name = min(fitting, key=lambda name: gpus[name]["memory"])
            n_rows = gpus[name]["engines"][engine]["largest_batch_size"]
            advice.append(f"It fits {name}, {way}; there --batch_size may be up to {n_rows}.")
            break
        advice.append(f"It fits none of these GPUs with {way}.")
    if engine == "ddp":
        return advice
    kept, recomputed = (plan["engines"]["ddp"][f"peak_{way}"] for way in WAYS)
    if not args["gradient_checkpointing"] and recomputed < 0.8 * kept:
        advice.append(
            f"--gradient_checkpointing takes {recomputed / kept:.0%} of the memory, in 4/3 of the time: try it first."
        )
    if args["batch_size"] > 1:
        advice.append("A smaller --batch_size with more --accumulation_steps makes the same update with less memory.")
    return advice
