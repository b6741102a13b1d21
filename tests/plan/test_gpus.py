"""The table of GPUs."""

import pytest

from minillm.errors import UserError
from minillm.plan.gpus import CONTEXT, find_gpu, known_gpus


def test_figures_of_the_data_sheets():
    a100, v100 = find_gpu("a100-80"), find_gpu("V100-32")
    assert (a100.half_peak, a100.single_peak) == (312e12, 19.5e12)
    assert a100.dtype("auto") == "bfloat16"
    assert v100.dtype("auto") == "float16"
    assert v100.dtype("float32") == "float32"
    assert v100.peak("float16") == 125e12
    assert v100.peak("bfloat16") == v100.peak("float32") == 15.7e12  # no fast bfloat16 there
    for name in known_gpus():
        gpu = find_gpu(name)
        assert gpu.single_peak < gpu.half_peak
        assert 14 < gpu.memory / 2**30 < 140


def test_more_than_tensors_is_needed():
    gpu = find_gpu("T4")
    assert gpu.needed(0) == CONTEXT
    assert gpu.needed(1e9) - CONTEXT > 1e9


def test_an_unknown_one_lists_all():
    with pytest.raises(UserError, match=r"--gpus B999.*T4.*H200"):
        find_gpu("B999")
