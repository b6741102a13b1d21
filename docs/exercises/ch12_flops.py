"""Chapter 12, exercise 2. 第 12 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch12.py
"""


def forward_flops(*, vocab, dim, n_layers, n_heads, n_kv_heads, head_dim, ff_dim, seq_len):
    """Return the operations per token of a forward pass: 2 per number of each matrix product, all keys counted.

    The products are those of the projections, of the feed-forward layers, of attention and of the output layer. Norms
    are left out.

    返回前向传播中每个词元的运算次数：每个矩阵乘法的每个数算 2 次，注意力按全部的键计算。
    包括投影、前馈层、注意力和输出层；归一化层不计。
    """
    raise NotImplementedError
