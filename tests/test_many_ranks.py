"""One seed on 1, 2, 4 and 8 ranks and on two nodes of two: the same losses and evaluation.

Through train.py, over gloo; the global batch is 16 windows everywhere. The nodes are two torchrun
agents of this host, which find each other by a rendezvous; each has its own prepared data.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement
from tests.conftest import ROOT, TINY, losses_of, torchrun
from tests.test_faults import Start, start, stop
from tests.test_two_nodes import free_port, train_on_nodes

__all__ = ["start"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS, GLOBAL_BATCH = 4, 16
FLAGS = (*TINY, "--mode=dmp", "--sharding=row_wise", "--dropout=0", "--seed=7", "--lr=0.003")
SETTINGS = (*FLAGS, f"--num_epochs={EPOCHS}", "--log_every=1")


def batch(num_ranks: int) -> str:
    return f"--train_batch_size={GLOBAL_BATCH // num_ranks}"


def evaluated(run_dir: Path) -> dict[str, Any]:
    found = json.loads((run_dir / "eval_test.json").read_text())
    return {name: found[name] for name in ("users", "step", "full", "sampled")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one rank."""
    return trained(1, tmp_path_factory.mktemp("alone"))


def trained(num_ranks: int, folder: Path) -> Path:
    where = f"--cache_dir={folder / 'cache'}", f"--run_dir={folder / 'run'}"
    done = torchrun(num_ranks, ROOT / "train.py", *SETTINGS, batch(num_ranks), *where, timeout=400)
    assert done.code == 0, done.err
    return folder / "run"


def assert_same(run_dir: Path, alone: Path) -> None:
    found, expected = losses_of(run_dir), losses_of(alone)
    assert len(expected) >= 4 * EPOCHS and expected[max(expected)] < expected[1] - 0.05
    assert found == pytest.approx(expected, abs=1e-4)
    one, other = evaluated(alone), evaluated(run_dir)
    assert (other["users"], other["step"]) == (one["users"], one["step"])
    for protocol in ("full", "sampled"):
        assert other[protocol] == pytest.approx(one[protocol], abs=1e-9)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_ranks_equal_one(alone: Path, tmp_path: Path, num_ranks: int) -> None:
    assert_same(trained(num_ranks, tmp_path), alone)


def test_two_nodes_of_two_ranks_equal_one(alone: Path, tmp_path: Path) -> None:
    meet = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
    flags = (*SETTINGS, batch(4), f"--run_dir={tmp_path / 'run'}")
    train_on_nodes(tmp_path / "nodes", [["--nproc_per_node=2", *meet]] * 2, flags)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["execution"]["exchange"] == "all_to_all"
    assert_same(tmp_path / "run", alone)


def test_the_benchmark_of_agreement_passes(tmp_path: Path) -> None:
    flags = [flag for flag in TINY if "batch_size" not in flag and "epochs" not in flag]
    lines = list(agreement.agreement(tmp_path, [1, 2], GLOBAL_BATCH, flags, gpus=[]))
    assert len(lines) == 5 and all(line.endswith("PASS |") for line in lines)
    trained = losses_of(tmp_path / "trained on 1")
    assert trained[max(trained)] < trained[1] - 0.05


def test_saved_on_four_and_continued_on_one_and_two(
    alone: Path, tmp_path: Path, start: Start
) -> None:
    job = start("four", 4, *SETTINGS, batch(4))
    job.wait_for_steps(len(losses_of(alone)) // 2)
    stop(job, signal.SIGTERM)
    saved = max(losses_of(job.run_dir))
    assert saved < max(losses_of(alone))
    for num_ranks in (1, 2):
        (tmp_path / str(num_ranks)).mkdir()
        shutil.copytree(job.run_dir, tmp_path / str(num_ranks) / "run")
        other = start(str(num_ranks), num_ranks, *SETTINGS, batch(num_ranks))
        assert other.wait(300) == 0, other.err
        assert f"resumed from {other.run_dir}" in other.out
        assert_same(other.run_dir, alone)
