"""FBGEMM's module of tables, with Adam on a CPU.

FBGEMM has no kernel for it there and refuses to make the module. `CpuAdamTables` is FBGEMM's module
in all that it keeps: weights, both averages under the names that they have on CUDA, learning rate
and step count. TorchRec therefore shards, saves, restores and reshards it like any other, and a
checkpoint of a CPU resumes on CUDA and the other way round. Its lookup and update are plain torch.

TorchRec creates the module by the name of FBGEMM's class, which :func:`adam_on_cpu` replaces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    construct_split_state,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed import batched_embedding_kernel

from model.kernels.segment_sum import sort_index
from model.tables.table_update import Step, update_some


class CpuAdamTables(SplitTableBatchedEmbeddingBagsCodegen):
    """Tables of one width on a CPU, each row looked up for itself, updated by Adam.

    Only rows that were looked up are updated, as by FBGEMM on CUDA.
    """

    def __init__(
        self, embedding_specs: list[Any], *, optimizer: EmbOptimType, **given: Any
    ) -> None:
        assert optimizer is EmbOptimType.ADAM
        # Adagrad's state is as large as Adam's first one, and has its name.
        super().__init__(embedding_specs, optimizer=EmbOptimType.EXACT_ADAGRAD, **given)
        split = construct_split_state(embedding_specs, rowwise=False, cacheable=False)
        self._apply_split(split, prefix="momentum2", dtype=torch.float32)
        self.optimizer = EmbOptimType.ADAM
        (self._width,) = {width for _, width, *_ in embedding_specs}
        starts = [0, *accumulate(rows for rows, *_ in embedding_specs)]
        self._starts = torch.tensor([starts[table] for table in self.feature_table_map])

    def forward(self, indices: Tensor, offsets: Tensor, **_: Any) -> Tensor:
        """The row of each index [T, D].

        Args:
            indices: int64 [T], of all features, in their order.
            offsets: int64 [F B + 1], the bounds of B bags of each of F features.
        """
        bags = (len(offsets) - 1) // len(self._starts)
        of_feature = offsets[:: max(bags, 1)].diff()
        starts = self._starts[: len(of_feature)].repeat_interleave(of_feature)
        return _LookUp.apply(self.placeholder_autograd_tensor, self, indices + starts)

    def parts(self) -> list[Tensor]:
        """Weights, means and squares of all tables [R, D]."""
        kept = self.weights_host, self.momentum1_host, self.momentum2_host
        return [part.detach().view(-1, self._width) for part in kept]


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trigger: Tensor, tables: CpuAdamTables, rows: Tensor) -> Tensor:
        """``trigger`` requires gradients: else autograd would not call the backward pass."""
        ctx.tables, ctx.rows = tables, rows
        return tables.parts()[0].index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        weights, *states = ctx.tables.parts()
        index = sort_index(ctx.rows, len(weights))
        update_some("adam", weights, states, index, [gradient], Step.counted(ctx.tables))
        return (None,) * 3


@contextmanager
def adam_on_cpu(is_needed: bool) -> Iterator[None]:
    """Let TorchRec make :class:`CpuAdamTables` where it makes FBGEMM's module."""
    name = SplitTableBatchedEmbeddingBagsCodegen.__name__
    if is_needed:
        setattr(batched_embedding_kernel, name, CpuAdamTables)
    try:
        yield
    finally:
        setattr(batched_embedding_kernel, name, SplitTableBatchedEmbeddingBagsCodegen)
