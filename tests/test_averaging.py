"""Means and norms of gradients by hand; tests/test_distributed.py checks them on real ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

from model.step.averaging import AveragingOptimizer, JoinedGradients
from model.step.clipping import ClippingOptimizer


def test_means_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (nn.Parameter(torch.zeros(n)) for n in (3, 1, 2))
    parameters = {"one": one, "two": two, "three": three}
    sgd = KeyedOptimizerWrapper(parameters, lambda params: torch.optim.SGD(params, lr=1.0))
    averaging = AveragingOptimizer(sgd, JoinedGradients(list(parameters.values())))
    sent: list[int] = []

    def add_ones_of_another_rank(gradients: torch.Tensor, group: object) -> None:
        sent.append(gradients.numel())
        gradients += 1

    monkeypatch.setattr(dist, "all_reduce", add_ones_of_another_rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    means = []
    for _ in range(2):
        averaging.zero_grad(set_to_none=True)
        one.grad, two.grad = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([7.0])
        averaging.step()
        means.append([one.grad, two.grad, three.grad])
    assert [mean.tolist() for mean in means[0]] == [[1, 2, 3], [4], [0.5, 0.5]]  # none is zeros
    assert all(mean is same for mean, same in zip(*means, strict=True))
    assert one.tolist() == [-2, -4, -6] and two.tolist() == [-8] and three.tolist() == [-1, -1]
    assert sent == [12, 12]  # each begins at a multiple of four


def test_gradients_already_in_the_buffer_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    sgd = KeyedOptimizerWrapper({"it": parameter}, lambda params: torch.optim.SGD(params, lr=0.0))
    averaging = AveragingOptimizer(sgd, JoinedGradients([parameter]))
    monkeypatch.setattr(dist, "all_reduce", lambda _, group: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    averaging.step()
    parameter.grad += 5  # autograd adds to an existing gradient
    averaging.step()
    assert parameter.grad.tolist() == [5, 5]


@pytest.mark.parametrize("in_one_tensor", [False, True])
def test_longer_gradients_are_clipped_and_all_norms_added_up(in_one_tensor: bool) -> None:
    one, two = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    parameters = {"one": one, "two": two}
    sgd = KeyedOptimizerWrapper(parameters, lambda params: torch.optim.SGD(params, lr=1.0))
    joined = JoinedGradients([one, two]) if in_one_tensor else None
    optimizer = ClippingOptimizer(sgd, 1.0, joined)
    stepped_to = []
    for gradients in ((3.0, 4.0), (0.3, 0.4), (0.0, 0.0)):
        one.grad, two.grad = (torch.tensor([each]) for each in gradients)
        if joined is not None:
            joined.join()
        optimizer.step()
        stepped_to.append([one.item(), two.item()])
    assert stepped_to == [
        pytest.approx(each) for each in ([-0.6, -0.8], [-0.9, -1.2], [-0.9, -1.2])
    ]
    assert optimizer.norms.take().tolist() == pytest.approx([5.5, 1])
    assert optimizer.norms.take().tolist() == [0, 0]
