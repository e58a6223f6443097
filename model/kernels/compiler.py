"""Triton, the kernels' compiler; None where it is not installed, as in CPU builds.

Modules define their kernels inside ``if triton is not None``.
"""

from collections.abc import Sequence

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["row_tiles", "tl", "triton"]


def row_tiles(shape: Sequence[int], values: int) -> tuple[int, int, int]:
    """Cut a tensor [count, width] into tiles of whole rows, of ``values`` values.

    Returns:
        Number of tiles, rows of a tile, and its columns: ``width`` rounded up to a power of two.
    """
    count, width = shape
    columns = triton.next_power_of_2(width)
    block = max(1, values // columns)
    return triton.cdiv(count, block), block, columns
