"""Training batches: every window, in a new order each epoch, once over all ranks.

    ShuffledSamples -> LeftContextFirst -> CutWindows -> MaskItems [-> PadToBuckets] [-> DrawNegatives]
    sample numbers     order in a step     jagged rows   cloze task
        -> ToTensors -> Prefetcher -> PackedBatch

The Prefetcher's thread runs all stages before it ahead.

A sample is one of ``dupe_factor`` copies of a window; ``pipeline/training/sampler.py`` says which rank
trains which. All ranks have equally many batches: one that gets no part of an epoch's last, partial
step is given a filler row, a lone mask token with nothing to predict.

Stages, and the thread, work on chunks of several steps, which is what makes small batches cheap: a
step's batch is a slice of its chunk. Draws are keyed by window, so chunks change nothing. The state
is {"epoch", "sample"}, the samples consumed by all ranks together, and goes on at any world size or
batch size::

    loader = TrainLoader(store, WindowConfig(), MaskConfig(), LoaderConfig(), rank=0, world_size=2)
    batches = loader.epoch(3)
    train(batch.to(device) for batch in itertools.islice(batches, 100))
    state = loader.state_dict()                  {"epoch": 3, "sample": 51200}
    batches = loader.epoch(**state)              later, elsewhere
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torchdata.nodes import BaseNode, Prefetcher

from pipeline.batches.train_batch import PackedBatch
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.training.cloze import ClozeMask, LeftContextFirst, MaskConfig, MaskItems
from pipeline.training.negatives import DrawNegatives, SharedNegatives
from pipeline.training.sampler import Chunk, ShuffledSamples
from pipeline.training.shape_buckets import PadToBuckets, bucket_size
from pipeline.training.to_tensors import ToTensors
from pipeline.training.two_stream import TwoStreams
from pipeline.training.windows import CutWindows, WindowConfig, WindowTable

# Enough items a chunk that NumPy's fixed cost a call vanishes, few enough to be made in some
# milliseconds.
_CHUNK_ITEMS = 1 << 18


@dataclass(frozen=True)
class LoaderConfig:
    """How windows become batches."""

    train_batch_size: int = field(default=128, metadata={"help": "windows a rank trains in a step"})
    prefetch_batches: int = field(
        default=8, metadata={"help": "batches made ahead by a background thread, at least"}
    )
    seed: int = field(default=0, metadata={"help": "seed of every random draw"})

    def __post_init__(self) -> None:
        for flag in ("train_batch_size", "prefetch_batches"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} must be at least 1, not {getattr(self, flag)}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"--seed must be in 0..2^63-1, not {self.seed}")


class TrainLoader:
    """All stages put together, for one rank.

    Args:
        store: the histories.
        windows, mask, config: how to cut, mask and batch them.
        rank, world_size: this rank's share; every rank must be given the same rest.
        candidate_range: half-open range of item ids that this rank scores; put into each batch.
        negatives: draws items that each step scores instead.
        agree: as of ``PadToBuckets``, called by the thread that runs ahead: a
            step's batches then have as many positions, rows and masked positions on all ranks.
        pin_memory: page-locked batches; None means wherever there is CUDA.
        few_shapes: round sizes up (``pipeline/training/shape_buckets.py``); None means wherever there is CUDA.

    Raises:
        UserError: if there is no window to train on.
    """

    def __init__(
        self,
        store: SequenceStore,
        windows: WindowConfig,
        mask: MaskConfig,
        config: LoaderConfig,
        rank: int = 0,
        world_size: int = 1,
        candidate_range: tuple[int, int] | None = None,
        pin_memory: bool | None = None,
        few_shapes: bool | None = None,
        negatives: SharedNegatives | None = None,
        agree: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        table = WindowTable.build(store, windows)
        if len(table) == 0:
            raise UserError("there is no history to train on: every user was filtered out")
        self.num_windows = len(table)
        step_items = config.train_batch_size * windows.max_len
        step_items = max(step_items, negatives.count if negatives is not None else 0)
        steps_per_chunk = max(1, _CHUNK_ITEMS // step_items)
        mean_items = config.train_batch_size * float(np.mean(table.end - table.start))
        self._samples = ShuffledSamples(
            num_windows=len(table),
            dupe_factor=mask.dupe_factor,
            batch_size=config.train_batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            steps_per_chunk=steps_per_chunk,
        )
        cloze = ClozeMask(mask, store.num_items, config.seed)
        ordered = LeftContextFirst(self._samples, cloze)
        cut = CutWindows(ordered, store.items, table)
        pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        chunks: BaseNode[Chunk] = (TwoStreams if mask.two_stream else MaskItems)(cut, cloze)
        second = mask.left_context_share if mask.two_stream else 0.0  # tokens of it for each item
        few = torch.cuda.is_available() if few_shapes is None else few_shapes
        if few or agree is not None:
            of_masks = second + (1 - second) * mask.mask_prob
            chunks = PadToBuckets(
                chunks,
                windows.max_len,
                cloze.mask_token,
                position_unit=bucket_size(mean_items * (1 + second)) if few else 1,
                mask_unit=bucket_size(mean_items * of_masks) if few else 1,
                agree=agree,
            )
        if negatives is not None:
            chunks = DrawNegatives(chunks, negatives)
        tensors = ToTensors(chunks, cloze.mask_token, candidate_range, pin)
        # More than one chunk, so that an epoch's first, which takes longer, is not waited for.
        ahead = max(2, -(-config.prefetch_batches // steps_per_chunk))
        self._prefetcher = Prefetcher(tensors, prefetch_factor=ahead)
        self._state = {"epoch": 0, "sample": 0}

    @property
    def num_samples(self) -> int:
        """Windows times ``dupe_factor``: what an epoch trains over all ranks."""
        return self._samples.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return self.steps_left(0)

    def steps_left(self, sample: int) -> int:
        """Batches of an epoch of which ``sample`` samples are already trained."""
        return -(-(self.num_samples - sample) // self._samples.global_batch_size)

    def epoch(self, epoch: int, sample: int = 0, stop: int | None = None) -> Iterator[PackedBatch]:
        """The batches of one epoch, from ``sample`` on, made ahead by a thread from now on.

        May be consumed in parts. The iterator of an earlier call is dead from now on.

        Args:
            epoch, sample: where to begin.
            stop: the batches of the epochs up to this one follow without a break: to begin anew
                costs some milliseconds, several steps' worth.
        """
        self._state = {"epoch": epoch, "sample": sample}
        begin = self._state | {"stop": epoch + 1 if stop is None else stop}
        self._prefetcher.reset({"snapshot": begin, "steps_since_snapshot": 0})
        return self._consume()

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "sample"}: what was handed out so far, however far the thread has run ahead.

        The same on every rank, JSON-able, and the arguments of :meth:`epoch`.
        """
        return dict(self._state)

    def _consume(self) -> Iterator[PackedBatch]:
        for chunk in self._prefetcher:
            for batch, sample in chunk.batches():
                self._state = {"epoch": chunk.epoch, "sample": sample}
                yield batch
