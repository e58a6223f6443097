"""Checkpoints of one rank in this process: manifests, damage, errors while saving, resume."""

import errno
import json
import pickle
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.config import CheckpointConfig
from model.checkpoints.manifest import (
    DamagedError,
    describe_files,
    read_manifest,
    verify,
    write_manifest,
)
from model.checkpoints.position import Position
from model.checkpoints.writer import CheckpointWriter
from model.distributed import Ranks
from model.training.trainer import Trainer
from pipeline.errors import UserError
from pipeline.files import publish
from tests.conftest import TINY, Outcome, RunMain, most_bytes_of_a_file, torchrun

FLAGS = (*TINY, "--num_epochs=3", "--eval_every=1", "--lr=0.01")


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"weights of rank 0")
    (folder / "__1_0.distcp").write_bytes(b"weights of rank 1" * 100)
    write_manifest(folder, {"position": {"step": 7}, "files": describe_files(folder, "__*")})
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("__*.distcp", cut, "bytes instead of"),
    ("__*.distcp", flip_a_byte, "was altered: its checksum differs"),
    ("__*.distcp", Path.unlink, "cannot be read"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", cut, "manifest.json is not whole"),
    (
        "manifest.json",
        lambda path: path.write_text(path.read_text().replace('"step": ', '"step": 1')),
        "manifest.json was altered",
    ),
    (
        "manifest.json",
        lambda path: write_manifest(path.parent, {"position": {"step": 7}}),
        "manifest.json is not whole",
    ),
]


def test_a_manifest_lists_its_files(tmp_path: Path) -> None:
    content = verify(checkpoint(tmp_path / "whole"))
    # CRC-32 of b"weights of rank 0", by another program (gzip's trailer).
    assert content["files"]["__0_0.distcp"]["size"] == 17
    assert content["files"]["__1_0.distcp"]["size"] == 1700
    assert content["position"] == {"step": 7}


@pytest.mark.parametrize(("pattern", "damage", "message"), DAMAGES)
def test_damage_is_found(
    tmp_path: Path, pattern: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = checkpoint(tmp_path / "damaged")
    damage(sorted(folder.glob(pattern))[-1])
    with pytest.raises(DamagedError, match=message):
        verify(folder)


def test_a_newer_format_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("model.checkpoints.manifest.FORMAT", 2)
        folder = checkpoint(tmp_path / "newer")
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        read_manifest(folder)


@pytest.fixture
def train(run_main: RunMain, cache_dir: Path) -> Callable[..., Outcome]:
    def run(run_dir: Path, *more: str) -> Outcome:
        return run_main("train", *FLAGS, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", *more)

    return run


Train = Callable[..., Outcome]


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, act: Callable[[Trainer], Any]) -> None:
    """Call ``act`` once, after step ``wanted`` of a training."""
    step = Trainer._step

    def patched(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        if self.position.step == wanted:
            act(self)

    monkeypatch.setattr(Trainer, "_step", patched)


def final(run_dir: Path) -> tuple[bytes, bytes]:
    weights = (run_dir / "model" / "model.safetensors").read_bytes()
    return weights, (run_dir / "eval_test.json").read_bytes()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def interrupted(
    template: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run stopped by SIGTERM at step 7 of 15, with checkpoints of steps 5 (best), 6 and 7."""
    made = template / "interrupted"
    if not made.exists():
        with monkeypatch.context() as patch:
            patch.setattr("model.checkpoints.checkpoints.Checkpoints.is_due", True)
            at_step(patch, 7, lambda _: signal.raise_signal(signal.SIGTERM))
            outcome = train(made)
        assert outcome.code == 143, outcome.err
        message = "stopped by SIGTERM at step 7 (epoch 2, sample 64), saved: go on with --run_dir /"
        assert message in outcome.out
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def uninterrupted(template: Path, train: Train) -> tuple[bytes, bytes]:
    made = template / "uninterrupted"
    if not made.exists():
        assert train(made).code == 0
        position = read_manifest(made / "checkpoints" / names(made)[-1])["position"]
        assert position["epoch"] == 3 and position["sample"] == 0
    return final(made)


def test_a_resumed_run_equals_an_uninterrupted_one(
    interrupted: Path, uninterrupted: tuple[bytes, bytes], train: Train
) -> None:
    assert names(interrupted) == [f"step-0000000{step}" for step in (5, 6, 7)]
    manifest = verify(interrupted / "checkpoints" / "step-00000007")
    position = manifest["position"]
    assert (position["step"], position["epoch"], position["sample"]) == (7, 1, 64)
    assert position["best_step"] == 5 and manifest["world_size"] == 1
    assert manifest["recorded"]["flags"]["emb_dim"] == 16
    assert {"torch", "torchrec"} <= manifest["recorded"]["versions"].keys()

    outcome = train(interrupted, "--resume=auto")
    assert outcome.code == 0 and "resumed from" in outcome.out
    assert final(interrupted) == uninterrupted


@pytest.mark.parametrize(("pattern", "damage", "message"), [DAMAGES[i] for i in (0, 1, 3)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    interrupted: Path,
    uninterrupted: tuple[bytes, bytes],
    train: Train,
    pattern: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    newest = interrupted / "checkpoints" / "step-00000007"
    damage(next(newest.glob(pattern)))
    outcome = train(interrupted, "--resume=auto")
    assert outcome.code == 0, outcome.err
    assert f"warning: {newest} is damaged: " in outcome.err and message in outcome.err
    assert f"resumed from {newest.with_name('step-00000006')}" in outcome.out
    assert "damaged-00000007" in names(interrupted)
    assert final(interrupted) == uninterrupted


def test_a_part_of_the_files_is_checked(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "damaged")
    flip_a_byte(folder / "__0_0.distcp")
    verify(folder, slice(1, None, 2))
    with pytest.raises(DamagedError, match="__0_0"):
        verify(folder, slice(0, None, 2))


@pytest.mark.slow
def test_the_second_rank_checks_files_too(tmp_path: Path, cache_dir: Path) -> None:
    flags = [*FLAGS, f"--run_dir={tmp_path / 'run'}", f"--cache_dir={cache_dir}"]
    outcome = torchrun(2, "train.py", *flags, "--num_epochs=2")
    assert outcome.code == 0, outcome.err
    *_, before, newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    name = "__1_0.distcp"
    flip_a_byte(newest / name)
    outcome = torchrun(2, "train.py", *flags, "--resume=auto", "--num_epochs=2")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count(f"{newest} is damaged: {name} was altered") == 1
    assert f"resumed from {before}" in outcome.out
    verify(newest)  # written again


def test_what_another_rank_found(
    one_rank: Ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = checkpoint_of(tmp_path)
    checkpoints = Checkpoints(tmp_path, one_rank)
    checkpoints.ranks = Ranks(0, 2, 2, one_rank.device)

    def other_finds(error: Exception) -> None:
        def gather(found: list[Any], mine: Exception | None) -> None:
            found[:] = [mine, error]

        monkeypatch.setattr(dist, "all_gather_object", gather)

    other_finds(UserError("rank 1 does not see it"))
    with pytest.raises(UserError, match="does not see"):
        checkpoints._newest_good()
    assert path.is_dir()
    other_finds(DamagedError("__1_0.distcp was altered"))
    with pytest.raises(UserError, match=r"all checkpoints are damaged .*__1_0.distcp was altered"):
        checkpoints._newest_good()
    assert path.is_dir()


def hide(aside: Path) -> None:
    """As if rank 0 did not see what another rank has written."""
    (aside / "__0_0.distcp").unlink()


def shorten(aside: Path) -> None:
    cut(aside / "__0_0.distcp")


def forget(aside: Path) -> None:
    """The files of the index have another name than those that are there."""
    index = pickle.loads((aside / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "__5_0.distcp"
    (aside / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    ("lose", "reason"),
    [
        (hide, "__0_0.distcp cannot be read (No such file or directory)"),
        (shorten, "__0_0.distcp has"),
        (forget, ".metadata is no index of tensors: "),
    ],
)
def test_a_checkpoint_that_lacks_files_is_not_published(
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    lose: Callable[[Path], None],
    reason: str,
) -> None:
    describe = CheckpointWriter._describe

    def described(self: CheckpointWriter, aside: Path) -> Any:
        files = describe(self, aside)
        lose(aside)
        return files

    monkeypatch.setattr(CheckpointWriter, "_describe", described)
    outcome = train(tmp_path)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert f".step-00000005.part is incomplete: {reason}" in last
    assert "--run_dir must be on a file system that all hosts share; there is no checkpoint" in last
    assert names(tmp_path) == []


def test_no_checkpoint_is_newer_than_the_exported_model(
    interrupted: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill just after a better checkpoint must not leave the older model for eval.py."""
    assert train(interrupted, "--resume=auto").code == 0
    model = interrupted / "model" / "model.safetensors"
    seen = []

    def published(aside: Path, folder: Path) -> None:
        publish(aside, folder)
        seen.append(model.exists())

    assert model.exists()
    monkeypatch.setattr("model.checkpoints.writer.publish", published)
    assert train(interrupted, "--resume=auto", "--num_epochs=5").code == 0
    assert seen and not any(seen) and model.exists()


def checkpoint_of(run_dir: Path) -> Path:
    (run_dir / "checkpoints").mkdir()
    path = checkpoint(run_dir / "checkpoints" / "step-00000007")
    position = {**vars(Position()), "step": 7, "best_step": 7}
    write_manifest(path, {**read_manifest(path), "position": position})
    return path


def test_a_lost_best_checkpoint_is_replaced(interrupted: Path, train: Train) -> None:
    shutil.rmtree(interrupted / "checkpoints" / "step-00000005")
    outcome = train(interrupted, "--resume=auto")
    assert outcome.code == 0, outcome.err
    assert "step-00000005, the best model, is lost: using step 7" in outcome.err


def test_the_best_is_kept_besides_the_newest(interrupted: Path, train: Train) -> None:
    # Step 5 gets NDCG@10 = 1.0, which no later evaluation can exceed.
    newest = interrupted / "checkpoints" / "step-00000007"
    manifest = read_manifest(newest)
    write_manifest(newest, {**manifest, "position": {**manifest["position"], "best": 1.0}})
    outcome = train(interrupted, "--resume=auto", "--keep_last=1")
    assert outcome.code == 0, outcome.err
    assert names(interrupted) == ["step-00000005", "step-00000015"]


def failing(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """The given calls of dcp.save (from 1) write half a file, then fail with a full disk."""
    save, done = dcp.save, []

    def full(state: dict[str, Any], checkpoint_id: Path, **more: Any) -> None:
        done.append(checkpoint_id)
        if len(done) in calls:
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, checkpoint_id=checkpoint_id, **more)

    monkeypatch.setattr("model.checkpoints.writer.dcp.save", full)


def test_a_full_disk_stops_the_run(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {2})
    outcome = train(tmp_path)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.endswith(
        "step-00000010 cannot be written: No space left on device; the checkpoint of step 5 is "
        "intact; make room, then go on with --resume auto"
    )
    assert names(tmp_path) == ["step-00000005"]
    verify(tmp_path / "checkpoints" / "step-00000005")


@pytest.mark.parametrize(
    "most_bytes", [100, 1500, 5000]
)  # in a tensor's header, its values, its end
def test_a_tensor_that_a_disk_does_not_take(
    tmp_path: Path, one_rank: Ranks, most_bytes: int
) -> None:
    checkpoints = Checkpoints(tmp_path, one_rank, CheckpointConfig())
    state = {"model": {"weight": torch.ones(100_000)}}
    with most_bytes_of_a_file(most_bytes), pytest.raises(UserError) as told:
        checkpoints._succeeds(lambda: checkpoints._write(state, Position(step=1)))
    assert "checkpoints cannot be written: File too large; there is no" in str(told.value)


def test_training_continues_on_a_full_disk_with_on_save_error_continue(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {1})
    outcome = train(tmp_path, "--on_save_error=continue")
    assert outcome.code == 0
    assert "No space left on device; there is no checkpoint yet, training goes on" in outcome.err
    # The model of step 5 is lost: the worse model of step 10 is now the best.
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    verify(tmp_path / "checkpoints" / "step-00000010")


def test_training_goes_on_while_a_thread_writes_a_copy(
    tmp_path: Path,
    train: Train,
    uninterrupted: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, three_steps_later = CheckpointWriter.write, threading.Event()

    def slow(self: CheckpointWriter, final: Path, *arguments: Any) -> None:
        if final.name == "step-00000001":
            assert three_steps_later.wait(30)
        write(self, final, *arguments)

    monkeypatch.setattr(CheckpointWriter, "write", slow)
    at_step(monkeypatch, 4, lambda _: three_steps_later.set())
    outcome = train(tmp_path, "--checkpoint_every=1e-9", "--keep_last=99")
    assert outcome.code == 0, outcome.err
    assert final(tmp_path) == uninterrupted
    # The checkpoint has the state of step 1: resumed, the run is the same.
    for name in names(tmp_path):
        if name != "step-00000001":
            shutil.rmtree(tmp_path / "checkpoints" / name)
    outcome = train(tmp_path, "--resume=auto")
    assert "resumed from" in outcome.out and "step-00000001" in outcome.out
    assert final(tmp_path) == uninterrupted


def test_an_error_during_a_background_write_names_it(tmp_path: Path, one_rank: Ranks) -> None:
    checkpoints = Checkpoints(tmp_path, one_rank)
    checkpoints._background, checkpoints._final = Future(), checkpoints.path(9)
    assert checkpoints.kept == "there is no checkpoint yet, step-00000009 is being written"
    checkpoints._background.set_result(None)
    assert checkpoints.kept == "there is no checkpoint yet"


def test_a_failed_background_write_is_raised_at_the_next_step(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {1})
    at_step(monkeypatch, 2, lambda trainer: trainer.checkpoints._background.exception())
    outcome = train(tmp_path, "--checkpoint_every=1e-9")
    assert outcome.code == 2
    assert "step-00000001 cannot be written: No space left on device; there is no" in outcome.err
    assert names(tmp_path) == []
    assert '"step": 2' in (tmp_path / "metrics.jsonl").read_text()
    assert '"step": 3' not in (tmp_path / "metrics.jsonl").read_text()


def test_a_failed_background_write_is_ignored_with_on_save_error_continue(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {1})
    outcome = train(tmp_path, "--checkpoint_every=1e-9", "--on_save_error=continue")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("cannot be written: No space left on device; there is no") == 1


def test_a_checkpoints_folder_that_cannot_be_created(tmp_path: Path, train: Train) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    outcome = train(tmp_path)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()  # before the first step
    assert f"{tmp_path / 'checkpoints'} is no folder: move it away, or choose another" in line
    assert "step " not in outcome.out


def poison(trainer: Trainer) -> None:
    next(trainer.model.module.encoder.parameters()).data.view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ("1e-9", "weights are not finite any more after step 8: "),
        ("10", "the loss became nan at step 9 (epoch 2, its samples 96 to 127, lr "),
    ],
)
def test_non_finite_weights_end_the_run_and_are_not_saved(
    interrupted: Path, train: Train, monkeypatch: pytest.MonkeyPatch, every: str, message: str
) -> None:
    before = {name: verify(interrupted / "checkpoints" / name) for name in names(interrupted)}
    at_step(monkeypatch, 8, poison)
    outcome = train(interrupted, "--resume=auto", f"--checkpoint_every={every}")
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    newest = max(int(name.removeprefix("step-")) for name in before)
    assert outcome.err.splitlines()[-1].endswith(f"; the checkpoint of step {newest} is intact")
    after = {name: verify(interrupted / "checkpoints" / name) for name in names(interrupted)}
    assert after == before


@pytest.mark.parametrize(
    "flag", ["--checkpoint_every=0", "--keep_last=0", "--on_save_error=ask", "--rank_timeout=0"]
)
def test_flags_out_of_range(tmp_path: Path, train: Train, flag: str) -> None:
    outcome = train(tmp_path, flag)
    assert outcome.code == 2 and flag.split("=")[0] in outcome.err.splitlines()[-1]


def test_the_exported_model_is_enough_for_evaluation(
    interrupted: Path, train: Train, run_main: RunMain, cache_dir: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    outcome = train(interrupted, "--resume=auto", f"--export_root={exported}")
    assert outcome.code == 0, outcome.err
    for folder in (exported, interrupted / "model"):
        files = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "catalog.parquet"} <= files
    before = json.loads((interrupted / "eval_test.json").read_text())
    shutil.rmtree(interrupted / "checkpoints")
    for folder in (exported, interrupted):
        outcome = run_main("eval", f"--checkpoint={folder}", f"--cache_dir={cache_dir}")
        assert outcome.code == 0, outcome.err
        assert json.loads((folder / "eval_test.json").read_text()) == before
