"""Terms added to every pair's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses.needs import halves, needed, per_token
from fused_prefopt.types import LogpBatch


@dataclass(frozen=True, kw_only=True)
class ChosenNll:
    """Weighted negative log-likelihood of the chosen completion: keeps its probability up.

    Args:
        weight: λ >= 0.
        nll: "sum" −L_w, "sequence_mean" −L_w/|y_w|, or "token_mean", the mean over all
            chosen tokens of the batch, of all ranks, the same term for every pair.

    Raises:
        ValueError: an option is out of range.

    Source: CPO (Xu et al. 2024); SLiC-HF (Zhao et al. 2023); ORPO (Hong et al. 2024).
    """

    weight: float = 1.0
    nll: str = "sum"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("weight", self.weight, low=0)
        require_choice("nll", self.nll, ("sum", "sequence_mean", "token_mean"))

    @property
    def coupled(self) -> bool:
        """Whether the mean is over the batch's tokens."""
        return self.nll == "token_mean" and self.weight > 0

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""
        if self.nll == "sequence_mean":
            return -self.weight * halves(per_token(batch.policy, batch))[0]
        chosen = halves(batch.policy)[0]
        if self.nll == "sum":
            return -self.weight * chosen
        # A NaN stays in its own pair, whose other terms carry it.
        finite = chosen.isfinite()
        tokens = halves(batch.lengths)[0].where(finite, 0).sum().clamp(min=1)
        return (-self.weight * chosen.where(finite, 0.0).sum() / tokens).expand_as(chosen)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Cal-DPO's pull of the log-ratios to ±1/(2β): ``(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²``.

    Args:
        beta: β > 0.

    Raises:
        ValueError: `beta` is out of range.

    Source: Cal-DPO (Xiao et al. 2024).
    """

    beta: float
    coupled: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        require_number("beta", self.beta, low=0, above=True)

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) terms."""
        chosen, rejected = halves(batch.policy - needed(batch, "reference"))
        target = 1 / (2 * self.beta)
        return (chosen - target).square() + (rejected + target).square()
