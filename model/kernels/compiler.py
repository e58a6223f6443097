"""Triton, the compiler of the kernels; ``None`` where it is not installed, as in CPU builds.

Kernels and their plain counterparts are imported everywhere: kernels are defined only inside
``if triton is not None``, and every launcher has a check that callers, or itself, make first.
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["row_tiles", "tl", "triton"]


def row_tiles(count: int, width: int, values: int) -> tuple[int, int, int]:
    """Cut [count, width] into tiles of whole rows, about ``values`` values each.

    Returns:
        Number of tiles, rows of a tile, and its columns: ``width`` rounded up to a power of two.
    """
    columns = triton.next_power_of_2(width)
    block = max(1, values // columns)
    return triton.cdiv(count, block), block, columns
