"""The fast paths on CUDA, in Triton and around FlashAttention; none is needed on a CPU.

    varlen_attention, varlen_kernels      attention on rows as they lie
    residual, residual_kernels            what stands between two products, a pass each way
    bf16_linear, dropout_bits             products in half precision, GELU, dropout
    l2_normalize, segment_sum             cosines, and gradients of targets, over a large catalog

Each has a plain counterpart where it is used, which a test compares it with.
"""
