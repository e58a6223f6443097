"""Recipes: flags to start from for each data set, as plain data.

    python train.py --dataset_name ml-1m                      takes the recipe "ml-1m" by itself
    python train.py --dataset_name mine --dataset_path x.csv --recipe ml-1m
    python train.py --dataset_name ml-1m --recipe none        the general defaults
    python train.py --dataset_name ml-1m --num_epochs 20      flags given override the recipe
    python train.py --dataset_name ml-1m --teachers a,b       takes the recipe "ml-1m-taught"
    python train.py --dataset_name ml-1m --recipe torchrec-example

``ml-1m``, ``beauty`` and ``ml-100k`` were chosen from the experiments in
``benchmarks/ABLATIONS.md``, on validation only. ``ml-20m`` was not measured: it is ML-1M's with
less dropout and a shorter schedule for twenty times as much data. Learning rates of tables are for
Adam, the default on CUDA.

``torchrec-example`` sets what TorchRec's ``examples/bert4rec`` does, as far as flags can. Eight of
its defaults differ from ours: mask_prob 0.15, dupe_factor 3, emb_dim 256, num_epochs 100,
weight_decay 0, val_batch_size and test_batch_size 128, and dataset_name ml-1m, which no recipe
sets. What the example has no flags for: a linear head with plain dot products, masked positions
that become the mask token (0.8) or a random item (0.2), windows that advance by a tenth of max_len,
learned positions only, no windows with left context, dropout 0.1, Adam with beta2 0.999, a constant
learning rate without warm-up, and no gradient clipping. Not reproduced: ReLU (here GELU), a bias of
the output layer, dropout on attention probabilities, layer norm over all positions of a window at
once, no norm after the last layer, and initial weights.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

_ML_1M: dict[str, Any] = {
    "max_len": 200,
    "emb_dim": 256,
    "nhead": 8,
    "num_layers": 2,
    "positions": "rotary",
    "learned_positions": False,
    "dropout": 0.2,
    "mask_prob": 0.3,
    "left_context_share": 0.5,
    "train_batch_size": 128,
    "lr": 1e-3,
    "embedding_lr": 1e-2,
    "num_epochs": 100,
    "eval_every": 10,
}

RECIPES: dict[str, dict[str, Any]] = {
    "synthetic": {
        "max_len": 40,
        "emb_dim": 64,
        "nhead": 2,
        "dropout": 0.1,
        "mask_prob": 0.2,
        "train_batch_size": 64,
        "lr": 3e-3,
        "num_epochs": 12,
        "eval_every": 3,
    },
    "ml-100k": _ML_1M
    | {
        "max_len": 100,
        "emb_dim": 128,
        "nhead": 4,
        "dropout": 0.3,
        "train_batch_size": 32,
        "num_epochs": 60,
    },
    "ml-1m": _ML_1M,
    # Teachers give probabilities of all items: there is less to overfit to.
    "ml-1m-taught": _ML_1M | {"dropout": 0.0, "teacher_share": 0.9},
    "ml-20m": _ML_1M | {"dropout": 0.1, "num_epochs": 60},
    "beauty": _ML_1M
    | {
        "max_len": 50,
        "dropout": 0.4,
        "mask_prob": 0.4,
        "two_stream": True,
        "train_batch_size": 512,
        "embedding_lr": 1e-3,
        "num_epochs": 60,
    },
    "torchrec-example": {
        "max_len": 100,
        "mask_prob": 0.15,
        "dupe_factor": 3,
        "emb_dim": 256,
        "nhead": 2,
        "num_layers": 2,
        "num_epochs": 100,
        "train_batch_size": 128,
        "lr": 1e-3,
        "weight_decay": 0.0,
        "val_batch_size": 128,
        "test_batch_size": 128,
        "window_stride": 0.1,
        "mask_token_share": 0.8,
        "random_item_share": 0.2,
        "left_context_share": 0.0,
        "head": "linear",
        "logit_temperature": 0.0,
        "positions": "none",
        "dropout": 0.1,
        "beta2": 0.999,
        "max_grad_norm": 0.0,
        "lr_schedule": "constant",
        "warmup_share": 0.0,
    },
}
CHOICES = ("auto", "none", *RECIPES)


def with_recipe(given: Mapping[str, Any], default_dataset: str) -> dict[str, Any]:
    """The flags given on a command line on top of their recipe's.

    Args:
        given: flags by name. Without ``recipe``, or with "auto", the recipe is the one named like
            the data set, if there is one; with ``teachers``, the one named like that and "-taught".
        default_dataset: the data set if ``dataset_name`` is not given.

    Returns:
        All flags that differ from the defaults; ``recipe`` is the name of the recipe taken.

    Raises:
        UserError: there is no such recipe.
    """
    name = given.get("recipe", "auto")
    if name == "auto":
        own_file = "dataset_path" in given and "dataset_name" not in given
        dataset = given.get("dataset_name", default_dataset)
        name = dataset if dataset in RECIPES and not own_file else "none"
        if given.get("teachers") and f"{name}-taught" in RECIPES:
            name = f"{name}-taught"
    if name not in CHOICES:
        raise UserError(f"--recipe must be one of {', '.join(CHOICES)}, not {name!r}")
    return {**RECIPES.get(name, {}), **given, "recipe": name}
