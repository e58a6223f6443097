"""Run folders and exported models of any content: one line and exit code 2, or success; no hang."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from model.checkpoints import manifest
from tests.conftest import TINY, Outcome, RunMain, assert_one_line, seal

FLAGS = (*TINY, "--num_epochs=2")
pytestmark = pytest.mark.timeout(60)  # for a hang
# JSON whose depth no recursive reader survives.
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def train(run_main: RunMain, cache_dir: Path) -> Callable[..., Outcome]:
    def run(run_dir: Path, *more: str) -> Outcome:
        return run_main("train", *FLAGS, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", *more)

    return run


@pytest.fixture
def run_dir(workplace: Path, tmp_path: Path, train: Callable[..., Outcome]) -> Path:
    """A copy of a finished run, without its exported model, which is beside it."""
    made = workplace / "made"
    if not made.exists():
        outcome = train(made, f"--export_root={workplace / 'exported'}")
        assert outcome.code == 0, outcome.err
        shutil.rmtree(made / "model")
    shutil.copytree(workplace / "exported", tmp_path / "exported")
    return Path(shutil.copytree(made, tmp_path / "run"))


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def best(run_dir: Path) -> Path:
    step = manifest.read_manifest(newest(run_dir))["position"]["best_step"]
    return run_dir / "checkpoints" / f"step-{step:08d}"


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def sparse(path: Path) -> None:
    """A file of 1 TiB of zeros that takes no space."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


# What a name in a run folder may be instead of a file.
KINDS: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "nowhere": lambda path: path.symlink_to("nowhere"),
    "empty": Path.touch,
    "deep": lambda path: path.write_text(DEEP),
    "null": lambda path: path.write_text("null"),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "huge": sparse,
}
EXPORTED = ("config.json", "model.safetensors", "checksums.json")
CHECKPOINT = ("manifest.json", ".metadata", "__0_0.distcp")


def refused(outcome: Outcome, script: str) -> None:
    """One line; before it a resume of more epochs may tell of its other learning rate."""
    *told, last = outcome.err.strip().splitlines()
    assert len(told) <= 1, outcome.err
    assert all(line.startswith("warning: --resume auto: the learning rate") for line in told)
    assert_one_line(Outcome(outcome.code, outcome.out, last), script, "")
    assert "Traceback" not in outcome.err and "weights_only" not in outcome.err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXPORTED)
def test_files_of_an_export(run_main: RunMain, run_dir: Path, name: str, kind: str) -> None:
    exported = run_dir.with_name("exported")
    replace(exported / name, KINDS[kind])
    refused(run_main("eval", f"--checkpoint={exported}"), "eval")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_files_of_a_checkpoint(
    run_main: RunMain, train: Callable[..., Outcome], run_dir: Path, name: str, kind: str
) -> None:
    for folder in (run_dir / "checkpoints").iterdir():
        replace(folder / name, KINDS[kind])
    refused(run_main("eval", f"--checkpoint={run_dir}"), "eval")
    outcome = train(run_dir, "--resume=auto", "--max_steps=1")
    refused(outcome, "train")
    assert "--resume auto: all checkpoints are damaged" in outcome.err


IN_RUN = (
    *(".lock", "config.json", "metrics.jsonl", "catalog.parquet", "checkpoints"),
    *("config.json.part", "metrics.jsonl.part", "results", "results/eval_test"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", IN_RUN)
def test_files_of_a_run(train: Callable[..., Outcome], run_dir: Path, name: str, kind: str) -> None:
    if name in ("checkpoints", "results", "results/eval_test"):
        shutil.rmtree(run_dir / name)
    elif name == "metrics.jsonl.part":  # a line to drop, so that the file is written again
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write("cut")
    replace(run_dir / name, KINDS[kind])
    outcome = train(run_dir, "--resume=auto", "--num_epochs=3", "--max_steps=11")
    if outcome.code:
        refused(outcome, "train")


@pytest.mark.parametrize("kind", ["pipe", "device", "empty", "loop"])
def test_what_is_in_the_place_of_checkpoints(
    train: Callable[..., Outcome], run_dir: Path, kind: str
) -> None:
    """It is replaced, or refused before the first step."""
    checkpoints = run_dir / "checkpoints"
    after = f"step-{int(newest(run_dir).name.removeprefix('step-')) * 3 // 2:08d}"
    KINDS[kind](checkpoints / f".{after}.part")
    KINDS[kind](checkpoints / f".{after}.old")
    more = ("--resume=auto", "--num_epochs=3")
    assert train(run_dir, *more).code == 0
    assert newest(run_dir).name == after
    shutil.rmtree(checkpoints)
    KINDS[kind](checkpoints)
    outcome = train(run_dir, *more)
    refused(outcome, "train")
    assert f"{checkpoints} is no folder" in outcome.err and "step " not in outcome.out


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_a_model_folder_that_is_none(
    run_main: RunMain, train: Callable[..., Outcome], run_dir: Path, kind: str
) -> None:
    KINDS[kind](run_dir / "model")
    assert run_main("eval", f"--checkpoint={run_dir}").code == 0  # its best checkpoint
    outcome = train(run_dir, "--resume=auto")
    refused(outcome, "train")
    assert f"--run_dir {run_dir}: model in it cannot be written" in outcome.err


def test_what_files_hold_reaches_no_device(
    train: Callable[..., Outcome], run_dir: Path, tmp_path: Path
) -> None:
    """Files are replaced, not written through a link."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in ("config.json", "catalog.parquet", "users.parquet", "eval_test.json"):
        content = (run_dir / name).read_bytes()
        outside.with_name(name).write_bytes(content)
        replace(run_dir / name, lambda path: path.symlink_to(outside.with_name(path.name)))
        replace(run_dir / f"{name}.part", lambda path: path.symlink_to(outside))
    assert train(run_dir, "--resume=auto").code == 0
    assert outside.read_text() == "mine"


def changed_catalog(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / "catalog.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    seal(folder)


CATALOGS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "the items of another run": lambda table: table.take(pa.array(range(len(table))[::-1])),
    "an id twice": lambda table: pa.concat_tables([table[:1], table[:-1]]),
    "no id": lambda table: table.set_column(0, "item", pa.nulls(len(table), pa.string())),
    "no counts": lambda table: table.set_column(2, "train_count", pa.nulls(len(table))),
    "titles of numbers": lambda table: table.set_column(1, "title", pa.array([[1]] * len(table))),
    "one item less": lambda table: table[1:],
}


@pytest.mark.parametrize("case", CATALOGS)
def test_another_catalog_is_refused(
    run_main: RunMain, run_dir: Path, tmp_path: Path, case: str
) -> None:
    """Recommendations would name other items than those that the model was trained on."""
    for folder in (run_dir, run_dir.with_name("exported")):
        changed_catalog(folder, CATALOGS[case])
        given = f"--checkpoint={folder}"
        refused(run_main("recommend", given, "--history=1,2,3"), "recommend")
        refused(run_main("export", given, f"--output={tmp_path / 'again'}"), "export")


def test_a_model_folder_of_another_run(run_main: RunMain, run_dir: Path) -> None:
    shutil.copytree(run_dir.with_name("exported"), run_dir / "model")
    path = run_dir / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ratings": "0123456789abcdef"}))
    seal(run_dir / "model")
    outcome = run_main("eval", f"--checkpoint={run_dir}")
    refused(outcome, "eval")
    assert "was trained on other data" in outcome.err


# Changes of an exported config.json; the weights stay as they are.
IMPOSSIBLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "num_items true": lambda c: c.update(num_items=True),
    "num_items 10^12": lambda c: c.update(num_items=10**12),
    "num_items 10^400": lambda c: c.update(num_items=10**400),
    "num_items a float": lambda c: c.update(num_items=80.0),
    "catalog null": lambda c: c.update(catalog=None),
    "flags empty": lambda c: c.update(flags={}),
    "layers 10^6": lambda c: c["flags"].update(num_layers=10**6),
    "layers 100": lambda c: c["flags"].update(num_layers=100),
    "width 4·10^9": lambda c: c["flags"].update(emb_dim=4 * 10**9),
    "width 10^30": lambda c: c["flags"].update(emb_dim=10**30),
    "heads 0": lambda c: c["flags"].update(nhead=0),
    "width true": lambda c: c["flags"].update(emb_dim=True),
    "width null": lambda c: c["flags"].update(emb_dim=None),
    "width a list": lambda c: c["flags"].update(emb_dim=[[[16]]]),
    "positions learned": lambda c: c["flags"].update(learned_positions=False),
    "head linear": lambda c: c["flags"].update(head="linear"),
    "precision of tables": lambda c: c["flags"].update(table_precision="int1"),
    "lr 10^400": lambda c: c["flags"].update(lr=10**400),
    "lr not a number": lambda c: c["flags"].update(lr=float("nan")),
    "data from a device": lambda c: c["flags"].update(dataset_path="/dev/zero"),
    "data from a pipe": lambda c: c["flags"].update(dataset_path="PIPE"),
    "a data set elsewhere": lambda c: c["flags"].update(dataset_name="../../etc/passwd"),
    "a cache elsewhere": lambda c: c["flags"].update(cache_dir="/proc/1/none"),
    "max_len 10^18": lambda c: c["flags"].update(max_len=10**18),
    "max_len 10^400": lambda c: c["flags"].update(max_len=10**400),
    "seed 10^30": lambda c: c["flags"].update(seed=10**30),
    "negatives 10^12": lambda c: c["flags"].update(eval_negatives=10**12),
    "negatives' seed": lambda c: c["flags"].update(eval_negatives_seed=-(10**40)),
    "batch 10^18": lambda c: c["flags"].update(test_batch_size=10**18),
    "batch 10^400": lambda c: c["flags"].update(test_batch_size=10**400),
    "step of another": lambda c: c.update(step=6),
    "no fingerprint": lambda c: c.pop("fingerprint"),
    "fingerprint a list": lambda c: c.update(fingerprint=[1]),
    "users 10^12": lambda c: c["flags"].update(synthetic_user_count=10**12),
    "teachers": lambda c: c["flags"].update(teachers="PIPE"),
    "temperature 1e-300": lambda c: c["flags"].update(logit_temperature=1e-300),
    "mode ddp": lambda c: c["flags"].update(mode="ddp"),
    "sharding column": lambda c: c["flags"].update(sharding="column_wise"),
    "kernel": lambda c: c["flags"].update(compute_kernel="fused_uvm_caching"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_configs_of_an_export(run_main: RunMain, run_dir: Path, case: str) -> None:
    exported = run_dir.with_name("exported")
    path = exported / "config.json"
    os.mkfifo(exported / "pipe")
    config = json.loads(path.read_text())
    IMPOSSIBLE[case](config)
    path.write_text(json.dumps(config).replace("PIPE", str(exported / "pipe")))
    seal(exported)
    outcome = run_main("eval", f"--checkpoint={exported}")
    if outcome.code:
        refused(outcome, "eval")


def rewrite_manifests(run_dir: Path, change: Callable[[dict[str, Any], Path], Any]) -> None:
    """Change the manifests, or the files and then their checksums, as who knows the format can."""
    for folder in (run_dir / "checkpoints").iterdir():
        content = manifest.read_manifest(folder)
        content["files"] = {}
        change(content, folder)
        for pattern in (".metadata", "__*.distcp"):
            content["files"] |= manifest.describe_files(folder, pattern)
        content.pop("format")
        manifest.write_manifest(folder, content)


def with_file(name: str, **about: Any) -> Callable[[dict[str, Any], Path], Any]:
    """A manifest that lists a file."""
    default = {"size": 0, "crc32": 0}
    return lambda content, _: content["files"].update({name: default | about})


def at(**position: Any) -> Callable[[dict[str, Any], Path], Any]:
    return lambda content, _: content["position"].update(position)


MANIFESTS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "a device": with_file("../../../../../../../../../dev/zero"),
    "a device by its path": with_file("/dev/zero"),
    "a file elsewhere": with_file("../../config.json"),
    "a file below": with_file("a/__0_0.distcp"),
    "a name with a line end": with_file("__0_0.distcp\n"),
    "an empty name": with_file(""),
    "itself": with_file("manifest.json"),
    "a file that is not there": with_file("__7_7.distcp"),
    "size -1": with_file("__7_7.distcp", size=-1),
    "size true": with_file("__7_7.distcp", size=True),
    "size 10^400": with_file("__7_7.distcp", size=10**400),
    "size null": with_file("__7_7.distcp", size=None),
    "no checksum": lambda content, _: content["files"].update({"__7_7.distcp": {"size": 1}}),
    "files as a list": lambda content, _: content["files"].update({"__7_7.distcp": [0, 0]}),
    "best_step text": at(best_step="x"),
    "best_step true": at(best_step=True),
    "best_step a float": at(best_step=5.0),
    "best_step -1": at(best_step=-1),
    "best_step 10^400": at(best_step=10**400),
    "best a list": at(best=[1]),
    "best not a number": at(best=float("nan")),
    "best infinite": at(best=float("inf")),
    "sample null": at(sample=None),
    "sample -10^12": at(sample=-(10**12)),
    "epoch -1": at(epoch=-1),
    "step of another": at(step=7),
    "another key": at(more=1),
    "no position": lambda content, _: content.update(position=[]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_another_manifest_is_refused(
    run_main: RunMain, train: Callable[..., Outcome], run_dir: Path, case: str
) -> None:
    rewrite_manifests(run_dir, MANIFESTS[case])
    refused(run_main("eval", f"--checkpoint={run_dir}"), "eval")
    outcome = train(run_dir, "--resume=auto", "--max_steps=1")
    refused(outcome, "train")
    assert "--resume auto: all checkpoints are damaged" in outcome.err


def test_a_sample_beyond_the_epoch(train: Callable[..., Outcome], run_dir: Path) -> None:
    rewrite_manifests(run_dir, at(sample=10**12, epoch=1))
    outcome = train(run_dir, "--resume=auto")
    if outcome.code:
        refused(outcome, "train")


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def index_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def changed_index(change: Callable[[Any], Any]) -> Callable[[dict[str, Any], Path], Any]:
    def act(_: dict[str, Any], folder: Path) -> None:
        index = index_of(folder)
        index = change(index) or index
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return act


def in_all_files(name: str) -> Callable[[Any], Any]:
    def change(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    return change


def of_type(dtype: torch.dtype) -> Callable[[Any], Any]:
    def change(index: Any) -> None:
        for about in index.state_dict_metadata.values():
            about.properties.dtype = dtype

    return change


def of_size(*size: int) -> Callable[[Any], Any]:
    def change(index: Any) -> None:
        for about in index.state_dict_metadata.values():
            about.size = torch.Size(size)

    return change


def write_data(make: Callable[[], Any]) -> Callable[[dict[str, Any], Path], Any]:
    def act(_: dict[str, Any], folder: Path) -> None:
        torch.save(make(), folder / "__0_0.distcp")
        index = index_of(folder)
        for info in index.storage_data.values():
            info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    return act


INDICES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "a list": changed_index(lambda _: [1]),
    "a folder maker": changed_index(lambda _: Call(os.mkdir, "/none")),
    "no tensors": changed_index(lambda i: i.state_dict_metadata.clear()),
    "tensors that are text": changed_index(
        lambda i: i.state_dict_metadata.update({"model.x": "x"})
    ),
    "names that are numbers": changed_index(lambda i: i.state_dict_metadata.update({1: 1})),
    "no files": changed_index(lambda i: i.storage_data.clear()),
    "files as a list": changed_index(lambda i: setattr(i, "storage_data", [1])),
    "no version": changed_index(lambda i: setattr(i, "storage_meta", None)),
    "a device": changed_index(in_all_files("../../../../../../../dev/zero")),
    "a file elsewhere": changed_index(in_all_files("../../config.json")),
    "a file that is not there": changed_index(in_all_files("__3_3.distcp")),
    "a name that is none": changed_index(in_all_files(7)),  # type: ignore[arg-type]
    "int64": changed_index(of_type(torch.int64)),
    "bool": changed_index(of_type(torch.bool)),
    "complex": changed_index(of_type(torch.complex64)),
    "a type that is text": changed_index(of_type("float32")),  # type: ignore[arg-type]
    "no dimensions": changed_index(of_size()),
    "10^18 rows": changed_index(of_size(10**18, 16)),
    "other objects": write_data(lambda: {"a": Call(os.mkdir, "/none")}),
    "functions": write_data(lambda: print),
    "a list of numbers": write_data(lambda: [1.0]),
    "text": lambda _, folder: (folder / "__0_0.distcp").write_bytes(b"x" * 200_000),
    "rank-local pipes": lambda _, folder: (
        os.mkfifo(folder / "__0.metadata"),
        (folder / ".metadata").write_bytes(b""),
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_another_index_of_tensors_is_refused(
    run_main: RunMain, train: Callable[..., Outcome], run_dir: Path, case: str
) -> None:
    rewrite_manifests(run_dir, INDICES[case])
    refused(run_main("eval", f"--checkpoint={run_dir}"), "eval")
    refused(train(run_dir, "--resume=auto"), "train")
