"""The bytes that a forward pass keeps for the backward pass.

Korthikanti et al., Reducing Activation Recomputation (2022), section 4, count a GPT block this way: each layer keeps
what the gradient of its weight or of its input needs. The sums here are those of our blocks:

* the stream (B, T, D): the inputs of two norms, and one float32 number per position for each;
* attention: the normalised input once for three projections, queries, keys, values, and the input of the output
  projection. RoPE keeps only angles, once for all blocks. On a CPU up to 1,024 positions the probabilities of the
  blocks of 64 queries that are computed; else torch's kernel keeps a log-sum per query and, on a CPU, the mask of the
  documents as numbers (B, T, T), rebuilt by every block;
* SwiGLU: the normalised input, gate, up and their product, 3·F numbers per position. With an adapter the product is
  recomputed;
* experts: the same for the k copies of each token, their inputs and outputs, and the router's numbers.

Legend: B rows, T positions, N = B·T, D hidden, H query heads, G kv heads, K head width, F feed-forward width, E
experts, k experts per token, c bytes of a number in the dtype of products, s of the stream.
"""

from dataclasses import dataclass

from minillm.config import ModelConfig
from minillm.kernels.block_attention import BLOCK_LEN, MAX_SEQ_LEN

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One micro-batch of a training step on one rank; every position is a target, each row one document."""

    config: ModelConfig
    batch_size: int
    """B, rows."""
    seq_len: int
    """T, positions."""
    accumulation_steps: int = 1
    """Micro-batches per update."""
    dtype: str = "float32"
    """Of products: float32, or autocast's."""
    gradient_checkpointing: bool = False
    """Keep only each block's input."""
    lora_rank: int = 0
    """R of an adapter on all linear layers, the rest frozen; 0: everything is trained."""
    base_dtype: str = "float32"
    """Of the frozen weights next to an adapter."""
    on_gpu: bool = False
    """torch's kernels for CUDA instead of ours for the CPU."""
    short_weights: bool = False
    """The forward pass sees weights in the dtype of products (FSDP2, DeepSpeed), and so is the stream."""

    @property
    def n_positions(self) -> int:
        """N, positions of the micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def product_bytes(self) -> int:
        """c, bytes of a number that goes into products."""
        return BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """s, bytes of a number of the weights in the forward pass and of the stream, which starts as an embedding."""
        return self.product_bytes if self.short_weights else BYTES[self.base_dtype] if self.lora_rank else 4

    @property
    def is_mixed(self) -> bool:
        """Whether weights are copied into the dtype of products."""
        return self.product_bytes != self.weight_bytes

    @property
    def stream(self) -> int:
        """Bytes of the residual stream (B, T, D) at one place."""
        return self.n_positions * self.config.hidden_size * self.weight_bytes


def uses_blocks(seq_len: int, *, on_gpu: bool) -> bool:
    """Return whether attention runs in our blocks (``minillm/kernels/block_attention.py``)."""
    return not on_gpu and 1 < seq_len <= MAX_SEQ_LEN


def uses_varlen(step: Step) -> bool:
    """Return whether attention computes the documents one by one (``minillm/kernels/varlen_attention.py``)."""
    return step.on_gpu and step.product_bytes == 2


def visible_pairs(seq_len: int) -> int:
    """Return the pairs of query and key that our blocks compute for a row of one document: about T·(T + 64) / 2."""
    starts = range(0, seq_len, BLOCK_LEN)
    return sum((min(start + BLOCK_LEN, seq_len) - start) * min(start + BLOCK_LEN, seq_len) for start in starts)


def block_activations(step: Step, layer: int) -> dict[str, int]:
    """Return the bytes that block ``layer`` keeps, by part: stream, attention, feed-forward."""
    config, n = step.config, step.n_positions
    # torch's norm on a GPU keeps the float32 copy that it computed on.
    norm_input = 4 * n * config.hidden_size if step.on_gpu else step.stream
    one_norm = norm_input + 4 * n
    # With an adapter, nothing below the first block is trained: its first norm needs no gradient.
    stream = one_norm if step.lora_rank and layer == 0 else 2 * one_norm
    mlp = _expert_activations(step) if config.has_experts(layer) else _swiglu(step, n, config.intermediate_size)
    return {"stream": stream, "attention": _attention(step), "feed-forward": mlp}


def kept_activations(step: Step) -> dict[str, int]:
    """Return the bytes that are kept from the forward pass to the backward pass, by part, without the loss.

    With gradient checkpointing these are the inputs of the blocks; a block's own are recomputed in the backward pass.
    """
    config = step.config
    parts = {"stream": 0, "attention": 0, "feed-forward": 0}
    for layer in range(config.num_hidden_layers):
        block = {"stream": step.stream} if step.gradient_checkpointing else block_activations(step, layer)
        for name, size in block.items():
            parts[name] += size
    wide = step.on_gpu and step.weight_bytes < 4
    parts["stream"] += (4 * step.n_positions * config.hidden_size if wide else step.stream) + 4 * step.n_positions
    return parts | {"tables": tables(step)}


def tables(step: Step) -> int:
    """Return the bytes of tensors that all blocks share: cosines and sines in float32, and the token ids."""
    return step.n_positions * (2 * step.config.rotary_dim // 2 * 4 + (0 if step.lora_rank else 8))


def _attention(step: Step) -> int:
    config, n, c = step.config, step.n_positions, step.product_bytes
    n_heads, n_groups = config.num_attention_heads, config.num_key_value_heads
    q, kv = n * n_heads * config.head_dim, n * n_groups * config.head_dim  # numbers
    size = n * config.hidden_size * c  # the normalised input
    if config.use_qk_norm:
        size += (q + kv) * (4 if step.on_gpu else c) + 4 * n * (n_heads + n_groups)
    size += 2 * q * c  # queries, and the input of the output projection
    if uses_blocks(step.seq_len, on_gpu=step.on_gpu):
        kept = 0 if step.lora_rank else visible_pairs(step.seq_len)  # with an adapter they are recomputed
        size += 2 * kv * c + step.batch_size * n_heads * kept * c
    elif uses_varlen(step):
        size += 2 * kv * c + 4 * n * n_heads
    else:
        # With a mask the fast kernels on a GPU take no grouped heads: keys and values are repeated.
        size += 2 * (q if step.on_gpu else kv) * c
        size += 4 * n * n_heads + (0 if step.on_gpu else step.batch_size * step.seq_len**2 * c)
    return size + _thin(step, 4)


def _thin(step: Step, n_layers: int) -> int:
    """Return the bytes of the products (R, N) of ``n_layers`` adapted layers."""
    return n_layers * step.lora_rank * step.n_positions * step.product_bytes


def _swiglu(step: Step, n_rows: int, width: int) -> int:
    """Return the bytes that a feed-forward layer keeps of ``n_rows`` rows, including their normalised input."""
    size = n_rows * (step.config.hidden_size + (2 if step.lora_rank else 3) * width) * step.product_bytes
    return size + _thin(step, 3)


def _expert_activations(step: Step) -> int:
    config, n, c = step.config, step.n_positions, step.product_bytes
    dim, chosen = config.hidden_size, config.num_experts_per_tok
    # For each chosen expert: input, gate, up, their product, output; its weight and two sorted orders.
    size = n * chosen * ((2 * dim + 3 * config.moe_intermediate_size) * c + 4 + 2 * 8)
    # The router: scores, the choice, the weights before they are divided (and their sum).
    size += n * (4 * config.num_experts + 8 * chosen)
    size += n * (4 * chosen + 4) if config.norm_topk_prob else 0
    if not step.lora_rank:  # for its own gradient: the float32 input; for the balance and z-loss: logits and sums
        size += n * (4 * dim + 4 * config.num_experts + 3 * 4)
    if config.n_shared_experts:
        size += _swiglu(step, n, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:  # the gate, and the output that it multiplies
            size += n * (dim + 1) * c + _thin(step, 1)
        # Without autocast that input is the router's too.
        size -= n * dim * c if c == 4 and not step.lora_rank else 0
    return size
