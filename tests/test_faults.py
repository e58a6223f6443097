"""Faults of processes and machines, through the real commands on two gloo ranks."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from model.checkpoints.manifest import verify
from tests.conftest import ROOT, TINY, RunMain, environment, losses_of

FLAGS = (*TINY, "--num_epochs=20", "--eval_every=5", "--lr=0.003", "--checkpoint_every=0.002")


class Job:
    """A torchrun of train.py, its output in files, none of its processes left behind."""

    def __init__(
        self,
        folder: Path,
        num_ranks: int,
        *flags: str,
        launch: str = "",
        script: str = "train.py",
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.run_dir = folder / "run"
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        launch_flags = ["--standalone", "--nproc_per_node", str(num_ranks), *launch.split()]
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", *launch_flags),
                    *(script, *FLAGS, f"--cache_dir={folder.parent / 'cache'}"),
                    *(f"--run_dir={self.run_dir}", "--resume=auto", *flags),
                ],
                cwd=ROOT,
                env=environment(OMP_NUM_THREADS="1"),
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in the order of their start."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(pid) for pid in children.read_text().split()]
        except OSError:
            return []

    def wait(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def steps(self) -> int:
        """Lines of the log so far."""
        log = self.run_dir / "metrics.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def wait_for_steps(self, count: int, timeout: float = 90) -> None:
        until = time.monotonic() + timeout
        while self.steps() < count:
            assert self.process.poll() is None and time.monotonic() < until, self.err
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 of every process at once."""
        for pid in [*self.ranks(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Iterator[Start]:
    jobs = []

    def begin(name: str, num_ranks: int = 2, *flags: str, **more: str) -> Job:
        jobs.append(Job(tmp_path / name, num_ranks, *flags, **more))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


def final(run_dir: Path) -> tuple[bytes, bytes]:
    weights = (run_dir / "model" / "model.safetensors").read_bytes()
    return weights, (run_dir / "eval_test.json").read_bytes()


def newest(run_dir: Path) -> dict:
    return verify(max((run_dir / "checkpoints").glob("step-*")))


def test_a_lost_rank_restarts_the_job_and_changes_nothing(start: Start) -> None:
    whole = start("whole")
    assert whole.wait() == 0, whole.err
    job = start("lost", launch="--max_restarts 1")
    job.wait_for_steps(15)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait() == 0, job.err
    assert "resumed from" in job.out
    assert "another rank ended" in job.err
    # On the same number of ranks the run and its learning curve are the same, bit by bit.
    assert final(job.run_dir) == final(whole.run_dir)
    assert losses_of(job.run_dir) == losses_of(whole.run_dir)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        pytest.param(
            "kill",
            r"another rank ended at step \d+; there is no checkpoint yet: start again with",
            id="killed",
        ),
        pytest.param(
            "error",
            r"rank 1 failed: LookupError: a bug\\x1b\[2J; there is no checkpoint yet$",
            id="failed",
            marks=pytest.mark.slow,
        ),
        pytest.param("mistake", r"^lost.py: rank 1: no such file$", id="a UserError"),
    ],
)
def test_a_lost_rank_is_reported_before_torchrun_ends_the_others(
    start: Start, monkeypatch: pytest.MonkeyPatch, how: str, told: str
) -> None:
    monkeypatch.setenv("LOST_BY", how)
    job = start("told", script="tests/workers/lost.py")
    assert job.wait() != 0
    lines = [line for line in job.err.splitlines() if line.startswith("lost.py: ")]
    assert len(lines) == 1, job.err
    assert re.search(told, lines[0]), lines
    assert (r"LookupError: a bug\x1b[2J" in job.err.split(lines[0])[0]) == (how == "error")


def stop(job: Job, number: signal.Signals) -> None:
    """Signal one rank: all must stop at the same step, within 10 s and 5 for the write."""
    began = time.monotonic()
    os.kill(job.ranks()[1], number)
    while job.ranks():
        assert time.monotonic() - began < 15
        time.sleep(0.05)
    assert job.wait() != 0


def lose_launcher(job: Job) -> None:
    """kill -9 of torchrun alone: the ranks must save and end."""
    ranks = job.ranks()
    job.process.kill()
    job.wait()
    began = time.monotonic()
    while any(map(is_running, ranks)):
        assert time.monotonic() - began < 15
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty once it has ended
    except OSError:
        return False


def test_preempted_and_continued_on_one_rank_in_another_sharding(
    start: Start, run_main: RunMain
) -> None:
    job = start("preempted")
    job.wait_for_steps(15)
    stop(job, signal.SIGTERM)
    line = re.search(r"stopped by SIGTERM at step (\d+) \(epoch (\d+), sample (\d+)\), s", job.out)
    assert line, job.out + job.err
    assert "exitcode  : 143" in job.err
    position = newest(job.run_dir)["position"]
    step, epoch, sample = map(int, line.groups())  # epochs are printed from 1, stored from 0
    assert (position["step"], position["epoch"] + 1, position["sample"]) == (step, epoch, sample)

    before = losses_of(job.run_dir)
    flags = [*FLAGS, f"--cache_dir={job.run_dir.parents[1] / 'cache'}", "--sharding=table_wise"]
    outcome = run_main("train", *flags, f"--run_dir={job.run_dir}", "--resume=auto")
    assert outcome.code == 0, outcome.err
    after = losses_of(job.run_dir)
    assert {step: after[step] for step in before} == before
    # The rest of the epochs was trained with 32 instead of 64 windows per step.
    windows = newest(job.run_dir)["position"]
    assert (windows["epoch"], windows["sample"]) == (20, 0)
    recent, next_ones = [
        [after[step] for step in steps]
        for steps in (sorted(before)[-5:], sorted(after.keys() - before.keys())[:5])
    ]
    assert abs(sum(recent) - sum(next_ones)) / 5 < 0.5


def test_two_runs_in_one_folder(start: Start) -> None:
    first = start("shared", 2, "--num_epochs=2000", "--checkpoint_every=10", "--eval_every=2000")
    first.wait_for_steps(5)
    second = start("second", 1, f"--run_dir={first.run_dir}")
    assert second.wait() != 0
    assert f"--run_dir {first.run_dir} is in use by another run" in second.err
    first.wait_for_steps(first.steps() + 5)  # the first run continues
    stop(first, signal.SIGHUP)  # its terminal is closed
    curve = losses_of(first.run_dir)
    assert sorted(curve) == list(range(1, len(curve) + 1))
    assert newest(first.run_dir)["position"]["step"] == len(curve)


def test_a_loss_that_is_not_finite(start: Start) -> None:
    """After a NaN weight on rank 1 both ranks end at that step with one line and save nothing."""
    job = start("nan", script="tests/workers/nan.py")
    assert job.wait() != 0
    assert "exitcode  : 2" in job.err
    lines = [line for line in job.err.splitlines() if line.startswith("nan.py: ")]
    assert len(lines) == 1
    assert re.search(
        r"the loss became nan at step 11 \(epoch 4, its samples 64 to 127, lr 0\.00\d+\): lower "
        r"--lr or raise --warmup_share; (the checkpoint of step \d+ is|there is no checkpoint yet)",
        lines[0],
    ), lines
    assert newest(job.run_dir)["position"]["step"] <= 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(
            "__1_0.distcp", "its checksum differs", id="a byte flipped", marks=pytest.mark.slow
        ),
        pytest.param("__0_0.distcp", "bytes instead of", id="cut", marks=pytest.mark.slow),
        pytest.param("manifest.json", "is missing", id="no manifest", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    start: Start, name: str, message: str
) -> None:
    job = start("damaged")
    job.wait_for_steps(20)
    lose_launcher(job)
    assert f"stopped by SIGTERM at step {newest(job.run_dir)['position']['step']} " in job.out
    assert "warning: torchrun has ended" in job.err
    *_, before, last = sorted((job.run_dir / "checkpoints").glob("step-*"))
    if message == "is missing":
        (last / name).unlink()
    else:
        content = bytearray((last / name).read_bytes())
        content[len(content) // 2] ^= 1
        (last / name).write_bytes(content[:-3] if "instead" in message else content)
    job = start("damaged")
    assert job.wait() == 0, job.err
    assert re.search(rf"warning: \S*{last.name} is damaged: .*{message}", job.err), job.err
    assert f"resumed from {before}" in job.out


def test_a_restart_must_find_its_folder(run_main: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    outcome = run_main("train", *TINY, "--run_dir=")
    assert outcome.code == 2
    assert "--run_dir is needed with --max_restarts" in outcome.err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_at_random_moments(start: Start) -> None:
    flags = ("--num_epochs=60",)
    whole = start("whole", 2, *flags)
    assert whole.wait(300) == 0, whole.err
    choose = random.Random(0)
    for _ in range(20):
        # From imports (some 8 s) over preparation into training.
        job = start("killed", 2, *flags)
        time.sleep(choose.uniform(4, 16))
        job.kill()
    job = start("killed", 2, *flags)
    assert job.wait(300) == 0, job.err
    assert final(job.run_dir) == final(whole.run_dir)
    assert losses_of(job.run_dir) == losses_of(whole.run_dir)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_then_three_then_one_rank(start: Start) -> None:
    for num_ranks, sharding in ((2, "row_wise"), (3, "column_wise"), (1, "table_wise")):
        job = start("moved", num_ranks, f"--sharding={sharding}", "--embedding_optimizer=sgd")
        if num_ranks > 1:
            job.wait_for_steps(job.steps() + 12)
            stop(job, signal.SIGINT)
            assert "stopped by SIGINT" in job.out and "exitcode  : 130" in job.err
            manifest = newest(job.run_dir)
            assert manifest["world_size"] == num_ranks
        else:
            assert job.wait() == 0, job.err
    curve = losses_of(job.run_dir)
    assert sorted(curve) == list(range(1, len(curve) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stuck"), [(2, 0), (2, 1), (8, 5)])
def test_a_stuck_rank_is_named(start: Start, num_ranks: int, stuck: int) -> None:
    job = start("stuck", num_ranks, "--train_batch_size=2", "--rank_timeout=0.05")
    job.wait_for_steps(10)
    pid = job.ranks()[stuck]
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + 60
    while f"no answer from rank {stuck}" not in job.err:
        assert time.monotonic() < until, job.err
        time.sleep(0.1)
    os.kill(pid, signal.SIGCONT)
    assert job.wait() != 0
    newest(job.run_dir)


@pytest.mark.slow
def test_ranks_in_different_collectives_are_named(start: Start) -> None:
    job = start("mismatch", 2, "--rank_timeout=0.1", script="tests/workers/mismatch.py")
    assert job.wait() != 0
    assert re.search(
        r"the ranks wait for each other for 6 s at step 10: rank 0 at \w+\.py:\d+ \(\w+\), "
        r"rank 1 at mismatch\.py:\d+ \(extra_barrier\); "
        r"(the checkpoint of step \d+ is|there is no checkpoint)",
        job.err,
    ), job.err
    assert job.err.count("mismatch.py: ") == 1
    assert newest(job.run_dir)["position"]["step"] <= 10


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_real_full_disk(start: Start, tmp_path: Path, policy: str) -> None:
    disk = tmp_path / "full" / "run" / "checkpoints"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        job = start("full", 2, f"--on_save_error={policy}", "--checkpoint_every=10")
        code = job.wait()
        assert (code == 0) == (policy == "continue"), job.err
        # Those of the first evaluations, written before the disk was full.
        kept = [verify(folder)["position"]["step"] for folder in sorted(disk.glob("step-*"))]
        assert kept and kept[0] == 15
        said = f"No space left on device; the checkpoint of step {kept[-1]} is intact"
        assert f"cannot be written: {said}" in job.err
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(disk, ignore_errors=True)


@pytest.mark.slow
def test_memory_does_not_grow(start: Start) -> None:
    job = start("memory", 2, "--num_epochs=600", "--checkpoint_every=0.05")

    def resident() -> int:
        pages = int(Path(f"/proc/{job.ranks()[0]}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    job.wait_for_steps(150)
    before = resident()
    job.wait_for_steps(650, timeout=200)
    # 500 steps, several evaluations and checkpoints.
    assert resident() - before < 48 << 20
