"""Worker: kernels in Triton's interpreter, against float64 and plain torch.

Those that sum equal ids, the gradients of attributes, which they sum, the sums over negatives, rows
at length 1, attention within packed rows, and AdamW, also among the optimizers of a model.

TRITON_INTERPRET=1 python -m tests.workers.interpreted
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from model.distributed import start
from model.kernels import l2_normalize, log_sum, segment_sum, varlen_attention
from model.kernels.segment_sum import KINDS, SortedIndex, step_at
from model.kernels.varlen_attention import RowLayout
from model.losses import sampled
from model.network import attributes
from model.network.attention import _rotate, _rotations
from model.network.attributes import AttributeSums
from model.network.padded import attend_padded
from model.step.flat_adamw import FlatAdamW, split_by_decay
from model.tables import table_update
from model.tables.distribute import replicated
from model.tables.table_update import Step, update_some
from pipeline.batches.attributes import ItemAttributes
from tests.workers.replayed import Replayed
from tests.workers.sharded import WAYS, Built, config_of

_patch = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes bounds of loops of arrays [1], which NumPy no longer converts."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def check(rows: int, index: Tensor, width: int) -> None:
    """Sums that are stored and added, and steps; values of entries ``rows`` are NaN."""
    keys, order = index.int().sort(stable=True)
    sorted_ = SortedIndex(index, rows, keys, order)
    values = torch.randn(len(index), width)
    values[index == rows] = torch.nan
    parts = values.split([len(index) // 3, len(index) - len(index) // 3])
    inside = index < rows
    sums = torch.zeros(rows, width, dtype=torch.float64)
    sums.index_add_(0, index[inside], values[inside].double())

    touched = torch.zeros(rows, 1, dtype=torch.bool).index_fill_(0, index[inside], True)
    stored = torch.full((rows, width), 7.0)
    segment_sum._sum_runs(stored, stored[:0], sorted_, parts, "store")
    torch.testing.assert_close(stored.double(), sums.where(touched, 7.0), rtol=1e-5, atol=1e-5)

    first, last = torch.ones(rows - 1, width), torch.ones(1, width)
    segment_sum._sum_runs(first, last, sorted_, (values,), "add")
    found = torch.cat([first, last]).double()
    torch.testing.assert_close(found, sums + 1, rtol=1e-5, atol=1e-5)

    step = Step(lr=0.1, beta1=0.9, beta2=0.98, eps=1e-8, number=3, scale=0.5, first_row=7)
    steps = [*((kind, torch.float32) for kind in KINDS), ("rowwise_adagrad", torch.float16)]
    for kind, dtype in steps:
        table = torch.linspace(1, 2, rows * width).view(rows, width).to(dtype)
        shapes = {"sgd": [], "rowwise_adagrad": [(rows,)], "adam": [table.shape] * 2}
        states = [torch.full(shape, 0.3) for shape in shapes.get(kind, [table.shape])]
        plain = [part.clone() for part in (table, *states)]
        update_some(kind, plain[0], plain[1:], SortedIndex(index, rows), parts, step)
        step_at(table, sorted_, parts, table_update._row_optimizer(kind, table, states, step, None))
        torch.testing.assert_close([table, *states], plain, rtol=1e-5, atol=1e-5)


def check_attributes(places: Tensor, count: int, width: int) -> None:
    """Gradients of attributes, of which ``count`` in ``places`` is none; sorted once."""
    made = []

    def sorted_(index: Tensor, rows: int) -> SortedIndex:
        keys, order = index.int().sort(stable=True)
        made.append(SortedIndex(index, rows, keys, order))
        return made[-1]

    own = np.ones(len(places), bool)
    sums = AttributeSums(ItemAttributes(places.int().numpy(), count, own))
    rows, weights = torch.randn(2, len(places), width).unbind()
    found, expected = (torch.randn(count, width, requires_grad=True) for _ in range(2))
    with (
        patch.object(attributes, "sort_index", sorted_),
        patch.object(segment_sum, "_has_kernels", lambda *_: True),
    ):
        sums.of_range(rows[:2], found.detach(), 1)  # an evaluation
        for _ in range(2):
            (sums.of_range(rows, found, 0) * weights).sum().backward()
    assert len(made) == 1
    known = torch.cat([expected, torch.zeros(1, width)])
    (2 * (rows + known[places].sum(dim=1)) * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5)


def check_log_sums(positions: int, draws: int) -> None:
    """Sums over negatives, half of which are the first position's target."""
    targets, negatives = torch.randint(1, 50, (positions,)), torch.randint(1, 50, (draws,))
    negatives[: draws // 2] = targets[0]
    given = 10 * torch.randn(positions, draws), targets, negatives, torch.randn(draws)
    found, plain = log_sum.log_sums(*given), sampled.log_sums(*given)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def check_unit_rows(count: int, width: int) -> None:
    """Rows at length 1, the first one zeros, and their gradient, against plain torch."""
    given, weights = torch.randn(2, count, width).unbind()
    given[0] = 0
    found, plain = given.clone().requires_grad_(), given.clone().requires_grad_()
    with patch.object(l2_normalize, "_has_kernels", lambda _: True):
        unit = l2_normalize.unit_rows(found)
        (unit * weights).sum().backward()
    expected = F.normalize(plain, dim=-1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(unit, expected)
    torch.testing.assert_close(found.grad, plain.grad, rtol=1e-5, atol=1e-6)


def check_attention(
    lengths: list[int], left: int | None, seconds: bool, fillers: int, tile: int, width: int
) -> None:
    """Outputs and gradients in windows, the first ``left`` of them with left context only."""
    count, rows, flags = len(lengths), [*lengths], None
    if left is not None:  # as in a batch, not beside each other in memory
        flags = torch.zeros(count, 8, dtype=torch.bool)[:, 0]
        flags[:left] = True
    if seconds:
        assert left is not None
        rows += [n + 1 if place < left else 0 for place, n in enumerate(lengths)]
    offsets = torch.tensor([0, *rows, fillers]).cumsum(0)
    end, total = int(offsets[len(rows)]), int(offsets[-1])
    steps_ago = torch.randint(0, 50, (total,)) if seconds else None
    layout = RowLayout(offsets, total, max(rows), flags, steps_ago)
    rotation = _rotations(50, width)
    given, wanted = torch.randn(2, total, 3, 2, width).unbind()
    found, plain = given.clone().requires_grad_(), given.clone().requires_grad_()
    weights = torch.where(torch.arange(total) < end, 1.0, 0.0)[:, None, None] * wanted[:, 0]
    with patch.object(varlen_attention, "tile", lambda *_: (tile, 1)):
        attended = varlen_attention.attend(found, layout, rotation, layout.steps_ago)
        (attended * weights).sum().backward()
    expected = attend_padded(layout, _rotate(plain, rotation[layout.steps_ago]))
    (expected * weights).sum().backward()
    torch.testing.assert_close(attended[:end], expected[:end], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.grad, plain.grad, rtol=1e-4, atol=1e-4)
    if left is not None:  # else a filler is a row like others
        torch.testing.assert_close(attended[end:], given[end:, 2], rtol=1e-5, atol=1e-5)


def check_adamw(limit: float) -> None:
    """Steps with clipped gradients, one of them without gradient, against torch's."""
    shapes = [(5, 7), (60, 40), (3,), (1,), (1100,)]
    ours, torchs = ([torch.ones(shape).requires_grad_() for shape in shapes] for _ in range(2))
    rate, betas = torch.tensor(0.01), (0.9, 0.98)
    flat = FlatAdamW(*split_by_decay(ours), rate, 0.1, betas, limit)
    groups = zip(split_by_decay(torchs), (0.1, 0.0), strict=True)
    plain = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in groups], 0.01, betas
    )
    norms = []
    for step in range(4):
        for one, other in zip(ours, torchs, strict=True):
            other.grad = torch.randn(other.shape) * (step != 2)
            one.grad = None if step == 2 else other.grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(torchs, limit or torch.inf))
        plain.step()
        flat.step()
        for one, other in zip(ours, torchs, strict=True):
            torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(flat.state[one], plain.state[other], rtol=1e-5, atol=1e-7)
    clipped = sum(norm > limit for norm in norms) if limit else 0
    expected = torch.tensor([float(sum(norms)), float(clipped)])
    torch.testing.assert_close(flat.norms.take(), expected)
    assert not flat.norms.take().any()


def check_optimizers() -> None:
    """Those of CUDA graphs of whole steps do as torch's: weights, state, and norms for the log.

    Replayed steps read the learning rates, which differ from step to step, from the table's memory.
    """
    ranks, found = start(), []
    config = config_of(WAYS["row_wise"], ranks)
    config = replace(config, optimizer=replace(config.optimizer, max_grad_norm=0.1))
    for graphs in ("none", "step"):
        built = Built.of(config, ranks, graphs=graphs)
        optimizers = built.optimizers()
        optimizers.materialise_state()
        step = Replayed(built.model.train(), optimizers, built.plan, ranks.device)
        batch = next(built.loader().epoch(0))
        for number in range(4):
            optimizers.set_lr(1 / (1 + number))
            step(batch)
        assert step.replayable == (graphs == "step")
        assert isinstance(optimizers.dense._optimizer, FlatAdamW) == (graphs == "step")
        assert optimizers.norms is not None
        norms, state = optimizers.norms.take(), optimizers.combined.state_dict()["state"]
        dense = {name: parts for name, parts in state.items() if name.startswith("dense")}
        assert norms[1] == 4 and dense
        found.append((replicated(built.model), dense, norms))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    interpreter._patch_lang_tensor = _with_index
    torch.manual_seed(3)
    # Tiles are chunks of 32: runs that end with one, within one, and after others.
    check(5, torch.tensor([0] * 64 + [1] * 3 + [2] * 2 + [3] * 140 + [4]).roll(50), 4)
    check(60, torch.randint(0, 61, (70,)), 4)
    check(2, torch.tensor([1]), 4)
    # Tiles of 4 or 8: a run ends in a chunk's first tile, the next one goes on in its second.
    check(6, torch.tensor([0] * 62 + [1] * 5 + [2] * 20 + [4, 4, 6])[torch.randperm(90)], 70)
    check_attributes(torch.randint(0, 6, (70, 3)), 5, 4)
    check_attributes(torch.cat([torch.randint(0, 9, (40, 2)), torch.full((9, 2), 8)]), 8, 70)
    for draws in (1, 3, 100, 10_001):  # the last in three blocks
        check_log_sums(5, draws)
    check_unit_rows(9, 12)
    check_unit_rows(200, 24)  # several tiles
    for tile in (16, 64):
        check_attention([3, 20, 0, 40, 7, 1], None, False, 2, tile, 8)
        check_attention([3, 20, 0, 40, 7, 1], 2, False, 5, tile, 24)
        # Rows and second streams in one tile, and in several.
        check_attention([9, 1, 30, 5, 7, 12, 6], 4, True, 20, tile, 32)
        check_attention([6, 33], 2, True, 0, tile, 16)
    for limit in (0.0, 1.0, 1000.0):
        check_adamw(limit)
    check_optimizers()
    print("checked")
