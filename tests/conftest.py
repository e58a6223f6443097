"""Shared fixtures: one rank in this process, the two scripts, and worker processes.

All ranks of the tests are on CPU, also on a host with GPUs.
"""

import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from safetensors.torch import load_file

from model.checkpoints.manifest import describe_files
from model.distributed import Ranks, start

ROOT = Path(__file__).parent.parent
# The folder of downloaded data sets; tests that need one are skipped where it is missing.
DATA = Path(os.environ.get("BERT4REC_DATA", ROOT.parent / "shared" / "data"))
needs_ml_100k = pytest.mark.skipif(
    not (DATA / "ml-100k.zip").exists(),
    reason=f"no ml-100k.zip in {DATA}: set BERT4REC_DATA to the folder that holds it",
)

# One thread per process: the models are tiny, and threads that wait for each other on shared cores
# are many times slower.
torch.set_num_threads(1)

# A machine may be busy: an example's time says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A training run of about a second: 60 users, 80 items, 4 steps an epoch on one rank.
TINY = (
    "--recipe=none",
    "--synthetic_user_count=60",
    "--synthetic_item_count=80",
    "--max_len=16",
    "--emb_dim=16",
    "--num_layers=1",
    "--train_batch_size=32",
    "--num_epochs=2",
    "--eval_every=1",
    "--log_every=1",
)


@dataclass(frozen=True)
class Outcome:
    """How a script ended."""

    code: int
    out: str
    err: str


RunMain = Callable[..., Outcome]


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of this process go to the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def one_rank(no_cuda: None) -> Iterator[Ranks]:
    """This process as the only rank of a process group."""
    yield start()
    dist.destroy_process_group()


@pytest.fixture
def run_main(
    no_cuda: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RunMain:
    """Run train.py or eval.py in this process: ``run_main("train", "--lr=1")``."""

    def exits(code: int) -> None:
        raise SystemExit(code)

    def run(script: str, *arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
            patch.setattr(os, "_exit", exits)
            patch.setattr(gc, "freeze", lambda: None)  # would keep the garbage of earlier tests
            try:
                importlib.import_module(script).main()
            except SystemExit as end:
                code = end.code
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep prepared data."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder for a run, not made yet."""
    return tmp_path / "runs" / "mine"


def assert_one_line(outcome: Outcome, script: str, message: str) -> None:
    """Exit code 2; stderr is one line with this beginning."""
    assert outcome.code == 2, outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(f"{script}.py: ")
    assert message in lines[0]


def assert_refused(
    run_main: RunMain, tmp_path: Path, arguments: list[str | Path], message: str
) -> None:
    """train.py exits with one line and leaves neither a run folder nor prepared data."""
    run_dir, cache_dir = tmp_path / "runs" / "mine", tmp_path / "cache"
    flags = [f"--run_dir={run_dir}", f"--cache_dir={cache_dir}", *arguments]
    assert_one_line(run_main("train", *TINY, *flags), "train", message)
    assert not run_dir.exists()
    assert not [
        path for path in cache_dir.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    ]


def environment(**more: str) -> dict[str, str]:
    """The environment of a new process: no GPU, one thread."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return {**os.environ, **alone, **more}


def run_process(*command: str | Path, cwd: Path = ROOT, timeout: float = 120) -> Outcome:
    """Run a command to its end; its whole process group is killed when it takes too long."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, 9)
        raise
    return Outcome(process.returncode, out, err)


def torchrun(num_ranks: int, *command: str | Path, **more: object) -> Outcome:
    """``torchrun --standalone --nproc_per_node N ...``."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks))
    return run_process(*launch, *command, **more)


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> dict[int, float]:
    """The logged losses of a run by step; of a step that was trained again, the later one."""
    return {line["step"]: line["loss"] for line in read_log(run_dir) if "loss" in line}


def seal(folder: Path) -> None:
    """Give an export that a test has changed the right checksums, as who knows the format can."""
    path = folder / "checksums.json"
    if path.exists():
        listed = json.loads(path.read_text())
        found = {
            name: about for each in listed for name, about in describe_files(folder, each).items()
        }
        path.write_text(json.dumps(found))


def whole_and_in_parts(
    run_main: RunMain, folder: Path, cache_dir: Path, *flags: str
) -> list[dict[str, torch.Tensor]]:
    """Weights of a run of two epochs, and of one that was resumed after the first."""
    for name, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        outcome = run_main(
            "train",
            *TINY,
            *flags,
            f"--cache_dir={cache_dir}",
            f"--run_dir={folder / name}",
            f"--num_epochs={epochs}",
            "--lr_schedule=constant",
            "--warmup_share=0",
            "--resume=auto",
        )
        assert outcome.code == 0, outcome.err
    return [load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "parts")]


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A file system of its own in ``folder``."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def most_bytes_of_a_file(limit: int) -> Iterator[None]:
    """Writing more into a file of this process is an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
