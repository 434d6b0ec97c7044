"""From the log-probs of a batch of pairs to losses, slopes and metrics: one program, one launch.

What is computed once per pair is float64, as it is cheap at these sizes and the log-probs' sums
cancel; what is iterated (`margin_solver`) is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_prefopt.kernels.loss_form import (
    LARGEST,
    PAIR_NUMBERS,
    Margin,
    Moments,
    PairForm,
    mirror_rate,
)
from fused_prefopt.kernels.loss_parts import (
    count_nonfinite,
    draw_margins,
    enqueue_margins,
    is_finite,
    link_losses,
    load_double,
    mean_of,
    moments,
    spread_of,
    tokens_of,
    values_of,
)
from fused_prefopt.kernels.margin_solver import mirror_descent, warps_for

ADAPTIVE: tl.constexpr = tl.constexpr(int(Margin.ADAPTIVE))
DYNAMIC: tl.constexpr = tl.constexpr(int(Margin.DYNAMIC))
NOT_STANDARDISED: tl.constexpr = tl.constexpr(int(Moments.NONE))


@triton.jit
def _pair_loss_kernel(
    policy,  # (2P,)
    lengths,  # (2P,)
    reference,  # (2P,)
    sequence_kl,  # (2P,)
    average,  # (2,) or ()
    weight,  # ()
    pool,  # (n,)
    order,  # (places,)
    queue,  # (places,)
    nonfinite,  # ()
    losses,  # (P,)
    loss,  # ()
    slopes,  # (2, P)
    details,  # (3, P)
    metrics,  # (11,)
    pairs,
    pooled,
    places,
    draws,
    start,
    steps,
    beta: tl.float64,
    gamma: tl.float64,
    alpha: tl.float64,
    momentum: tl.float64,
    link_a: tl.float64,
    link_b: tl.float64,
    budget,
    pull,
    push,
    REWARD_REFERENCE: tl.constexpr,
    REWARD_PER_TOKEN: tl.constexpr,
    MARGIN: tl.constexpr,
    GAP_POLICY: tl.constexpr,
    GAP_REFERENCE: tl.constexpr,
    GAP_PER_TOKEN: tl.constexpr,
    GAP_KL: tl.constexpr,
    MOMENTS: tl.constexpr,
    PASSES_GRADIENT: tl.constexpr,
    LINK: tl.constexpr,
    UPDATE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_POOL: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
    QUEUE_BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    inside = lane < pairs
    other = lane + pairs  # the rejected sequence of the pair
    chosen = beta * values_of(
        policy, reference, lengths, lane, inside, 1, REWARD_REFERENCE, REWARD_PER_TOKEN
    )
    rejected = beta * values_of(
        policy, reference, lengths, other, inside, 1, REWARD_REFERENCE, REWARD_PER_TOKEN
    )
    margins = chosen - rejected

    target_gain = 0.0  # d γ / d gap
    targets = tl.zeros_like(margins) + gamma
    if MARGIN == ADAPTIVE:
        if GAP_KL:
            gap = load_double(sequence_kl, other, inside) - load_double(sequence_kl, lane, inside)
        else:
            gap = values_of(
                policy, reference, lengths, lane, inside, GAP_POLICY, GAP_REFERENCE, GAP_PER_TOKEN
            )
            gap -= values_of(
                policy, reference, lengths, other, inside, GAP_POLICY, GAP_REFERENCE, GAP_PER_TOKEN
            )
        if MOMENTS == NOT_STANDARDISED:
            target_gain = alpha
        else:
            mean, std = moments(gap, inside, average, weight, nonfinite, momentum, MOMENTS, UPDATE)
            gap -= mean
            target_gain = alpha / std
        targets += target_gain * gap
    if MARGIN == DYNAMIC:
        finite = inside & is_finite(margins)
        candidates = margins
        if HAS_ORDER:
            pooled = pairs + draw_margins(queue, order, pool + pairs, places, draws, QUEUE_BLOCK)
        if HAS_POOL:
            # The pairs keep their lanes; the rest of the pool, before and behind them, follows.
            at = lane - pairs
            at += tl.where(at >= start, pairs, 0)
            rest = tl.load(pool + at, mask=(lane >= pairs) & (lane < pooled), other=0.0)
            candidates = tl.where(inside, margins, rest)
        taking_part = (lane < pooled) & is_finite(candidates)
        targets = mirror_descent(candidates, taking_part, budget, pull, push, steps)
        if UPDATE:
            enqueue_margins(queue, margins, finite, places, QUEUE_BLOCK)
            count_nonfinite(nonfinite, pairs - tl.sum(finite.to(tl.int64), 0))

    pair_losses, gains, target_gains = link_losses(margins, targets, link_a, link_b, LINK)
    chosen_slopes = gains * (beta / tokens_of(lengths, lane, inside, REWARD_PER_TOKEN))
    rejected_slopes = -gains * (beta / tokens_of(lengths, other, inside, REWARD_PER_TOKEN))
    if PASSES_GRADIENT:
        target_gains *= target_gain * GAP_POLICY
        chosen_slopes += target_gains / tokens_of(lengths, lane, inside, GAP_PER_TOKEN)
        rejected_slopes -= target_gains / tokens_of(lengths, other, inside, GAP_PER_TOKEN)
    tl.store(losses + lane, pair_losses, mask=inside)
    tl.store(loss, mean_of(pair_losses, inside, pairs))
    tl.store(slopes + lane, chosen_slopes, mask=inside)
    tl.store(slopes + other, rejected_slopes, mask=inside)
    tl.store(details + lane, chosen, mask=inside)
    tl.store(details + other, rejected, mask=inside)
    tl.store(details + other + pairs, targets, mask=inside)

    target_mean = mean_of(targets, inside, pairs)
    overflow = inside & (is_finite(pair_losses.to(tl.float32)) == 0)
    tl.store(metrics, mean_of(chosen, inside, pairs))
    tl.store(metrics + 1, mean_of(rejected, inside, pairs))
    tl.store(metrics + 2, mean_of((chosen > rejected).to(tl.float64), inside, pairs))
    tl.store(metrics + 3, mean_of(margins, inside, pairs))
    chosen_logps = load_double(policy, lane, inside)
    rejected_logps = load_double(policy, other, inside)
    tl.store(metrics + 4, mean_of(chosen_logps, inside, pairs))
    tl.store(metrics + 5, mean_of(rejected_logps, inside, pairs))
    tl.store(metrics + 6, target_mean)
    tl.store(metrics + 7, spread_of(targets, target_mean, inside, pairs))
    tl.store(metrics + 8, tl.sum(overflow.to(tl.float32), 0))
    if HAS_REFERENCE:
        chosen_ratio = chosen_logps - load_double(reference, lane, inside)
        rejected_ratio = rejected_logps - load_double(reference, other, inside)
        tl.store(metrics + 9, mean_of(chosen_ratio, inside, pairs))
        tl.store(metrics + 10, mean_of(rejected_ratio, inside, pairs))


def pair_loss(
    policy: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    sequence_kl: Tensor | None,
    average: Tensor | None,
    weight: Tensor | None,
    pool: Tensor | None,
    order: Tensor | None,
    queue: Tensor | None,
    nonfinite: Tensor | None,
    form: PairForm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of a batch of pairs and all that follows from them.

    Args:
        policy: (2P,) fp32 summed log-probs, chosen half first; so are all fields. P >= 1.
        lengths: (2P,) integers.
        reference: (2P,) or None; used in the metrics also where the loss has no use for it.
        sequence_kl: (2P,) or None.
        average: (2,) float64 running averages, updated in place; or () a given mean.
        weight: () float64 their weight, updated in place; or the given standard deviation.
        pool: (n,) float64 given margins of all ranks and of the past.
        order: (places,) int64 random permutation by which past margins are drawn from `queue`.
        queue: (places,) float64 margins of the past, updated in place.
        nonfinite: () int64 values skipped so far, updated in place.
        form: what is computed.

    Returns:
        fp32: losses (P,); their mean (); slopes (2, P), d losses / d policy; details (3, P), the
        rewards of the chosen, of the rejected, and the target margins;
        `losses.metrics.PAIR_METRICS` (11,), the last two defined with a reference only.

    Raises:
        ValueError: more pairs or pooled margins than one program takes.
    """
    pairs = policy.shape[0] // 2
    places = 0 if queue is None else queue.shape[0]
    pooled = pairs + form.draws if pool is None else pool.shape[0]
    if max(pairs, pooled) > LARGEST:
        raise ValueError(f"policy: got a pool of {pooled} pairs, wanted at most {LARGEST}")
    if order is not None:
        pool = torch.empty(pooled, dtype=torch.float64, device=policy.device)
    losses, loss = policy.new_empty(pairs), policy.new_empty(())
    slopes, details = policy.new_empty(2, pairs), policy.new_empty(3, pairs)
    metrics = policy.new_empty(PAIR_NUMBERS)
    rate = mirror_rate(form.tau)
    block = max(32, triton.next_power_of_2(pooled))
    _pair_loss_kernel[(1,)](
        policy,
        lengths,
        reference,
        sequence_kl,
        average,
        weight,
        pool,
        order,
        queue,
        nonfinite,
        losses,
        loss,
        slopes,
        details,
        metrics,
        pairs,
        pooled,
        places,
        form.draws,
        form.start,
        form.steps,
        form.beta,
        form.gamma,
        form.alpha,
        form.momentum,
        form.link_a,
        form.link_b,
        form.gamma,
        rate * form.tau,
        rate * form.gamma,
        REWARD_REFERENCE=form.reward_reference,
        REWARD_PER_TOKEN=form.reward_per_token,
        MARGIN=form.margin,
        GAP_POLICY=form.gap_policy,
        GAP_REFERENCE=form.gap_reference,
        GAP_PER_TOKEN=form.gap_per_token,
        GAP_KL=form.gap_kl,
        MOMENTS=form.moments,
        PASSES_GRADIENT=form.passes_gradient,
        LINK=form.link,
        UPDATE=form.update,
        HAS_REFERENCE=reference is not None,
        HAS_POOL=pool is not None,
        HAS_ORDER=order is not None,
        BLOCK=block,
        QUEUE_BLOCK=min(2048, max(32, triton.next_power_of_2(places))),
        num_warps=warps_for(block),
        # Fused multiply-adds would leave rounding where E[x²] − E[x]² cancels to zero.
        enable_fp_fusion=False,
    )
    return losses, loss, slopes, details, metrics
