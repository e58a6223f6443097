"""Whether a resumed run has other learning rates than its checkpoint was trained for.

The schedule covers all epochs: ``--resume auto`` with more epochs raises the rate at once.
"""

from collections.abc import Mapping
from typing import Any

from model.checkpoints.position import Position
from model.run.execution import table_lr
from model.settings.config import RunConfig
from model.settings.flags import build, current_flags, flatten
from pipeline.errors import UserError

_FLAGS = (
    *("num_epochs", "warmup_share", "lr_schedule", "decay_step", "gamma"),
    *("lr", "embedding_lr", "embedding_optimizer"),
)
_COMPARED = 100  # moments of the rest of training


def changed_rates(
    manifest: Mapping[str, Any],
    config: RunConfig,
    optimizer: str,
    position: Position,
    epoch_samples: int,
) -> str | None:
    """One line about the learning rates from ``position`` on; None if they stay the same.

    Args:
        manifest: of the checkpoint, with the flags that it was trained with.
        optimizer: of the tables.
        epoch_samples: of all ranks.
    """
    try:
        before = build(RunConfig, current_flags(RunConfig, manifest["recorded"]["flags"]))
    except (UserError, LookupError, TypeError, AttributeError):
        return None  # another version wrote it: flags of unknown meaning
    epochs = config.training.num_epochs - position.epoch
    if epochs <= 0:
        return None

    def rates(flags: RunConfig, epoch: int, sample: int) -> list[float]:
        total = flags.training.num_epochs * epoch_samples
        progress = min(1.0, (epoch * epoch_samples + sample) / total)
        factor = flags.training.lr_factor(progress, epoch)
        return [factor * peak for peak in (flags.optimizer.lr, table_lr(flags, optimizer))]

    later = range(position.epoch + 1, config.training.num_epochs, -(-epochs // _COMPARED))
    moments = [(position.epoch, position.sample), *((epoch, 0) for epoch in later)]
    differing = (each for each in moments if rates(before, *each) != rates(config, *each))
    first = next(differing, None)
    if first is None:
        return None
    when = f"after step {position.step}" if first == moments[0] else f"in epoch {first[0] + 1}"
    (old, old_tables), (new, new_tables) = (rates(each, *first) for each in (before, config))
    was, now = flatten(before), flatten(config)
    why = ", ".join(
        f"--{name} is {now[name]}, not {was[name]}" for name in _FLAGS if now[name] != was[name]
    )
    return (
        f"--resume auto: the learning rate {when} is {new:.3g}, not {old:.3g} "
        f"(tables: {new_tables:.3g}, not {old_tables:.3g}): {why}"
    )
