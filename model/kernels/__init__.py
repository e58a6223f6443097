"""Fused kernels for CUDA, in Triton (imported by compiler).

For the encoder: varlen_attention, varlen_kernels, residual, residual_kernels, bf16_linear. For
tables and losses: l2_normalize, segment_sum, log_sum. For both: random_bits. To keep the GPU busy:
graphed_call (CUDA graphs), side_stream (work beside the main stream). On CPU, plain torch computes
the same; tests compare the two. Imports: nothing of ``model``.
"""
