"""The fast paths on CUDA, in Triton and around FlashAttention; none is needed on a CPU.

    jagged_attention, jagged_kernels      attention on rows as they lie
    residual, residual_kernels            what stands between two products, a pass each way
    half_products, dropout_bits           products in half precision, GELU, dropout
    unit_rows, row_sums                   cosines, and gradients of targets, over a large catalog

Each has a plain counterpart where it is used, which a test compares it with.
"""
