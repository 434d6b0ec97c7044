"""Scores of a model on pairs: how well it tells them apart, how far it is from its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data.columns import ATTENTION_MASK, INPUT_IDS, PAIR_IDS, PAIR_REFERENCES
from fused_prefopt.data.labels import counts_of, labels_of
from fused_prefopt.losses.metrics import LOGPS_CHOSEN, LOGPS_REJECTED
from fused_prefopt.models.causal_lm import last_hidden
from fused_prefopt.ops import sequence_kl
from fused_prefopt.reference import dataset_logps
from fused_prefopt.types import LMHead, LogpBatch

Feature = Mapping[str, Any]
Collator = Callable[[Sequence[Feature]], Mapping[str, Any]]


@dataclass(frozen=True)
class PairScores:
    """A model's log-probs of preference pairs, beside its reference's.

    Attributes:
        batch: policy, lengths and reference of all pairs, chosen first.
        kl: mean over chosen tokens of KL(policy || reference), in nats, exact over the vocabulary.
        kl_rejected: the same over rejected tokens.
    """

    batch: LogpBatch
    kl: float
    kl_rejected: float

    @property
    def margins(self) -> Tensor:
        """(P,) mean log-prob of chosen minus that of rejected, in nats per token."""
        chosen, rejected = (self.batch.policy / self.batch.lengths).chunk(2)
        return chosen - rejected

    def summary(self, reward: Callable[[LogpBatch], Tensor] | None = None) -> dict[str, float]:
        """Numbers of the comparison table.

        Args:
            reward: the implicit reward a loss trains, such as `PreferenceLoss(...).loss.reward`.

        Returns:
            accuracy: share of pairs whose chosen side has the higher mean log-prob;
            accuracy_stderr: its standard error; margin: mean of `margins`; kl; logps/chosen,
            logps/rejected: mean sums in nats; with `reward` also reward_accuracy: share of pairs
            whose chosen side has the higher reward.
        """
        accuracy, pairs = _share(self.margins > 0), self.margins.numel()
        chosen, rejected = self.batch.policy.chunk(2)
        summary = {
            "accuracy": accuracy,
            "accuracy_stderr": (accuracy * (1 - accuracy) / pairs) ** 0.5,
            "margin": self.margins.mean().item(),
            "kl": self.kl,
            LOGPS_CHOSEN: chosen.mean().item(),
            LOGPS_REJECTED: rejected.mean().item(),
        }
        if reward is not None:
            better, worse = reward(self.batch).chunk(2)
            summary["reward_accuracy"] = _share(better > worse)
        return summary


def _share(of: Tensor) -> float:
    return of.float().mean().item()


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
        features: from `tokenise_pairs`, with the reference's log-probs (`add_reference_logps`).
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
    lengths = [len(feature[side]) for side in PAIR_IDS for feature in features]
    batch = LogpBatch(
        policy=torch.cat([columns[name] for name in PAIR_REFERENCES]),
        lengths=torch.tensor(lengths),
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
        # KL(first || second): the policy takes the place that a loss gives the reference.
        found = sequence_kl(
            last_hidden(reference, inputs),
            LMHead.of(reference),
            last_hidden(model, inputs),
            LMHead.of(model),
            labels_of(batch).to(device),
            num_labels=counts_of(batch)[0],
        )
        totals += found.kl.view(2, -1).sum(1).cpu()
        tokens += found.lengths.view(2, -1).sum(1).cpu()
    chosen, rejected = (totals / tokens.clamp(min=1)).tolist()
    return chosen, rejected
