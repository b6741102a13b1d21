"""Exercises of chapter 12: parameters and operations of a model, and what is counted twice."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.model import Transformer
from tests.exercises.kit import exercise, find_the_bug

ODD = {"vocab": 101, "dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "ff_dim": 56}


def config_of(*, vocab, dim, n_layers, n_heads, n_kv_heads, head_dim, ff_dim, is_tied=True):
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=dim,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=ff_dim,
        tie_word_embeddings=is_tied,
    )


def library_parameters(**shape):
    return config_of(**shape).num_parameters()


def always_untied(**shape):
    return library_parameters(**shape | {"is_tied": False})


def as_many_kv_heads(**shape):
    return library_parameters(**shape | {"n_kv_heads": shape["n_heads"]})


def square_attention(**shape):
    n_projections = 2 * shape["n_heads"] + 2 * shape["n_kv_heads"]
    difference = shape["dim"] // shape["n_heads"] - shape["head_dim"]
    return library_parameters(**shape) + shape["n_layers"] * shape["dim"] * n_projections * difference


def two_matrices(**shape):
    return library_parameters(**shape) - shape["n_layers"] * shape["dim"] * shape["ff_dim"]


def no_norms(**shape):
    return library_parameters(**shape) - (2 * shape["n_layers"] + 1) * shape["dim"]


@exercise(
    "ch12_parameters",
    solution=library_parameters,
    wrong={
        "output layer counted twice": (always_untied, "tied"),
        "as many kv heads as heads": (as_many_kv_heads, "n_kv_heads"),
        "head_dim from dim": (square_attention, "head_dim"),
        "two matrices in SwiGLU": (two_matrices, "three matrices"),
        "no norms": (no_norms, "norms"),
    },
)
def test_num_parameters(candidate):
    def difference(**shape):
        return candidate(**shape) - sum(p.numel() for p in Transformer(config_of(**shape)).parameters())

    same = ODD | {"head_dim": 6, "n_kv_heads": 4}
    norms = -(2 * 3 + 1) * 24
    assert difference(**same, is_tied=False) != norms, "you forgot the norms: two in a block, and the last one"
    assert difference(**same, is_tied=False) == 0, "a block has attention, norms and three matrices of SwiGLU"
    assert difference(**same, is_tied=True) == 0, "tied: the output layer is the embedding matrix, count it once"
    assert difference(**ODD | {"head_dim": 6}, is_tied=True) == 0, "keys and values have n_kv_heads heads"
    assert difference(**ODD, is_tied=True) == 0, "a head has head_dim numbers, not dim / n_heads"


def right_flops(*, vocab, dim, n_layers, n_heads, n_kv_heads, head_dim, ff_dim, seq_len):
    matrices = dim * head_dim * 2 * (n_heads + n_kv_heads) + 3 * dim * ff_dim
    return n_layers * (2 * matrices + 4 * n_heads * head_dim * seq_len) + 2 * vocab * dim


def multiplications_only(**shape):
    return right_flops(**shape) / 2


def without_output(**shape):
    return right_flops(**shape) - 2 * shape["vocab"] * shape["dim"]


def without_attention(*, seq_len, **shape):
    return right_flops(seq_len=0, **shape)


def kv_heads_attend(*, seq_len, **shape):
    grouped = 4 * shape["n_layers"] * shape["n_kv_heads"] * shape["head_dim"] * seq_len
    return right_flops(seq_len=0, **shape) + grouped


@exercise(
    "ch12_flops",
    solution=right_flops,
    wrong={
        "additions forgotten": (multiplications_only, "addition"),
        "output layer forgotten": (without_output, "output layer"),
        "attention's products forgotten": (without_attention, "grows with seq_len"),
        "only kv heads attend": (kv_heads_attend, "every query head"),
    },
)
def test_forward_flops(candidate):
    model = Transformer(config_of(**ODD)).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(ODD["vocab"], (1, 16)))
    counted, yours = counter.get_total_flops() / 16, candidate(**ODD, seq_len=16)
    assert yours != counted / 2, "a multiplication comes with an addition: 2 operations"
    assert yours != counted - 2 * ODD["vocab"] * ODD["dim"], "the output layer multiplies, although it is the embedding"
    assert candidate(**ODD, seq_len=32) > yours, "attention grows with seq_len: a query meets seq_len keys"
    assert yours == counted, "torch counts another number: is it every query head that meets seq_len keys and values?"


def finder(count):
    model = Transformer(config_of(**ODD, is_tied=True))
    assert count(model) == sum(p.numel() for p in model.parameters()), "a tied matrix is one matrix"


def untied_model(count):
    model = Transformer(config_of(**ODD, is_tied=False))
    assert count(model) == sum(p.numel() for p in model.parameters())


def one_layer(count):
    assert count(nn.Linear(3, 5)) == 20


def counts_trained_only(count):
    model = nn.Linear(3, 5)
    model.weight.requires_grad_(False)
    assert count(model) == 5, "expects frozen weights not to count"


test_find_the_bug = find_the_bug(
    "ch12_bug",
    right=lambda model: sum(p.numel() for p in model.parameters()),
    finder=finder,
    hint="it hides in models that store nothing but parameters, and each of them once",
    wrong={"an untied model": untied_model, "one layer": one_layer, "only what is trained": counts_trained_only},
)
