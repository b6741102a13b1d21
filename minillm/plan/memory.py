"""The memory of a training step, in bytes, at the moments at which it may be largest.

A step is followed through time: activations grow until the loss and are freed block by block while the gradients grow;
during the update there are only gradients. The peak is the largest of these moments, less than the sum of the largest
parts.

* loss: all activations and autocast's copies of the weights, and the logits of one chunk;
* backward: looked at before each block, the last one first;
* update: all gradients, no activations.

All parts are tensors. Other memory of a process or device (code, a CUDA context, gaps between tensors) is in
``gpus.py``.

Legend: V vocabulary, D hidden, F feed-forward width, N positions of a micro-batch, n of a chunk, c bytes of a product's
number.
"""

import dataclasses
from dataclasses import dataclass

from minillm.kernels.linear_cross_entropy import CHUNK_NUMEL
from minillm.kernels.products import chunk_len
from minillm.plan.activations import Step, block_activations, kept_activations, tables, uses_blocks, uses_varlen
from minillm.plan.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Bytes that one rank holds of weights and of what belongs to them, under an engine (``engines.py``)."""

    weights: float
    """Weights that are always in memory."""
    gradients: float
    """At the end of the backward pass."""
    optimizer: float
    """AdamW's two moments, and master weights if the engine has them."""
    gathered: float = 0
    """Weights that are gathered temporarily."""
    buffers: float = 0
    """The engine's communication buffers."""
    update: float = 0
    """Only during the update."""
    host: float = 0
    """In host memory instead of device memory."""
    short_weights: bool = False
    """Whether weights have the dtype of matrix products."""
    keeps_whole_gradients: bool = False
    """Whether gradients are unsharded between micro-batches, although they are sharded in the end (FSDP2)."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The memory at one moment, in bytes."""

    name: str
    weights: float
    """Including weights that the engine gathers and casts temporarily."""
    optimizer: float
    gradients: float
    casts: float
    """Copies of weights that autocast made."""
    activations: float
    logits: float
    """Of one chunk, with their softmax and gradient."""
    transient: float
    """Temporary memory of running operations."""
    buffers: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(value for name, value in dataclasses.asdict(self).items() if name != "name")


PARTS = tuple(field.name for field in dataclasses.fields(Moment) if field.name != "name")


def moments(step: Step, parameters: Parameters, layout: Layout) -> dict[str, Moment]:
    """Return the moments ``loss``, ``backward`` (the largest of its moments) and ``update``."""
    step = dataclasses.replace(step, short_weights=layout.short_weights)
    kept, n_layers = kept_activations(step), step.config.num_hidden_layers
    blocks = [block_activations(step, layer) for layer in range(n_layers)]
    casts = [n * step.product_bytes * step.is_mixed for n in parameters.cast_blocks]
    # Autocast's cache keeps its copies until the end of the forward pass, also those that no gradient needs.
    cached = sum(parameters.cached_blocks) * step.product_bytes * step.is_mixed
    always = {"weights": layout.weights + layout.gathered, "optimizer": layout.optimizer, "buffers": layout.buffers}

    def at(name: str, **parts: float) -> Moment:
        return Moment(name=name, **(dict.fromkeys(PARTS, 0.0) | always | parts))

    # From the second micro-batch on, the gradients of the earlier ones are in memory.
    waiting = 4.0 * parameters.trained if layout.keeps_whole_gradients else layout.gradients
    waiting = waiting if step.accumulation_steps > 1 else 0.0
    logits, extra = _loss(step)
    is_tied = step.config.tie_word_embeddings
    output_grad = 0 if step.lora_rank else parameters.embedding * step.weight_bytes
    batch, mask = _batch(step)
    whole, hidden = sum(kept.values()) + batch, step.n_positions * step.config.hidden_size
    casts_loss = cached if step.gradient_checkpointing else sum(casts)
    loss = at("loss", gradients=waiting, casts=casts_loss, activations=whole + mask, logits=logits, transient=extra)

    # The loss returns its stored gradients, scaled; then the last norm's gradient is computed.
    start = max(2 * hidden * step.product_bytes + output_grad, _norm(step))
    casts_then = 0 if step.gradient_checkpointing else sum(casts)
    backward_moments = [
        at("backward", gradients=waiting + output_grad, casts=casts_then, activations=whole, transient=start),
    ]
    per_number = layout.gradients / max(parameters.trained, 1)
    for layer in reversed(range(n_layers)):
        if step.gradient_checkpointing:  # the inputs of the blocks up to this one, and its recomputed activations
            activations = layer * step.stream + sum(blocks[layer].values())
        else:
            activations = sum(sum(block.values()) for block in blocks[: layer + 1])
        done = per_number * sum(parameters.trained_blocks[layer + 1 :])
        moment = at(
            "backward",
            # The gradient of a tied output layer waits for that of the embedding, and is added to it at the end.
            gradients=(waiting or done) + (0 if waiting and not is_tied else output_grad),
            casts=casts[layer] if step.gradient_checkpointing else sum(casts[: layer + 1]),
            activations=activations + tables(step) + batch,
            transient=_feed_forward(step, layer),
        )
        backward_moments.append(moment)
    # At the end the embedding's gradient is added to that of earlier micro-batches and of a tied output layer.
    added = output_grad * (bool(waiting) + is_tied) + step.stream
    all_gradients = max(layout.gradients, waiting)
    backward_moments.append(at("backward", gradients=all_gradients, activations=tables(step) + batch, transient=added))
    update = at("update", gradients=layout.gradients, transient=layout.update)
    return {"loss": loss, "backward": max(backward_moments, key=lambda moment: moment.total), "update": update}


def peak(step: Step, parameters: Parameters, layout: Layout) -> Moment:
    """Return the moment with the largest memory."""
    return max(moments(step, parameters, layout).values(), key=lambda moment: moment.total)


def _batch(step: Step) -> tuple[int, int]:
    """Return the bytes of a micro-batch, and of the masks that exist only in the forward pass.

    Ids, targets, documents and positions are 64 bits wide. Our blocks keep −inf for keys that a query may not see;
    those of the last micro-batch are freed with its loss, when there is a new one. torch's kernel computes such numbers
    itself, block by block, from a boolean mask (B, T, T).
    """
    pairs = step.batch_size * step.seq_len**2
    in_blocks = uses_blocks(step.seq_len, on_gpu=step.on_gpu)
    ids = 4 if step.lora_rank else 3  # otherwise they are activations: the embedding's gradient needs them
    on_gpu_with_mask = step.on_gpu and not uses_varlen(step)  # as numbers, the same for all blocks
    bias = pairs * step.product_bytes * (in_blocks or on_gpu_with_mask)
    return step.n_positions * 8 * ids + bias, bias or (0 if uses_varlen(step) else pairs)


def _loss(step: Step) -> tuple[int, int]:
    """Return the peak bytes of the chunked loss: (of logits, of other tensors).

    ``minillm/kernels/linear_cross_entropy.py``: a chunk of n positions has logits (n, V), and a second tensor of that
    size during the softmax, both at least float32. From the second chunk on, the last one's gradient is still in
    memory.
    """
    config, c = step.config, step.product_bytes
    vocab, dim, n_positions = config.vocab_size, config.hidden_size, step.n_positions
    chunk = min(n_positions, chunk_len(vocab, numel=CHUNK_NUMEL, device_type="cuda" if step.on_gpu else "cpu"))
    second = min(chunk, n_positions - chunk)
    weight, is_trained = vocab * dim, not step.lora_rank
    # Hidden states and their gradient; the output weight in the dtype of products; its gradient so far, in float32.
    extra = 2 * n_positions * dim * c + weight * c * step.is_mixed
    so_far = weight * 4 * is_trained * (second > 0)
    short = c if c < 4 else 0  # the gradient of the logits has a copy in the shorter dtype
    softmax = [8 * chunk * vocab, so_far]
    if second:  # logits are computed in the short dtype and widened while the last chunk's are in memory
        softmax[0] = max(
            softmax[0], (4 * chunk + 8 * second) * vocab, (4 + short) * (chunk + second) * vocab * bool(short)
        )
    # Then the gradient of the logits is multiplied; the product is widened before it is added.
    product = weight * is_trained * (c + (4 if c < 4 else 0)) + chunk * dim * c
    gradient = [(4 + short) * chunk * vocab, so_far + product]
    logits, more = max(softmax, gradient, key=sum)
    return logits, extra + more


def _norm(step: Step) -> int:
    """Return the bytes for the gradient of a norm: its own, the upstream one, a product; wide copies of short ones."""
    short = step.product_bytes if step.product_bytes < 4 else 0
    size = step.product_bytes + 4 * 2 + (4 if short else 0) + (4 + step.weight_bytes if step.weight_bytes < 4 else 0)
    return step.n_positions * step.config.hidden_size * size


def _feed_forward(step: Step, layer: int) -> int:
    """Return the bytes for the gradient of a feed-forward layer, without activations and finished gradients.

    The peak is in SwiGLU: gradients of the product and of gate, and one of up or a factor of it, F numbers per position
    each, without the product itself, which is no longer needed; and the gradients of the stream and of the down
    projection.
    """
    config, n, c = step.config, step.n_positions, step.product_bytes
    # A finished gradient of a weight is stored for the update, or added to the stored one.
    number = 0 if step.lora_rank or step.accumulation_steps > 1 else step.weight_bytes
    dim = config.hidden_size

    def swiglu(rows: int, width: int) -> int:
        # With an adapter the product was recomputed, and there is a cast copy of the frozen weight.
        recomputed = rows * width * c + (dim * width * c if step.is_mixed else 0) if step.lora_rank else 0
        return 2 * rows * width * c + recomputed + dim * width * number

    if not config.has_experts(layer):
        return step.stream + swiglu(n, config.intermediate_size)
    rows, width = n * config.num_experts_per_tok, config.moe_intermediate_size
    # The output of the experts is multiplied by the router's weights in float32, and has two gradients.
    weighing = rows * dim * (8 + (c if c < 4 else 0))
    inside = 2 * rows * width * c - rows * dim * c
    inside += config.num_experts * dim * width * (number - c * step.is_mixed)  # a cast copy is no longer needed
    largest, shared = max(weighing, inside), config.shared_expert_intermediate_size
    if shared:  # their gradients are computed first, then their activations are freed
        freed = (2 if step.lora_rank else 3) * n * shared * c
        largest = max(swiglu(n, shared), largest - freed + 3 * dim * shared * number + n * dim * c)
    return step.stream + largest
