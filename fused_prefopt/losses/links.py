"""Links: from reward margins and target margins to losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_number


def logistic(
    reward_margins: Tensor, target_margins: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Bradley–Terry negative log-likelihood with a share of flipped labels.

    ``−(1−ε) log σ(m − γ) − ε log σ(γ − m)``

    Args:
        reward_margins: (P,) m.
        target_margins: (P,) γ.
        label_smoothing: ε.

    Returns:
        (P,) losses in nats.

    Source: DPO (Rafailov et al. 2023), eq. 7; ε after cDPO (Mitchell 2023).
    """
    excess = reward_margins - target_margins
    if label_smoothing == 0:
        return -logsigmoid(excess)
    # log σ(x) = log σ(−x) + x: one log-sigmoid serves both terms.
    return label_smoothing * excess - logsigmoid(excess)


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """The `logistic` link with its hyperparameter.

    Args:
        label_smoothing: 0 <= ε <= 0.5, probability that a label is flipped.

    Raises:
        ValueError: `label_smoothing` is out of range.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_number("label_smoothing", self.label_smoothing, low=0, high=0.5)

    def __call__(self, reward_margins: Tensor, target_margins: Tensor) -> Tensor:
        """(P,) losses."""
        return logistic(reward_margins, target_margins, label_smoothing=self.label_smoothing)
