"""Two models on the same users: their metrics, and whether the difference is more than chance.

The test is a paired randomisation test (Fisher; for rankings: Smucker, Allan and Carterette, 2007).
If both models were alike, each user's difference could as well have the other sign. p is the share
of random signs that make the sum of differences at least as large as it is, in either direction.

Shapes: U users, M metrics, J distinct sizes of a user's difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.evaluation.ranked_users import MODEL, PROTOCOLS, RankedUsers
from model.evaluation.report import format_table
from pipeline.evaluation.config import SELECTING

# Random signs; p is not smaller than 1 / (DRAWS + 1).
DRAWS = 10_000
# Sums of more different sizes are normal but for a trace: they are not drawn.
_MOST_SIZES = 1000
REAL = 0.05


@dataclass(frozen=True)
class Difference:
    """A metric of two models on the same users."""

    one: float
    other: float
    half_width: float  # of the 95 % interval of other - one, normal
    p: float


def compare(
    one: RankedUsers, other: RankedUsers, cutoffs: Sequence[int], seed: int
) -> dict[str, dict[str, Difference]]:
    """Differences by protocol and metric."""
    assert np.array_equal(one.users, other.users) and np.array_equal(one.places, other.places)
    generator, found = np.random.default_rng(seed), {}
    for at, protocol in enumerate(PROTOCOLS):
        values = [each.values(each.ranks[MODEL][at], cutoffs) for each in (one, other)]
        found[protocol] = {
            name: Difference(
                float(of_one.mean()),
                float(of_other.mean()),
                1.96 * float((of_other - of_one).std()) / math.sqrt(len(of_one)),
                p_value(of_other - of_one, generator),
            )
            for name, of_one, of_other in zip(one.names(cutoffs), *values, strict=True)
        }
    return found


def p_value(differences: np.ndarray, generator: np.random.Generator) -> float:
    """Two-sided p of the paired randomisation test; float64 [U].

    Users with a difference of one size are drawn at once: how many of them keep their sign is
    binomial.
    """
    found = abs(differences.sum())
    sizes, counts = np.unique(np.abs(differences).round(12), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    if len(sizes) == 0:
        return 1.0
    if len(sizes) > _MOST_SIZES:  # the signs' sum has this variance
        return math.erfc(found / math.sqrt(2 * float(counts @ sizes**2)))
    signs = 2 * generator.binomial(counts, 0.5, size=(DRAWS, len(sizes))) - counts
    as_large = np.abs(signs @ sizes) >= found * (1 - 1e-9)
    return (1 + int(as_large.sum())) / (1 + DRAWS)


def format_comparison(
    names: Sequence[str],
    found: dict[str, dict[str, Difference]],
    split: str,
    users: int,
    noted: Sequence[Sequence[str]] = (),
) -> str:
    """A table of two models, named by ``names``, and whether the second differs from the first.

    Args:
        noted: of each model, in what this evaluation differs from that of its training.
    """
    lines = [f"{split}, {users:,} users of both"]
    for name, notes in zip(names, noted, strict=False):
        if notes:
            lines.append(f"{name}: {', '.join(notes)}")
    for protocol, metrics in found.items():
        rows = [
            (f"{protocol}, {names[0]}", {name: each.one for name, each in metrics.items()}),
            (f"{protocol}, {names[1]}", {name: each.other for name, each in metrics.items()}),
            ("  difference", {name: each.other - each.one for name, each in metrics.items()}),
            ("  ± (95 %)", {name: each.half_width for name, each in metrics.items()}),
            ("  p", {name: each.p for name, each in metrics.items()}),
        ]
        lines.append(format_table(rows))
    chosen = found["full"][SELECTING]
    change = chosen.other - chosen.one
    verdict = "is not shown to differ from"
    if chosen.p < REAL:
        verdict = "is better than" if change > 0 else "is worse than"
    lines.append(
        f"{names[1]} {verdict} {names[0]} by full {SELECTING}: {change:+.4f} ± "
        f"{chosen.half_width:.4f}, p {chosen.p:.4f} (paired randomisation test of users)"
    )
    return "\n".join(lines)
