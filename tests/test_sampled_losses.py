"""Losses over negatives: by hand, against the exact softmax, and through the head."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.losses import sampled as sampled_losses
from model.losses.sampled import gbce_beta
from model.network.config import HeadConfig
from model.network.head import CatalogSlice, Scored, ScoringHead
from pipeline.errors import UserError
from pipeline.training.negatives import SharedNegatives

NUM_ITEMS, WIDTH = 6, 4
ITEM_3, DRAWN = torch.tensor([3]), torch.tensor([1, 2])


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def test_sampled_softmax_by_hand() -> None:
    # Negatives of exponentials e^1 and e^0, expected 2 and .5 times: the sum is e/2 + 1/.5.
    loss = sampled_losses.softmax(
        torch.tensor([3.0]),
        torch.tensor([[1.0, 0.0]]),
        torch.eye(2),
        ITEM_3,
        DRAWN,
        torch.tensor([math.log(2), math.log(0.5)]),
    )
    total = math.exp(3) + math.exp(1) / 2 + 2
    assert loss.item() == pytest.approx(math.log(total) - 3, abs=1e-6)


def test_draws_of_the_target_do_not_count() -> None:
    scores, drawn = torch.tensor([[1.0, 9.0]]).requires_grad_(), torch.tensor([1, 3])
    loss = sampled_losses.softmax(
        torch.tensor([2.0]), scores, torch.eye(2), ITEM_3, drawn, torch.zeros(2)
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    loss.sum().backward()
    assert scores.grad[0, 1] == 0 and scores.grad[0, 0] > 0

    loss = sampled_losses.gbce(torch.tensor([2.0]), scores, ITEM_3, drawn, beta=1.0)
    expected = -math.log(sigmoid(2)) - math.log(1 - sigmoid(1))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_all_draws_are_the_target() -> None:
    positive = torch.tensor([2.0], requires_grad=True)
    scores, drawn = torch.tensor([[1.0, 1.0]], requires_grad=True), torch.tensor([3, 3])
    loss = sampled_losses.softmax(positive, scores, torch.eye(2), ITEM_3, drawn, torch.zeros(2))
    loss.sum().backward()
    assert loss.item() == 0 and positive.grad.item() == 0 and not scores.grad.any()


def test_gbce_by_hand() -> None:
    # beta .4: the positive's probability to the power of .4, those of the negatives against.
    scores = torch.tensor([[1.0, -2.0]])
    loss = sampled_losses.gbce(torch.tensor([0.5]), scores, ITEM_3, DRAWN, beta=0.4)
    product = sigmoid(0.5) ** 0.4 * (1 - sigmoid(1)) * (1 - sigmoid(-2))
    assert loss.item() == pytest.approx(-math.log(product), abs=1e-6)


def test_the_calibration_of_gbce() -> None:
    # 256 of 1024 others: the sampling rate alpha is .25; alpha (t (1 - 1/alpha) + 1/alpha).
    assert gbce_beta(0.0, 256, 1025) == 1
    assert gbce_beta(1.0, 256, 1025) == 0.25
    assert gbce_beta(0.75, 256, 1025) == pytest.approx(0.25 * (0.75 * (1 - 4) + 4))
    assert gbce_beta(0.75, 5000, 1025) == 1  # more draws than items


def vectors(positions: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden [M, D], the table [V + 1, D] with the padding row, targets [M]."""
    generator = torch.Generator().manual_seed(3)
    hidden, table = torch.randn(positions + NUM_ITEMS + 1, WIDTH, generator=generator).split(
        [positions, NUM_ITEMS + 1]
    )
    return hidden, table, torch.arange(positions) % NUM_ITEMS + 1


def gradient(
    config: HeadConfig, hidden: torch.Tensor, table: torch.Tensor, *asked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, and its gradients for hidden vectors and table, through the head."""
    head = ScoringHead(config, CatalogSlice(1, NUM_ITEMS + 1, shared=False), NUM_ITEMS)
    hidden, table = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    targets, *drawn = asked
    rows = table[torch.cat([targets, drawn[0]])] if drawn else table[1:]
    loss, report = head(hidden, rows, Scored(targets, *drawn))
    loss.backward()
    assert report[1] == (targets > 0).sum()
    return loss.detach(), hidden.grad, table.grad


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_all_items_once_are_the_exact_softmax(temperature: float) -> None:
    hidden, table, targets = vectors()
    targets[1] = 0  # nothing to predict
    exact = gradient(HeadConfig(logit_temperature=temperature), hidden, table, targets)
    sampled = gradient(
        HeadConfig(logit_temperature=temperature, loss="sampled_softmax"),
        hidden,
        table,
        targets,
        torch.arange(1, NUM_ITEMS + 1),
        torch.zeros(NUM_ITEMS),  # every item once: the logarithm of 1
    )
    for found, expected in zip(sampled, exact, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert not sampled[1][1].any()


def test_the_mean_gradient_over_many_draws_is_nearly_the_exact_one() -> None:
    # The sum over negatives is unbiased, the logarithm of it is not: an error of order 1 / K in
    # the mean, 1 / K^.5 in one draw. Without the correction popular items would be pushed away
    # by their popularity, an error of order 1.
    hidden, table, targets = vectors()
    config = HeadConfig(logit_temperature=0.5, loss="sampled_softmax")
    _, exact, _ = gradient(HeadConfig(logit_temperature=0.5), hidden, table, targets)
    sampler = SharedNegatives(200, NUM_ITEMS, 5, torch.tensor([29, 0, 4, 0, 9, 1]).numpy())

    def error(corrected: bool) -> float:
        total = torch.zeros_like(exact)
        for sample in range(100):
            items, log_counts = (torch.from_numpy(drawn[0]) for drawn in sampler(0, [sample]))
            if not corrected:
                log_counts = torch.full_like(log_counts, math.log(200 / NUM_ITEMS))
            total += gradient(config, hidden, table, targets, items, log_counts)[1]
        return float((total / 100 - exact).norm() / exact.norm())

    assert error(corrected=True) < 0.03
    assert error(corrected=False) > 0.2


def test_gbce_through_the_head() -> None:
    config = HeadConfig(logit_temperature=0.5, loss="gbce", gbce_calibration=1.0)
    hidden, table, targets = vectors(1)
    negatives = torch.tensor([4, 1, 5])  # 1 is the target
    loss, _, for_table = gradient(config, hidden, table, targets, negatives, torch.zeros(3))
    scores = F.normalize(hidden, dim=1) @ F.normalize(table, dim=1).T / 0.5
    beta = 3 / (NUM_ITEMS - 1)
    terms = beta * F.logsigmoid(scores[0, 1]) + F.logsigmoid(-scores[0, [4, 5]]).sum()
    assert loss.item() == pytest.approx(-terms.item(), abs=1e-6)
    assert for_table.any(dim=1).tolist() == [False, True, False, False, True, True, False]


def test_no_masked_position() -> None:
    for loss in ("sampled_softmax", "gbce"):
        hidden, table, targets = vectors(0)
        found = gradient(
            HeadConfig(loss=loss), hidden, table, targets, torch.tensor([2, 3]), torch.zeros(2)
        )
        assert found[0] == 0 and not found[2].any()


def test_flags_out_of_range() -> None:
    with pytest.raises(UserError, match="--loss must be one of softmax, sampled_softmax, gbce"):
        HeadConfig(loss="hinge")
    with pytest.raises(
        UserError, match="--gbce_calibration must be at least 0 and at most 1, not 2"
    ):
        HeadConfig(gbce_calibration=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "draws"), [(1, 1), (7, 3), (300, 4096), (5, 10_001)])
def test_the_kernel_equals_the_plain_code(positions: int, draws: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(draws)
    scores = 10 * torch.randn(positions, draws, generator=generator)
    targets, negatives = (
        torch.randint(1, 50, (count,), generator=generator) for count in (positions, draws)
    )
    negatives[: draws // 2] = targets[0]
    given = scores.to(dtype), targets, negatives, torch.randn(draws, generator=generator)
    expected = sampled_losses.log_sums(*given)
    found = sampled_losses.kernel.log_sums(*(each.cuda() for each in given))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(
            one.cpu(), other, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=1e-5
        )
