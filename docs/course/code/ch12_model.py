"""Chapter 12: parameters, FLOPs and bytes of the demo's model, by hand, by the library, and counted on a real step."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model.sizes import size_of
from minillm.plan.activations import Step
from minillm.plan.engines import layout
from minillm.plan.flops import count_flops
from minillm.plan.parameters import count_parameters
from minillm.training.optim import adamw

T = 128
config = ModelConfig.preset("demo")
D, F, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
H, H_KV, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
print(f"D {D}, F {F}, L {L}, V {V}, H {H}, H_KV {H_KV}, K {K}")
model = Transformer(config)

# 1. Parameters.
embedding = V * D  # the output layer is the same matrix
attention = D * H * K + 2 * D * H_KV * K + H * K * D  # Q; K and V; O
head_norms = 2 * K * config.use_qk_norm
feed_forward = 3 * D * F  # gate, up, down
block = attention + head_norms + feed_forward + 2 * D
by_hand = embedding + L * block + D
size = size_of(model, T)
print(f"one block: {block:,}")
print(f"parameters by hand: {by_hand:,}")
print(f"parameters by the library: {size.n_parameters:,}")
print(f"share of the embedding: {embedding / by_hand:.4f}")

# 2. FLOPs of the forward pass per token.
matrices = 2 * (L * (attention + feed_forward) + V * D)
scores = L * 4 * H * K * T
with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
    model.eval()(torch.randint(V, (2, T)))
flops = count_flops(model, T)
print(f"forward FLOPs per token by hand: {matrices + scores:,}")
print(f"forward FLOPs per token counted by torch: {counter.get_total_flops() / (2 * T):,.0f}")
print(f"forward FLOPs per token by the library: {flops.forward:,.0f}")
print(f"share of attention's products: {scores / (matrices + scores):.4f}")
print(f"training / forward: {flops.training / flops.forward:.4f}")

# 3. Bytes that every training step holds: weights, gradients, two moments, 4 bytes each.
optimizer = adamw(model, learning_rate=1e-3)
model.train()(torch.randint(V, (2, T))).sum().backward()
optimizer.step()
tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
plan = layout("ddp", Step(config=config, batch_size=2, seq_len=T), count_parameters(model))
print(f"bytes by hand: {16 * by_hand:,}")
print(f"bytes of the tensors: {sum(tensor.nbytes for tensor in tensors):,}")
print(f"bytes by the plan: {plan.weights + plan.gradients + plan.optimizer:,.0f}")
