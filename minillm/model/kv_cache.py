"""Keys and values of the tokens seen so far, for a batch of sequences of different lengths.

Legend: B batch, T new positions, S slots, G kv heads, K head width.
"""

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import UserError


class KVCache:
    """Preallocated (B, G, S, K) keys and values per layer; slot s of a row holds the token at position s.

    Rows may differ in length: ``lengths[b]`` slots of row b are filled. Prompts are padded on the right, with
    ``document_ids`` −1 there; padding is not stored. With a sliding window all slots are kept, and those that no
    query may see any more are left out of what attention reads.

    Args:
        dtype: None: that in which keys and values are made, so that nothing is converted from step to step. Under
            autocast it is not the weights'.
    """

    page_groups = None  # keys lie in one piece per row; an engine's lie in pages (``minillm/serving/cache.py``)

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        shape = (batch_size, config.num_key_value_heads, max_len, config.head_dim)  # (B, G, S, K)
        # Without a dtype there is only the shape, until the first keys show theirs.
        place = {"device": "meta" if dtype is None else device, "dtype": dtype}
        self.keys = [torch.zeros(shape, **place) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, **place) for _ in range(config.num_hidden_layers)]
        self.window = config.sliding_window
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.long)  # (B,)
        self.longest = 0  # max(lengths), known without asking the device
        self.ragged = False  # whether the lengths may differ

    @property
    def max_len(self) -> int:
        """Return the number of slots per row."""
        return self.keys[0].shape[2]

    def begin(self, seq_len: int, document_ids: Tensor | None) -> None:
        """Plan one forward pass of T = ``seq_len`` new positions per row: which slots, and who sees which.

        Afterwards ``position_ids`` is (B, T) and ``mask`` (B, 1, T, S), true where a query may look at one of the S
        slots that ``store`` returns. Without one each query sees those up to its own (``is_causal``) or all of them.

        Raises:
            UserError: the new tokens do not fit.
        """
        offsets = torch.arange(seq_len, device=self.lengths.device)  # (T,)
        self.position_ids = self.lengths[:, None] + offsets  # (B, T)
        self._added = torch.full_like(self.lengths, seq_len)
        self._valid = None
        if document_ids is not None:
            valid = document_ids >= 0  # (B, T)
            self._added = valid.sum(dim=1)
            self._valid = valid.nonzero(as_tuple=True)  # rows and columns of what is to be stored
            self.ragged = True
        self._start, self._next_longest = self.longest, self.longest + seq_len
        if document_ids is not None:  # else every row grows alike, and nothing has to be asked of the device
            self._next_longest = int((self.lengths + self._added).max())
        if self._next_longest > self.max_len:
            raise UserError(
                f"the cache has {self.max_len} slots and would need {self._next_longest}: make it with a larger max_len"
            )
        self._first, self._end = 0, self._next_longest
        if self.window is not None:
            shortest = int(self.lengths.min()) if self.ragged and len(self.lengths) else self.longest
            # The first slot that the first new query may see.
            self._first = max(0, min(shortest, self._end - 1) + 1 - self.window)
        self.mask, self.is_causal = None, False
        if not self.ragged and self.longest == 0 and 1 < seq_len <= (self.window or seq_len):
            self.is_causal = True  # the first tokens of rows of one length: what every kernel knows without a mask
        elif self.ragged or seq_len > 1:
            slots = torch.arange(self._first, self._end, device=self.lengths.device)  # (S,)
            queries = self.position_ids[..., None]  # (B, T, 1)
            seen = slots <= queries  # (B, T, S)
            if self.window is not None:
                # Padding may stand beyond the last slot; it sees the window there: with nothing to see, 0 / 0.
                seen &= slots > queries.clamp(max=self._end - 1) - self.window
            self.mask = seen[:, None]

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of one layer, each (B, G, T, K); return what is to be seen, (B, G, S, K)."""
        for buffers, new in ((self.keys, keys), (self.values, values)):
            if buffers[layer].is_meta and not new.is_meta:
                buffers[layer] = torch.zeros(buffers[layer].shape, device=new.device, dtype=new.dtype)
            buffer = buffers[layer]
            new = new.to(buffer.dtype)
            if not self.ragged:
                buffer[:, :, self._start : self._end] = new
            elif self._valid is None:
                rows = torch.arange(new.shape[0], device=new.device)[:, None]  # (B, 1)
                buffer[rows, :, self.position_ids] = new.transpose(1, 2)  # indexed: (B, T, G, K)
            else:
                rows, columns = self._valid
                buffer[rows, :, self.position_ids[rows, columns]] = new[rows, :, columns]  # (n, G, K)
        seen = slice(self._first, self._end)
        return self.keys[layer][:, :, seen].to(keys.dtype), self.values[layer][:, :, seen].to(values.dtype)

    def end(self) -> None:
        """Count the stored tokens: the forward pass is over."""
        self.lengths = self.lengths + self._added
        self.longest = self._next_longest

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of each row; rows of different lengths cannot be rewound."""
        assert not self.ragged
        assert length <= self.longest
        self.lengths, self.longest = torch.full_like(self.lengths, length), length

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows (indices, in the order given), e.g. those not finished yet."""
        self.keys, self.values = ([slots[rows] for slots in buffers] for buffers in (self.keys, self.values))
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max()) if len(self.lengths) else 0
