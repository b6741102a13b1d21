"""Chapter 4: the shift by one, documents in rows, the mask between them, and the test that nobody sees the future."""

import numpy as np
import torch

from minillm.config import ModelConfig
from minillm.data.packing import best_fit
from minillm.model import Transformer
from minillm.model.attention_plan import document_mask, document_positions

# 1. The shift: a document of n + 1 tokens gives n pairs (input, target).
stored = [0, 11, 12, 13, 0]  # 0 is <|endoftext|>, which begins and ends a text
inputs, targets = stored[:-1], stored[1:]
print(f"pairs of a document of {len(stored)} tokens: {len(inputs)}")
print(f"the target after input 11: {targets[inputs.index(11)]}")

# 2. Twenty thousand documents of 1 to 64 pairs in rows of 64: one a row, and packed.
lengths = np.random.default_rng(0).integers(1, 65, size=20_000)
_, row_starts = best_fit(lengths, 64)
print(f"filled without packing: {lengths.sum() / (len(lengths) * 64):.4f}")
print(f"filled by best fit: {lengths.sum() / ((len(row_starts) - 1) * 64):.4f}")

# 3. One row with documents of 5 and 3 pairs and two places of padding.
documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1, -1]])
print(f"allowed pairs of the mask: {document_mask(documents).sum()}")
print(f"position of the second document's first token: {document_positions(documents)[0, 5]}")

# 4. A document next to another one gets the logits that it gets alone; without the mask it does not.
torch.manual_seed(0)
model = Transformer(ModelConfig.preset("demo")).eval()
ids = torch.randint(1, 1024, (1, 8))
row = documents[:, :8]
with torch.no_grad():
    alone = model(ids[:, 5:])
    packed = model(ids, document_ids=row)[:, 5:]
    unmasked = model(ids)[:, 5:]
print(f"difference, next to another document: {(packed - alone).abs().max():.6f}")
print(f"difference without the mask is visible: {int((unmasked - alone).abs().max() > 1e-2)}")

# 5. The test against seeing the future: change the last token, and no earlier logits may move.
changed = ids.clone()
changed[0, -1] = (ids[0, -1] + 1) % 1024
with torch.no_grad():
    moved = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
print(f"earlier positions moved by the last token: {int((moved[:-1] > 1e-5).sum())}")
print(f"the last position moved: {int(moved[-1] > 1e-5)}")
