"""Detached scalars worth logging, under TRL's names."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.losses.protocol import halves
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.types import LogpBatch

# The names of what is logged: TRL's where TRL logs it.
REWARDS_CHOSEN, REWARDS_REJECTED = "rewards/chosen", "rewards/rejected"
REWARDS_ACCURACIES, REWARDS_MARGINS = "rewards/accuracies", "rewards/margins"
REWARDS_MEAN, REWARDS_STD = "rewards/mean", "rewards/std"
LOGPS_CHOSEN, LOGPS_REJECTED, LOGPS_MEAN = "logps/chosen", "logps/rejected", "logps/mean"
KL_CHOSEN, KL_REJECTED, KL_MEAN = "kl/chosen", "kl/rejected", "kl/mean"
SEQUENCE_KL_CHOSEN, SEQUENCE_KL_REJECTED = "sequence_kl/chosen", "sequence_kl/rejected"
SEQUENCE_KL_MEAN = "sequence_kl/mean"
MARGIN_MEAN, MARGIN_STD = "margin/mean", "margin/std"
SCORES_MEAN, SCORES_STD = "reward_model/mean", "reward_model/std"
LOG_Z_MEAN = "log_z/mean"
# What BCO's rewards are measured from: of all pairs so far.
REWARD_SHIFT = "delta"
LOGITS_CHOSEN, LOGITS_REJECTED = "logits/chosen", "logits/rejected"
NONFINITE = "nonfinite"
WEIGHTS_MEAN = "weights/mean"
# Pairs of a list that are compared.
LIST_PAIRS = "lists/pairs"
# Of a sum, followed by a term's name: its own loss, before its weight.
TERM_LOSS = "loss/"

# Metrics in the order of the kernels' numbers.
PAIR_METRICS = (
    REWARDS_CHOSEN,
    REWARDS_REJECTED,
    REWARDS_ACCURACIES,
    REWARDS_MARGINS,
    LOGPS_CHOSEN,
    LOGPS_REJECTED,
    MARGIN_MEAN,
    MARGIN_STD,
    NONFINITE,
    KL_CHOSEN,
    KL_REJECTED,
)
POINT_METRICS = (
    REWARDS_MEAN,
    REWARDS_STD,
    LOGPS_MEAN,
    NONFINITE,
    KL_MEAN,
    SCORES_MEAN,
    SCORES_STD,
    LOG_Z_MEAN,
)


def mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of a vector, ``Σ w v / n``; 0, with a gradient of none, for an empty one.

    Args:
        values: (n,).
        weights: (n,), or None for 1 each.
    """
    weighted = values if weights is None else weights * values
    return weighted.sum() / max(1, values.shape[0])


def average(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of (..., n) over the last dimension, ``Σ w v / Σ w``; 0 without any value or weight.

    Args:
        values: (..., n).
        weights: (n,), or None for 1 each.
    """
    if weights is None:
        return values.sum(-1) / max(1, values.shape[-1])
    total = weights.sum()
    return (weights * values).sum(-1) / total.where(total > 0, 1)


def spread(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Population standard deviation of a vector, weighted; 0 for one value or none."""
    if weights is not None:
        return average((values - average(values, weights)).square(), weights).sqrt()
    return values.std(correction=0) if values.shape[0] else mean(values)


def is_unweighted(name: str) -> bool:
    """Whether a metric is of all pairs or completions alike, or has their weights in it already."""
    alike = (NONFINITE, WEIGHTS_MEAN, REWARD_SHIFT, "kl", "aux_loss")
    return name in alike or name.startswith(TERM_LOSS)


def of_weights(batch: LogpBatch) -> dict[str, Tensor]:
    """`weights/mean`, where a batch has weights."""
    if batch.weights is None:
        return {}
    return {WEIGHTS_MEAN: mean(batch.weights.to(batch.policy.dtype))}


def nonfinite(losses: Tensor) -> Tensor:
    """Number of NaN or infinite losses, in their dtype."""
    return losses.isfinite().logical_not().sum().to(losses.dtype)


@torch.no_grad()
def pairwise_metrics(
    batch: LogpBatch, rewards: Tensor, target_margins: Tensor, losses: Tensor
) -> dict[str, Tensor]:
    """Metrics of a batch of pairs: those of TRL's DPO trainer, plus KL and margin.

    Args:
        batch: the pairs.
        rewards: (S,) implicit rewards.
        target_margins: (P,) γ_i.
        losses: (P,) losses.

    Returns:
        Means over the pairs, weighted where the batch has weights: `rewards/chosen`,
        `rewards/rejected`, `rewards/accuracies` (share with the chosen reward greater),
        `rewards/margins`, `logps/chosen`, `logps/rejected` (sums, nats); with a reference
        `kl/chosen`, `kl/rejected` (policy − reference, nats); `margin/mean`, `margin/std` of γ_i;
        `nonfinite`, the number of non-finite losses; and `weights/mean` where there are weights.
    """
    weights = weights_of(batch, pairwise=True)
    chosen, rejected = halves(rewards)
    chosen_logps, rejected_logps = halves(batch.policy)
    averaged = {
        REWARDS_CHOSEN: chosen,
        REWARDS_REJECTED: rejected,
        REWARDS_ACCURACIES: (chosen > rejected).to(rewards.dtype),
        REWARDS_MARGINS: chosen - rejected,
        LOGPS_CHOSEN: chosen_logps,
        LOGPS_REJECTED: rejected_logps,
        MARGIN_MEAN: target_margins,
    }
    if batch.reference is not None:
        averaged[KL_CHOSEN], averaged[KL_REJECTED] = halves(batch.policy - batch.reference)
    means = average(torch.stack(list(averaged.values())), weights)
    metrics = dict(zip(averaged, means.unbind(), strict=True))
    deviation = {MARGIN_STD: spread(target_margins, weights)}
    return metrics | deviation | {NONFINITE: nonfinite(losses)} | of_weights(batch)


@torch.no_grad()
def divergence_metrics(batch: LogpBatch, *, pairwise: bool) -> dict[str, Tensor]:
    """Exact KL(reference || policy) of a completion, where the batch has `sequence_kl`.

    Args:
        batch: pairs or completions.
        pairwise: which of them.

    Returns:
        `sequence_kl/chosen` and `sequence_kl/rejected`, or `sequence_kl/mean`: means, in nats.
    """
    if batch.sequence_kl is None:
        return {}
    weights = weights_of(batch, pairwise=pairwise)
    if not pairwise:
        return {SEQUENCE_KL_MEAN: average(batch.sequence_kl, weights)}
    chosen, rejected = halves(batch.sequence_kl)
    return {
        SEQUENCE_KL_CHOSEN: average(chosen, weights),
        SEQUENCE_KL_REJECTED: average(rejected, weights),
    }


@torch.no_grad()
def feedback_metrics(
    batch: LogpBatch, rewards: Tensor, desirable: Tensor, losses: Tensor
) -> dict[str, Tensor]:
    """Metrics of judged completions: those of TRL's KTO trainer, and `pointwise_metrics`.

    Args:
        batch: the completions.
        rewards: (S,) implicit rewards.
        desirable: (S,) bool.
        losses: (S,) losses.

    Returns:
        Means over the desirable completions, `rewards/chosen` and `logps/chosen`, over the others,
        `rewards/rejected` and `logps/rejected` (sums, nats), each 0 without any, and
        `rewards/margins`, the difference of the rewards; and those of `pointwise_metrics`.
    """
    metrics = pointwise_metrics(batch, rewards, losses)
    weights = weights_of(batch, pairwise=False)
    for reward, logp, members in (
        (REWARDS_CHOSEN, LOGPS_CHOSEN, desirable),
        (REWARDS_REJECTED, LOGPS_REJECTED, desirable.logical_not()),
    ):
        if weights is not None:
            own = weights.where(members, 0.0)
            metrics[reward] = average(rewards.where(members, 0.0), own)
            metrics[logp] = average(batch.policy.where(members, 0.0), own)
            continue
        count = members.sum().clamp(min=1)
        metrics[reward] = rewards.where(members, 0.0).sum() / count
        metrics[logp] = batch.policy.where(members, 0.0).sum() / count
    metrics[REWARDS_MARGINS] = metrics[REWARDS_CHOSEN] - metrics[REWARDS_REJECTED]
    return metrics


@torch.no_grad()
def pointwise_metrics(batch: LogpBatch, rewards: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """Metrics of single completions.

    Args:
        batch: the completions.
        rewards: (S,) implicit rewards.
        losses: (S,) losses.

    Returns:
        `rewards/mean`, `rewards/std`, `logps/mean` (sums, nats); with a reference `kl/mean`
        (policy − reference, nats); with given scores `reward_model/mean`, `reward_model/std`;
        `nonfinite`, the number of non-finite losses; and `weights/mean` where there are weights,
        by which the means are then weighted.
    """
    weights = weights_of(batch, pairwise=False)
    metrics = {
        REWARDS_MEAN: average(rewards, weights),
        REWARDS_STD: spread(rewards, weights),
        LOGPS_MEAN: average(batch.policy, weights),
        NONFINITE: nonfinite(losses),
    }
    if batch.reference is not None:
        metrics[KL_MEAN] = average(batch.policy - batch.reference, weights)
    if batch.rewards is not None:
        scores = batch.rewards.to(batch.policy.dtype)
        metrics[SCORES_MEAN] = average(scores, weights)
        metrics[SCORES_STD] = spread(scores, weights)
    return metrics | of_weights(batch)
