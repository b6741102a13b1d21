"""Chapter 22: temperature and filters on five tokens, a fair draw, answers that do not depend on neighbours."""

import torch

from minillm.config import ModelConfig
from minillm.inference import SamplingOptions, complete
from minillm.inference.sampling import draw, penalize_repetition, process_logits
from minillm.model import Transformer

p = torch.tensor([[0.50, 0.25, 0.15, 0.07, 0.03]])
logits = p.log()


def after(**options):
    """Return the probabilities (1, 5) that the options leave."""
    return process_logits(logits, SamplingOptions(**options)).softmax(dim=-1)


# 1. Temperature: p ** (1 / T), normalised.
print(f"best token at T 0.5: {after(temperature=0.5)[0, 0]:.4f}")
print(f"best token at T 2: {after(temperature=2.0)[0, 0]:.4f}")

# 2. Filters: how many of the five tokens stay?
print(f"tokens left by top_p 0.7: {(after(top_p=0.7) > 0).sum()}")
print(f"tokens left by top_p 0.7 after T 2: {(after(top_p=0.7, temperature=2.0) > 0).sum()}")
print(f"tokens left by min_p 0.2: {(after(min_p=0.2) > 0).sum()}")
print(f"best token after top_k 2: {after(top_k=2)[0, 0]:.4f}")

# 3. The draw: 100,000 uniform numbers become tokens in the right shares.
torch.manual_seed(0)
tokens = draw(logits.expand(100_000, 5), torch.rand(100_000))
print(f"share of the best token: {(tokens == 0).double().mean():.4f}")
print(f"share of the rarest token: {(tokens == 4).double().mean():.4f}")

# 4. The repetition penalty makes a seen token less likely, whatever the sign of its logit.
seen = torch.tensor([[True, True, False]])
positive, negative, _ = penalize_repetition(torch.tensor([[2.0, -2.0, 1.0]]), seen, 2.0)[0].tolist()
print(f"logit 2 after the penalty: {positive:.1f}")
print(f"logit -2 after the penalty: {negative:.1f}")

# 5. Each prompt has its own random stream: its answer is the same alone and in a batch.
model = Transformer(ModelConfig.preset("demo")).eval()
prompts = [[1, 5, 9], [2, 7], [3, 4, 5, 6, 7, 8]]
options = {"max_new_tokens": 12, "eos_token_id": ()}
together = complete(model, prompts, generator=torch.Generator().manual_seed(7), **options)
generator = torch.Generator().manual_seed(7)
alone = [complete(model, [prompt], generator=generator, **options)[0] for prompt in prompts]
print(f"answers that the batch changed: {sum(a.ids != b.ids for a, b in zip(together, alone, strict=True))}")
