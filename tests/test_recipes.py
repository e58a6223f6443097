"""Recipes are valid flags; the data set chooses one, the command line overrides it."""

from pathlib import Path
from typing import Any

import pytest

from model.run.config import RunConfig
from model.run.flags import build, flags_of, flatten
from model.run.recipes import RECIPES, with_recipe
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config(name: str) -> None:
    assert RECIPES[name].keys() <= flags_of(RunConfig).keys()
    build(RunConfig, with_recipe({"recipe": name}))


def test_the_data_set_chooses_its_recipe() -> None:
    flags = with_recipe({"dataset_name": "ml-1m", "dataset_path": "x"})
    assert flags["recipe"] == "ml-1m"
    assert flags["emb_dim"] == RECIPES["ml-1m"]["emb_dim"]


def test_without_a_data_set_the_default_one_chooses() -> None:
    assert with_recipe({})["recipe"] == "synthetic"


@pytest.mark.parametrize(
    "given", [{"dataset_name": "random"}, {"dataset_path": "mine.csv"}, {"recipe": "none"}]
)
def test_data_without_a_recipe_gets_the_defaults(given: dict[str, str]) -> None:
    assert with_recipe(given) == {**given, "recipe": "none"}


def test_the_command_line_overrides_the_recipe() -> None:
    flags = with_recipe({"recipe": "beauty", "emb_dim": 8})
    assert flags["emb_dim"] == 8
    assert flags["train_batch_size"] == RECIPES["beauty"]["train_batch_size"]


@pytest.mark.parametrize("recipe", ["ml-2m", []])  # argparse reads "--recipe=--" as []
def test_an_unknown_recipe_is_refused(recipe: object) -> None:
    with pytest.raises(UserError, match="--recipe must be"):
        build(RunConfig, with_recipe({"recipe": recipe}))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"dataset_name": "ml-1m", "teachers": "a,b"}, "ml-1m-taught"),
        ({"dataset_name": "ml-1m", "teachers": ""}, "ml-1m"),
        ({"dataset_name": "ml-1m", "teachers": "a", "recipe": "ml-1m"}, "ml-1m"),
        ({"dataset_name": "beauty", "teachers": "a"}, "beauty"),
        ({"dataset_path": "x.csv", "teachers": "a"}, "none"),
    ],
)
def test_taught_models_have_separate_recipes(given: dict[str, str], name: str) -> None:
    assert with_recipe(given)["recipe"] == name


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({}, 1e-2),
        ({"embedding_optimizer": "adam"}, 1e-2),
        ({"mode": "ddp", "embedding_optimizer": "sgd"}, 1e-2),  # which ddp does not have
        ({"embedding_optimizer": "rowwise_adagrad"}, None),  # its default rate
        ({"table_precision": "fp16"}, None),
        ({"table_precision": "fp16", "embedding_lr": 0.3}, 0.3),
        ({"embedding_optimizer": "sgd", "embedding_lr": 0.3}, 0.3),
    ],
)
def test_a_recipes_rate_of_the_tables_is_adams(given: dict[str, Any], rate: float | None) -> None:
    config = build(RunConfig, with_recipe({"recipe": "ml-1m", **given}))
    assert config.sharding.embedding_lr == rate


# Defaults of examples/bert4rec/bert4rec_main.py in TorchRec, and what its code does without a flag.
EXAMPLE_DEFAULTS = {
    "min_user_count": 5,
    "min_item_count": 0,
    "max_len": 100,
    "mask_prob": 0.15,
    "min_rating": 0.0,
    "num_epochs": 100,
    "lr": 0.001,
    "decay_step": 25,
    "weight_decay": 0.0,
    "gamma": 1.0,
    "train_batch_size": 128,
    "val_batch_size": 128,
    "test_batch_size": 128,
    "emb_dim": 256,
    "nhead": 2,
    "num_layers": 2,
    "random_user_count": 10,
    "random_item_count": 30,
    "random_size": 300,
    "dupe_factor": 3,
    "mode": "dmp",
}
EXAMPLE_CODE = {
    "dropout": 0.1,
    "head": "linear",
    "logit_temperature": 0.0,
    "mask_token_share": 0.8,
    "random_item_share": 0.2,
    "window_stride": 0.1,
    "left_context_share": 0.0,
    "eval_negatives": 100,
}


def test_torchrec_example_has_its_defaults() -> None:
    flat = flatten(build(RunConfig, with_recipe({"recipe": "torchrec-example"})))
    expected = EXAMPLE_DEFAULTS | EXAMPLE_CODE
    assert {name: flat[name] for name in expected} == expected
    ours = flatten(RunConfig())
    differ = {name for name, value in EXAMPLE_DEFAULTS.items() if ours[name] != value}
    assert differ == {
        "min_rating",
        "mask_prob",
        "num_epochs",
        "weight_decay",
        "val_batch_size",
        "test_batch_size",
        "emb_dim",
        "dupe_factor",
    }


def test_torchrec_example_trains(run_main: RunMain, tmp_path: Path, cache_dir: Path) -> None:
    folders = [f"--cache_dir={cache_dir}", f"--run_dir={tmp_path / 'run'}"]
    flags = ["--recipe=torchrec-example", "--max_steps=1"]
    outcome = run_main("train", *TINY, *folders, *flags)
    assert outcome.code == 0, outcome.err
