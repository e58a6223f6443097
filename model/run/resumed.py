"""What is otherwise in a resumed run than in the training of its checkpoint.

The learning rates' schedule covers all epochs: ``--resume auto`` with more epochs raises the rate
at once. Other flags may change what is learnt, such as ``--teachers``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from model.checkpoints.position import Position
from model.run.config_file import PLACES
from model.run.execution import table_lr
from model.settings.config import RunConfig
from model.settings.flags import build, current_flags, flatten
from pipeline.errors import UserError

_RATES = (
    *("num_epochs", "warmup_share", "lr_schedule", "decay_step", "gamma"),
    *("lr", "embedding_lr", "embedding_optimizer"),
)
_COMPARED = 100  # moments of the rest of training
# Flags that change no weight.
_GROUPS_WITHOUT_EFFECT = ("checkpoint", "profiling", "board")
_WITHOUT_EFFECT = (
    *("run_dir", "resume", "export_root", "with_users", "acceleration"),
    *("val_batch_size", "test_batch_size", "table_init"),
    *("recipe", "prefetch_batches", *PLACES),
    *("log_every", "max_steps", "rank_timeout", "metrics_at"),
)


def recorded_config(manifest: Mapping[str, Any]) -> RunConfig | None:
    """The config that a checkpoint was trained with; None if another version wrote it otherwise."""
    try:
        return build(RunConfig, current_flags(RunConfig, manifest["recorded"]["flags"]))
    except (UserError, LookupError, TypeError, AttributeError):
        return None


def changed_flags(manifest: Mapping[str, Any], config: RunConfig, position: Position) -> str | None:
    """One line about flags that change what is learnt from ``position`` on; None without any.

    Those of the learning rates are :func:`changed_rates`'.
    """
    before = recorded_config(manifest)
    if before is None or position.epoch >= config.training.num_epochs:
        return None
    groups = (getattr(RunConfig(), name) for name in _GROUPS_WITHOUT_EFFECT)
    untold = {*_RATES, *_WITHOUT_EFFECT}.union(*map(flatten, groups))
    changed = _changed(before, config, flatten(config).keys() - untold)
    return f"--resume auto: training goes on otherwise than before: {changed}" if changed else None


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
    before, epochs = recorded_config(manifest), config.training.num_epochs - position.epoch
    if before is None or epochs <= 0:
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
    why = _changed(before, config, _RATES)
    return (
        f"--resume auto: the learning rate {when} is {new:.3g}, not {old:.3g} "
        f"(tables: {new_tables:.3g}, not {old_tables:.3g}): {why}"
    )


def _changed(before: RunConfig, config: RunConfig, names: Iterable[str]) -> str:
    was, now = flatten(before), flatten(config)
    differing = [name for name in now if name in {*names} and now[name] != was[name]]
    shown = (
        (name, *(f[name] if f[name] != "" else "none" for f in (now, was))) for name in differing
    )
    return ", ".join(f"--{name} is {new}, not {old}" for name, new, old in shown)
