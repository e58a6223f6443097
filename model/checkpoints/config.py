"""Flags of the checkpoints."""

from dataclasses import dataclass

from pipeline.config import Config, flag


@dataclass(frozen=True)
class CheckpointConfig(Config):
    """When to save checkpoints and how many to keep."""

    checkpoint_every: float = flag(
        10.0, "minutes between checkpoints; a better evaluation saves one too", above=0
    )
    keep_last: int = flag(2, "newest checkpoints to keep besides the best", at_least=1)
    on_save_error: str = flag(
        "stop",
        "reaction to a checkpoint or log that cannot be written; continue: warn and train on",
        choices=("stop", "continue"),
    )
