"""Damaged or unsuitable run folders, checkpoints and exported models; bad input on two ranks."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.checkpoints import manifest
from tests.conftest import ROOT, TINY, Outcome, RunMain, assert_one_line, seal, torchrun

HEAD = "user,item,time\n"
RATINGS = HEAD + "".join(f"{u},{u + i},{i}\n" for u in range(5) for i in range(4))
REPEATING = HEAD + "".join(f"{u},{u + i % 2},{i}\n" for u in range(5) for i in range(4))
FLAGS = (*TINY, "--num_epochs=2", "--min_user_count=0")

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "ratings.csv").write_text(RATINGS)
    return folder


@pytest.fixture
def train(run_main: RunMain, workplace: Path) -> Train:
    def run(run_dir: Path, *more: str, data: Path = workplace / "ratings.csv") -> Outcome:
        folders = [f"--run_dir={run_dir}", f"--cache_dir={workplace / 'cache'}"]
        return run_main("train", *FLAGS, f"--dataset_path={data}", *folders, *more)

    return run


@pytest.fixture
def run_dir(workplace: Path, tmp_path: Path, train: Train) -> Path:
    """A copy of a finished run that the test may damage; its exported model is beside it."""
    made = workplace / "made"
    if not made.exists():
        outcome = train(made, f"--export_root={workplace / 'exported'}")
        assert outcome.code == 0, outcome.err
    shutil.copytree(workplace / "exported", tmp_path / "exported")
    return Path(shutil.copytree(made, tmp_path / "run"))


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config) or config))
    seal(folder)


def rewrite_manifests(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and update its checksum."""
    for folder in (run_dir / "checkpoints").iterdir():
        content = manifest.read_manifest(folder)
        content.pop("format")
        change(content)
        manifest.write_manifest(folder, content)


# Change of config.json, and eval.py's error line; FOLDER stands for the run folder.
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda config: [config], "FOLDER/config.json is damaged (keys are missing)"),
    "no catalog": (lambda config: {"flags": {}}, "FOLDER/config.json is damaged (keys are missing"),
    "flags that are none": (
        lambda config: config.update(flags=["max_len"]),
        "FOLDER/config.json is damaged (flags is ['max_len'])",
    ),
    "items as text": (
        lambda config: config.update(num_items="7"),
        "FOLDER/config.json is damaged (num_items is '7')",
    ),
    "less than no items": (
        lambda config: config.update(num_items=-5),
        "FOLDER/config.json is damaged (a value in it is impossible)",
    ),
    "a path with a zero byte": (
        lambda config: config["flags"].update(dataset_path="a\0b"),
        "FOLDER/config.json is damaged (a value in it is impossible)",
    ),
    "other items": (
        lambda config: config.update(catalog="0123456789abcdef"),
        "FOLDER was trained on 8 items that are not the 8 of this data: give the ratings of",
    ),
    "more items": (
        lambda config: config.update(num_items=9),
        "model.safetensors cannot be loaded (size mismatch",
    ),
    "a flag of a newer version": (
        lambda config: config["flags"].update(newest=1),
        "FOLDER/config.json: unknown settings newest: made by another version?",
    ),
    "a flag out of range": (
        lambda config: config["flags"].update(nhead=3),
        "FOLDER/config.json: --nhead 3 does not divide --emb_dim 16",
    ),
    "a flag of another kind": (
        lambda config: config["flags"].update(emb_dim="16"),
        "FOLDER/config.json: --emb_dim must be of type int, not '16'",
    ),
    "another width": (
        lambda config: config["flags"].update(emb_dim=32),
        "model.safetensors cannot be loaded (size mismatch",
    ),
    "a data set elsewhere": (
        lambda config: config["flags"].update(dataset_name="../../etc"),
        "FOLDER/config.json: --dataset_name must be made of letters",
    ),
    "ratings that are gone": (
        lambda config: config["flags"].update(dataset_path="gone.csv"),
        "no such file: gone.csv, which FOLDER was trained on: give it by --dataset_path",
    ),
    "a split that is gone": (
        lambda config: config["flags"].update(split_path="gone", dataset_path=""),
        "no such file: gone, which FOLDER was trained on: give it by --dataset_path",
    ),
    "items that are gone": (
        lambda config: config["flags"].update(items_path="gone.csv"),
        "no such file: gone.csv, which FOLDER was trained on: give it by --items_path",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_changed_config_is_refused_before_a_result_is_written(
    run_main: RunMain, run_dir: Path, case: str
) -> None:
    change, message = CONFIGS[case]
    rewrite_config(run_dir, change)
    (run_dir / "eval_test.json").unlink()
    outcome = run_main("eval", f"--checkpoint={run_dir}")
    assert_one_line(outcome, "eval", message.replace("FOLDER", str(run_dir)))
    assert not (run_dir / "eval_test.json").exists()


@pytest.mark.parametrize("flag", ["dataset_path", "items_path"])
def test_a_file_given_that_is_not_there(run_main: RunMain, run_dir: Path, flag: str) -> None:
    outcome = run_main("eval", f"--checkpoint={run_dir}", f"--{flag}=gone.csv")
    assert_one_line(outcome, "eval", f"no such file: gone.csv (--{flag}); check the path")


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe\0")])
def test_a_config_that_is_not_text(
    run_main: RunMain, train: Train, run_dir: Path, make: Callable[[Path], Any]
) -> None:
    (run_dir / "config.json").unlink()
    make(run_dir / "config.json")
    message = f"{run_dir}"
    assert_one_line(run_main("eval", f"--checkpoint={run_dir}"), "eval", message)
    assert_one_line(train(run_dir, "--resume=auto"), "train", message)


def test_checkpoints_without_a_config(train: Train, run_dir: Path) -> None:
    (run_dir / "config.json").unlink()
    message = f"--run_dir {run_dir} has checkpoints, but config.json is missing"
    for resume in ("--resume=never", "--resume=auto"):
        assert_one_line(train(run_dir, resume), "train", message)


@pytest.mark.parametrize("content", [b"", b"12345678", "cut"])
def test_truncated_weights(run_main: RunMain, run_dir: Path, content: bytes) -> None:
    path = run_dir / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] if content == "cut" else content)
    outcome = run_main("eval", f"--checkpoint={run_dir}")
    assert_one_line(outcome, "eval", f"{path} cannot be loaded")


def test_a_file_instead_of_a_run_folder(run_main: RunMain, workplace: Path) -> None:
    path = workplace / "ratings.csv"
    message = f"{path} is no run folder: config.json cannot be read (Not a directory)"
    assert_one_line(run_main("eval", f"--checkpoint={path}"), "eval", message)


def test_an_exported_model_is_not_a_run_folder(train: Train, run_dir: Path) -> None:
    exported = run_dir.with_name("exported")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in exported.iterdir())
    for resume in ("--resume=never", "--resume=auto"):
        message = f"--run_dir {exported} is an exported model: choose another folder"
        assert_one_line(train(exported, resume), "train", message)
    after = sorted((path.name, path.stat().st_mtime_ns) for path in exported.iterdir())
    assert [each for each in after if each[0] != ".lock"] == before


def test_another_run_cannot_be_the_export_folder(train: Train, run_dir: Path) -> None:
    outcome = train(run_dir.with_name("new"), f"--export_root={run_dir}")
    assert_one_line(outcome, "train", f"--export_root {run_dir} is the folder of a run")


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        (RATINGS.replace(",3,", ",30,"), "was trained on other data (catalog "),
        (RATINGS + "7,3,1\n7,4,2\n", "was trained on other data (num_ratings 20, not 22)"),
        # Items repeat: --seen auto decides otherwise, which is not what the user should hear of.
        (REPEATING, "was trained on other data (num_items 8, not 6)"),
    ],
)
def test_resuming_on_other_data(
    train: Train, run_dir: Path, tmp_path: Path, ratings: str, message: str
) -> None:
    data = tmp_path / "ratings.csv"
    data.write_text(ratings)
    before = (run_dir / "config.json").read_bytes()
    outcome = train(run_dir, "--resume=auto", data=data)
    assert_one_line(outcome, "train", f"--resume auto: {run_dir} {message}")
    assert (run_dir / "config.json").read_bytes() == before


def without_model(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "model")


def test_checkpoints_of_a_newer_format(
    run_main: RunMain, train: Train, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer(content: dict[str, Any]) -> None:
        content["format"] = 2

    rewrite_manifests(run_dir, newer)
    without_model(run_dir)
    message = "has format 2, this version reads 1: use the version that wrote it"
    assert_one_line(train(run_dir, "--resume=auto"), "train", message)
    assert_one_line(run_main("eval", f"--checkpoint={run_dir}"), "eval", message)


def test_checkpoints_without_their_index(run_main: RunMain, train: Train, run_dir: Path) -> None:
    for index in run_dir.glob("checkpoints/*/.metadata"):
        index.unlink()
    without_model(run_dir)
    outcome = run_main("eval", f"--checkpoint={run_dir}")
    assert_one_line(outcome, "eval", "the best model of this run, is damaged: .metadata cannot be")
    config = (run_dir / "config.json").read_bytes()
    checkpoints = run_dir / "checkpoints"
    steps = sorted(each.name for each in checkpoints.iterdir())
    for _ in range(2):  # a refusal changes nothing, so that the next one does not start anew
        outcome = train(run_dir, "--resume=auto")
        newest = checkpoints / steps[-1]
        message = f"all checkpoints are damaged ({newest}: .metadata cannot be read (No such file"
        assert_one_line(outcome, "train", message)
        assert f"restore one, or delete {checkpoints} to train from" in outcome.err
    assert sorted(each.name for each in checkpoints.iterdir()) == steps
    assert (run_dir / "config.json").read_bytes() == config
    shutil.rmtree(checkpoints)
    outcome = train(run_dir, "--resume=auto")
    assert outcome.code == 0 and "resumed from" not in outcome.out, outcome.err


def test_an_invalid_position(run_main: RunMain, train: Train, run_dir: Path) -> None:
    rewrite_manifests(run_dir, lambda content: content["position"].update(steps=1))
    without_model(run_dir)
    outcome = run_main("eval", f"--checkpoint={run_dir}")
    assert_one_line(outcome, "eval", f"{run_dir} has no evaluated model yet")
    assert "its position is invalid" in train(run_dir, "--resume=auto").err


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_checkpoint_with_a_malicious_pickle_runs_no_code(
    run_main: RunMain, train: Train, run_dir: Path, tmp_path: Path
) -> None:
    for index in run_dir.glob("checkpoints/*/.metadata"):
        index.write_bytes(pickle.dumps(Evil(tmp_path / "evil")))

    def right_checksums(content: dict[str, Any]) -> None:
        (folder,) = run_dir.glob(f"checkpoints/step-{content['position']['step']:08d}")
        content["files"] |= manifest.describe_files(folder, ".metadata")

    rewrite_manifests(run_dir, right_checksums)
    without_model(run_dir)
    message = "mkdir is not allowed there"
    assert_one_line(run_main("eval", f"--checkpoint={run_dir}"), "eval", message)
    assert message in train(run_dir, "--resume=auto").err
    assert not (tmp_path / "evil").exists()


def test_two_ranks_end_with_the_same_exit_code(workplace: Path, tmp_path: Path) -> None:
    """Many cases through one pair of ranks: tests/workers/bad_input.py lists them."""
    outcome = torchrun(2, ROOT / "tests" / "workers" / "bad_input.py", tmp_path, timeout=120)
    assert outcome.code == 0, outcome.err
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) >= 10 and first.keys() == second.keys()
    for case, ended in first.items():
        assert ended["code"] == second[case]["code"] == ended["expected"], (case, ended)
        if ended["code"]:
            assert ended["said"].startswith("train.py: ") and ended["said"].count("\n") == 1, case
            said = ended["said"].replace("train.py: ", "train.py: rank 1: ")
            assert second[case]["said"] == said, case
    blind = first["a run folder of each host"]["said"]
    assert "--run_dir own: rank 1 does not see what rank 0 writes there: give" in blind
    other = first["other ratings on each host"]["said"]
    assert "ratings of rank 1 (4 items, 4 ratings) is not that of rank 0 (4 items," in other
    assert not list(tmp_path.glob("*/own"))


# The items of RATINGS: one more rating, and the same number in another order.
OTHER_RATINGS = [RATINGS + "7,3,1\n7,4,2\n7,5,3\n", RATINGS.replace("4,6,2", "4,6,9")]


@pytest.mark.parametrize("ratings", OTHER_RATINGS)
@pytest.mark.parametrize("where", ["run", "exported"])
def test_evaluating_on_other_ratings_of_the_same_items(
    run_main: RunMain, run_dir: Path, workplace: Path, tmp_path: Path, ratings: str, where: str
) -> None:
    folder, data = run_dir.with_name(where), tmp_path / "other.csv"
    flags = [f"--checkpoint={folder}", f"--cache_dir={workplace / 'cache'}"]
    assert run_main("eval", *flags).code == 0
    before = (folder / "eval_test.json").read_bytes()
    assert "other_ratings" not in json.loads(before)
    data.write_text(ratings)
    for discount in (0.0, 0.5):
        more = [f"--dataset_path={data}", f"--popularity_discount={discount}"]
        outcome = run_main("eval", *flags, *more)
        assert outcome.code == 0, outcome.err
        (first, *_) = [line for line in outcome.out.splitlines() if line.startswith("test, ")]
        assert "on other ratings than those of training (" in first
        assert ("popularity discount 0.5" in first) == (discount > 0)
        name = "eval_test-discount-0.5-ratings-*" if discount else "eval_test-ratings-*"
        (path,) = folder.glob(name)
        result = json.loads(path.read_text())
        assert path.name.endswith(f"-ratings-{result['other_ratings']}.json")
        assert result["other_ratings"] in first
    assert (folder / "eval_test.json").read_bytes() == before
    told = f"warning: the histories are of other ratings than {folder} was trained on: give those"
    recommended = run_main("recommend", *flags, "--user=1", f"--dataset_path={data}")
    assert recommended.code == 0 and recommended.err.startswith(told)
    assert run_main("recommend", *flags, "--user=1").err == ""
    # Ratings that have changed in their place are other ones, too.
    rewrite_config(folder, lambda config: config["flags"].update(dataset_path=str(data)))
    assert "on other ratings" in run_main("eval", *flags).out
    assert (folder / "eval_test.json").read_bytes() == before


def test_a_run_that_recorded_only_the_number_of_ratings(
    run_main: RunMain, run_dir: Path, workplace: Path, tmp_path: Path
) -> None:
    rewrite_config(run_dir, lambda config: config.pop("ratings") and None)
    flags = [f"--checkpoint={run_dir}", f"--cache_dir={workplace / 'cache'}"]
    assert "on other ratings" not in run_main("eval", *flags).out
    (tmp_path / "other.csv").write_text(OTHER_RATINGS[0])
    outcome = run_main("eval", *flags, f"--dataset_path={tmp_path / 'other.csv'}")
    assert "on other ratings" in outcome.out


def test_a_teacher_of_other_ratings_is_told(train: Train, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text(OTHER_RATINGS[0])
    for data, told in ((run_dir.parent / "other.csv", True), (None, False)):
        more = {} if data is None else {"data": data}
        outcome = train(tmp_path / f"taught-{told}", f"--teachers={run_dir}", **more)
        assert outcome.code == 0, outcome.err
        message = f"--teachers {run_dir} was trained on other ratings of these items"
        assert (message in outcome.err) == told
