"""Names of TorchRec and FBGEMM that are private or unstable, and what each is needed for.

Only their subclasses (``model/step/pipelines.py``, ``cpu_adam.py``) and ``Step.counted``
(``table_update.py``) use more of them.
``tests/test_upstream.py`` fails when an upgrade takes one away.
"""

from collections.abc import Iterator
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection


def lookups(model: nn.Module) -> Iterator[Any]:
    """The modules that look up rows in sharded collections: one for each way of sharding."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingCollection):
            yield from module._lookups


def features_per_lookup(collection: ShardedEmbeddingCollection) -> list[list[str]]:
    """Names of the features in the order in which each lookup returns their rows."""
    return collection._embedding_names_per_sharding


def width(collection: ShardedEmbeddingCollection) -> int:
    """Width of a row."""
    return collection._embedding_dim


def fbgemm_tables(
    collection: ShardedEmbeddingCollection,
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's module of all tables of a collection: this rank's rows and optimizer state."""
    (lookup,) = collection._lookups
    (kernel,) = lookup._emb_modules
    return kernel.emb_module


def table_names(collection: ShardedEmbeddingCollection) -> list[str]:
    """Names of the tables in the order in which FBGEMM's module holds them."""
    (lookup,) = collection._lookups
    (kernel,) = lookup._emb_modules
    return [table.name for table in kernel.config.embedding_tables]


def set_input_dist_ready(collection: ShardedEmbeddingCollection, is_ready: bool) -> None:
    """Whether ``input_dist`` has what it needs; TorchRec's creates it at its first call."""
    collection._has_uninitialized_input_dist = not is_ready


def drop_cached_rows(model: nn.Module) -> None:
    """Drop the rows that ``fused_uvm_caching`` keeps on the GPU, after the tables were loaded."""
    for lookup in lookups(model):
        lookup.purge()


def set_table_steps(model: nn.Module, step: int) -> None:
    """Set the fused optimizers' step counts, by which Adam corrects its averages.

    FBGEMM does not save them, and counts every lookup as a step, also in an evaluation.
    """
    for lookup in lookups(model):
        for table in lookup.modules():
            for counter in ("iter", "iter_cpu"):
                if isinstance(count := getattr(table, counter, None), Tensor):
                    count.fill_(step)


def wrapped(model: DistributedModelParallel) -> nn.Module:
    """The module that DistributedModelParallel puts into DistributedDataParallel."""
    return model._dmp_wrapped_module
