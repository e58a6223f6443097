"""Exports: one model or none at any moment, wherever the target is, of weights that are numbers."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from model.checkpoints import export as exporting
from model.checkpoints import manifest, weights_file
from model.checkpoints.export import Trained, check_target, export
from model.checkpoints.safe_reader import SafeReader
from model.checkpoints.weights import StoredTensor, check_finite, check_fit
from model.checkpoints.weights_file import Part, WeightsFile
from model.distributed import ALONE, Ranks
from model.run.build import build_plain_model
from model.run.config_file import write_config
from model.run.trained import TrainedRun
from model.settings.config import EvalFlags, RunConfig
from model.settings.flags import build, flatten
from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore
from tests.conftest import TINY, RunMain, assert_one_line, mounted, seal

STORE = SequenceStore.from_arrays([1, 2, 3, 3, 2, 1], [0, 3, 6], 3)
SMALL = {"emb_dim": 4, "nhead": 1, "num_layers": 1, "max_len": 4}


class Killed(BaseException):
    """The process ends here."""


class Kill:
    """At the n-th file operation the process ends: this and all later ones do nothing."""

    armed: "Kill | None" = None

    def __init__(self, at: int, folder: Path) -> None:
        self.left, self.folder = at, str(folder)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.split(".")[0] not in ("open", "os", "shutil") or event == "os.listdir":
            return
        if any(str(each).startswith(self.folder) for each in arguments):
            self.left -= 1
            if self.left < 0:
                raise Killed


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if Kill.armed is not None:
        Kill.armed(event, arguments)


sys.addaudithook(hook)


@contextmanager
def killed(at: int, folder: Path) -> Iterator[None]:
    Kill.armed = Kill(at, folder)
    try:
        yield
    finally:
        Kill.armed = None


@pytest.fixture
def one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, of which only the step counts: it is the value of all weights."""

    shapes = build_plain_model(config(1), 3, ALONE).state_dict()

    class Reader:
        def __init__(self, checkpoint: Path) -> None:
            self.index = checkpoint

        def copy_parts(self, put: Callable[[Part], None], check: Callable[[str], None]) -> None:
            for name, tensor in shapes.items():
                value = torch.full_like(tensor, float(self.index.name))
                put(Part(name, (0,) * tensor.dim(), value))

    def stored(_: Any) -> dict[str, StoredTensor]:
        return {k: StoredTensor([*v.shape], "", True) for k, v in shapes.items()}

    monkeypatch.setattr(exporting, "checker", lambda checkpoint: lambda name: None)
    monkeypatch.setattr(exporting, "SafeReader", Reader)
    monkeypatch.setattr(exporting, "stored_weights", stored)


def config(seed: int) -> RunConfig:
    return build(RunConfig, SMALL | {"seed": seed})


def trained(folder: Path, step: int) -> Trained:
    """A run of this step, seed and metric, without its checkpoint."""
    run_dir = folder / f"run-{step}"
    if not run_dir.exists():
        run_dir.mkdir()
        facts = {"num_items": 3, "catalog": STORE.catalog_fingerprint}
        write_config(run_dir, flatten(config(step)), facts)
        STORE.catalog.write_to(run_dir)
    plain = build_plain_model(config(step), 3, ALONE, table_device="meta")
    metrics = {"test": {"users": step}}
    return Trained(plain, run_dir / str(step), step, metrics, run_dir, run_dir)


def export_step(folder: Path, step: int, target: Path, with_users: bool = False) -> None:
    export(trained(folder, step), target, with_users, with_programs=False)


def found(target: Path) -> tuple[int, ...] | None:
    """Step of config.json, of its flags, of its metrics, of all weights; None without a model."""
    try:
        run = TrainedRun(EvalFlags(checkpoint=str(target)))
        weights = {x for p in run.plain_model().parameters() for x in p.unique().tolist()}
    except UserError:
        return None
    (weight,) = weights
    about = json.loads((target / "config.json").read_text())
    seed = run.config.loader.seed
    return about["step"], seed, about["metrics"]["test"]["users"], int(weight)


@pytest.mark.parametrize("old", ["nothing", "a model", "a model with users", "a killed export"])
def test_a_kill_leaves_the_old_model_the_new_one_or_none(
    tmp_path: Path, one_weight: None, old: str
) -> None:
    seen, at, ended = set(), 0, False
    trained(tmp_path, 1), trained(tmp_path, 2)
    template = tmp_path / "template"
    if old != "nothing":
        export_step(tmp_path, 1, template, with_users=old != "a model")
        (template / "eval_test.json").write_text("{}")
    if old == "a killed export":
        kills = iter(range(99))
        while found(template):
            with suppress(Killed), killed(next(kills), template):
                export_step(tmp_path, 3, template)
    while not ended:
        target = tmp_path / f"at-{at}"
        if template.exists():
            shutil.copytree(template, target)
        with killed(at, target), suppress(Killed):
            export_step(tmp_path, 2, target)
            ended = True
        model = found(target)
        assert model in (None, (1, 1, 1, 1), (2, 2, 2, 2)), at
        if model == (2, 2, 2, 2):
            assert not (target / "users.parquet").exists()
            assert not (target / "eval_test.json").exists()
        seen.add(model)
        if at % 5 == 0:  # the next export is whole, whatever was left
            export_step(tmp_path, 2, target)
            assert found(target) == (2, 2, 2, 2)
            names = {"catalog.parquet", "config.json", "model.safetensors", "checksums.json"}
            assert {path.name for path in target.iterdir()} == names
        at += 1
    assert at > 20
    assert {None, (2, 2, 2, 2)} <= seen
    assert ((1, 1, 1, 1) in seen) == old.startswith("a model")


def test_weights_beside_another_config_are_refused(tmp_path: Path, one_weight: None) -> None:
    for step in (1, 2):
        export_step(tmp_path, step, tmp_path / f"model-{step}")
    shutil.copy(tmp_path / "model-1" / "model.safetensors", tmp_path / "model-2")
    message = r"its step is 1, that of config.json 2\): its config.json belongs to another model"
    with pytest.raises(UserError, match=message):
        TrainedRun(EvalFlags(checkpoint=str(tmp_path / "model-2"))).plain_model()


def test_an_export_of_the_same_step_of_another_run_is_told_by_its_fingerprint(
    tmp_path: Path, one_weight: None
) -> None:
    for folder in ("a", "b"):
        export_step(tmp_path, 2, tmp_path / folder)
    path = tmp_path / "a" / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"fingerprint": "0" * 16}))
    with pytest.raises(UserError, match=f"its fingerprint is {about['fingerprint']}, that of conf"):
        TrainedRun(EvalFlags(checkpoint=str(tmp_path / "a"))).plain_model()


def test_a_run_folder_with_the_model_of_another_run(tmp_path: Path, one_weight: None) -> None:
    export_step(tmp_path, 1, trained(tmp_path, 2).folder / "model")
    message = "run-2/model was trained with --seed 1, .*run-2 with 2: delete"
    with pytest.raises(UserError, match=message):
        TrainedRun(EvalFlags(checkpoint=str(tmp_path / "run-2"))).plain_model()


def test_exports_of_one_model_are_the_same_bytes(tmp_path: Path, one_weight: None) -> None:
    for name in "abcd":
        export_step(tmp_path, 1, tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"}) == 1


def test_all_files_have_the_mode_of_the_umask(tmp_path: Path, one_weight: None) -> None:
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            export_step(tmp_path, 1, tmp_path / oct(mask), with_users=True)
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / oct(mask)).iterdir()} == {mode}


def test_users_leave_only_with_with_users(tmp_path: Path, one_weight: None) -> None:
    export_step(tmp_path, 1, tmp_path / "a", with_users=True)
    assert (tmp_path / "a" / "users.parquet").exists()
    assert Catalog.read(tmp_path / "a").users.to_pylist() == ["0", "1"]
    export_step(tmp_path, 2, tmp_path / "a")
    assert not (tmp_path / "a" / "users.parquet").exists()
    catalog = Catalog.read(tmp_path / "a")
    assert catalog.items.to_pylist() == ["1", "2", "3"] and len(catalog.users) == 0


@pytest.mark.parametrize("how", ["itself", "a link", "a folder in it", "."])
def test_an_export_into_a_mount_point(
    tmp_path: Path, one_weight: None, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "link").symlink_to(disk)
    places = {"itself": disk, "a link": tmp_path / "link", "a folder in it": disk / "new", ".": "."}
    target = Path(places[how])
    with mounted(disk):
        monkeypatch.chdir(disk)
        for step in (1, 2):
            check_target(target)
            export_step(tmp_path, step, target)
            assert found(target) == (step,) * 4
        monkeypatch.chdir(tmp_path)


# What --export_root may be, and what is wrong with it.
TARGETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (Path.touch, "Not a directory"),
    "a dangling link": (lambda path: path.symlink_to(path.with_name("none") / "x"), ""),
    "a loop": (lambda path: path.symlink_to(path), ""),
    "a pipe": (os.mkfifo, "Not a directory"),
    "weights as a folder": (
        lambda path: (path / "model.safetensors").mkdir(parents=True),
        "model.safetensors in it is a folder",
    ),
    "a config as a folder": (
        lambda path: (path / "config.json" / "x").mkdir(parents=True),
        "config.json in it is a folder",
    ),
    "users as a folder": (
        lambda path: (path / "users.parquet").mkdir(parents=True),
        "users.parquet in it is a folder",
    ),
    "a link to nothing": (
        lambda path: path.symlink_to("nowhere"),
        "target is a link to nowhere, which is missing",
    ),
    "another run's model": (
        lambda path: (path.mkdir(), (path / "checkpoints").mkdir()),
        "is the folder of a run",
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_a_target_that_cannot_be_written_is_found_before_training(
    run_main: RunMain, tmp_path: Path, cache_dir: Path, case: str
) -> None:
    make, message = TARGETS[case]
    target, run_dir = tmp_path / "target", tmp_path / "run"
    make(target)
    flags = [f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", f"--export_root={target}"]
    outcome = run_main("train", *TINY, *flags)
    assert_one_line(outcome, "train", f"--export_root {target}")
    assert message in outcome.err
    assert not run_dir.exists()


@pytest.mark.parametrize("target", ["checkpoints", "checkpoints/step-00000005", "results", "."])
def test_folders_of_a_run_are_no_target(
    run_main: RunMain, run_dir: Path, tmp_path: Path, cache_dir: Path, target: str
) -> None:
    before = sorted(run_dir.rglob("*"))
    flag = f"{run_dir / target} is {'the folder' if target == '.' else 'a folder'} of a run"
    arguments = [f"--checkpoint={run_dir}", f"--output={run_dir / target}"]
    assert_one_line(run_main("export", *arguments), "export", f"--output {flag}: choose another")
    new = tmp_path / "new"  # of this run, which is not there yet, or of another one
    for folder in (run_dir, new):
        root = f"--export_root={folder / target}"
        flags = [f"--cache_dir={cache_dir}", f"--run_dir={new}", root]
        message = f"{str(folder / target).rstrip('.').rstrip('/')}"
        outcome = run_main("train", *TINY, *flags)
        assert_one_line(outcome, "train", f"--export_root {message}")
        assert "of a run: choose another one" in outcome.err
    assert sorted(run_dir.rglob("*")) == before and not new.exists()


@pytest.mark.parametrize("link", [False, True])
def test_the_root_is_no_target(
    run_main: RunMain, run_dir: Path, tmp_path: Path, cache_dir: Path, link: bool
) -> None:
    root, new = Path("/"), tmp_path / "new"
    if link:
        root = tmp_path / "root"
        root.symlink_to("/")
    message = f"{root} is the root of all files: name a folder in it"
    arguments = [f"--checkpoint={run_dir}", f"--output={root}"]
    assert_one_line(run_main("export", *arguments), "export", f"--output {message}")
    flags = [*TINY, f"--cache_dir={cache_dir}"]
    outcome = run_main("train", *flags, f"--run_dir={new}", f"--export_root={root}")
    assert_one_line(outcome, "train", f"--export_root {message}")
    outcome = run_main("train", *flags, f"--run_dir={root}")
    assert_one_line(outcome, "train", f"--run_dir {message}")
    assert not new.exists()


def test_another_run_s_model_is_no_target(
    run_main: RunMain, tmp_path: Path, cache_dir: Path
) -> None:
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    target = tmp_path / "other" / "model"
    flags = [f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}", f"--export_root={target}"]
    message = f"--export_root {target} is the model of a run: choose another folder"
    assert_one_line(run_main("train", *TINY, *flags), "train", message)


def test_a_full_disk_while_exporting(tmp_path: Path, one_weight: None) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk):
        export_step(tmp_path, 1, disk)
        (disk / "rest").write_bytes(bytes((4 << 20) - (64 << 10)))
        with pytest.raises(UserError, match=r"disk cannot be written: .*make room"):
            for number in range(100):
                (disk / f"rest-{number}").write_bytes(bytes(4096))
                export_step(tmp_path, 2, disk)
        assert found(disk) in ((1,) * 4, (2,) * 4)


# Not numbers to train or rank with.
NO_NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one NaN": lambda x: x.index_fill(0, torch.tensor([2]), torch.nan),
    "one infinity": lambda x: x.index_fill(0, torch.tensor([-1 % len(x)]), torch.inf),
    "minus infinity": lambda x: torch.full_like(x, -torch.inf),
    "int64": lambda x: x.to(torch.int64),
    "int8": lambda x: x.to(torch.int8),
    "bool": lambda x: x > 0,
    "uint8": lambda x: x.to(torch.uint8),
    "too large for float32": lambda x: x.double() + 1e300,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run_dir(run_main: RunMain, made: Path, tmp_path: Path, cache_dir: Path) -> Path:
    """A copy of a finished run, its exported model in it."""
    if not (made / "run").exists():
        flags = (f"--run_dir={made / 'run'}", f"--cache_dir={cache_dir}", "--num_epochs=1")
        outcome = run_main("train", *TINY, *flags)
        assert outcome.code == 0, outcome.err
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.mark.parametrize("case", NO_NUMBERS)
@pytest.mark.parametrize("name", ["embeddings.embeddings.item.weight", "encoder.final_norm.bias"])
def test_exported_weights_that_are_no_numbers(
    run_main: RunMain, run_dir: Path, cache_dir: Path, tmp_path: Path, name: str, case: str
) -> None:
    path = run_dir / "model" / "model.safetensors"
    weights = load_file(path)
    weights[name] = NO_NUMBERS[case](weights[name])
    with exporting.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(weights, path, metadata)
    seal(path.parent)
    for folder in (run_dir, run_dir / "model"):
        outcome = run_main("eval", f"--checkpoint={folder}")
        assert_one_line(outcome, "eval", f"{path} cannot be loaded ({name} ")
    flags = (f"--run_dir={tmp_path / 'new'}", f"--cache_dir={cache_dir}", f"--teachers={run_dir}")
    outcome = run_main("train", *TINY, *flags)
    assert_one_line(outcome, "train", f"{path} cannot be loaded ({name} ")


def rewrite_checkpoints(run_dir: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Save all checkpoints again with another item table."""
    for folder in (run_dir / "checkpoints").iterdir():
        content = manifest.read_manifest(folder)
        content.pop("format")
        state: dict[str, Any] = {}
        planner, reader = _EmptyStateDictLoadPlanner(), dcp.FileSystemReader(folder)
        _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
        table = state["model"]["embeddings.embeddings.item.weight"]
        state["model"]["embeddings.embeddings.item.weight"] = change(table)
        shutil.rmtree(folder)
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        content["files"] = {}
        for pattern in (".metadata", "__*"):
            content["files"] |= manifest.describe_files(folder, pattern)
        manifest.write_manifest(folder, content)


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_weights_of_a_checkpoint_that_are_no_numbers(
    run_main: RunMain, run_dir: Path, cache_dir: Path, case: str
) -> None:
    shutil.rmtree(run_dir / "model")
    rewrite_checkpoints(run_dir, NO_NUMBERS[case])
    name = "embeddings.embeddings.item.weight"
    assert_one_line(run_main("eval", f"--checkpoint={run_dir}"), "eval", f"{name} ")
    flags = (f"--run_dir={run_dir}", f"--cache_dir={cache_dir}", "--resume=auto")
    for epochs in (1, 2):  # only exported again, or trained on
        outcome = run_main("train", *TINY, *flags, f"--num_epochs={epochs}")
        assert_one_line(outcome, "train", f"{name} ")


def test_weights_are_checked_by_rows_of_any_type() -> None:
    check_finite({"a": torch.zeros(0, 4), "b": torch.ones(3, dtype=torch.float16)})
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for bad in (torch.nan, torch.inf, -torch.inf):
            weight = torch.ones(5, 2, dtype=dtype)
            weight[4, 1] = bad
            with pytest.raises(ValueError, match="b has values that are not finite"):
                check_finite({"a": torch.ones(1), "b": weight})


def test_stored_weights_fit_or_are_named() -> None:
    model = nn.Linear(2, 3, device="meta").state_dict()
    good = {"weight": StoredTensor([3, 2], "F32", True), "bias": StoredTensor([3], "F16", True)}
    check_fit(good, model)
    for change, message in (
        ({"weight": StoredTensor([2, 3], "F32", True)}, r"size mismatch of weight: \[2, 3\], not"),
        ({"bias": StoredTensor([3], "I64", False)}, "bias is of type I64"),
        ({"more": StoredTensor([3], "F32", True)}, "more is only in one of both"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fit(good | change, model)


def write(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """Write a file in parts of one value each; its fingerprint."""
    with WeightsFile(path, {k: v.to("meta") for k, v in weights.items()}, metadata) as file:
        for name, tensor in weights.items():
            for place in np.ndindex(*tensor.shape):
                file.put(Part(name, place, tensor[tuple(slice(at, at + 1) for at in place)]))
        return file.fingerprint()


@given(
    st.dictionaries(
        st.text("ab.é", min_size=1, max_size=3),
        st.tuples(
            st.lists(st.integers(1, 4), min_size=1, max_size=2),
            st.sampled_from([torch.float16, torch.float32, torch.float64]),
        ),
        max_size=4,
    ),
    st.sampled_from([1, 8, 1 << 20]),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_written_by_parts_is_that_of_safetensors(
    tmp_path: Path, shapes: dict[str, tuple[list[int], torch.dtype]], block: int
) -> None:
    weights = {name: torch.randn(shape).to(kind) for name, (shape, kind) in shapes.items()}
    save_file(weights, tmp_path / "theirs", {"a": "b"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights_file, "_BLOCK", block)
        write(tmp_path / "ours", weights, {"a": "b"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_fingerprint_is_of_names_shapes_types_and_values(tmp_path: Path) -> None:
    def fingerprint(weights: dict[str, torch.Tensor]) -> str:
        return write(tmp_path / "file", weights, {})

    one = {"a": torch.arange(6.0), "b": torch.ones(1)}
    others = [
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1)},
        {"a": torch.arange(6.0).double(), "b": torch.ones(1)},
        {"a": torch.arange(6.0) + 1, "b": torch.ones(1)},
        {"b": torch.arange(6.0), "a": torch.ones(1)},
        {"a": torch.arange(6.0)},
    ]
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert len({fingerprint(each) for each in (one, *others)}) == 6


def test_a_checkpoint_that_is_damaged_after_training(run_dir: Path, one_rank: Ranks) -> None:
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    (checkpoint / "__0_0.distcp").write_bytes(bytes(10**6))
    run = TrainedRun(EvalFlags(checkpoint=str(run_dir)))
    trained = Trained(run.trained(one_rank).plain, checkpoint, 5, {}, run_dir, run_dir)
    message = "step-00000005 cannot be exported: __0_0.distcp has 1000000 bytes instead of "
    with pytest.raises(UserError, match=message):
        export(trained, run_dir / "again", with_users=False, with_programs=False)
    assert not any((run_dir / "again").iterdir())


def test_an_export_reads_each_file_once_before_its_parts(
    run_main: RunMain, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a checkpoint is checked once, just before its parts are copied."""
    shutil.rmtree(run_dir / "model")
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    done, check, read = [], manifest.size_and_crc32, SafeReader._read

    def checked(path: Path) -> tuple[int, int]:
        if path.parent == checkpoint:
            done.append(path.name)
        return check(path)

    def copied(*given: Any) -> torch.Tensor:
        done.append("part")
        return read(*given)

    monkeypatch.setattr(manifest, "size_and_crc32", checked)
    monkeypatch.setattr(SafeReader, "_read", copied)
    flags = f"--checkpoint={run_dir}", f"--output={tmp_path / 'once'}"
    assert run_main("export", *flags).code == 0
    assert done[:3] == [".metadata", "__0_0.distcp", "part"] and {*done[3:]} == {"part"}


def test_an_export_has_its_metrics(run_dir: Path) -> None:
    about = json.loads((run_dir / "model" / "config.json").read_text())
    assert about["metrics"] == {"test": json.loads((run_dir / "eval_test.json").read_text())}
    assert about["step"] == 5
