"""A model of a training step on many GPUs over hosts, for both exchanges of the item table.

    python benchmarks/scaling.py

Counts the bytes that cross a GPU's links in a step and divides them by the links' rates: inside a
host NVLink, between hosts a network. Nothing is overlapped. One GPU's step, and the steps measured
on 2 and 4, are those of docs/distributed.md (H200, commits 0ea69c1 and b1f41a6).

R rows requested by a rank, U different ones, W ranks, D width.
"""

import argparse
from dataclasses import dataclass
from math import exp

HOST = 8  # GPUs
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU in one direction
REACHED = 0.8  # share of these rates
COLLECTIVE = 20e-6  # seconds to start one inside a host; between hosts twice this
DIFFERENT = 150e-6  # seconds to find the different rows of a batch and to add gradients by slot
PADDED = 1.12  # slots of a different row (benchmarks/slots.py)
ENCODER = 1.7e6  # bytes of the encoder's gradients
WIDTH, ID = 128, 8


@dataclass(frozen=True)
class Load:
    """A row of benchmarks/rows.py: items, rows requested by a rank, one GPU's step in seconds."""

    name: str
    items: int
    requested: int
    step: float
    measured: dict[tuple[str, int], float]


LOADS = (
    Load(
        "sampled 1024",
        500_000,
        24_064,
        1.592e-3,
        {
            ("gather", 2): 1.774e-3,
            ("gather", 4): 1.935e-3,
            ("all-to-all", 2): 1.895e-3,
            ("all-to-all", 4): 1.931e-3,
        },
    ),
    Load("sampled 4096", 500_000, 82_944, 4.538e-3, {("all-to-all", 4): 5.112e-3}),
    Load(
        "10 million items 4096",
        10_000_000,
        82_944,
        4.555e-3,
        {("all-to-all", 2): 4.980e-3, ("all-to-all", 4): 5.106e-3},
    ),
)


def received(load: Load, exchange: str, ranks: int) -> float:
    """Rows that a rank receives from others in a step."""
    if exchange == "gather":
        return load.requested * (ranks - 1)
    different = load.items * (1 - exp(-load.requested / load.items))
    return PADDED * different * (ranks - 1) / ranks


def step_seconds(load: Load, exchange: str, ranks: int) -> float:
    """A step on ``ranks`` GPUs: one GPU's, and what ranks exchange one after another."""
    rows = received(load, exchange, ranks)
    away = max(0, ranks - HOST) / (ranks - 1)  # share of the other ranks on other hosts
    if exchange == "gather" and away:
        away = 1.0  # a ring is as fast as its slowest link
    row_bytes = rows * (ID + 2 * 4 * WIDTH)  # ids, rows, gradients
    dense_bytes = 2 * ENCODER * (ranks - 1) / ranks
    rates = [(away, NETWORK), (1 - away, NVLINK)]
    seconds = max(row_bytes * share / (REACHED * rate) for share, rate in rates)
    seconds += dense_bytes / (REACHED * (NETWORK if away else NVLINK))
    seconds += 4 * COLLECTIVE * (2 if away else 1)
    return load.step + seconds + (DIFFERENT if exchange == "all-to-all" else 0)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print(
        "| | exchange | GPUs | MB received by a GPU | step ms, modelled | measured | efficiency |"
    )
    print("|---|---|---|---|---|---|---|")
    for load in LOADS:
        for exchange in ("gather", "all-to-all"):
            for ranks in (2, 4, 8, 16, 64, 256):
                rows, step = received(load, exchange, ranks), step_seconds(load, exchange, ranks)
                found = load.measured.get((exchange, ranks))
                cells = load.name, exchange, ranks, f"{rows * 8 * WIDTH / 1e6:,.0f}"
                timed = f"{1e3 * step:.2f}", f"{1e3 * found:.2f}" if found else "-"
                print("|", " | ".join(map(str, (*cells, *timed, f"{load.step / step:.0%}"))), "|")


if __name__ == "__main__":
    main()
