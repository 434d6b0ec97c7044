"""Scores of a model on pairs: how well it tells them apart, how far it is from its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    INPUT_IDS,
    PAIR_IDS,
    PAIR_REFERENCES,
    TOKEN_WEIGHTS,
    WEIGHT,
    WEIGHTS,
    is_given,
    stacked,
)
from fused_prefopt.data.labels import counts_of, labels_of
from fused_prefopt.data.token_weights import token_weights
from fused_prefopt.losses.metrics import LOGPS_CHOSEN, LOGPS_REJECTED, average
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.models.causal_lm import last_hidden
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
        collator: `PairCollator`, padded layout.
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
    of_tokens = token_weights(features, PAIR_IDS)
    if of_tokens is None:
        lengths = torch.tensor([len(feature[side]) for side in PAIR_IDS for feature in features])
    else:
        lengths = torch.stack([each.sum() for each in of_tokens])
    weights = None
    if is_given(features, WEIGHT):
        weights = stacked(features, WEIGHT).repeat(2)
    batch = LogpBatch(
        policy=torch.cat([columns[name] for name in PAIR_REFERENCES]),
        lengths=lengths,
        weights=weights,
        reference=torch.tensor([feature[name] for name in PAIR_REFERENCES for feature in features]),
    )
    return PairScores(batch, *_mean_kls(model, reference, features, collator, batch_size))


@torch.no_grad()
def _mean_kls(
    model: nn.Module,
    reference: nn.Module,
    features: Sequence[Feature],
    collator: Collator,
    batch_size: int,
) -> tuple[float, float]:
    """Of chosen and of rejected tokens."""
    device = next(model.parameters()).device
    totals, tokens = torch.zeros(2), torch.zeros(2)
    for start in range(0, len(features), batch_size):
        batch = collator(features[start : start + batch_size])
        inputs = {name: batch[name].to(device) for name in (INPUT_IDS, ATTENTION_MASK)}
        of_tokens, weights = (
            batch[name].to(device) if name in batch else None for name in (TOKEN_WEIGHTS, WEIGHTS)
        )
        # KL(first || second): the policy takes the place that a loss gives the reference.
        found = sequence_kl(
            last_hidden(reference, inputs),
            LMHead.of(reference),
            last_hidden(model, inputs),
            LMHead.of(model),
            labels_of(batch).to(device),
            num_labels=counts_of(batch)[0],
            token_weights=of_tokens,
        )
        kls, lengths = found.kl, found.lengths
        if weights is not None:
            kls, lengths = weights * kls, weights * lengths
        totals += kls.view(2, -1).sum(1).cpu()
        tokens += lengths.view(2, -1).sum(1).cpu()
    chosen, rejected = (totals / divisors(tokens)).tolist()
    return chosen, rejected
