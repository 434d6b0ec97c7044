"""α-DPO: a target margin that follows the gap between policy and reference, standardised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fused_prefopt.checks import require_choice, require_number
from fused_prefopt.losses.protocol import Reward, expect, halves, needed, per_token
from fused_prefopt.statistics import (
    BatchMoments,
    DatasetMoments,
    Moments,
    ReferenceMoments,
    RunningMoments,
    Statistic,
)
from fused_prefopt.types import LogpBatch


def _ratio(batch: LogpBatch) -> Tensor:
    return batch.policy - needed(batch, "reference")


def _policy(batch: LogpBatch) -> Tensor:
    return batch.policy


def _reference(batch: LogpBatch) -> Tensor:
    return needed(batch, "reference")


def _inverse_reference(batch: LogpBatch) -> Tensor:
    return -needed(batch, "reference")


@dataclass(frozen=True)
class Gap:
    """``v_w − v_l`` with v a per-sequence value, or its mean per token.

    Args:
        value: (S,) values of a batch's sequences.
        needs: the `LogpBatch` fields that `value` uses.
        length_normalized: v is divided by ``|y|``; an empty completion's is 0.
    """

    value: Callable[[LogpBatch], Tensor]
    needs: frozenset[str]
    length_normalized: bool = True

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) gaps, differentiable where the values are."""
        values = self.value(batch)
        chosen, rejected = halves(per_token(values, batch) if self.length_normalized else values)
        return chosen - rejected


@dataclass(frozen=True)
class SequenceKlGap:
    """``K_l − K_w``, K the summed token-level KL: TDPO's δ in α-DPO's margin (its C.4).

    K stays a sum over tokens, as in TDPO, also where rewards are means.
    """

    needs: frozenset[str] = frozenset({"sequence_kl"})

    def __call__(self, batch: LogpBatch) -> Tensor:
        """(P,) gaps, in nats."""
        chosen, rejected = halves(needed(batch, "sequence_kl"))
        return rejected - chosen


_SEQUENCE_VALUES: dict[str, tuple[Callable[[LogpBatch], Tensor], frozenset[str]]] = {
    "ratio": (_ratio, frozenset({"reference"})),
    "policy": (_policy, frozenset()),
    "reference": (_reference, frozenset({"reference"})),
    "inverse_reference": (_inverse_reference, frozenset({"reference"})),
}
IMPLICIT_REFERENCES = (*_SEQUENCE_VALUES, "sequence_kl")


def gap_of(implicit_reference: str, *, length_normalized: bool) -> Gap | SequenceKlGap:
    """The gap of one of α-DPO's implicit reference models ``U · (…)^α``.

    Args:
        implicit_reference: one of `IMPLICIT_REFERENCES`.
        length_normalized: log-probs are means per token instead of sums.

    Returns:
        A function of a batch.

    Source: α-DPO, eq. 10, Table 2 and Appendix C.4.
    """
    if implicit_reference == "sequence_kl":
        return SequenceKlGap()
    value, needs = _SEQUENCE_VALUES[implicit_reference]
    return Gap(value, needs, length_normalized)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Where the mean and standard deviation of α-DPO's z-score come from.

    Args:
        statistics: "ema", "batch", "dataset" or "reference".
        momentum: weight of the past, for "ema" and "reference".
        mean: μ, for "dataset" alone.
        std: σ > 0, for "dataset" alone.

    Raises:
        ValueError: an option is out of range, missing, or has no effect.

    Source: α-DPO, eq. 11.
    """

    statistics: str = "ema"
    momentum: float = 0.9
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        require_choice("statistics", self.statistics, ("ema", "batch", "dataset", "reference"))
        require_number("momentum", self.momentum, low=0, high=1, below=True)
        given = self.mean is not None or self.std is not None
        if given and self.statistics != "dataset":
            raise ValueError(
                f"mean, std: got {self.mean}, {self.std}, wanted None unless statistics='dataset'"
            )
        if self.statistics == "dataset":
            if self.mean is None or self.std is None:
                raise ValueError("statistics: 'dataset' needs `mean` and `std` of the gap")
            require_number("mean", self.mean)
            require_number("std", self.std, low=0, above=True)

    def build(self) -> Statistic:
        """A fresh statistic."""
        if self.mean is not None and self.std is not None:
            return DatasetMoments(self.mean, self.std)
        if self.statistics == "batch":
            return BatchMoments()
        kinds = {"ema": RunningMoments, "reference": ReferenceMoments}
        return kinds[self.statistics](self.momentum)


@dataclass(frozen=True, kw_only=True)
class AdaptiveMargin:
    """α-DPO's margin: it follows the gap between policy and reference.

    ``sg[γ + α s z]`` with ``z = (gap − μ)/σ``, or ``z = gap`` without normalisation.

    Args:
        gap: the pair's gap, per token or summed.
        gamma: γ, in units of reward.
        alpha: α, strength of the adaptation.
        scale: s, in units of reward.
        normalisation: of the gap, or None.
        stop_gradient: the margin is a constant of the step; False lets the gap's gradient pass
            (μ and σ stay constants).

    Raises:
        ValueError: a number is not finite.

    Source: α-DPO, eq. 9–12.
    """

    gap: Gap | SequenceKlGap
    gamma: float
    alpha: float
    scale: float = 1.0
    normalisation: Normalisation | None = Normalisation()
    stop_gradient: bool = True

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma)
        require_number("alpha", self.alpha)
        require_number("scale", self.scale)

    @property
    def needs(self) -> frozenset[str]:
        """The gap's."""
        return self.gap.needs

    def statistics(self) -> Statistic | None:
        """Moments of the gap, or None without normalisation."""
        return None if self.normalisation is None else self.normalisation.build()

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the gaps, detached."""
        return self.gap(batch).detach()

    def __call__(self, batch: LogpBatch, reward_margins: Tensor, summary: Moments | None) -> Tensor:
        """(P,) target margins."""
        z = self.gap(batch)
        if self.normalisation is not None:
            z = expect(summary, Moments).standardise(z)
        margins = self.gamma + self.alpha * self.scale * z
        return margins.detach() if self.stop_gradient else margins


def adaptive_margin(
    reward: Reward,
    *,
    gamma: float = 0.0,
    alpha: float = 0.05,
    implicit_reference: str = "ratio",
    length_normalized: bool | None = None,
    margin_scale: str = "beta",
    normalize: bool = True,
    stop_gradient: bool = True,
    statistics: str = "ema",
    momentum: float = 0.9,
    mean: float | None = None,
    std: float | None = None,
) -> AdaptiveMargin:
    """α-DPO's margin for a reward: its gap is of the mean token where the reward is.

    Args:
        reward: whose β is the margin's unit.
        gamma: γ, in units of reward.
        alpha: α; the margins' standard deviation is αβ where the gap is normalised.
        implicit_reference: one of `IMPLICIT_REFERENCES`.
        length_normalized: the gap is of the mean token, True, or of whole completions, False; None:
            as the reward is. The gap "sequence_kl" is always of whole completions.
        margin_scale: "beta" for s = β or "unit" for s = 1.
        normalize: False uses the margin γ + αβ gap.
        stop_gradient: False lets the gap's gradient pass.
        statistics, momentum, mean, std: as in `Normalisation`.

    Raises:
        ValueError: an option is out of range, or has no effect.

    Source: α-DPO, eq. 8–12, Table 2 and Appendix C.4.
    """
    require_choice("implicit_reference", implicit_reference, IMPLICIT_REFERENCES)
    require_choice("margin_scale", margin_scale, ("beta", "unit"))
    if length_normalized is None:
        length_normalized = reward.per_token
    elif not isinstance(length_normalized, bool):
        raise ValueError(f"length_normalized: got {length_normalized!r}, wanted a bool or None")
    elif implicit_reference == "sequence_kl":
        raise ValueError(
            f"length_normalized: got {length_normalized} with 'sequence_kl', whose gap is always of"
            " whole completions, wanted None"
        )
    # Eq. 10's M carries β itself; only its z-score loses the unit.
    scale = 1.0 if normalize and margin_scale == "unit" else reward.beta
    source = Normalisation(statistics=statistics, momentum=momentum, mean=mean, std=std)
    return AdaptiveMargin(
        gap=gap_of(implicit_reference, length_normalized=length_normalized),
        gamma=gamma,
        alpha=alpha,
        scale=scale,
        normalisation=source if normalize else None,
        stop_gradient=stop_gradient,
    )
