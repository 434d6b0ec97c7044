"""DRO's loss of scored completions, its slopes and metrics: one program, one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.loss_form import LARGEST, LARGEST_GROUPED, POINT_NUMBERS
from fused_prefopt.kernels.loss_parts import is_finite, load_double, mean_of, spread_of
from fused_prefopt.kernels.margin_solver import warps_for


@triton.jit
def _group_sizes(groups, lane, inside, size, CHUNK: tl.constexpr):
    """Number of sequences in each one's group; by comparing all with all, in any order."""
    mine = tl.load(groups + lane, mask=inside, other=0)
    sizes = tl.zeros_like(lane)
    for begin in range(0, size, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        theirs = tl.load(groups + at, mask=at < size, other=0)
        same = (mine[:, None] == theirs[None, :]) & (at < size)[None, :]
        sizes += tl.sum(same.to(tl.int32), 1)
    return sizes


@triton.jit
def _direct_reward_kernel(
    policy,  # (S,)
    reference,  # (S,)
    scores,  # (S,)
    prompt,  # (S,)
    prompt_reference,  # (S,)
    groups,  # (S,)
    losses,  # (S,)
    loss,  # ()
    slopes,  # (S,)
    weights,  # (S,)
    details,  # (S,)
    metrics,  # (8,)
    size,
    beta: tl.float64,
    log_z0: tl.float64,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    logps = load_double(policy, lane, inside)
    ratio = logps - load_double(reference, lane, inside)
    score = load_double(scores, lane, inside)
    prompt_ratio = load_double(prompt, lane, inside) - load_double(prompt_reference, lane, inside)
    log_z = prompt_ratio + log_z0
    rewards = beta * ratio
    residuals = score - rewards - beta * log_z
    squares = residuals * residuals
    if HAS_GROUPS:
        sizes = _group_sizes(groups, lane, inside, size, CHUNK).to(tl.float64)
        shares = tl.where(inside, 1 / tl.maximum(sizes, 1.0), 0.0)
        # A group's shares add up to 1: their sum is the number of groups.
        shares = shares / tl.sum(shares, 0)
        tl.store(weights + lane, shares, mask=inside)
        tl.store(loss, tl.sum(tl.where(inside, squares * shares, 0.0), 0))
    else:
        tl.store(loss, mean_of(squares, inside, size))
    tl.store(losses + lane, squares, mask=inside)
    tl.store(slopes + lane, -2 * beta * residuals, mask=inside)
    tl.store(details + lane, rewards, mask=inside)

    overflow = inside & (is_finite(squares.to(tl.float32)) == 0)
    reward_mean = mean_of(rewards, inside, size)
    score_mean = mean_of(score, inside, size)
    tl.store(metrics, reward_mean)
    tl.store(metrics + 1, spread_of(rewards, reward_mean, inside, size))
    tl.store(metrics + 2, mean_of(logps, inside, size))
    tl.store(metrics + 3, tl.sum(overflow.to(tl.float32), 0))
    tl.store(metrics + 4, mean_of(ratio, inside, size))
    tl.store(metrics + 5, score_mean)
    tl.store(metrics + 6, spread_of(score, score_mean, inside, size))
    tl.store(metrics + 7, mean_of(log_z, inside, size))


def direct_reward(
    policy: Tensor,
    reference: Tensor,
    scores: Tensor,
    prompt: Tensor,
    prompt_reference: Tensor,
    groups: Tensor | None,
    beta: float,
    log_z0: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DRO's losses of a batch of completions and all that follows from them.

    Args:
        policy: (S,) fp32 summed log-probs, S >= 1.
        reference: (S,) the same under the reference model.
        scores: (S,) explicit rewards.
        prompt: (S,) summed log-probs of the prompts.
        prompt_reference: (S,) the same under the reference model.
        groups: (S,) integers, equal for the completions of one prompt, or None.
        beta: β.
        log_z0: log Z of the first token, in nats.

    Returns:
        fp32: losses (S,); their mean () over groups; slopes (1, S), d losses / d policy; weights
        (S,) of the losses in the mean, or (0,) where they are all 1/S; rewards (1, S);
        `losses.metrics.POINT_METRICS` (8,).

    Raises:
        ValueError: more sequences than one program takes.

    Source: DRO, eq. 6–8, Algorithm 1.
    """
    size = policy.shape[0]
    largest = LARGEST if groups is None else LARGEST_GROUPED
    if size > largest:
        raise ValueError(f"policy: got {size} sequences, wanted at most {largest}")
    losses, loss = policy.new_empty(size), policy.new_empty(())
    slopes, details = policy.new_empty(1, size), policy.new_empty(1, size)
    weights = policy.new_empty(0 if groups is None else size)
    metrics = policy.new_empty(POINT_NUMBERS)
    block = max(32, triton.next_power_of_2(size))
    _direct_reward_kernel[(1,)](
        policy,
        reference,
        scores,
        prompt,
        prompt_reference,
        groups,
        losses,
        loss,
        slopes,
        weights,
        details,
        metrics,
        size,
        beta,
        log_z0,
        HAS_GROUPS=groups is not None,
        BLOCK=block,
        CHUNK=16,
        num_warps=warps_for(block),
        enable_fp_fusion=False,
    )
    return losses, loss, slopes, weights, details, metrics
