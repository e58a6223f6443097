"""--max_grad_norm bounds the norm of the gradients' mean over the ranks, on one rank and on two.

The worker (tests/workers/clipping.py) takes the same step here on one rank and under torchrun on
two, each of which has half of the batch.
"""

import pytest
import torch

from model.distributed import Ranks
from tests.conftest import torchrun
from tests.workers import clipping
from tests.workers.clipping import LIMITS, WAYS, Gradients


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    path = tmp_path_factory.mktemp("clipping") / "two.pt"
    outcome = torchrun(2, "tests/workers/clipping.py", path)
    assert outcome.code == 0, outcome.err
    return torch.load(path)


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())


def test_clipping_by_the_norm_of_the_mean(one_rank: Ranks, two: Gradients) -> None:
    one = clipping.all_gradients(one_rank)
    none, small, large = LIMITS
    for way in WAYS:
        whole = one[way, none]
        assert small < norm(whole) < large
        for found in (one, two):
            assert norm(found[way, small]) == pytest.approx(small, rel=1e-3)
            for limit, factor in ((none, 1), (small, small / norm(whole)), (large, 1)):
                assert found[way, limit].keys() == whole.keys()
                for name, gradient in whole.items():
                    torch.testing.assert_close(
                        found[way, limit][name],
                        factor * gradient,
                        atol=1e-6 * factor * norm(whole),  # other sums of float32
                        rtol=1e-4,
                        msg=name,
                    )
