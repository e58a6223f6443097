"""Losses of the masked positions, over the whole catalog or a step's negatives.

    linear_cross_entropy   softmax over a catalog without storing logits, by attention kernels
    sharded_softmax        the same over a catalog spread over the ranks, with teachers
    sampled                sampled softmax and generalised binary cross-entropy

Imports: ``model.kernels``.
"""
