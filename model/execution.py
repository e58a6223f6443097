"""How a run is executed: decided once, before anything is built (``model/run/execution.py``).

docs/architecture.md and docs/distributed.md explain each value and when it is chosen.
"""

from dataclasses import dataclass
from typing import Literal

# torch: Adam on CPU, in FBGEMM's module (model/tables/cpu_adam.py)
Lookup = Literal["own", "fbgemm", "torch", "replicated"]
# gather, all_to_all: in sizes known beforehand, so that a CUDA graph can hold the exchange
Exchange = Literal["none", "gather", "all_to_all", "torchrec", "all_reduce"]
# encoder: its optimizer is another graph, but not in ddp
Graphs = Literal["step", "encoder", "none"]
Precision = Literal["bf16", "fp32"]

_LOOKUPS = {
    "own": "looked up and updated by this project's code",
    "fbgemm": "looked up and updated by FBGEMM",
    "torch": "looked up and updated by plain torch",
    "replicated": "replicated as an ordinary weight",
}
_EXCHANGES = {
    "none": "",
    "gather": ", every rank looks up the ids of all ranks in its shard",
    "all_to_all": ", rows exchanged by an all-to-all, ids a batch ahead",
    "torchrec": ", rows exchanged by TorchRec, ids a batch ahead",
    "all_reduce": ", gradients averaged by DDP",
}
_GRAPHS = {
    "step": "one CUDA graph per step",
    "encoder": "CUDA graphs of the encoder",
    "none": "no CUDA graphs",
}


@dataclass(frozen=True)
class ExecutionPlan:
    """The same on every rank. The default executes a plain model on one rank.

    Attributes:
        in_place: the exact softmax scores the rank's shard itself (if it is fp16, a float32 copy),
            not rows looked up by their ids.
        precision: of the matrix products of encoder and head.
        table_optimizer: in ddp the encoder's.
        table_lr: the tables' peak learning rate.
    """

    lookup: Lookup = "replicated"
    exchange: Exchange = "none"
    graphs: Graphs = "none"
    in_place: bool = False
    precision: Precision = "fp32"
    table_optimizer: str = "adam"
    table_lr: float = 0.0

    def __post_init__(self) -> None:
        assert self.lookup == "own" or not self.in_place
        assert self.lookup == "own" or not self.agrees_on_sizes
        assert self.graphs != "step" or self.lookup == "own"

    @property
    def is_replicated(self) -> bool:
        return self.lookup == "replicated"

    @property
    def agrees_on_sizes(self) -> bool:
        """Whether the loaders pad the steps of all ranks to the same sizes."""
        return self.exchange in ("gather", "all_to_all")

    @property
    def has_static_gradients(self) -> bool:
        """Whether graphs keep the encoder's gradients at fixed addresses; DDP's hooks do not."""
        return self.graphs == "encoder" and not self.is_replicated

    def describe(self, shards: str) -> str:
        """One line for the log; ``shards`` from ``describe_shards``."""
        lookup = _LOOKUPS[self.lookup] + _EXCHANGES[self.exchange]
        if self.in_place:
            lookup += ", the exact softmax scores the shard in place"
        tables = f"{shards}: " * bool(shards) + lookup
        return f"{tables}; encoder {self.precision}; {_GRAPHS[self.graphs]}"
