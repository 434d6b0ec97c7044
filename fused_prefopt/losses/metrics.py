"""Detached scalars worth logging, under TRL's names."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.losses.protocol import halves
from fused_prefopt.types import LogpBatch


def mean(values: Tensor) -> Tensor:
    """Mean of a vector; 0, with a gradient of none, for an empty one."""
    return values.sum() / max(1, values.shape[0])


def spread(values: Tensor) -> Tensor:
    """Population standard deviation of a vector; 0 for one value or none."""
    return values.std(correction=0) if values.shape[0] else mean(values)


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
        Means over the pairs: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies` (share
        with the chosen reward greater), `rewards/margins`, `logps/chosen`, `logps/rejected`
        (sums, nats); with a reference `kl/chosen`, `kl/rejected` (policy − reference, nats);
        `margin/mean`, `margin/std` of γ_i; `nonfinite`, the number of non-finite losses.
    """
    chosen, rejected = halves(rewards)
    chosen_logps, rejected_logps = halves(batch.policy)
    averaged = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(rewards.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "margin/mean": target_margins,
    }
    if batch.reference is not None:
        averaged["kl/chosen"], averaged["kl/rejected"] = halves(batch.policy - batch.reference)
    means = torch.stack(list(averaged.values())).sum(1) / max(1, chosen.shape[0])
    metrics = dict(zip(averaged, means.unbind(), strict=True))
    return metrics | {"margin/std": spread(target_margins), "nonfinite": nonfinite(losses)}


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
    if not pairwise:
        return {"sequence_kl/mean": mean(batch.sequence_kl)}
    chosen, rejected = halves(batch.sequence_kl)
    return {"sequence_kl/chosen": mean(chosen), "sequence_kl/rejected": mean(rejected)}


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
    for name, members in (("chosen", desirable), ("rejected", desirable.logical_not())):
        count = members.sum().clamp(min=1)
        metrics[f"rewards/{name}"] = rewards.where(members, 0.0).sum() / count
        metrics[f"logps/{name}"] = batch.policy.where(members, 0.0).sum() / count
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
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
        `nonfinite`, the number of non-finite losses.
    """
    metrics = {
        "rewards/mean": mean(rewards),
        "rewards/std": spread(rewards),
        "logps/mean": mean(batch.policy),
        "nonfinite": nonfinite(losses),
    }
    if batch.reference is not None:
        metrics["kl/mean"] = mean(batch.policy - batch.reference)
    if batch.rewards is not None:
        scores = batch.rewards.to(batch.policy.dtype)
        metrics["reward_model/mean"] = mean(scores)
        metrics["reward_model/std"] = spread(scores)
    return metrics
