"""How a run is executed: decided once, before anything is built (``model/run/execution.py``).

lookup     own          the item table is looked up and updated by ``tables/item_table.py``
           fbgemm       by FBGEMM: several tables, half precision, tables in host memory,
                        column-wise and table-wise shards on several ranks
           replicated   an ordinary embedding (``--mode ddp``)
exchange   none         one rank
           gather       every rank looks up the ids of all ranks in its own shard; sizes are
                        known beforehand, so a CUDA graph can hold the exchange
           torchrec     TorchRec's all-to-all, which TrainPipelineSparseDist starts a batch ahead
           all_reduce   replicas, whose gradients DistributedDataParallel averages
graphs     step         one CUDA graph from the lookup to the optimizer
           dense        a pair of graphs for encoder and head, and one for the encoder's optimizer
           encoder      a pair for the encoder alone; one for its optimizer, but not in ddp
           none         kernels are launched one by one
"""

from dataclasses import dataclass
from typing import Literal

_LOOKUPS = {
    "own": "looked up and updated by this project's kernels",
    "fbgemm": "looked up and updated by FBGEMM",
    "replicated": "replicated as an ordinary weight",
}
_EXCHANGES = {
    "none": "",
    "gather": ", every rank looks up the ids of all",
    "torchrec": ", rows exchanged by TorchRec a batch ahead",
    "all_reduce": ", gradients averaged by DDP",
}
_GRAPHS = {
    "step": "one CUDA graph a step",
    "dense": "CUDA graphs of encoder and head",
    "encoder": "CUDA graphs of the encoder",
    "none": "no CUDA graphs",
}


@dataclass(frozen=True)
class ExecutionPlan:
    """The way of execution of a run, the same on every rank.

    The default executes a plain model on one rank, as export and teachers do.

    Attributes:
        lookup, exchange, graphs: as in the module docstring.
        in_place: the exact softmax scores the rank's shard itself, not a looked-up copy of it.
        precision: of the encoder's products.
        table_optimizer: of the tables; in ddp the encoder's.
        table_lr: the tables' peak learning rate.
    """

    lookup: Literal["own", "fbgemm", "replicated"] = "replicated"
    exchange: Literal["none", "gather", "torchrec", "all_reduce"] = "none"
    graphs: Literal["step", "dense", "encoder", "none"] = "none"
    in_place: bool = False
    precision: Literal["bf16", "fp32"] = "fp32"
    table_optimizer: str = "adam"
    table_lr: float = 0.0

    def __post_init__(self) -> None:
        assert self.lookup == "own" or not (self.in_place or self.exchange == "gather")
        assert self.graphs != "step" or self.lookup == "own"

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole model."""
        return self.lookup == "replicated"

    @property
    def has_static_gradients(self) -> bool:
        """Whether graphs leave the encoder's gradients at the same addresses, step by step.

        Not in ddp: autograd hands all gradients over, those of the tables among them.
        """
        return self.graphs in ("dense", "encoder") and not self.is_replicated

    def describe(self, shards: str) -> str:
        """One line for the log.

        Args:
            shards: what TorchRec's planner did with each table, such as "item row_wise fused".
        """
        lookup = _LOOKUPS[self.lookup] + _EXCHANGES[self.exchange]
        if self.in_place:
            lookup += ", the exact softmax scores the shard in place"
        tables = f"{shards}: " * bool(shards) + lookup
        return f"{tables}; {self.precision}; {_GRAPHS[self.graphs]}"
