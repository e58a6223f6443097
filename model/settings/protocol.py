"""How a run is evaluated: what ``--seen auto`` stands for, and what results record of it."""

from dataclasses import replace
from typing import Any

from model.settings.config import RunConfig
from pipeline.evaluation.repeats import keeps_seen
from pipeline.preparation.store import SequenceStore


def with_seen(config: RunConfig, store: SequenceStore) -> tuple[RunConfig, str]:
    """The config with ``--seen`` drop or keep, and a line that says which and why.

    Raises:
        UserError: ``--metrics_at`` has a length beyond the catalog.
    """
    config.holdout.check_catalog(store.num_items)
    choice = config.holdout.seen
    kept, share = keeps_seen(choice, store)
    seen = "keep" if kept else "drop"
    decided = replace(config, holdout=replace(config.holdout, seen=seen))
    return decided, (
        f"seen items: {seen} (--seen {choice}; {share:.1%} of validation targets are in their "
        "user's history)"
    )


def protocol_of(config: RunConfig, store: SequenceStore) -> dict[str, Any]:
    """What a result was measured by, JSON-able."""
    kept, share = keeps_seen(config.holdout.seen, store)
    return {
        "split": store.parts.by,
        **{name: store.split[name] for name in ("points", "until") if name in store.split},
        "targets": config.holdout.targets,
        "seen": "keep" if kept else "drop",
        "repeated_validation_targets": share,
        "negatives": config.holdout.eval_negatives,
        "negatives_seed": config.holdout.eval_negatives_seed,
        "metrics_at": list(config.holdout.cutoffs),
        **({"times": True} if config.encoder.use_times else {}),
    }
