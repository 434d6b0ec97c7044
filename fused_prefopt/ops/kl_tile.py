"""What an engine keeps of each row where a policy's logits meet a reference model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.ops.tile import RowStatistics


@dataclass(frozen=True)
class KlStatistics:
    """Running statistics of both distributions of each row.

    Attributes:
        policy, reference: maximum, Σ exp(logit − maximum) and target logit, each (n,).
        weighted: (n,) running Σ exp(r − max r) (r − z) of policy logits z, reference logits r.
    """

    policy: RowStatistics
    reference: RowStatistics
    weighted: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> KlStatistics:
        """Of rows that have met no logit yet."""
        policy, reference = (RowStatistics.empty(rows, dtype, device) for _ in range(2))
        return cls(policy, reference, torch.zeros_like(policy.sum))

    def __getitem__(self, rows: slice) -> KlStatistics:
        return KlStatistics(self.policy[rows], self.reference[rows], self.weighted[rows])

    def kls(self) -> Tensor:
        """(n,) ``KL(reference || policy) = E[r − z] − lse r + lse z``, the mean over the reference.

        Terms cancel where the two distributions are close: they are added in float64, and what
        rounding has left below 0 becomes 0.
        """
        mean = self.weighted.double() / self.reference.sum.double()
        maxima = self.policy.maximum.double() - self.reference.maximum.double()
        sums = self.policy.sum.double().log() - self.reference.sum.double().log()
        return (mean + (maxima + sums)).clamp_(min=0).to(self.weighted.dtype)


@dataclass(frozen=True)
class KlGradients:
    """What each row's gradient is made of, all (n,).

    Attributes:
        logsumexps: of the policy's whole rows.
        reference_logsumexps: of the reference's.
        scale: factor on the policy's probabilities.
        reference_scale: factor on the reference's.
        targets: the whole gradient of the target's logit.
    """

    logsumexps: Tensor
    reference_logsumexps: Tensor
    scale: Tensor
    reference_scale: Tensor
    targets: Tensor

    def __getitem__(self, rows: slice) -> KlGradients:
        return KlGradients(
            self.logsumexps[rows],
            self.reference_logsumexps[rows],
            self.scale[rows],
            self.reference_scale[rows],
            self.targets[rows],
        )
