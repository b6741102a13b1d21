"""Exercises of chapter 26: one byte a number, rows in another order, and too few scales."""

import numpy as np
import torch

from minillm.hub.gguf import pairs_from_halves
from minillm.hub.gguf_file import dequantize_q8_0, quantize_q8_0
from tests.exercises.kit import exercise, find_the_bug


def library_quantize(block):
    stored = quantize_q8_0(np.array(block, dtype=np.float32))
    return float(stored[0, :2].copy().view("<f2")[0]), stored[0, 2:].view(np.int8).tolist()


def with_128(block):
    d = max(map(abs, block)) / 128
    return d, [round(x / d) if d else 0 for x in block]


def cut_off(block):
    d = max(map(abs, block)) / 127
    return d, [int(x / d) if d else 0 for x in block]


def without_zero(block):
    d = max(map(abs, block)) / 127
    return d, [round(x / d) if d else float("nan") for x in block]


def without_sign(block):
    d = max(block) / 127
    return d, [round(x / d) if d else 0 for x in block]


@exercise(
    "ch26_quantize",
    solution=library_quantize,
    wrong={
        "128 steps": (with_128, "one byte"),
        "cut off": (cut_off, "nearest"),
        "divides by zero": (without_zero, "all 0"),
        "the largest instead of the largest size": (without_sign, "size"),
    },
)
def test_quantize(candidate):
    block = [0.0] * 29 + [1.0, -1.0, 0.996]
    d, q = candidate(block)
    assert max(q) <= 127, "128 does not fit into a signed number of one byte: divide by 127"
    assert [q[29], q[30]] == [127, -127], "the numbers of the largest size become 127 and -127"
    assert abs(float(d) * 127 - 1) < 1e-3, "d · q[i] must come near block[i]: 127 d is the largest size, here 1"
    assert q[31] == 126, "take the nearest whole number: 0.996 / d is 126.49"
    _, q = candidate([0.9 / 127] * 31 + [-1.0])
    assert q[31] == -127, "the scale follows from the largest size, also of a negative number"
    assert q[0] == 1, "0.9 d is nearest to 1 d"
    d, q = candidate([0.0] * 32)
    assert q == [0] * 32, "a block of all 0 stays 0"


def library_row_order(n_heads, head_dim):
    return pairs_from_halves(torch.arange(n_heads * head_dim)[:, None], head_dim)[:, 0].tolist()


def of_the_whole_matrix(n_heads, head_dim):
    return library_row_order(1, n_heads * head_dim)


def the_other_way(n_heads, head_dim):
    order = library_row_order(n_heads, head_dim)
    return [order.index(n) for n in range(len(order))]


def every_row_twice(n_heads, head_dim):
    return [h * head_dim + i // 2 for h in range(n_heads) for i in range(head_dim)]


@exercise(
    "ch26_rows",
    solution=library_row_order,
    wrong={
        "heads ignored": (of_the_whole_matrix, "head by head"),
        "the other way round": (the_other_way, "plane"),
        "unchanged": (lambda n, k: list(range(n * k)), "plane"),
        "a row twice": (every_row_twice, "exactly once"),
    },
)
def test_row_order(candidate):
    order = list(candidate(1, 8))
    assert sorted(order) == list(range(8)), "each row is written exactly once"
    assert order == [0, 4, 1, 5, 2, 6, 3, 7], (
        "row 1 of weight[order] must be row 4 of weight: the plane of halves (0, 4) becomes that of neighbours (0, 1)"
    )
    assert list(candidate(2, 4)) == [0, 2, 1, 3, 4, 6, 5, 7], "rows are reordered head by head; they never change heads"


def right_there_and_back(row):
    return torch.from_numpy(dequantize_q8_0(quantize_q8_0(row.numpy()))).view(-1)


def finder(there_and_back):
    row = torch.full((64,), 0.01)
    row[0] = 100.0
    assert float(there_and_back(row)[32:].min()) > 0.009, "an outlier must not harm other blocks"


def one_block(there_and_back):
    row = torch.linspace(-1, 1, 32)
    assert float((there_and_back(row) - row).abs().max()) < 1 / 127


def all_of_one_size(there_and_back):
    row = torch.sin(torch.arange(128.0))
    assert float((there_and_back(row) - row).abs().max()) < 1 / 127


def zeros(there_and_back):
    assert not there_and_back(torch.zeros(64)).any()


def expects_exact_numbers(there_and_back):
    row = torch.linspace(-1, 1, 64)
    assert there_and_back(row).equal(row)


test_find_the_bug = find_the_bug(
    "ch26_bug",
    right=right_there_and_back,
    finder=finder,
    wrong={
        "a single block": one_block,
        "all of one size": all_of_one_size,
        "zeros": zeros,
        "expects exact numbers": expects_exact_numbers,
    },
    hint="it hides while all blocks of a row have numbers of one size",
)
