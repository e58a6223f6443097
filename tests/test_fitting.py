"""Flags that fit the data, ``--recipe auto``: by hand, and for any data beside any flags given."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

import train
from model.settings.config import RunConfig
from model.settings.fitting import FITTED, Machine, fitted
from model.settings.flags import build, flags_of, flatten
from model.settings.recipes import with_recipe
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from tests.conftest import RunMain, assert_one_line

GPU = Machine("cuda", 80 << 30, 1)


def store_of(users: int, length: int, items: int = 50) -> SequenceStore:
    """Histories of ``length`` training items and two held out."""
    values = np.resize(np.arange(1, items + 1), users * (length + 2))
    return SequenceStore.from_arrays(values, np.arange(users + 1) * (length + 2), items)


def fit(store: SequenceStore, machine: Machine = GPU, **given: Any) -> dict[str, Any]:
    return flatten(fitted({"dataset_path": "mine.csv", **given}, store, machine)[0])


def chosen(store: SequenceStore, *names: str, machine: Machine = GPU, **given: Any) -> list[Any]:
    flat = fit(store, machine, **given)
    return [flat[name] for name in names]


def test_short_and_long_histories() -> None:
    names = "two_stream", "dropout", "mask_prob", "num_epochs", "eval_every"
    assert chosen(store_of(9, 29), *names) == [True, 0.4, 0.4, 60, 3]
    assert chosen(store_of(9, 30), *names) == [False, 0.2, 0.3, 100, 5]


def test_the_mean_leaves_out_users_without_training_items() -> None:
    items = np.resize(np.arange(1, 51), 62)
    store = SequenceStore.from_arrays(items, [0, 0, 0, 31, 62], 50)  # two have 29, two none
    assert fit(store)["two_stream"]


@pytest.mark.parametrize(
    ("users", "length", "batch"),
    [
        (1, 1, 32),  # the least
        (512, 5, 32),  # 512 windows, root of 1,024
        (1100, 5, 64),  # root of 2,200: 46.9, nearer to 64 by ratio
        (8192, 5, 128),
        (512, 150, 64),  # two windows a user: root of 2,048, 45.3
    ],
)
def test_the_batch_is_near_the_root_of_twice_the_windows(
    users: int, length: int, batch: int
) -> None:
    assert fit(store_of(users, length))["train_batch_size"] == batch


@pytest.mark.parametrize(("users", "batch"), [(1, 8), (1100, 16), (8192, 32)])
def test_a_cpu_has_a_quarter_of_the_batch(users: int, batch: int) -> None:
    store = store_of(users, 5)
    assert fit(store, Machine())["train_batch_size"] == batch
    assert fit(store)["train_batch_size"] == 4 * batch
    assert fit(store, Machine(ranks=2))["train_batch_size"] == batch // 2


def test_ranks_share_the_batch() -> None:
    for ranks, batch in ((1, 128), (2, 64), (3, 42), (500, 1)):
        machine = Machine("cuda", 80 << 30, ranks)
        assert fit(store_of(8192, 5), machine)["train_batch_size"] == batch


def test_passes_fall_with_the_root_of_the_windows() -> None:
    assert fit(store_of(100_000, 1))["num_epochs"] == 60
    assert fit(store_of(400_000, 1))["num_epochs"] == 30


@pytest.mark.parametrize(
    ("users", "given", "patience"),
    [
        (8192, {}, 7),  # 64 steps a pass, 60 passes, an evaluation each 3: 35 % are 21 passes
        (8192, {"eval_every": 1}, 21),
        (8192, {"eval_every": 6}, 4),  # 3.5
        (8192, {"eval_every": 60}, 1),
        (8192, {"num_epochs": 600}, 7),  # an evaluation each 30 passes
        (8192, {"num_epochs": 20}, 19),  # 35 % are 448 steps: 1,200 are 18.75 passes
        (8192, {"train_batch_size": 1024, "eval_every": 1}, 150),  # 8 steps a pass
        (8192, {"dupe_factor": 10, "eval_every": 1}, 21),
        (320, {}, 40),  # 10 steps a pass, an evaluation each 30 steps: more than there are
        (0, {}, 400),  # one step a pass
    ],
)
def test_patience_is_of_steps(users: int, given: dict[str, Any], patience: int) -> None:
    store = store_of(users, 5)
    assert fit(store, **given)["patience"] == patience
    halves = {**given, "train_batch_size": given.get("train_batch_size", 128) // 2}
    if users == 8192:
        assert fit(store, Machine("cuda", 1 << 36, 2), **halves)["patience"] == patience


@pytest.mark.parametrize(
    ("windows", "length"),
    [(6489, 100), (13115, 100), (22381, 6), (30476, 8), (40272, 6)],
)
def test_larger_data_sets_that_the_rule_is_made_from_have_seven(windows: int, length: int) -> None:
    assert chosen(store_of(windows, length), "patience", machine=Machine()) == [7]
    assert chosen(store_of(windows, length), "patience") == [7]
    assert chosen(store_of(1519, 100), "patience") == [10]  # the smallest, 24 steps a pass


def test_the_catalog_and_the_device_decide_width_and_loss() -> None:
    names = "emb_dim", "nhead", "loss"
    small, large = store_of(9, 5, 20_000), store_of(9, 5, 20_000_000)
    assert chosen(small, *names) == [256, 8, "softmax"]
    assert chosen(small, *names, machine=Machine()) == [64, 2, "sampled_softmax"]
    # A third of 80 GiB holds 12 x 20M bytes 119 times, that of two such GPUs 238 times.
    assert chosen(large, *names) == [64, 2, "sampled_softmax"]
    two = Machine("cuda", 80 << 30, 2)
    assert chosen(large, *names, machine=two) == [128, 4, "sampled_softmax"]
    assert chosen(large, *names, machine=two, mode="ddp") == [64, 2, "sampled_softmax"]


def test_flags_given_stay_and_the_others_fit_them() -> None:
    store = store_of(100, 200)
    flat = fit(store, emb_dim=96, lr=0.01, num_epochs=7, max_len=10)
    assert [flat[name] for name in ("emb_dim", "nhead", "lr", "num_epochs")] == [96, 2, 0.01, 7]
    assert flat["embedding_lr"] == pytest.approx(0.03)
    assert flat["eval_every"] == 1
    assert flat["train_batch_size"] == 64  # 20 windows a user
    assert not fit(store_of(9, 5), left_context_share=0.0)["two_stream"]
    assert fit(store, train_on_validation=True)["patience"] is None
    assert fit(store, embedding_optimizer="rowwise_adagrad")["embedding_lr"] is None


@pytest.mark.parametrize(
    ("heads", "on_gpu", "on_cpu"),
    [
        (1, 256, 64),
        (3, 252, 60),
        (6, 252, 60),
        (12, 240, 48),  # 252 would make heads of odd width
        (64, 256, 128),  # two values a head are the least
        (100, 200, 200),
        (16_383, 65_532, 65_532),
    ],
)
def test_the_width_fits_the_heads_given(heads: int, on_gpu: int, on_cpu: int) -> None:
    store, flags = store_of(9, 5), {"dataset_path": "mine.csv", "nhead": heads}
    build(RunConfig, with_recipe(flags))  # the check before the data are read
    assert chosen(store, "emb_dim", "nhead", nhead=heads) == [on_gpu, heads]
    assert chosen(store, "emb_dim", machine=Machine(), nhead=heads) == [on_cpu]


def test_teachers_lower_dropout_and_need_the_exact_softmax() -> None:
    long, short = store_of(9, 200), store_of(9, 5, 200_000)
    names = "dropout", "teacher_share", "loss"
    assert chosen(long, *names, teachers="a") == [0.0, 0.9, "softmax"]
    assert chosen(short, *names, teachers="a") == [0.1, 0.9, "softmax"]


ANY = {
    "max_len": st.integers(1, 300),
    "left_context_share": st.sampled_from([0.0, 0.5, 1.0]),
    "mask_prob": st.floats(0.1, 0.9),
    "emb_dim": st.sampled_from([4, 8, 64, 100, 256]),
    "loss": st.sampled_from(["softmax", "gbce"]),
    "embedding_optimizer": st.sampled_from(["adam", "rowwise_adagrad"]),
    "num_epochs": st.integers(1, 1000),
    "train_batch_size": st.integers(1, 5000),
    "train_on_validation": st.booleans(),
}


@drawn(
    st.lists(st.integers(0, 400), max_size=20),
    st.integers(1, 10**6),
    st.sampled_from([Machine(), GPU, Machine("cuda", 1 << 30, 7)]),
    st.fixed_dictionaries({}, optional=ANY),
)
def test_any_data_and_flags_give_a_config_that_repeats(
    lengths: list[int], items: int, machine: Machine, given: dict[str, Any]
) -> None:
    offsets = np.cumsum([0, *lengths])
    values = np.resize(np.arange(1, min(items, 1000) + 1), offsets[-1])
    store = SequenceStore.from_arrays(values, offsets, items)
    given["dataset_path"] = "mine.csv"
    config, lines = fitted(given, store, machine)
    flat = flatten(config)
    assert {name: flat[name] for name in given} == given
    differing = {name for name, value in flatten(RunConfig()).items() if flat[name] != value}
    assert differing <= {*FITTED, *given}
    for name in set(FITTED) & differing - set(given):
        assert any(f"--{name} " in line for line in lines)
    again, nothing = fitted({name: flat[name] for name in FITTED} | given, store, Machine())
    assert again == config
    assert nothing == []


def _values(entry: dataclasses.Field) -> tuple[Any, ...]:
    """The choices of a flag, or the least and the largest number that it may have."""
    about, is_whole = entry.metadata, "int" in str(entry.type)
    if about["choices"] or entry.type is bool:
        return about["choices"] or (False, True)
    if entry.type in (str, tuple[str, ...]):
        return ()
    bounds, most = about["bounds"], min(about["limit"], 2**62 if is_whole else 1e300)
    little = 1 if is_whole else 1e-9
    least = bounds.get("at least", bounds.get("above", -little) + little)
    return least, min(bounds.get("at most", bounds.get("below", most + little) - little), most)


ALONE = [(name, value) for name, entry in flags_of(RunConfig).items() for value in _values(entry)]


@pytest.mark.parametrize("length", [5, 40], ids=["short", "long"])
def test_a_flag_that_is_right_alone_fits_the_others(length: int) -> None:
    """Else its error, which comes once the data are prepared, names a flag that nobody gave."""
    store, fitting = store_of(9, length), 0
    for name, value in ALONE:
        flags = {"dataset_path": "mine.csv"} | {name: value}
        try:
            build(RunConfig, with_recipe(flags))
        except UserError:  # before the data are read
            continue
        for machine in (GPU, Machine()):
            assert flatten(fitted(flags, store, machine)[0])[name] == value
        fitting += 1
    assert fitting > 150


def test_times_that_could_be_read_are_told() -> None:
    store = store_of(9, 5)
    told = "the data have times, which --use_times reads (not chosen by itself)"
    given = {"dataset_path": "mine.csv"}
    for unit, flags, expected in (
        ("s", given, True),
        ("s", given | {"use_times": False}, False),
        ("", given, False),
    ):
        store.counts = {"times": {"unit": unit}}
        assert (told in fitted(flags, store, GPU)[1]) == expected


def test_other_recipes_are_not_fitted() -> None:
    assert fitted({"recipe": "none"}, store_of(9, 5), GPU) == (
        build(RunConfig, {"recipe": "none"}),
        [],
    )


def test_fitted_are_flags() -> None:
    assert set(FITTED) <= flags_of(RunConfig).keys()


SMALL = "--recipe=auto", "--dataset_name=random", "--emb_dim=16", "--num_layers=1"


def test_train_py_says_what_it_chose_and_goes_on_with_it(
    run_main: RunMain, run_dir: Path, cache_dir: Path
) -> None:
    flags = [*SMALL, f"--run_dir={run_dir}", f"--cache_dir={cache_dir}"]
    outcome = run_main("train", *flags, "--num_epochs=1")
    assert outcome.code == 0, outcome.err
    fit_to_size = "--train_batch_size 8 --eval_every 1 --patience 600"
    assert f"10 windows, 1 rank, cpu: {fit_to_size}" in outcome.out
    recorded = json.loads((run_dir / "config.json").read_text())["flags"]
    assert (recorded["recipe"], recorded["train_batch_size"]) == ("auto", 8)
    # Flags that were fitted once are kept: another rule may come with another version.
    recorded |= {"train_batch_size": 20, "dropout": 0.3}
    assert recorded.pop("table_init") == "cooccurrence"  # a version without this flag
    config = json.loads((run_dir / "config.json").read_text()) | {"flags": recorded}
    (run_dir / "config.json").write_text(json.dumps(config))
    outcome = run_main("train", *flags, "--num_epochs=2", "--resume=auto")
    assert outcome.code == 0, outcome.err
    assert "flags that fit" not in outcome.out
    resumed = json.loads((run_dir / "config.json").read_text())["flags"]
    assert resumed == recorded | {"num_epochs": 2, "resume": "auto", "table_init": "normal"}
    outcome = run_main("train", *flags, "--mask_prob=0.1", "--resume=auto")
    assert_one_line(outcome, "train", "was trained with --mask_prob 0.4, not 0.1")
    for other, error in (
        ("--train_on_validation", "--patience needs validation items"),
        ("--positions=none", "--positions none needs --learned_positions true"),
        ("--left_context_share=0", "--two_stream needs windows with left context"),
    ):  # beside flags of the run that nobody has given
        outcome = run_main("train", *flags, other, "--resume=auto")
        message = f"--resume auto: the flags of {run_dir} and those given do not fit each other"
        assert_one_line(outcome, "train", f"{message} ({error}")


@pytest.mark.usefixtures("one_rank")
def test_train_returns_the_metrics_and_calls_back(run_dir: Path, cache_dir: Path) -> None:
    seen: list[tuple[int, float]] = []
    given: dict[str, Any] = {"dataset_name": "random", "emb_dim": 16}
    given |= {"run_dir": str(run_dir), "cache_dir": str(cache_dir), "num_epochs": 2}
    results = train.train(
        given, lambda epoch, result: seen.append((epoch, result["full"]["NDCG@10"]))
    )
    assert [epoch for epoch, _ in seen] == [1, 2]
    assert results["validation"]["full"]["NDCG@10"] == max(value for _, value in seen)
    assert results["test"] == json.loads((run_dir / "eval_test.json").read_text())
