"""One altered byte anywhere in a checkpoint or an export: refused, or nothing that is read differs.

A weight with another finite value would be evaluated, learnt from and served like any other.
"""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.export import Trained, export
from model.checkpoints.exported import WEIGHTS
from model.checkpoints.manifest import DamagedError
from model.distributed import ALONE, Ranks
from model.programs.recommender import Recommender
from model.run.config_file import lasting_flags
from model.run.trained import TrainedRun
from model.settings.config import EvalFlags
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain, assert_one_line

HISTORIES = [["1"], ["5", "2", "3"], ["unknown"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("altered")


@pytest.fixture
def run_dir(run_main: RunMain, made: Path, cache_dir: Path) -> Path:
    """A finished run, its exported model beside it; tests put back what they change."""
    if not (made / "run").exists():
        flags = f"--run_dir={made / 'run'}", f"--export_root={made / 'exported'}"
        outcome = run_main("train", *TINY, "--num_epochs=1", f"--cache_dir={cache_dir}", *flags)
        assert outcome.code == 0, outcome.err
    return made / "run"


def of_export(folder: Path) -> Any:
    """What eval.py, recommend.py, --teachers and export.py read of an export."""
    run = TrainedRun(EvalFlags(checkpoint=str(folder)))
    trained, catalog = run.trained(ALONE), run.catalog()
    names = catalog.items.to_pylist(), catalog.titles.to_pylist(), catalog.train_counts.tolist()
    return copied_weights(trained), names, trained.step, trained.metrics, lasting_flags(run.config)


def of_run(folder: Path) -> Any:
    """What they read of a run that has not ended."""
    run = TrainedRun(EvalFlags(checkpoint=str(folder)))
    trained, catalog = run.trained(ALONE), run.catalog()
    names = catalog.items, catalog.titles, catalog.users
    known = *(each.to_pylist() for each in names), catalog.train_counts.tolist()
    return copied_weights(trained), known, trained.step, lasting_flags(run.config)


def copied_weights(trained: Trained) -> dict[str, list[Any]]:
    """The weights that an export has."""
    with tempfile.TemporaryDirectory() as folder:
        export(trained, Path(folder), with_users=False, with_programs=False)
        return {name: each.tolist() for name, each in load_file(f"{folder}/{WEIGHTS}").items()}


def served(folder: Path) -> Any:
    """What an exported recommender.py answers."""
    serving = Recommender(folder)
    return serving.recommend(HISTORIES), serving.similar("1"), serving.titles, serving.config


def check_every_byte(
    folder: Path, names: list[str], read: Callable[[], Any], refusals: Any, examples: int = 150
) -> None:
    whole = {name: (folder / name).read_bytes() for name in names}
    expected = read()

    @settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(name=st.sampled_from(names), place=st.floats(0, 1), change=st.integers(1, 255))
    def examples_of(name: str, place: float, change: int) -> None:
        content = bytearray(whole[name])
        content[int(place * (len(content) - 1))] ^= change
        (folder / name).write_bytes(content)
        try:
            with suppress(*refusals):
                assert read() == expected
        finally:
            (folder / name).write_bytes(whole[name])

    examples_of()
    assert read() == expected


def test_files_of_an_export(run_dir: Path) -> None:
    exported = run_dir.with_name("exported")
    names = ["config.json", "catalog.parquet", "model.safetensors", "checksums.json"]
    check_every_byte(exported, names, lambda: of_export(exported), [UserError])


def test_an_altered_byte_of_what_serves_is_an_error_or_no_difference(run_dir: Path) -> None:
    exported = run_dir.with_name("exported")
    names = ["config.json", "items.json", "item_vectors.npy", "model.onnx", "model.safetensors"]
    # Any error but an assertion's.
    refusals = [ValueError, LookupError, TypeError, OSError, RuntimeError]
    read = lambda: served(exported)  # noqa: E731
    check_every_byte(exported, [*names, "checksums.json"], read, refusals, 60)


def test_files_of_a_checkpoint(run_dir: Path, one_rank: Ranks, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.rmtree(copied / "model")
    (checkpoint,) = (copied / "checkpoints").iterdir()
    names = [f"checkpoints/{checkpoint.name}/{each.name}" for each in checkpoint.iterdir()]
    assert len(names) == 3
    own = ["config.json", "catalog.parquet", "users.parquet", "checksums.json"]
    check_every_byte(copied, [*names, *own], lambda: of_run(copied), [UserError])
    checkpoints = Checkpoints(copied, one_rank)
    read = lambda: checkpoints._verified(checkpoint)  # noqa: E731  what --resume auto takes
    check_every_byte(copied, names, read, [DamagedError, UserError])


def test_a_checkpoint_that_is_altered_before_training_ends(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Checkpoints.finish

    def alter(self: Checkpoints) -> None:
        finish(self)
        for path in self.folder.glob("step-*/__0_0.distcp"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(Checkpoints, "finish", alter)
    flags = f"--run_dir={tmp_path / 'run'}", f"--cache_dir={cache_dir}", "--num_epochs=1"
    outcome = run_main("train", *TINY, *flags)
    assert_one_line(outcome, "train", "the best model of this run, is damaged: __0_0.distcp was al")
    assert "test, 60 users" not in outcome.out


@pytest.mark.parametrize("name", ["catalog.parquet", "users.parquet"])
def test_an_altered_catalog_of_a_run_is_refused_in_one_line(
    run_main: RunMain, run_dir: Path, tmp_path: Path, name: str
) -> None:
    copied = Path(shutil.copytree(run_dir, tmp_path / "run"))
    path = copied / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = f"{path} cannot be used ({name} was altered: its checksum differs): restore it, or"
    outcome = run_main("recommend", f"--checkpoint={copied}", "--history=1")
    assert_one_line(outcome, "recommend", message)
    # The model in it was exported before: the users come from the run.
    flags = f"--checkpoint={copied}", f"--output={tmp_path / 'again'}", "--with_users"
    assert_one_line(run_main("export", *flags), "export", message)
    (copied / "checksums.json").unlink()  # as earlier versions wrote a run
    path.write_bytes((run_dir / name).read_bytes())
    assert run_main("recommend", f"--checkpoint={copied}", "--history=1").code == 0


@pytest.mark.parametrize("script", ["eval", "recommend", "export", "train"])
def test_one_altered_weight_is_refused_in_one_line(
    run_main: RunMain, run_dir: Path, cache_dir: Path, tmp_path: Path, script: str
) -> None:
    exported = Path(shutil.copytree(run_dir.with_name("exported"), tmp_path / "exported"))
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-2] ^= 1  # of the last weight's mantissa
    (exported / "model.safetensors").write_bytes(content)
    flags = {
        "eval": [f"--checkpoint={exported}"],
        "recommend": [f"--checkpoint={exported}", "--history=1"],
        "export": [f"--checkpoint={exported}", f"--output={tmp_path / 'again'}"],
        "train": [*TINY, f"--run_dir={tmp_path / 'taught'}", f"--teachers={exported}"],
    }[script]
    if script != "export":
        flags = [*flags, f"--cache_dir={cache_dir}"] if script != "recommend" else flags
    message = "model.safetensors cannot be loaded (model.safetensors was altered: its checksum"
    assert_one_line(run_main(script, *flags), script, message)
