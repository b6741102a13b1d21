"""However a step is cut into micro-batches, its gradients are the same."""

import pytest

from tests.contracts import checks


@pytest.mark.parametrize("double, bound", [(False, 1e-6), (True, 1e-12)], ids=["fp32", "fp64"])
def test_partition_invariance(tmp_path, double, bound):
    checks.partition_invariance(tmp_path, double=double, bound=bound)
