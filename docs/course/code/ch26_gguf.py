"""Chapter 26: a number in one byte, rows in another order, and a file that is read with struct alone."""

import struct
import tempfile
from pathlib import Path

import torch

from minillm.hub.gguf import pairs_from_halves
from minillm.hub.gguf_file import FORMATS, StoredTensor, dequantize_q8_0, quantize_q8_0, write_gguf

torch.manual_seed(0)

# 1. q8_0: 32 neighbours share a scale. How large is the error, of a number and of a product?
weight = torch.randn(1024, 1024)
again = torch.from_numpy(dequantize_q8_0(quantize_q8_0(weight.numpy()))).view(1024, 1024)
x = torch.randn(1024)
largest = weight.view(-1, 32).abs().amax(dim=1)
_, block_bytes, block_len = FORMATS["q8_0"]
print(f"bits per number: {8 * block_bytes / block_len}")
print(f"error by the formula: {float((largest / 127).square().mean().sqrt() / 12**0.5):.5f}")
print(f"error of a number: {float((again - weight).norm() / weight.norm()):.5f}")
print(f"error of a product: {float((again @ x - weight @ x).norm() / (weight @ x).norm()):.5f}")
normal = weight[weight.abs() >= 2.0**-14]  # below, float16 has fewer bits
half_error = ((normal.half() - normal) / normal).abs().max()
print(f"largest error of float16, times 2048: {half_error * 2048:.3f}")


# 2. RoPE turns halves here and neighbours there. Scores agree if the rows of both projections are reordered.
def turned(vector, position: int, first, second):
    """Return a head (K,) turned by position · 10000^(-2i/K) in each plane (first[i], second[i])."""
    angles = position * 10000.0 ** (-2 * torch.arange(len(first)) / len(vector))
    result = vector.clone()
    result[first] = vector[first] * angles.cos() - vector[second] * angles.sin()
    result[second] = vector[first] * angles.sin() + vector[second] * angles.cos()
    return result


halves = (torch.arange(8), torch.arange(8, 16))
neighbours = (torch.arange(0, 16, 2), torch.arange(1, 16, 2))
q, k = torch.randn(2, 16)
score = turned(q, 7, *halves) @ turned(k, 3, *halves)
reordered = turned(pairs_from_halves(q, 16), 7, *neighbours) @ turned(pairs_from_halves(k, 16), 3, *neighbours)
forgotten = turned(q, 7, *neighbours) @ turned(k, 3, *neighbours)
print(f"difference of scores, reordered: {abs(score - reordered):.4f}")
print(f"difference of scores, forgotten: {abs(score - forgotten):.4f}")

# 3. The file: magic, version, counts, then settings, a table, and numbers at multiples of 32 bytes.
tensors = [
    StoredTensor("token_embd.weight", (100, 64), "q8_0", lambda: weight[:100, :64]),
    StoredTensor("output_norm.weight", (64,), "f32", lambda: weight[0, :64]),
]
with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / "model.gguf"
    write_gguf(path, {"general.architecture": "llama", "llama.block_count": 0}, tensors)
    content = path.read_bytes()
magic, version, n_tensors, n_settings = struct.unpack("<4sIQQ", content[:24])
print(f"magic {magic.decode()}, version {version}, tensors {n_tensors}, settings {n_settings}")
print(f"bytes of the tensors: {sum(tensor.n_bytes for tensor in tensors)}")
last = torch.frombuffer(bytearray(content[-256:]), dtype=torch.float32)
print(f"numbers of the last tensor that differ: {int((last != weight[0, :64]).sum())}")
