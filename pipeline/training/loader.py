"""Training batches: every window once an epoch over all ranks, in a new order each epoch.

    ShuffledSamples -> LeftContextFirst -> CutWindows [-> AddTimes] -> MaskItems or TwoStreams
    which windows      order in a step     items                       cloze task
        [-> DrawNegatives] [-> PadToBuckets] [-> CountSlots] -> ToTensors -> Prefetch
        sampled losses     few shapes        all-to-all                      a thread
    InThreads: all but the first, or, where ranks agree on shapes, those before PadToBuckets

All ranks have the same number of batches: a rank without a share of an epoch's last, partial step
gets a filler row, one mask token without a target. Stages work on chunks of several steps. The
state counts the samples consumed by all ranks: training can resume at any world and batch size::

    loader = TrainLoader(store, WindowConfig(), MaskConfig(), LoaderConfig(), RankShare(0, 2))
    batches = loader.epoch(3)
    train(batch.to(device) for batch in itertools.islice(batches, 100))
    state = loader.state_dict()                  {"epoch": 3, "sample": 51200}
    batches = loader.epoch(**state)              later, elsewhere
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torchdata.nodes import BaseNode

from pipeline.batches.times import ItemTimes
from pipeline.batches.train_batch import PackedBatch
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.stage import InThreads, Prefetch
from pipeline.training.chunks import JaggedWindows, MaskedWindows
from pipeline.training.cloze import ClozeMask, LeftContextFirst, MaskItems
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.negatives import DrawNegatives, SharedNegatives
from pipeline.training.sampler import ShuffledSamples
from pipeline.training.shape_buckets import PadToBuckets, bucket_size
from pipeline.training.slots import CountSlots
from pipeline.training.to_tensors import Steps, ToTensors
from pipeline.training.two_stream import TwoStreams
from pipeline.training.windows import AddTimes, CutWindows, WindowTable

# Integers of all ranks, [W, ...], from this rank's.
AllSizes = Callable[[np.ndarray], np.ndarray]
# Large enough that NumPy's fixed cost per call is negligible; a chunk takes some milliseconds.
_CHUNK_ITEMS = 1 << 19
_EXAMPLES = 8


@dataclass(frozen=True)
class RankShare:
    """One rank's share of the work of making batches.

    Attributes:
        all_sizes: as in `PadToBuckets`, called by the loader's thread: a step's batches then
            have the same number of positions, rows and masked positions on all ranks.
        shard_rows: rows of a rank's shard of the item table, to count the slots of each step
            (slots.py); needs ``all_sizes``.
        shared: of arrays that are the same on all ranks; they may be made once for several.
        threads: that make batches.
    """

    rank: int = 0
    world_size: int = 1
    all_sizes: AllSizes | None = None
    shard_rows: int | None = None
    shared: Callable[[Callable[[], list[np.ndarray]]], list[np.ndarray]] = lambda make: make()
    threads: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        assert self.shard_rows is None or self.all_sizes is not None


class TrainLoader:
    """All training stages, for one rank.

    Args:
        candidate_range: half-open range of item ids that this rank scores; put into each batch.
        few_shapes: whether to pad to few shapes (shape_buckets.py); None: if there is CUDA.
        negatives: draws the items that each step scores instead of the candidate range.
        times: of the store's items, put into each batch; None: batches have no times.

    Raises:
        UserError: there is no window to train on.
    """

    def __init__(
        self,
        store: SequenceStore,
        windows: WindowConfig,
        mask: MaskConfig,
        config: LoaderConfig,
        share: RankShare = RankShare(),
        candidate_range: tuple[int, int] | None = None,
        few_shapes: bool | None = None,
        negatives: SharedNegatives | None = None,
        times: ItemTimes | None = None,
    ) -> None:
        self._table = WindowTable.build(store, windows, shared=share.shared)
        if len(self._table) == 0:
            raise UserError("there is no history to train on: every user was filtered out")
        self.num_windows = len(self._table)
        self._windows, self._mask, self._config = windows, mask, config
        self._items, self._times = np.asarray(store.items), times
        self._cloze = ClozeMask(mask, store.num_items, config.seed)
        self._candidate_range, self._negatives, self._share = candidate_range, negatives, share
        self._few_shapes = torch.cuda.is_available() if few_shapes is None else few_shapes
        step_items = config.train_batch_size * windows.max_len
        step_items = max(step_items, negatives.count if negatives is not None else 0)
        steps_per_chunk = max(1, _CHUNK_ITEMS // step_items)
        self._samples = ShuffledSamples(
            num_windows=self.num_windows,
            dupe_factor=mask.dupe_factor,
            batch_size=config.train_batch_size,
            seed=config.seed,
            rank=share.rank,
            world_size=share.world_size,
            steps_per_chunk=steps_per_chunk,
        )
        self.num_samples = self._samples.num_samples  # of an epoch, over all ranks
        self.steps_per_epoch = self.steps_left(0)
        self._stages = self._stages_of(self._samples, share)
        # At least two chunks, because an epoch's first chunk takes longer to make.
        self._chunks_ahead = max(2, -(-config.prefetch_batches // steps_per_chunk))
        self._prefetch: Prefetch[Steps] | None = None
        self._state = {"epoch": 0, "sample": 0}

    def _stages_of(self, samples: ShuffledSamples, share: RankShare) -> BaseNode[Steps]:
        """The stages that make batches of samples."""
        ordered = LeftContextFirst(samples, self._cloze)
        cut: BaseNode[JaggedWindows] = CutWindows(ordered, self._items, self._table)
        if self._times is not None:
            cut = AddTimes(cut, self._times, self._table, self._config.seed)
        make_rows = TwoStreams if self._mask.two_stream else MaskItems
        chunks: BaseNode[MaskedWindows] = make_rows(cut, self._cloze)
        if self._negatives is not None:
            chunks = DrawNegatives(chunks, self._negatives)
        token = self._cloze.mask_token
        agree = share.all_sizes is not None  # in the order of the steps
        if agree:
            chunks = InThreads(chunks, share.threads)
        if self._few_shapes or agree:
            units = self._bucket_sizes() if self._few_shapes else (1, 1)
            chunks = PadToBuckets(chunks, self._windows.max_len, token, *units, share.all_sizes)
        if share.shard_rows is not None:
            assert share.all_sizes is not None
            sizes = share.shard_rows, share.world_size, token
            chunks = CountSlots(chunks, *sizes, share.all_sizes)
        has_cuda = torch.cuda.is_available()
        steps = ToTensors(chunks, token, self._candidate_range, pin_memory=has_cuda)
        return steps if agree else InThreads(steps, share.threads)

    def _bucket_sizes(self) -> tuple[int, int]:
        """Units of positions and of masked positions, by the means of a step."""
        mean_items = self._config.train_batch_size * self._table.mean_length()
        # Share of positions of second streams.
        second = self._mask.left_context_share if self._mask.two_stream else 0.0
        masked_share = second + (1 - second) * self._mask.mask_prob
        return bucket_size(mean_items * (1 + second)), bucket_size(mean_items * masked_share)

    def steps_left(self, sample: int) -> int:
        """Batches of an epoch after its first ``sample`` samples, the same on every rank."""
        return -(-(self.num_samples - sample) // self._samples.global_batch_size)

    def epoch(self, epoch: int, sample: int = 0, stop: int | None = None) -> Iterator[PackedBatch]:
        """The batches of one epoch, from ``sample`` on; a thread starts to make them at once.

        They may be consumed in parts. The iterator of an earlier call ends. With ``stop``, the
        epochs before it follow without the pause of a new call (some milliseconds).
        """
        if self._prefetch is not None:
            self._prefetch.close()
        self._state = {"epoch": epoch, "sample": sample}
        self._stages.reset(self._state | {"stop": epoch + 1 if stop is None else stop})
        self._prefetch = Prefetch(self._stages, self._chunks_ahead)
        return self._consume(self._prefetch)

    def examples(self) -> Iterator[PackedBatch]:
        """A few batches of the shapes of an epoch's, the last one too, made without other ranks."""
        samples = self._samples
        size = samples.global_batch_size
        few = min(samples.num_windows, _EXAMPLES * size + samples.num_samples % size)

        def all_alike(own: np.ndarray) -> np.ndarray:
            return np.stack([own] * samples.world_size)

        stages = self._stages_of(
            replace(samples, num_windows=few, dupe_factor=1, steps_per_chunk=1),
            replace(self._share, all_sizes=self._share.all_sizes and all_alike),
        )
        stages.reset()
        for steps in stages:
            yield from (batch for batch, _ in steps)

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "sample"} after the last batch yielded, the same on every rank."""
        return dict(self._state)

    def _consume(self, chunks: Iterator[Steps]) -> Iterator[PackedBatch]:
        for steps in chunks:
            for batch, state in steps:
                if chunks is not self._prefetch:  # `epoch` was called again
                    return
                self._state = state
                yield batch
