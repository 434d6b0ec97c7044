"""γ-PO's mirror descent: a budget of n·γ₀ shared over n reward margins, in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.loss_form import LARGEST, contracts, mirror_rate
from fused_prefopt.kernels.loss_parts import is_finite


@triton.jit
def mirror_descent(
    margins,  # (BLOCK,) float64
    taking_part,  # (BLOCK,)
    gamma,  # γ₀
    pull,  # η τ
    push,  # η γ₀
    steps,
):
    """(BLOCK,) float64 target margins; γ₀ where a margin takes no part.

    The paper's update in ``t = log(n p)``, where it needs no largest exponent:
    ``t ← t − η (τ log(e^t + n 1e-10) + γ₀ σ(γ₀ e^t − m))``, then minus log mean e^t, which cancels
    the constant part of its gradient. Only for settings that `loss_form.contracts` accepts: there
    e^t stays far from overflow, and float32 errors die out.
    """
    margins = tl.where(taking_part, margins, 0.0).to(tl.float32)
    count = tl.maximum(tl.sum(taking_part.to(tl.float32), 0), 1.0)
    floor = count * 1e-10
    t = tl.zeros_like(margins)
    share = t + 1.0  # n p = e^t
    for _ in range(steps):
        pressure = 1 / (1 + tl.exp(margins - gamma * share))
        # log(e^t + floor), of which the series' next term is far below float32's digits of t.
        t = (1 - pull) * t - pull * (floor / share) - push * pressure
        share = tl.exp(t)
        mean = tl.maximum(tl.sum(tl.where(taking_part, share, 0.0), 0) / count, 1e-30)
        share = share / mean
        t -= tl.log(mean)
    # The last normalisation in float64: the target margins then add up to the budget.
    share64 = tl.where(taking_part, tl.exp(t.to(tl.float64)), 0.0)
    mean64 = tl.maximum(tl.sum(share64, 0) / count, 1e-30)
    return gamma * tl.where(taking_part, share64 / mean64, 1.0)


@triton.jit
def _mirror_margins_kernel(
    margins,  # (n,)
    targets,  # (n,)
    size,
    gamma,
    pull,
    push,
    steps,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    inside = lanes < size
    values = tl.load(margins + lanes, mask=inside, other=0.0).to(tl.float64)
    found = mirror_descent(values, inside & is_finite(values), gamma, pull, push, steps)
    tl.store(targets + lanes, found, mask=inside)


def mirror_margins(margins: Tensor, gamma: float, tau: float, steps: int = 20) -> Tensor:
    """Target margins after a fixed number of mirror-descent steps from the uniform distribution.

    Args:
        margins: (n,) reward margins, n <= 4096; the non-finite take no part and get γ₀.
        gamma: γ₀ >= 0, the mean target margin.
        tau: τ > 0, pull towards equal margins.
        steps: number of updates.

    Returns:
        (n,) float64 target margins.

    Raises:
        ValueError: there are too many margins, or the descent would not converge.

    Source: γ-PO, eq. 22–24 and Appendix C.
    """
    size = margins.shape[0]
    if size > LARGEST:
        raise ValueError(f"margins: got {size}, wanted at most {LARGEST}")
    if not contracts(gamma, tau):
        raise ValueError(f"gamma, tau: got {gamma}, {tau}, with which the descent may oscillate")
    targets = torch.empty(size, dtype=torch.float64, device=margins.device)
    if size:
        rate = mirror_rate(tau)
        block = max(32, triton.next_power_of_2(size))
        _mirror_margins_kernel[(1,)](
            margins.contiguous(),
            targets,
            size,
            gamma,
            rate * tau,
            rate * gamma,
            steps,
            BLOCK=block,
            num_warps=warps_for(block),
            enable_fp_fusion=False,
        )
    return targets


def warps_for(lanes: int) -> int:
    """Warps of a program over so many lanes: two lanes a thread as far as there are warps."""
    return min(16, max(1, lanes // 64))
