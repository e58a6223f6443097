"""Lower bound of a training step's time on a GPU: the larger of its bytes over the memory's speed
and its operations over the tensor cores' speed. Launches and the host's work come on top.

    least_ms(row, items)        of an H100: 3 TB/s, 790 TFLOP/s of bfloat16

Counted for B windows of L items, M masked positions, C scored items, width D and N layers::

    operations   3 x (N B L (24 D^2 + 4 L D) + 2 M C D)       forward, and twice that backward
    bytes        40 D for each row of the table that the step touches: weight and Adam's two moments
                 read and written, gradient written and read, weight read by lookup and scoring

Windows count as full, and the last layer as computed at all positions. For short histories, or with
kernels that skip work, the bound is too high.
"""

from benchmarks.rows import Row

BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 3e12, 790e12


def least_ms(row: Row, items: int) -> float:
    """Milliseconds of a training step of ``row`` with a table of ``items`` rows."""
    flags = dict(flag.removeprefix("--").split("=") for flag in row.flags)
    length, width = int(flags["max_len"]), int(flags["emb_dim"])
    layers = int(flags.get("num_layers", 2))
    positions = row.batch * length
    masked = positions * float(flags.get("mask_prob", 0.3))
    scored, touched = float(items), float(items)
    if "train_negatives" in flags:
        negatives = int(flags["train_negatives"])
        scored, touched = negatives, min(items, positions + masked + negatives)
    encoder = layers * positions * (24 * width**2 + 4 * length * width)
    operations = 3 * (encoder + 2 * masked * scored * width)
    return max(1e3 * operations / OPERATIONS_PER_SECOND, table_ms(touched, width))


def table_ms(touched: float, width: int) -> float:
    """Milliseconds of a step's passes over ``touched`` rows of the table."""
    return 1e3 * 40 * width * touched / BYTES_PER_SECOND
