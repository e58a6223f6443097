"""Flags for TensorBoard's HParams page.

Only the start and the end of a session are written, not the list of all columns: TensorBoard takes
such a list from one run alone, and without it makes the columns of the flags and scalars of all.
"""

from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from model.board.markdown import shortened


def add_flags(events: SummaryWriter, flags: Mapping[str, Any]) -> None:
    """A row with these flags and the scalars of the same writer."""
    values = {
        name: value if isinstance(value, (bool, int, float)) else shortened(str(value))
        for name, value in flags.items()
    }
    _, start, end = hparams(values, {})
    writer: Any = events.file_writer  # its type is that before it is opened
    for summary in (start, end):
        writer.add_summary(summary)
