"""AdamW with clipped gradients, over all parameters as one tensor: two kernels.

    gradients [N] -> squares, summed by blocks [P]
    squares, gradients, moments, weights -> clipped gradients, moments, weights

torch's fused AdamW gives a program 65,536 values of one parameter, and clipping takes a dozen
kernels more: 90 us for the 800,000 values of a small encoder, of which passes over memory are 8.

Shapes: N values, P blocks.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

from dataclasses import dataclass

from torch import Tensor

from model.kernels.compiler import launch, tl, triton

# Values of a block, and the most blocks, whose sums each program adds up.
_BLOCK, _MOST_BLOCKS = 1024, 8192


@dataclass(frozen=True)
class Moments:
    """AdamW's tensors, on CUDA: float32 [N], contiguous, unless noted."""

    weights: Tensor
    gradients: Tensor
    first: Tensor
    second: Tensor
    rate: Tensor  # float32 scalar, the learning rate
    corrections: Tensor  # float64 [2], 1 - beta ** step of both moments


def update(
    given: Moments,
    norms: Tensor,
    limit: float,
    decayed: int,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Clip the gradients to the norm ``limit`` and step, in place (arXiv 1711.05101).

    Args:
        norms: float32 [2], to which the gradients' norm and [norm > limit] are added.
        limit: of the L2 norm of all gradients as one vector; infinity: none.
        decayed: number of the values that decay; they come first.
        decay: decoupled, times the learning rate.
        eps: added to the root of the second moment.
    """
    count = len(given.gradients)
    block = max(_BLOCK, triton.next_power_of_2(triton.cdiv(count, _MOST_BLOCKS)))
    blocks = triton.cdiv(count, block)
    squares = given.gradients.new_empty(blocks)
    launch(_squares, (blocks,), given.gradients, squares, count, block)
    tensors = given.weights, given.gradients, given.first, given.second
    known = squares, given.rate, given.corrections, norms
    sizes = blocks, count, decayed
    factors = limit, decay, *betas, eps
    launch(
        _adamw, (blocks,), tensors, known, *sizes, *factors, block, triton.next_power_of_2(blocks)
    )


if triton is not None:

    @triton.jit
    def _squares(values, squares, count, block: tl.constexpr) -> None:
        at = tl.program_id(0) * block + tl.arange(0, block)
        value = tl.load(values + at, mask=at < count, other=0.0)
        tl.store(squares + tl.program_id(0), tl.sum(value * value, axis=0))

    @triton.jit
    def _adamw(
        tensors,
        known,
        blocks,
        count,
        decayed,
        limit,
        decay,
        beta1,
        beta2,
        eps,
        block: tl.constexpr,
        columns: tl.constexpr,
    ) -> None:
        weights, gradients, first, second = tensors
        squares, rate, corrections, norms = known
        column = tl.arange(0, columns)
        norm = tl.sqrt(tl.sum(tl.load(squares + column, mask=column < blocks, other=0.0), axis=0))
        if tl.program_id(0) == 0:
            tl.store(norms, tl.load(norms) + norm)
            tl.store(norms + 1, tl.load(norms + 1) + (norm > limit).to(tl.float32))
        at = tl.program_id(0) * block + tl.arange(0, block)
        inside = at < count
        # So that the factor of gradients of zero is finite, as in ``clip_grad_norm_``.
        factor = tl.minimum(limit / (norm + 1e-6), 1.0)
        gradient = tl.load(gradients + at, mask=inside, other=0.0) * factor
        tl.store(gradients + at, gradient, mask=inside)
        mean = tl.load(first + at, mask=inside, other=0.0)
        mean += (gradient - mean) * (1 - beta1)
        tl.store(first + at, mean, mask=inside)
        square = beta2 * tl.load(second + at, mask=inside, other=0.0)
        square += (1 - beta2) * gradient * gradient
        tl.store(second + at, square, mask=inside)
        lr = tl.load(rate)
        bias, square_bias = tl.load(corrections), tl.load(corrections + 1)
        weight = tl.load(weights + at, mask=inside, other=0.0)
        weight -= tl.where(at < decayed, lr * decay, 0.0) * weight
        deviation = tl.sqrt(square) / tl.sqrt(square_bias.to(tl.float32)) + eps
        weight -= lr / bias.to(tl.float32) * mean / deviation
        tl.store(weights + at, weight, mask=inside)
