"""Recipes are valid flags; the data set chooses one, the command line overrides it."""

import pytest

from model.run.config import RunConfig
from model.run.flags import build, flags_of
from model.run.recipes import RECIPES, with_recipe
from pipeline.errors import UserError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_config(name: str) -> None:
    assert RECIPES[name].keys() <= flags_of(RunConfig).keys()
    build(RunConfig, with_recipe({"recipe": name}, "synthetic"))


def test_the_data_set_chooses_its_recipe() -> None:
    flags = with_recipe({"dataset_name": "ml-1m", "dataset_path": "x"}, "synthetic")
    assert flags["recipe"] == "ml-1m"
    assert flags["emb_dim"] == RECIPES["ml-1m"]["emb_dim"]


def test_without_a_data_set_the_default_one_chooses() -> None:
    assert with_recipe({}, "synthetic")["recipe"] == "synthetic"


@pytest.mark.parametrize(
    "given", [{"dataset_name": "random"}, {"dataset_path": "mine.csv"}, {"recipe": "none"}]
)
def test_data_without_a_recipe_gets_the_defaults(given: dict[str, str]) -> None:
    assert with_recipe(given, "synthetic") == {**given, "recipe": "none"}


def test_the_command_line_overrides_the_recipe() -> None:
    flags = with_recipe({"recipe": "beauty", "emb_dim": 8}, "synthetic")
    assert flags["emb_dim"] == 8
    assert flags["train_batch_size"] == RECIPES["beauty"]["train_batch_size"]


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="--recipe must be one of auto, none, synthetic"):
        with_recipe({"recipe": "ml-2m"}, "synthetic")


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
def test_taught_models_have_recipes_of_their_own(given: dict[str, str], name: str) -> None:
    assert with_recipe(given, "synthetic")["recipe"] == name
