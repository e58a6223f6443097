"""Names of TensorBoard's charts, which it sorts: the numbers put the first page in order."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.config import SELECTING

# Of a line of training steps in metrics.jsonl.
_STEPS = {
    "loss": "1_quality/loss",
    "records_per_second": "2_speed/records_per_second",
    "step_ms": "2_speed/step_ms",
    "peak_memory_gb": "2_speed/peak_memory_gb",
    "lr": "3_optimizer/lr_encoder",
    "table_lr": "3_optimizer/lr_tables",
    "gradient_norm": "3_optimizer/gradient_norm",
    "clipped_share": "3_optimizer/clipped_share",
    "epoch": "3_optimizer/epoch",
}
SECONDS = "2_speed/validation_seconds"
_PROTOCOLS = {"full": "4_full", "sampled": "5_sampled"}


def of_steps(values: Mapping[str, float]) -> dict[str, float]:
    """Scalars by tag, of the values of training steps."""
    found = {tag: values[name] for name, tag in _STEPS.items() if name in values}
    if "data_wait_ms" in values:
        found["2_speed/data_wait_share"] = values["data_wait_ms"] / max(values["step_ms"], 1e-9)
    return found


def of_metrics(protocols: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scalars by tag, of the metrics of one or both protocols."""
    return {
        tag(protocol, name): value
        for protocol in _PROTOCOLS
        for name, value in protocols.get(protocol, {}).items()
    }


def tag(protocol: str, metric: str) -> str:
    """The chart of a metric; the one that selects the best model is on the first page."""
    if (protocol, metric) == ("full", SELECTING):
        return f"1_quality/full_{SELECTING}"
    return f"{_PROTOCOLS[protocol]}/{metric}"


def layout(metrics: Sequence[str]) -> dict[str, Any]:
    """Of the custom scalars: a chart for each metric with both protocols; both learning rates."""
    first = sorted(metrics, key=lambda name: name != SELECTING)
    both = {name: _chart(*(tag(each, name) for each in _PROTOCOLS)) for name in first}
    rates = _chart(_STEPS["lr"], _STEPS["table_lr"])
    return {"full and sampled": both, "learning rates": {"encoder and tables": rates}}


def _chart(*names: str) -> list[Any]:
    """Curves of one chart; TensorBoard takes regular expressions, and a prefix is a match."""
    return ["Multiline", [f"{re.escape(name)}$" for name in names]]
