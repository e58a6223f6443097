"""Recipes: flags to start from for each data set, as plain data.

    python train.py --dataset_name ml-1m                      uses the recipe "ml-1m"
    python train.py --dataset_name ml-1m --recipe none        the general defaults
    python train.py --dataset_name ml-1m --num_epochs 20      flags given override the recipe
    python train.py --dataset_name ml-1m --teachers a,b       uses the recipe "ml-1m-taught"

``ml-1m``, ``beauty`` and ``ml-100k`` were chosen on validation (``benchmarks/ABLATIONS.md``);
``ml-20m`` was not measured. A recipe's ``embedding_lr`` is Adam's: tables with another optimizer
get the default rate of that one.

``torchrec-example`` sets what TorchRec's ``examples/bert4rec`` does, as far as flags can
(``docs/differences.md``).
"""

from collections.abc import Mapping
from typing import Any

from pipeline.sources.config import DataConfig

_ML_1M: dict[str, Any] = {
    **dict(max_len=200, emb_dim=256, nhead=8, num_layers=2, dropout=0.2),
    **dict(positions="rotary", learned_positions=False),
    **dict(mask_prob=0.3, left_context_share=0.5),
    **dict(train_batch_size=128, lr=1e-3, embedding_lr=1e-2, num_epochs=100, eval_every=10),
}

RECIPES: dict[str, dict[str, Any]] = {
    "synthetic": {
        **dict(max_len=40, emb_dim=64, nhead=2, dropout=0.1, mask_prob=0.2),
        **dict(train_batch_size=64, lr=3e-3, num_epochs=12, eval_every=3),
    },
    "ml-100k": {
        **_ML_1M,
        **dict(max_len=100, emb_dim=128, nhead=4, dropout=0.3),
        **dict(train_batch_size=32, num_epochs=60),
    },
    "ml-1m": _ML_1M,
    # Teachers give probabilities of all items, which reduces overfitting.
    "ml-1m-taught": {**_ML_1M, "dropout": 0.0, "teacher_share": 0.9},
    # Not measured: less dropout and a shorter schedule for twenty times as much data.
    "ml-20m": {**_ML_1M, "dropout": 0.1, "num_epochs": 60},
    "beauty": {
        **_ML_1M,
        **dict(max_len=50, dropout=0.4, mask_prob=0.4, two_stream=True),
        **dict(train_batch_size=512, embedding_lr=1e-3, num_epochs=60),
    },
    "torchrec-example": {
        **dict(max_len=100, window_stride=0.1, mask_prob=0.15, dupe_factor=3),
        **dict(mask_token_share=0.8, random_item_share=0.2, left_context_share=0.0),
        **dict(emb_dim=256, nhead=2, num_layers=2, dropout=0.1, positions="none"),
        **dict(head="linear", logit_temperature=0.0),
        **dict(train_batch_size=128, val_batch_size=128, test_batch_size=128, num_epochs=100),
        **dict(lr=1e-3, lr_schedule="constant", warmup_share=0.0),
        **dict(weight_decay=0.0, beta2=0.999, max_grad_norm=0.0),
        **dict(min_rating=0.0),  # drops negative ratings
    },
}
CHOICES = ("auto", "none", *RECIPES)


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags given on a command line on top of their recipe's; ``recipe`` is its name."""
    name = given.get("recipe", "auto")
    if name == "auto":
        has_path = "dataset_path" in given or "split_path" in given
        own_file = has_path and "dataset_name" not in given
        dataset = given.get("dataset_name", DataConfig.dataset_name)
        name = dataset if dataset in RECIPES and not own_file else "none"
        if given.get("teachers") and f"{name}-taught" in RECIPES:
            name = f"{name}-taught"
    recipe = RECIPES.get(name, {}) if isinstance(name, str) else {}  # RunConfig refuses others
    if not _has_adam(given):
        recipe = {flag: value for flag, value in recipe.items() if flag != "embedding_lr"}
    return {**recipe, **given, "recipe": name}


def _has_adam(given: Mapping[str, Any]) -> bool:
    """Whether the tables have Adam, as ``sharding_plan.table_optimizer`` decides."""
    optimizer = given.get("embedding_optimizer", "auto")
    if optimizer == "auto":
        return given.get("table_precision") != "fp16"
    return optimizer == "adam" or given.get("mode") == "ddp"
