"""Compile a run's Triton kernels while its model is built, not one by one in its first step.

    main thread      data, loader -> model, optimizers, checkpoint, log -> first step
    a thread             \\-> a step on fake tensors: the kernels, and the types of their arguments
    more threads              \\-> compile them; a launch waits for its own kernel

torch's fake tensors have shapes, types and offsets but no memory: the step runs no kernel, draws no
random number and changes nothing. Its code is that of the real steps, and kernels are noted where
they are launched (``model/kernels/compiler.py``), so that there is no second list of them. A kernel
that it misses is compiled when it is used.
"""

import os
import sys
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

# Private: fake tensors have no public name.
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec.modules.embedding_configs import data_type_to_dtype

from model.bert4rec import TABLE_PRECISIONS
from model.distributed import Ranks
from model.evaluation.users import vectors
from model.execution import ExecutionPlan
from model.kernels.compiler import (
    MULTIPLE,
    THREADS_COMPILE,
    Launch,
    captures_wait,
    launches_wait,
    noted_launches,
    triton,
)
from model.run.build import build_plain_model, num_attributes
from model.settings.config import RunConfig
from model.step.flat_adamw import FlatAdamW, split_by_decay
from model.step.pipelines import MODULES_CALLED
from model.step.train_step import backward
from model.tables.item_table import TableShard, exchanged_ids, look_up_all
from model.tables.row_exchange import RowExchange
from model.tables.row_lookup import rows_or_zeros
from model.tables.table_update import Step
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.times import TimeSpan
from pipeline.batches.train_batch import PackedBatch
from pipeline.errors import warn
from pipeline.training.loader import TrainLoader

# There are some 40 kernels. A fifth of compiling them holds the interpreter's lock, for which more
# threads wait in turn: on two cores 2 threads took 4.4 s, 8 5.3, 16 6.8.
_THREADS = 8
# Seconds until a thread that compiles gives the lock to one that waits for it. By default it is
# 5 ms: the thread that builds the model waits as long for each of the others in turn.
_TURN, _USUAL_TURN = 0.0005, sys.getswitchinterval()


class KernelsAhead:
    """Compiles the kernels of a run's training steps in threads; on CPU there are none."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._noted, self._untold = ranks, dict[Launch, Future[None]](), Lock()
        self._pool: ThreadPoolExecutor | None = None
        if THREADS_COMPILE and ranks.device.type == "cuda":
            # At least two: one may wait until the pipeline has traced the model.
            threads = max(2, min(_THREADS, (os.cpu_count() or 1) // ranks.local_world_size))
            # Every thread has a current device of its own.
            self._pool = ThreadPoolExecutor(
                threads, "kernels", torch.cuda.set_device, (ranks.device,)
            )
            # With an empty cache, Triton compiles its interface to the driver first.
            self._ready = self._pool.submit(
                lambda: triton.runtime.driver.active.get_current_target()
            )

    def start(
        self,
        config: RunConfig,
        num_items: int,
        loader: TrainLoader,
        plan: ExecutionPlan,
        span: TimeSpan | None = None,
        attributes: ItemAttributes | None = None,
    ) -> None:
        """Start to find the kernels, and to compile each; a launch waits for its own."""
        if self._pool is not None:
            with self._failures_told():
                # Made here: another thread would change the generator of the initial weights.
                step = FakeStep(config, num_items, plan, self._ranks, span, attributes)
                sys.setswitchinterval(_TURN)
                captures_wait(self._pool.submit(self._find, step, loader.examples()))

    def _find(self, step: "FakeStep", batches: Iterator[PackedBatch]) -> None:
        with self._failures_told(), noted_launches(self._note), MODULES_CALLED:
            step.train(next(batches))
        assert self._pool is not None
        captures_wait(self._pool.submit(self._find_others, step, batches))

    def _find_others(self, step: "FakeStep", batches: Iterator[PackedBatch]) -> None:
        """Other shapes of training steps, then evaluation, behind what the first step needs."""
        futures.wait([*self._noted.values()])
        with self._failures_told(), noted_launches(self._note):
            for batch in batches:
                with MODULES_CALLED:
                    step.train(batch)
            with MODULES_CALLED:
                step.evaluate()
        assert self._pool is not None
        # The last work to start.
        captures_wait(self._pool.submit(sys.setswitchinterval, _USUAL_TURN))
        self._pool.shutdown(wait=False)

    def _note(self, launch: Launch) -> None:
        if launch not in self._noted:
            assert self._pool is not None
            self._noted[launch] = self._pool.submit(self._compile, launch)
            launches_wait(launch, self._noted[launch])

    def _compile(self, launch: Launch) -> None:
        with self._failures_told():
            self._ready.result()
            launch.compile()

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        """A failure is one warning: the step itself would show what it means."""
        try:
            yield
        except Exception as error:
            if self._untold.acquire(blocking=False):
                warn(f"kernels are compiled when they are used: {type(error).__name__}: {error}")


class FakeStep:
    """Steps on fake tensors, with this rank's part of the table but no other rank."""

    def __init__(
        self,
        config: RunConfig,
        num_items: int,
        plan: ExecutionPlan,
        ranks: Ranks,
        span: TimeSpan | None = None,
        attributes: ItemAttributes | None = None,
    ) -> None:
        self._mode, self._device = FakeTensorMode(), ranks.device
        output, on_validation = config.output, config.windows.train_on_validation
        self._users = output.test_batch_size if on_validation else output.val_batch_size
        self._trained = set[tuple[int, ...]]()
        self._plan = replace(plan, graphs="none")
        with self._mode, self._device:
            self._model = build_plain_model(
                config, num_items, ranks, self._plan, span=span, attributes=attributes
            )
        head = self._model.head
        head.catalog = replace(head.catalog, shared=False)
        self._exchange = RowExchange(num_items, ranks, num_attributes(attributes))
        self._attributes = self._model.embeddings.attributes
        self._exchange.world_size = 1
        self._width = config.encoder.emb_dim
        self._is_own = plan.lookup == "own"  # else looked up by FBGEMM
        self._draws = config.head.loss != "softmax"
        self._row_type = data_type_to_dtype(TABLE_PRECISIONS[config.sharding.table_precision])
        self._optimizer: FlatAdamW | None = None
        if plan.graphs == "step":
            named = self._model.named_parameters()
            dense = [p for name, p in named if not name.startswith("embeddings.")]
            with self._mode, self._device:
                groups, betas = split_by_decay(dense), config.optimizer.betas
                self._optimizer = FlatAdamW(*groups, torch.ones(()), 0.0, betas, limit=1.0)

    def train(self, batch: PackedBatch) -> None:
        """The step of a batch, of which only the sizes matter; once for sizes of equal remainders.

        Kernels depend on sizes, and on offsets in the batch, by their remainders.
        """
        packed = batch.packed
        remainders = tuple(size % MULTIPLE for size in packed.sizes)
        if remainders in self._trained:
            return
        self._trained.add(remainders)
        with self._mode, self._device:
            words = torch.empty(len(packed.words), dtype=torch.int64)
            batch = replace(batch, packed=replace(packed, words=words))
            # Without candidates: they are tensors that the real step takes from a cache.
            counted = replace(batch.unpack(), all_targets=torch.ones(1, dtype=torch.int64))
            loss, _ = self._model.score(counted, *self._rows(batch))
            backward(loss, torch.ones(()))
            if self._optimizer is not None:
                self._optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        """The encoder as evaluations call it: any number of positions, a last batch of any size."""
        self._model.eval()
        with self._mode, self._device:
            for users in (self._users, MULTIPLE + 1):
                items = torch.empty(MULTIPLE * users + 1, self._width)
                if self._is_own:
                    ids = torch.empty(len(items), dtype=torch.int64)
                    items = rows_or_zeros(self._shards()[0].rows, ids)
                offsets = torch.empty(users + 1, dtype=torch.int64)
                vectors(self._model, items, offsets, offsets[1:], None)

    def _rows(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Rows [T, D] of the items, [C, D] of the candidates and [A, D] of any attributes."""
        exchange, head = self._exchange, self._model.head
        num_items, *_ = batch.packed.sizes
        candidates = None
        if batch.candidate_range is not None and not self._draws:
            candidates = torch.arange(*batch.candidate_range)
        if self._is_own:
            # Not by ``items_of``, whose cache real steps read.
            added = None if self._attributes is None else torch.arange(*self._attributes)
            ids = exchanged_ids(batch, self._draws and head.config.head == "linear", added)
            requests = [exchange.request(each, batch.slots) for each in ids]
            given = num_items, candidates, self._model.embeddings.num_attributes
            return look_up_all(self._shards(), requests, *given)
        count = len(batch.requested) - num_items if candidates is None else len(candidates)
        sizes = [num_items, count]
        if self._attributes is not None:
            sizes.append(self._model.embeddings.num_attributes)
        return tuple(torch.empty(size, self._width, requires_grad=True) for size in sizes)

    def _shards(self) -> list[TableShard]:
        head, optimizer = self._model.head, self._plan.table_optimizer
        count = 1 if head.config.head == "tied" else 2
        tables = _Tables(count, (self._exchange.rows, self._width), self._row_type, optimizer)
        shards = []
        for place in range(count):
            scored = head.catalog if self._plan.in_place and place == count - 1 else None
            shard = TableShard(tables, optimizer, self._exchange, scored, place)
            shard.begin_step(Step.counted(tables))
            shards.append(shard)
        return shards


class _Tables:
    """As FBGEMM's module of tables [R, D]."""

    def __init__(
        self, count: int, shape: tuple[int, int], dtype: torch.dtype, optimizer: str
    ) -> None:
        states: dict[str, list[tuple[int, ...]]] = {
            "adam": [shape, shape],
            "adagrad": [shape],
            "rowwise_adagrad": [shape[:1]],
        }
        weights = [torch.empty(shape, dtype=dtype) for _ in range(count)]
        kept = [[torch.empty(each) for each in states.get(optimizer, [])] for _ in range(count)]
        self.split_embedding_weights = lambda: weights
        self.split_optimizer_states = lambda: kept
        self.get_learning_rate = lambda: 0.001
        self.optimizer_args = SimpleNamespace(beta1=0.9, beta2=0.98, eps=1e-8)
        self.iter_cpu = SimpleNamespace(numpy=lambda: np.zeros(1, dtype=np.int64))
