"""The floating-point operations of a token, and the hours of a run.

Multiplying a row by a matrix of n numbers takes 2n operations: n multiplications, n additions (Kaplan et al.,
Scaling Laws, 2020, section 2.1). The forward pass multiplies each token by every matrix that it passes; the
backward pass computes two products of the same size, for the gradients of the input and of the weight.

Legend: L blocks, H query heads, K head width, T positions of a row, V vocabulary, D hidden.
"""

from dataclasses import dataclass

from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model.sizes import flops_per_token
from minillm.plan.activations import uses_blocks, visible_pairs


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations per token of a row of T tokens, each token a target."""

    matrices: float
    """Forward, through the blocks: 2 per parameter that the token uses (also of norms, which are few)."""
    attention: float
    """Forward, queries with keys and shares with values: 2·2·H·K·T per block, as if every query saw all T keys.
    That is how MFU is counted (Chowdhery et al., PaLM, 2022, appendix B)."""
    output: float
    """Forward, the output layer: 2·V·D. The embedding is looked up, not multiplied."""
    training: float
    """Forward and backward, 3 times forward. With an adapter, frozen weights have no gradients."""
    recomputed: float
    """With gradient checkpointing: the second forward pass of the blocks (the output layer runs once)."""

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return self.matrices + self.attention + self.output


def count_flops(model: Transformer, seq_len: int, *, gradient_checkpointing: bool = False) -> Flops:
    """Return the operations per token of ``model`` (on any device, meta too)."""
    config: ModelConfig = model.config
    forward, without_attention = config.flops_per_token(seq_len) / 3, config.flops_per_token(0) / 3
    output = 2 * config.vocab_size * config.hidden_size
    return Flops(
        matrices=without_attention - output,
        attention=forward - without_attention,
        output=output,
        training=flops_per_token(model, seq_len),
        recomputed=forward - output if gradient_checkpointing else 0.0,
    )


def attention_shares(seq_len: int, *, on_gpu: bool) -> tuple[float, float]:
    """Return the shares (needed, computed) of all T² pairs of a row.

    Needed by a row of one document: a query sees itself and all positions before it, (T + 1) / 2T. Packed documents
    need less: documents of length t only (t + 1) / 2T. Computed: our blocks on a CPU skip positions after a block of 64
    queries (and, for packed rows, before its first document; one document is assumed here); torch's kernel with a mask
    computes all pairs. (In 16 bits a GPU takes the documents one by one, without a mask.)
    """
    computed = visible_pairs(seq_len) if uses_blocks(seq_len, on_gpu=on_gpu) else seq_len**2
    return (seq_len + 1) / (2 * seq_len), computed / seq_len**2


def chinchilla_tokens(n_parameters: int) -> float:
    """Return 20 tokens per parameter, the best ratio for a given amount of compute (Hoffmann et al., 2022, table 3)."""
    return 20.0 * n_parameters


def hours(flops: Flops, tokens: float, *, peak: float, mfu: float, ranks: int = 1) -> float:
    """Return the hours of ``tokens`` tokens on ``ranks`` devices of ``peak`` FLOP/s each, with utilisation ``mfu``.

    Recomputation by checkpointing takes time too, so it is added here, although MFU does not count it.
    """
    return tokens * (flops.training + flops.recomputed) / (peak * mfu * ranks) / 3600
