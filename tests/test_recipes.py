"""Recipes are valid flags; the data set chooses one, the command line overrides it."""

from pathlib import Path

import pytest

from model.settings.config import RunConfig
from model.settings.flags import build, current_flags, flags_of, flatten
from model.settings.recipes import RECIPES, with_recipe
from pipeline.errors import UserError
from tests.conftest import TINY, RunMain


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_flags(name: str) -> None:
    assert RECIPES[name].keys() <= flags_of(RunConfig).keys()
    build(RunConfig, with_recipe({"recipe": name}))


def test_flags_given_override_the_recipe() -> None:
    flags = with_recipe({"recipe": "torchrec-example", "emb_dim": 8})
    assert flags["emb_dim"] == 8
    assert flags["dropout"] == RECIPES["torchrec-example"]["dropout"]


@pytest.mark.parametrize("given", [{}, {"dataset_name": "synthetic"}])
def test_generated_data_have_a_recipe(given: dict[str, str]) -> None:
    assert with_recipe(given) == RECIPES["synthetic"] | given | {"recipe": "synthetic"}


@pytest.mark.parametrize(
    "given",
    [
        {"dataset_name": "ml-1m", "dataset_path": "x"},
        {"dataset_path": "mine.csv"},
        {"dataset_name": "synthetic", "dataset_path": "mine.csv"},
        {"dataset_name": "synthetic", "split_path": "mine"},
        {"recipe": "none"},
    ],
)
def test_other_data_are_fitted_once_they_are_prepared(given: dict[str, str]) -> None:
    assert with_recipe(given) == {"recipe": "auto", **given}


@pytest.mark.parametrize("recipe", ["ml-2m", []])  # argparse reads "--recipe=--" as []
def test_an_unknown_recipe_is_refused(recipe: object) -> None:
    with pytest.raises(UserError, match="--recipe must be"):
        build(RunConfig, with_recipe({"recipe": recipe}))


@pytest.mark.parametrize("name", ["ml-1m", "beauty", "ml-20m", "ml-1m-taught", "ml-100k"])
def test_runs_of_removed_recipes_can_be_read(name: str) -> None:
    recorded = flatten(RunConfig()) | {"recipe": name, "emb_dim": 32}
    config = build(RunConfig, current_flags(RunConfig, recorded))
    assert (config.recipe, config.encoder.emb_dim) == ("none", 32)


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
