"""However a step is cut into micro-batches, its gradients are the same."""

import pytest

from tests.contracts import checks
from tests.contracts.harness import CONFIG, MOE_CONFIG


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("double, bound", [(False, 1e-6), (True, 1e-12)], ids=["fp32", "fp64"])
def test_partition_invariance(tmp_path, double, bound, config, weighted):
    """With experts the balance and z-losses are part of the gradients, and the bias moves from step to step."""
    checks.partition_invariance(tmp_path, double=double, bound=bound, config=config, weighted=weighted)
