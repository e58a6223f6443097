"""Flags that are given and that nothing reads: they change nothing, and one warning names them."""

import json
import re
from pathlib import Path

import pytest

from model.settings.config import RunConfig
from model.settings.flags import build, flags_of
from model.settings.unread import _NEEDS, without_effect
from tests.conftest import TINY, RunMain

RATINGS = "user,item\n" + "".join(
    f"{user},{(3 * user + step) % 50}\n" for user in range(40) for step in range(8)
)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, None),
        ({"mode": "dmp", "sharding": "table_wise"}, None),
        ({"mode": "ddp"}, None),
        ({"mode": "ddp", "sharding": "row_wise"}, "--sharding (only with --mode dmp)"),
        (
            {"mode": "ddp", "sharding": "row_wise", "embedding_optimizer": "sgd"},
            "--sharding --embedding_optimizer (only with --mode dmp)",
        ),
        ({"mode": "ddp", "embedding_lr": 0.1}, None),  # ddp reads it
        (
            {"loss": "softmax", "train_negatives": 9},
            "--train_negatives (only with --loss sampled_soft",
        ),
        ({"loss": "gbce", "train_negatives": 9, "gbce_calibration": 0.5}, None),
        (
            {"loss": "sampled_softmax", "gbce_calibration": 0.5},
            "--gbce_calibration (only with --loss g",
        ),
        ({"item_dropout": 0.1}, "--item_dropout (only with --item_attributes)"),
        ({"teachers": "a", "teacher_share": 0.1}, None),
        ({"teacher_share": 0.1}, "--teacher_share (only with --teachers)"),
        ({"decay_step": 3, "gamma": 0.5}, None),
        ({"num_epochs": 25, "gamma": 0.5}, "--gamma (only with --num_epochs above --decay_step)"),
        ({"num_epochs": 26, "gamma": 0.5}, None),
        ({"decay_step": 3}, "--decay_step (only with --gamma below 1)"),
        ({"dataset_name": "random", "random_skew": 1.0, "data_seed": 3}, None),
        ({"random_skew": 1.0, "data_seed": 3}, "--random_skew (only with --dataset_name random)"),
        ({"dataset_path": "a.csv", "data_seed": 3}, "--data_seed (only with generated data)"),
        (
            {"dataset_path": "a.csv", "synthetic_user_count": 60},
            "--synthetic_user_count (only with --dataset_name synthetic)",
        ),
        (
            {"train_on_validation": True, "eval_every": 2},
            "--eval_every (only with --train_on_validation false)",
        ),
        (
            {"train_on_validation": True, "val_batch_size": 9},
            "--val_batch_size (only with --train_on_validation false)",
        ),
        ({"val_batch_size": 9, "eval_every": 2}, None),
        ({"two_stream": True, "left_context_share": 0.9, "mask_prob": 0.2}, None),
        (
            {"two_stream": True, "left_context_share": 1.0, "mask_prob": 0.2},
            "--mask_prob (only with --two_stream false or --left_context_share below 1)",
        ),
        (
            {"mask_last_share": 1.0, "mask_prob": 0.2},
            "--mask_prob (only with --mask_last_share below",
        ),
    ],
)
def test_flags_without_effect_are_named(given: dict, line: str | None) -> None:
    found = without_effect(given, build(RunConfig, given))
    if line is None:
        assert found is None
    else:
        assert found is not None and found.startswith(f"flags without effect: {line}")
        assert found.count("(") == 1


def test_each_line_of_the_table_is_about_flags() -> None:
    for each in _NEEDS:
        assert flags_of(RunConfig).keys() >= {*each.names}


@pytest.mark.parametrize(
    ("where", "unread"),
    [
        (
            "--mode=ddp --train_on_validation --two_stream --left_context_share=1",
            "--sharding=column_wise --embedding_optimizer=sgd --eval_every=2 --mask_prob=0.9 "
            "--val_batch_size=7 --mask_last_share=0.5 --mask_token_share=0.1 "
            "--random_item_share=0.9 --train_negatives=3 --gbce_calibration=0 "
            "--attribute_separator=, --item_dropout=0.9 "
            "--teacher_share=0.1 --decay_step=1 --random_user_count=7 --random_item_count=8 "
            "--random_size=9 --random_skew=1",
        ),
        (
            "--dataset_path=ratings.csv --mask_last_share=1 --loss=sampled_softmax",
            "--mask_prob=0.9 --mask_token_share=0.1 --random_item_share=0.9 --data_seed=3 "
            "--synthetic_user_count=70 --synthetic_item_count=90 --gbce_calibration=0",
        ),
    ],
    ids=["ddp", "file"],
)
def test_they_change_nothing(
    run_main: RunMain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_dir: Path,
    where: str,
    unread: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ratings.csv").write_text(RATINGS)
    both = []
    for flags in ("", unread):
        run_dir = f"run{len(both)}"
        places = f"--cache_dir={cache_dir}", f"--run_dir={run_dir}"
        outcome = run_main("train", *TINY, *places, *where.split(), *flags.split())
        assert outcome.code == 0, outcome.err
        lines = [
            json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()
        ]
        both.append([line["loss"] for line in lines if line["event"] == "train"])
    assert both[0] == both[1] and len(both[0]) > 2
    (warning,) = (line for line in outcome.err.splitlines() if "without effect" in line)
    assert warning.startswith("warning: flags without effect: --")
    named = {flag.split("=")[0] for flag in unread.split()}
    assert {*re.findall(r"--\w+(?= --| \()", warning)} == named
