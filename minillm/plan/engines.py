"""The memory of one rank under each engine: one process or DDP, FSDP2, and DeepSpeed's ZeRO 1 to 3.

Rajbhandari et al., ZeRO (2020), section 3: mixed-precision Adam takes 16 bytes per parameter: 2 for the weight, 2 for
its gradient, and K = 12 for master weight and two moments, all float32. Stage 1 shares the 12 among the ranks, stage 2
the gradient too, stage 3 the weight too (section 5). Our own training takes 16 as well, cut another way: the weight is
float32 (4) and its own master, the gradient float32 (4), two moments (8); autocast's short copies come on top, with
the activations. FSDP2 shares these 16, and gathers weights in the short dtype. DeepSpeed in bfloat16 or float16 keeps
short weights and gradients, as in the paper; in float32 its stages 1 and 2 copy the weights into masters all the same:
4 + 4 + 12. With an offload (Ren et al., ZeRO-Offload, 2021) the CPU makes the update, from float32 gradients there.
"""

from minillm.distributed.zero import bucket_size, live_parameters
from minillm.errors import UserError
from minillm.plan.activations import Step
from minillm.plan.memory import Layout
from minillm.plan.parameters import Parameters

ENGINES = {
    "ddp": "one process; DDP with several ranks",
    "fsdp": "FSDP2",
    "zero1": "ZeRO 1: optimizer sharded",
    "zero2": "ZeRO 2: gradients too",
    "zero3": "ZeRO 3: parameters too",
    "zero2_offload": "ZeRO 2, optimizer on the CPU",
    "zero3_offload": "ZeRO 3, optimizer and parameters on the CPU",
}
MOMENTS = 8  # bytes per parameter: AdamW's two float32 moments
MASTER = 4  # and float32 weights
SNAPSHOT = 12  # what a checkpoint keeps of a parameter: float32 weight and two moments


def zero_bytes(n_parameters: float, *, stage: int, ranks: int, weight=2.0, gradient=2.0, optimizer=12.0) -> float:
    """Return the bytes of weights, gradients and optimizer per rank (ZeRO, section 3 and figure 1).

    Args:
        stage: 0 (nothing is sharded) to 3. weight, gradient, optimizer: bytes per parameter; the paper's by default.
    """
    shares = [weight / (ranks if stage >= 3 else 1), gradient / (ranks if stage >= 2 else 1)]
    return n_parameters * (sum(shares) + optimizer / (ranks if stage >= 1 else 1))


def snapshot_bytes(parameters: Parameters) -> int:
    """Return what ``--async_save`` keeps in the main rank's host memory while a checkpoint is written."""
    return SNAPSHOT * parameters.trained


def layout(engine: str, step: Step, parameters: Parameters, *, ranks: int = 1) -> Layout:
    """Return what a rank holds under ``engine`` (a key of ``ENGINES``)."""
    if engine not in ENGINES:
        raise UserError(f"engine {engine}: choose from {', '.join(ENGINES)}")
    if engine == "ddp":
        return _whole(step, parameters, ranks)
    return _fsdp(step, parameters, ranks) if engine == "fsdp" else _zero(engine, step, parameters, ranks)


def _weights(step: Step, parameters: Parameters) -> float:
    """Return the bytes of the weights as they are kept: trained ones in float32, frozen ones in their dtype."""
    return 4.0 * parameters.trained + step.weight_bytes * (parameters.total - parameters.trained)


def _whole(step: Step, parameters: Parameters, ranks: int) -> Layout:
    gradients = 4.0 * parameters.trained
    return Layout(
        weights=_weights(step, parameters),
        gradients=gradients,
        optimizer=MOMENTS * parameters.trained,
        buffers=gradients if ranks > 1 else 0.0,  # DDP's buckets are copies of all gradients
    )


def _fsdp(step: Step, parameters: Parameters, ranks: int) -> Layout:
    """Blocks and, as one group, all that is outside of them are gathered in the dtype of products.

    The group outside stays gathered from the forward to the backward pass; of the blocks, the one being computed and
    the one that is fetched ahead. Gradients of the block being computed are whole, in that dtype and, to be reduced, in
    float32. Next to an adapter nothing is cast on the way (``minillm/distributed/fsdp.py``).
    """
    is_short = step.product_bytes < 4 and not step.lora_rank
    gathered = step.product_bytes if is_short else step.weight_bytes
    block, trained = max(parameters.blocks), max(parameters.trained_blocks)
    return Layout(
        weights=_weights(step, parameters) / ranks,
        gradients=4.0 * parameters.trained / ranks,
        optimizer=MOMENTS * parameters.trained / ranks,
        gathered=gathered * (2 * block + parameters.outside),
        buffers=trained * (4 + (step.product_bytes if is_short else 0)),
        short_weights=is_short,
        keeps_whole_gradients=True,
    )


def _zero(engine: str, step: Step, parameters: Parameters, ranks: int) -> Layout:
    stage, offload = int(engine[4]), engine.endswith("offload")
    # An adapter is float32 next to frozen weights of any dtype: DeepSpeed then casts products alone.
    is_short = step.product_bytes < 4 and not step.lora_rank
    number = step.product_bytes if is_short else 4
    has_master = is_short or stage < 3 or offload
    weights = float(number * parameters.total) if not step.lora_rank else _weights(step, parameters)
    weights /= ranks if stage == 3 else 1
    gradients = float(number * parameters.trained) / (ranks if stage >= 2 else 1)
    optimizer = (MOMENTS + MASTER * has_master) * parameters.trained / ranks
    bucket = bucket_size(step.config.hidden_size) * number
    host = 0.0
    if offload:  # reduced gradients go to the host too, in float32, where the update is made
        host = optimizer + 4 * parameters.trained / ranks + (weights if stage == 3 else 0)
        optimizer = gradients = 0.0
        weights = 0.0 if stage == 3 else weights
    return Layout(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        gathered=min(parameters.total, live_parameters(step.config.hidden_size)) * number if stage == 3 else 0,
        buffers=bucket * (2 if stage == 3 else 1),
        # The rank's share of the gradients, flat and in float32.
        update=0 if offload or stage == 3 else 4.0 * parameters.trained / ranks,
        host=host,
        short_weights=is_short,
    )
