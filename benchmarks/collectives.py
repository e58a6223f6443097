"""Count the bytes that training steps send, in every collective that reaches torch's dispatcher.

    counter = CollectiveCounter()
    with counter:
        pipeline.progress(batches)      collectives of TorchRec, DDP and the loss
    counter.calls                       [("all-reduce, float32", bytes that this rank sends), ...]

Bytes that a rank sends to others by the usual algorithms, with W ranks and tensors of S bytes:

    all-reduce       2 (W - 1) / W S      ring: reduce-scatter, then all-gather
    all-gather         (W - 1) S          S: the rank's input
    reduce-scatter     (W - 1) S          S: the rank's output
    all-to-all                 S          S: the rank's input for other ranks
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.distributed import Ranks, start
from model.ending import exit_rank
from model.nodes import prepared_data
from model.run.build import build_model, train_loader
from model.run.execution import plan_execution
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from model.step.optimizers import Optimizers
from model.step.pipelines import train_pipeline

# Steps before the counted ones, while the pipeline fills and DDP arranges its buckets.
WARM_UP = 3


class CollectiveCounter(TorchDispatchMode):
    """While entered, records kind, dtype and sent bytes of every collective of this rank.

    Raises:
        NotImplementedError: an unknown collective, whose bytes would be missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if "c10d" in func.namespace:
            kind, dtype, size = _sent(func.overloadpacket.__name__, args)
            self.calls.append((f"{kind}, {dtype}".replace("torch.", ""), size))
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: tuple[Any, ...]) -> tuple[str, torch.dtype, float]:
    """Kind of a collective, its dtype, and the bytes that this rank sends to others."""
    world_size = dist.get_world_size()
    others = world_size - 1
    if name == "allreduce_":
        (tensor,) = args[0]
        return "all-reduce", tensor.dtype, 2 * others / world_size * tensor.nbytes
    if name == "_allgather_base_":
        return "all-gather", args[1].dtype, others * args[1].nbytes
    if name == "_reduce_scatter_base_":
        return "reduce-scatter", args[0].dtype, others * args[0].nbytes
    if name == "alltoall_base_":
        source, splits = args[1], args[4]
        if not splits:
            return "all-to-all", source.dtype, others / world_size * source.nbytes
        sent = sum(splits) - splits[dist.get_rank()]
        return "all-to-all", source.dtype, sent * source.nbytes / max(source.shape[0], 1)
    raise NotImplementedError(f"bytes of the collective {name} are not counted")


def count_steps(flags: list[str], steps: int, ranks: Ranks) -> dict[str, Any]:
    """Calls and bytes per step of real training steps; every rank must call it.

    Args:
        flags: flags of train.py.

    Returns:
        ``{"items": V, "parameters": n, "collectives": {kind: {"calls", "mean", "most"}}}``: calls
        and bytes per step, as the mean over the ranks and of the busiest rank. n counts the
        parameters of this rank.
    """
    config = FlagParser("", RunConfig).parse(flags)
    store = prepared_data(config.data, ranks)
    plan = plan_execution(config, store.num_items, ranks)
    loader = train_loader(config, store, ranks, plan)
    model = build_model(config, store.num_items, ranks, plan)
    optimizers = Optimizers(model, plan, config.optimizer, ranks)
    pipeline = train_pipeline(model, optimizers, plan, ranks.device)
    model.train()
    # Two batches more than steps: the pipeline reads ahead, and must be full while steps count.
    batches = itertools.islice(loader.epoch(0), WARM_UP + steps + 2)
    for _ in range(WARM_UP):
        pipeline.progress(batches)
    counter = CollectiveCounter()
    with counter:
        for _ in range(steps):
            pipeline.progress(batches)
    for _ in range(2):
        pipeline.progress(batches)
    of_all: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(of_all, counter.calls)
    return {
        "items": store.num_items,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "collectives": per_step(of_all, steps),
    }


def per_step(calls: list[list[tuple[str, float]]], steps: int) -> dict[str, dict[str, float]]:
    """Calls and bytes per step by kind, from the calls of each rank in ``steps`` steps.

    "most" sums, call by call, the bytes of the rank that sends most: the others wait for it.
    """
    found: dict[str, dict[str, float]] = {}
    for same in zip(*calls, strict=True):
        (kind,) = {kind for kind, _ in same}
        sizes = [size for _, size in same]
        entry = found.setdefault(kind, {"calls": 0, "mean": 0.0, "most": 0.0})
        entry["calls"] += 1 / steps
        entry["mean"] += sum(sizes) / len(sizes) / steps
        entry["most"] += max(sizes) / steps
    return dict(sorted(found.items()))


def main(jobs: Path, steps: int) -> None:
    """Replace each list of flags in the JSON file ``jobs`` by its counts.

    torchrun --nproc_per_node N -m benchmarks.collectives jobs.json 3
    """
    ranks = start()
    found = [count_steps(flags, steps, ranks) for flags in json.loads(jobs.read_text())]
    if ranks.is_first:
        jobs.write_text(json.dumps(found))
    exit_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
