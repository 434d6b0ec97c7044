"""How far a pair's policy and implicit reference are apart: the gap that α-DPO's margin follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fused_prefopt.losses.needs import halves, needed, per_token
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
        length_normalized: v is divided by ``max(1, |y|)``.
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
