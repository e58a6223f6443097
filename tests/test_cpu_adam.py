"""Adam of tables on a CPU: torch's own where every row is looked up, FBGEMM's otherwise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice
from torchrec.distributed import batched_embedding_kernel

from model.distributed import Ranks
from model.kernels.segment_sum import sort_index
from model.run.build import build_model
from model.run.execution import plan_execution
from model.tables.cpu_adam import CpuAdamTables, adam_on_cpu
from model.tables.table_update import Step, update, update_some
from tests.workers.sharded import WAYS, config_of

WIDTH = 4
STEPS = [Step(lr=0.1, beta1=0.9, beta2=0.98, eps=1e-8, number=n, scale=0.5) for n in (1, 2, 3)]


def made(rows: list[int], tables_of_features: list[int]) -> CpuAdamTables:
    """Tables of so many rows, all values of row r of table t 10 t + r."""
    tables = CpuAdamTables(
        [(count, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU) for count in rows],
        feature_table_map=tables_of_features,
        optimizer=EmbOptimType.ADAM,
        learning_rate=0.1,
        eps=1e-8,
        beta1=0.9,
        beta2=0.98,
        pooling_mode=PoolingMode.NONE,
        device=torch.device("cpu"),
    )
    for number, weights in enumerate(tables.split_embedding_weights()):
        weights.copy_((10 * number + torch.arange(len(weights)))[:, None].expand(-1, WIDTH))
    return tables


def by_torch(rows: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Rows after steps of torch's Adam."""
    weight = torch.nn.Parameter(rows.clone())
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.98), eps=1e-8)
    for gradient in gradients:
        weight.grad = gradient
        adam.step()
    return weight.detach()


@pytest.mark.parametrize("first", [0, 1])
def test_steps_are_those_of_torchs_adam(first: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, WIDTH, generator=generator)
    gradients = [torch.randn(5, WIDTH, generator=generator) for _ in STEPS]
    expected = by_torch(rows, [0.5 * each for each in gradients])
    whole, some = rows.clone(), rows.clone()
    states = [[torch.zeros_like(rows) for _ in range(2)] for _ in range(2)]
    for step, gradient in zip(STEPS, gradients, strict=True):
        # The candidates are rows first ... first + 2; each gradient is halved for update_some.
        order = (first + torch.arange(5)) % 5
        scored, outer = gradient[order[:3]].clone(), gradient[order[3:]].clone()
        update("adam", whole, states[0], scored, outer, first, step)
        index = sort_index(torch.arange(5).repeat(2), 5)
        update_some("adam", some, states[1], index, [gradient.repeat(2, 1) / 2], step)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(some, expected)


def test_tables_of_one_module_by_hand() -> None:
    tables = made([3, 2], [0, 1, 0])
    # Two bags of each feature: rows 2 0 | 1 of table 0, row 1 | 1 of table 1, nothing | row 2.
    indices, offsets = torch.tensor([2, 0, 1, 1, 1, 2]), torch.tensor([0, 2, 3, 4, 5, 5, 6])
    found = tables(indices, offsets)
    assert found[:, 0].tolist() == [2, 0, 1, 11, 11, 2]
    # Adam's first step is the rate in the direction of the gradient; a looked-up row counts as one
    # with a gradient of zero: only row 0 of table 1 was not looked up.
    (found * torch.tensor([[1.0], [0], [-1], [1], [1], [1]])).sum().backward()
    one, two = (weights[:, 0].tolist() for weights in tables.split_embedding_weights())
    assert one == pytest.approx([0, 1.1, 1.9])
    assert two == pytest.approx([10, 10.9])
    means, squares = tables.split_optimizer_states()[1]
    assert means[1].tolist() == pytest.approx([0.1 * 2] * WIDTH)
    assert squares[1].tolist() == pytest.approx([0.02 * 4] * WIDTH)
    assert int(tables.iter_cpu) == 1


def test_a_row_keeps_its_averages_while_it_is_not_looked_up() -> None:
    tables = made([2], [0])
    for row in (0, 1, 1):
        tables(torch.tensor([row]), torch.tensor([0, 1])).sum().backward()
        tables.set_learning_rate(0.2)
    means, _ = tables.split_optimizer_states()[0]
    assert means[:, 0].tolist() == pytest.approx([0.1, 0.1 * 0.9 + 0.1])


def test_a_step_without_a_lookup_changes_no_row() -> None:
    tables = made([2], [0, 0])
    nothing = torch.tensor([], dtype=torch.int64)
    tables(nothing, torch.tensor([0, 0, 0])).sum().backward()
    assert tables.split_embedding_weights()[0][:, 0].tolist() == [0, 1]
    assert tables(nothing, torch.tensor([0])).shape == (0, WIDTH)


@pytest.mark.parametrize("way", ["row_wise", "table_wise"])
@pytest.mark.parametrize("head", ["tied", "linear"])
def test_torchrec_names_the_state_as_on_cuda(one_rank: Ranks, way: str, head: str) -> None:
    adam = replace(WAYS[way], embedding_optimizer="auto")
    config = config_of(adam, one_rank, head=head)
    plan = plan_execution(config, 21, one_rank)
    model = build_model(config, 21, one_rank, plan)
    state: dict[str, Any] = model.fused_optimizer.state_dict()["state"]
    names = {key.rsplit(".", 1)[1] for of_table in state.values() for key in of_table}
    assert names == {"momentum1", "exp_avg_sq"}
    assert len(state) == (2 if head == "linear" else 1)


def test_torchrec_gets_its_module_back() -> None:
    name = "SplitTableBatchedEmbeddingBagsCodegen"
    before = getattr(batched_embedding_kernel, name)
    with pytest.raises(KeyError), adam_on_cpu(True):
        assert getattr(batched_embedding_kernel, name) is CpuAdamTables
        raise KeyError
    assert getattr(batched_embedding_kernel, name) is before
    with adam_on_cpu(False):
        assert getattr(batched_embedding_kernel, name) is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_steps_equal_those_of_the_kernels() -> None:
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(50, 64, generator=generator)
    found = {}
    for device in ("cpu", "cuda"):
        draws = torch.Generator().manual_seed(3)
        rows = start.to(device, copy=True)
        states = [torch.zeros_like(rows) for _ in range(2)]
        for number in range(1, 21):
            step = Step(lr=0.01, beta1=0.9, beta2=0.98, eps=1e-8, number=number, scale=0.5)
            index = torch.randint(0, 51, (300,), generator=draws)
            gradients = torch.randn(300, 64, generator=draws)
            sorted_ = sort_index(index.to(device), 50)
            update_some("adam", rows, states, sorted_, [gradients.to(device)], step)
            scored, outer = torch.randn(50, 64, generator=draws).to(device).split([48, 2])
            outer = outer.contiguous()
            outer[number % 2] = 0
            update("adam", rows, states, scored.contiguous(), outer, 1, step)
        found[device] = [part.cpu() for part in (rows, *states)]
    torch.testing.assert_close(found["cpu"], found["cuda"], rtol=1e-5, atol=1e-6)
