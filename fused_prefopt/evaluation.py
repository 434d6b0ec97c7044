"""Scores of a model on pairs: how well it tells them apart, how far it is from its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data.columns import PAIR_REFERENCES, WEIGHT, is_given, stacked
from fused_prefopt.losses.metrics import LOGPS_CHOSEN, LOGPS_REJECTED, average
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.models.batch import collated_rows
from fused_prefopt.models.model_call import evaluating
from fused_prefopt.ops import sequence_kl
from fused_prefopt.reference import dataset_logps
from fused_prefopt.types import LMHead, LogpBatch, divisors

Feature = Mapping[str, Any]
Collator = Callable[[Sequence[Feature]], Mapping[str, Any]]


@dataclass(frozen=True)
class PairScores:
    """A model's log-probs of preference pairs, beside its reference's.

    Attributes:
        batch: policy, lengths and reference of all pairs, chosen first, and their weights.
        kl: mean over chosen tokens of KL(policy || reference), in nats, exact over the vocabulary.
        kl_rejected: the same over rejected tokens.
    """

    batch: LogpBatch
    kl: float
    kl_rejected: float

    @property
    def margins(self) -> Tensor:
        """(P,) mean log-prob of chosen minus that of rejected, in nats per token."""
        chosen, rejected = (self.batch.policy / divisors(self.batch.lengths)).chunk(2)
        return chosen - rejected

    def summary(self, reward: Callable[[LogpBatch], Tensor] | None = None) -> dict[str, float]:
        """Numbers of the comparison table.

        Args:
            reward: the implicit reward a loss trains, such as `PreferenceLoss(...).loss.reward`.

        Returns:
            accuracy: share of pairs whose chosen side has the higher mean log-prob;
            accuracy_stderr: its standard error; margin: mean of `margins`; kl; logps/chosen,
            logps/rejected: mean sums in nats; with `reward` also reward_accuracy: share of pairs
            whose chosen side has the higher reward. Shares and means are weighted where the pairs
            have weights.
        """
        weights = weights_of(self.batch, pairwise=True)
        accuracy, pairs = _mean(self.margins > 0, weights), float(self.margins.numel())
        if weights is not None:
            # As many pairs of equal weight have the same standard error.
            pairs = (weights.sum().square() / weights.square().sum()).item()
        chosen, rejected = self.batch.policy.chunk(2)
        summary = {
            "accuracy": accuracy,
            "accuracy_stderr": (accuracy * (1 - accuracy) / pairs) ** 0.5,
            "margin": _mean(self.margins, weights),
            "kl": self.kl,
            LOGPS_CHOSEN: _mean(chosen, weights),
            LOGPS_REJECTED: _mean(rejected, weights),
        }
        if reward is not None:
            better, worse = reward(self.batch).chunk(2)
            summary["reward_accuracy"] = _mean(better > worse, weights)
        return summary


def _mean(values: Tensor, weights: Tensor | None) -> float:
    values = values.float()
    return (values.mean() if weights is None else average(values, weights)).item()


def score_pairs(
    model: nn.Module,
    reference: nn.Module,
    features: Sequence[Feature],
    collator: Collator,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> PairScores:
    """Judge a model on preference pairs.

    Args:
        model: the policy.
        reference: what it is compared with.
        features: from `tokenise_pairs`, with the reference's log-probs (`add_reference_logps`);
            weights of pairs and of tokens count as in training.
        collator: `PairCollator`, any layout; where it cuts, the cut pairs are judged.
        batch_size: pairs a forward pass takes.
        progress: show a progress bar.
    """
    columns = dataset_logps(
        model,
        features,
        collator,
        batch_size=batch_size,
        progress=progress,
        description="held-out pairs",
    )
    kls, lengths = _kls(model, reference, features, collator, batch_size)
    weights = None
    if is_given(features, WEIGHT):
        weights = stacked(features, WEIGHT).repeat(2)
        kls = weights * kls
    batch = LogpBatch(
        policy=torch.cat([columns[name] for name in PAIR_REFERENCES]),
        lengths=lengths,
        weights=weights,
        reference=torch.cat([stacked(features, name) for name in PAIR_REFERENCES]),
    )
    tokens = lengths if weights is None else weights * lengths
    chosen, rejected = (
        (kl.sum() / divisors(count.sum())).item()
        for kl, count in zip(kls.chunk(2), tokens.chunk(2), strict=True)
    )
    return PairScores(batch, chosen, rejected)


@torch.no_grad()
def _kls(
    model: nn.Module,
    reference: nn.Module,
    features: Sequence[Feature],
    collator: Collator,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """(2P,) KL sums and lengths in tokens, both weighted where tokens are; chosen pairs first."""
    device = next(model.parameters()).device
    found = []
    with evaluating(model), evaluating(reference):
        for start in range(0, len(features), batch_size):
            batch = collator(features[start : start + batch_size])
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            rows, other = (collated_rows(each, batch, prompt=False) for each in (model, reference))
            # KL(first || second): the policy takes the place that a loss gives the reference.
            kl = sequence_kl(
                other.hidden,
                LMHead.of(reference),
                rows.hidden,
                LMHead.of(model),
                rows.labels,
                token_weights=rows.token_weights,
                **rows.layout,
            )
            found.append(torch.stack([kl.kl, kl.lengths]).view(2, 2, -1).cpu())
    kls, lengths = torch.cat(found, dim=2).flatten(1)
    return kls, lengths
