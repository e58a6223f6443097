"""Bytes that ranks send: known collectives, whole training steps by hand, and the step's model."""

import itertools
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import communication
from benchmarks.collectives import WARM_UP, per_step
from model.distributed import Ranks
from model.run.build import build_plain_model, train_loader
from model.run.execution import plan_execution
from model.settings.config import RunConfig
from model.settings.flags import FlagParser
from pipeline.preparation.prepare import prepare
from tests.conftest import torchrun
from tests.workers.collectives import FLAGS, STEPS

DIM = 8


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Any]:
    """The counts of two ranks."""
    out = tmp_path_factory.mktemp("counted") / "counted.json"
    outcome = torchrun(2, "tests/workers/collectives.py", out, cache_dir)
    assert outcome.code == 0, outcome.err
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def config(cache_dir: Path) -> RunConfig:
    """The run whose steps were counted."""
    return FlagParser("", RunConfig).parse([*FLAGS, f"--cache_dir={cache_dir}"])


@pytest.mark.slow
def test_known_collectives(counted: dict[str, Any]) -> None:
    # Each of two ranks sends half of its tensor, twice in an all-reduce; see collectives.py.
    expected = [
        ["all-reduce, float64", 2 * 80 / 2],
        ["all-gather, float32", 40],
        ["reduce-scatter, float32", 40],
        ["all-to-all, float32", 40],
        ["all-to-all, int64", 0],
        ["all-reduce, float32", 8 * 4],  # the weights and biases of a 3 x 2 linear layer
    ]
    for rank, sent in ((0, 2 * 5 * 8), (1, 3 * 5 * 8)):
        expected[4][1] = sent
        assert counted["known"][rank] == expected


def dense_parameters(config: RunConfig, num_items: int) -> int:
    """Of the encoder, which every rank holds."""
    model = build_plain_model(config, num_items, alone(0, 1))
    return sum(parameter.numel() for parameter in model.encoder.parameters())


def alone(rank: int, world_size: int) -> Ranks:
    return Ranks(rank, world_size, world_size, torch.device("cpu"))


@pytest.mark.slow
def test_ddp_sends_every_gradient(counted: dict[str, Any], config: RunConfig) -> None:
    items = counted["ddp"]["items"]
    assert items == 50
    numbers = dense_parameters(config, items) + (items + 2) * DIM
    assert counted["ddp"]["parameters"] == numbers
    # Of two ranks each sends as many bytes as the gradients have; 4 are the number of positions.
    found = counted["ddp"]["collectives"]
    assert found.keys() == {"all-reduce, float32"}
    assert found["all-reduce, float32"]["mean"] == pytest.approx(4 * numbers + 4)
    assert found["all-reduce, float32"]["most"] == pytest.approx(4 * numbers + 4)


@pytest.mark.slow
def test_row_wise_gathers_ids_and_gradients_and_scatters_rows(
    counted: dict[str, Any], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, dense = counted["dmp"]["collectives"], dense_parameters(config, 50)
    # The loaders add up the number of positions.
    assert found["all-reduce, float32"]["mean"] == pytest.approx(4 * dense)

    # Sizes differ between the two ranks: the larger one counts.
    monkeypatch.setattr("model.run.build.all_sizes", lambda _: lambda sizes: sizes[None])
    monkeypatch.setattr("model.run.build.shared_arrays", lambda _, make: make())
    config = replace(config, sharding=replace(config.sharding, mode="dmp"))
    store, sizes = prepare(config.data), []
    for rank in (0, 1):
        ranks = alone(rank, 2)
        plan = plan_execution(config, store.num_items, ranks)
        batches = train_loader(config, store, ranks, plan).epoch(0)
        steps = [*itertools.islice(batches, WARM_UP, WARM_UP + STEPS)]
        sizes.append([(len(step.unpack().ids), len(step.unpack().masked)) for step in steps])
    ids, masked = np.max(sizes, axis=0).sum(axis=0) / STEPS
    # int64: ids, targets. float32: gradients of rows; hidden vectors; two sums per position of both
    # ranks, one weight per own position. Reduce-scatter: rows and gradients of hidden vectors.
    assert found["all-gather, int64"]["mean"] == pytest.approx(8 * (ids + masked))
    assert found["all-gather, float32"]["mean"] == pytest.approx(
        4 * (ids * DIM + masked * DIM + 5 * masked)
    )
    assert found["reduce-scatter, float32"]["mean"] == pytest.approx(4 * (ids + masked) * DIM)
    whole = communication.total(counted["dmp"], "mean")
    assert whole == pytest.approx(sum(entry["mean"] for entry in found.values()))


def test_per_step_by_hand() -> None:
    # Two ranks, two steps of two calls each.
    calls = [
        [("a", 10.0), ("b", 1.0), ("a", 20.0), ("b", 1.0)],
        [("a", 30.0), ("b", 3.0), ("a", 10.0), ("b", 1.0)],
    ]
    assert per_step(calls, 2) == {
        "a": {"calls": 1, "mean": (20 + 15) / 2, "most": (30 + 20) / 2},
        "b": {"calls": 1, "mean": (2 + 1) / 2, "most": (3 + 1) / 2},
    }
    with pytest.raises(ValueError, match="unpack"):
        per_step([[("a", 1.0)], [("b", 1.0)]], 1)


def counts() -> list[dict[str, Any]]:
    def one(way: str, batch: int, calls: int, most: float) -> dict[str, Any]:
        mean = most if way == "ddp" else most / 2
        entry = {"calls": calls, "mean": mean, "most": most}
        return {"way": way, "ranks": 8, "batch": batch, "collectives": {"all-gather, int8": entry}}

    # 300 MB for any batch; 1 MB and 0.5 MB more per window.
    return [
        one("ddp", 8, 2, 300e6),
        one("row_wise", 8, 10, 5e6),
        one("ddp", 32, 2, 300e6),
        one("row_wise", 32, 10, 17e6),
    ]


OPTIONS = Namespace(
    bandwidth=100.0,
    efficiency=0.5,
    latency_us=20.0,
    compute={("ddp", 8): 4.0, ("dmp", 8): 1.0, ("dmp", 128): 3.0},
    items=200_000,
    emb_dim=128,
    flags=["--loss=sampled_softmax"],
)


def test_bytes_are_linear_in_the_batch() -> None:
    assert communication.at_batch(counts(), "ddp", 8, 1024) == (2, 300e6)
    assert communication.at_batch(counts(), "row_wise", 8, 128) == (10, 65e6)
    assert communication.at_batch(counts()[:2], "ddp", 8, 8) == (2, 300e6)
    assert communication.at_batch(counts()[:2], "ddp", 8, 9) is None
    # Of 8 ranks each sends 2 x 7/8 of the gradients, of 4 ranks 2 x 3/4.
    assert communication.at_batch(counts(), "ddp", 4, 8) == (2, pytest.approx(300e6 / 7 * 6))
    assert communication.at_batch(counts(), "row_wise", 4, 8) is None


def test_the_model_by_hand() -> None:
    # 10 calls of 20 us and 5 MB at 50 GB/s.
    assert communication.communication_ms(10, 5e6, OPTIONS) == pytest.approx(0.2 + 0.1)
    lines = communication.model_table(counts(), OPTIONS).splitlines()[2:]
    # DDP: 0.04 + 6 ms; hidden 6.04 and 1.0, exposed 10.04 and 1.3.
    assert lines[:3] == [
        "| 8 | 8 | ddp | 6.04 | 4.00 | 6.04 ... 10.04 | 6,375 ... 10,596 | - |",
        "| 8 | 8 | row_wise | 0.30 | 1.00 | 1.00 ... 1.30 | 49,231 ... 64,000 | 6.04 ... 7.72 |",
        "| 8 | 128 | ddp | 6.04 | - | - | - | - |",
    ]
    assert lines[3].startswith("| 8 | 128 | row_wise | 1.50 | 3.00 | 3.00 ... 4.50 |")


def test_with_the_exact_softmax_each_gpu_passes_over_its_own_rows() -> None:
    # 40 bytes for each of 200,000 x 128 values at 3 TB/s: 0.3413 ms, of which 8 GPUs save 7/8.
    exact = Namespace(**{**vars(OPTIONS), "flags": []})
    assert communication.compute_at("row_wise", 8, 8, exact) == pytest.approx(
        1 - 0.3413 * 7 / 8, abs=1e-4
    )
    assert communication.compute_at("row_wise", 1, 8, exact) == 1.0
    assert communication.compute_at("table_wise", 8, 8, exact) == 1.0
    assert communication.compute_at("ddp", 8, 8, exact) == 4.0
    assert communication.compute_at("row_wise", 8, 8, OPTIONS) == 1.0
    assert communication.compute_at("row_wise", 8, 1024, exact) is None


def test_counts_are_shown_with_their_ratio() -> None:
    lines = communication.counts_table(counts()).splitlines()
    assert lines[0] == ("| ranks | local batch | | all-gather, int8 | all | busiest | DDP : it |")
    assert lines[2] == "| 8 | 8 | ddp | 300 MB (2) | 300 MB | 300 MB | 1.0 |"
    assert lines[3] == "| 8 | 8 | row_wise | 2.5 MB (10) | 2.5 MB | 5 MB | 120.0 |"


def test_compute_comes_from_the_throughput_file_or_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    result = {"row": "exact-8", "ranks": 1, "mode": "dmp", "batch": 8, "more": []}
    file.write_text(
        json.dumps(
            [
                {**result, "step_ms": 2.5},
                {**result, "batch": 128, "failed": "out of memory"},
                {**result, "ranks": 2, "step_ms": 9},
                {**result, "row": "sampled-8", "step_ms": 7},
            ]
        )
    )
    options = Namespace(throughput=file, compute_ms=["ddp:128=7.5"], flags=["--emb_dim=128"])
    assert communication.compute_ms(options) == {("dmp", 8): 2.5, ("ddp", 128): 7.5}
    options = Namespace(throughput=file, compute_ms=[], flags=["--loss=sampled_softmax"])
    assert communication.compute_ms(options) == {("dmp", 8): 7}
