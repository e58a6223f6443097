"""The fast paths on CUDA, in Triton and around FlashAttention; a CPU needs none of them.

Each is tested against a plain counterpart, which runs on a CPU:

    file                                 counterpart
    varlen_attention, varlen_kernels     model.network.attention, padded rows
    residual, residual_kernels           nn.LayerNorm, dropout and sums in model.network.encoder
    bf16_linear                          F.linear, F.gelu
    dropout_bits                         none: tests check the kept share, mean and independence
    l2_normalize, segment_sum            plain torch in the same file
    log_sum                              model.losses.sampled.log_sums

    compiler                             imports Triton, if it is installed
    side_stream                          runs work beside the main stream of a captured step

Imports: nothing of ``model``.
"""
