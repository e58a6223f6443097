"""Recipes: flags to start from, as plain data.

    python train.py --dataset_path mine.csv                     flags that fit the data
    python train.py --dataset_path mine.csv --num_epochs 20     flags given override the fit
    python train.py --dataset_path mine.csv --recipe none       the defaults that --help shows
    python train.py                                             the recipe "synthetic"

``auto``, the default, has no flags here: :mod:`model.settings.fitting` chooses them once the data
are prepared. ``synthetic`` ends within a minute on a CPU. ``torchrec-example`` sets what TorchRec's
``examples/bert4rec`` does, as far as flags can (``docs/differences.md``).
"""

import math
from collections.abc import Mapping
from typing import Any

from model.network.config import MOST_HEADS, EncoderConfig
from pipeline.sources.config import DataConfig

RECIPES: dict[str, dict[str, Any]] = {
    "synthetic": {
        **dict(max_len=40, emb_dim=64, nhead=2, dropout=0.1, mask_prob=0.2),
        **dict(train_batch_size=64, lr=3e-3, num_epochs=12, eval_every=3),
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
    """The flags given on a command line on top of their recipe's; ``recipe`` is its name.

    With ``auto`` there is a width that fits the heads given, which a fit may replace.
    """
    name = given.get("recipe", "auto")
    has_path = given.get("dataset_path") or given.get("split_path")
    dataset = given.get("dataset_name", DataConfig.dataset_name)
    if name == "auto" and dataset == "synthetic" and not has_path:
        name = "synthetic"
    recipe = RECIPES.get(name, {}) if isinstance(name, str) else {}  # RunConfig refuses others
    heads = given.get("nhead")  # RunConfig refuses other types and numbers
    if name == "auto" and isinstance(heads, int) and 1 <= heads <= MOST_HEADS:
        recipe = {"emb_dim": width_of_heads(heads, EncoderConfig.emb_dim)}
    return {**recipe, **given, "recipe": name}


def width_of_heads(heads: int, most: int) -> int:
    """The largest width up to ``most``, else the least, of heads of equal and even width."""
    multiple = math.lcm(4, 2 * heads)  # rows are read in groups of four values
    return max(1, most // multiple) * multiple
