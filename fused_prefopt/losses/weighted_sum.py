"""A weighted sum of losses on the same log-probs: MPO, RPO, SimPO with a likelihood term, …"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.checks import require_number
from fused_prefopt.losses.links import Indifferent
from fused_prefopt.losses.metrics import NONFINITE, TERM_LOSS, mean, nonfinite
from fused_prefopt.losses.pairwise import AnchoredLoss, PairwiseLoss
from fused_prefopt.losses.protocol import Loss, Reward, Weighting
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.statistics import TermStatistics
from fused_prefopt.types import LogpBatch, LossOutput


@dataclass(frozen=True)
class Term:
    """A loss in a sum.

    Args:
        name: by which its own loss is logged and its statistic is saved, unlike the other terms'.
        loss: on pairs or on single completions, as all terms.
        weight: w >= 0.

    Raises:
        ValueError: `weight` is out of range.
    """

    name: str
    loss: Loss
    weight: float = 1.0

    def __post_init__(self) -> None:
        require_number(f"weight of {self.name}", self.weight, low=0)


@dataclass(frozen=True)
class WeightedSum:
    """``Σ_k w_k ℓ_k``: every term is a function of one batch of log-probs, as is their sum.

    A term's statistic sees every batch, as it would alone. Where a term spans the batch of all
    ranks, all terms are taken of the pairs of all ranks.

    Args:
        terms: at least one.
        weighting: how much a pair counts, regularisers and all, in every term; on top of a
            weighting of the term's own, unless that is the same one.

    Raises:
        ValueError: there is no term, two have one name, some judge pairs and others single
            completions, or with a weighting a term is no mean over pairs.

    Source: MPO (Wang et al. 2024, arXiv:2411.10442), eq. 1, of three terms.
    """

    terms: tuple[Term, ...]
    weighting: Weighting | None = None

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("loss: got a sum without terms, wanted one at least")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"loss: got terms named {names}, wanted another name for each")
        kinds = {term.loss.pairwise: term.name for term in self.terms}
        if len(kinds) == 2:
            raise ValueError(
                f"loss: got {kinds[True]}, on pairs, with {kinds[False]}, on single completions,"
                " wanted terms of one kind"
            )
        for term in self.terms if self.weighting is not None else ():
            if not _is_mean_over_pairs(term.loss):
                raise ValueError(
                    f"use_weighting: got True with {term.name}, needs losses that are means over"
                    " pairs"
                )

    @property
    def leading(self) -> int:
        """Number of the term whose rewards are the sum's: the first that trains a reward."""
        comparing = (i for i, term in enumerate(self.terms) if _trains_a_reward(term))
        return next(comparing, 0)

    @property
    def reward(self) -> Reward:
        """The implicit reward of the leading term."""
        return self.terms[self.leading].loss.reward

    @property
    def needs(self) -> frozenset[str]:
        """Union of the terms' needs and the weighting's."""
        found = frozenset(field for term in self.terms for field in term.loss.needs)
        return found if self.weighting is None else found | self.weighting.needs

    @property
    def wants(self) -> frozenset[str]:
        """Union of the terms' wants and the weighting's."""
        found = frozenset(field for term in self.terms for field in term.loss.wants)
        return found if self.weighting is None else found | self.weighting.wants

    @property
    def pairwise(self) -> bool:
        """Whether the terms judge pairs."""
        return self.terms[0].loss.pairwise

    @property
    def coupled(self) -> bool:
        """Whether a term spans the batch."""
        return any(term.loss.coupled for term in self.terms)

    def statistics(self) -> TermStatistics | None:
        """Fresh statistics of the terms, or None where no term needs one."""
        parts = {term.name: term.loss.statistics() for term in self.terms}
        return None if all(part is None for part in parts.values()) else TermStatistics(parts)

    def observe(self, batch: LogpBatch) -> tuple[Any, ...]:
        """What each term observes."""
        return tuple(term.loss.observe(batch) for term in self.terms)

    def __call__(self, batch: LogpBatch, summary: Any = None) -> LossOutput:
        """The loss of a batch.

        Args:
            batch: what the terms need.
            summary: what `statistics` returned for this batch, where there are any.

        Returns:
            As in `joined`.

        Raises:
            ValueError: a needed field or a summary is missing, or the batch does not fit.
        """
        summaries = summary if isinstance(summary, tuple) else (summary,) * len(self.terms)
        parts = zip(self.terms, summaries, strict=True)
        return self.joined(batch, [term.loss(batch, each) for term, each in parts])

    def joined(self, batch: LogpBatch, outputs: Sequence[LossOutput]) -> LossOutput:
        """The sum of what the terms' losses returned for a batch.

        Args:
            batch: the pairs or completions.
            outputs: one of each term.

        Returns:
            Weighted sums of `loss` and `losses`; the leading term's rewards, target margins and
            metrics, with each term's own loss, before the term's weight, as `loss/<its name>`.

        Raises:
            ValueError: the pairs have weights, and with a weighting a term is a mean over tokens.
        """
        if self.weighting is not None:
            factors, weights = self.weighting(batch), weights_of(batch, pairwise=self.pairwise)
            outputs = [
                output
                if _weighting_of(term.loss) == self.weighting
                else _counted(term, output, factors, weights)
                for term, output in zip(self.terms, outputs, strict=True)
            ]
        weighed = list(zip(self.terms, outputs, strict=True))
        losses = _weighted([(term.weight, output.losses) for term, output in weighed])
        metrics = dict(outputs[self.leading].metrics)
        metrics[NONFINITE] = nonfinite(losses.detach())
        metrics |= {f"{TERM_LOSS}{term.name}": output.loss.detach() for term, output in weighed}
        return replace(
            outputs[self.leading],
            loss=_weighted([(term.weight, output.loss) for term, output in weighed]),
            losses=losses,
            metrics=metrics,
        )


def _trains_a_reward(term: Term) -> bool:
    loss = term.loss
    indifferent = isinstance(loss, PairwiseLoss) and isinstance(loss.link, Indifferent)
    return term.weight > 0 and not indifferent


def _weighting_of(loss: Loss) -> Weighting | None:
    return loss.weighting if isinstance(loss, PairwiseLoss) else None


def _is_mean_over_pairs(loss: Loss) -> bool:
    composed = isinstance(loss, PairwiseLoss) and loss.reduction is mean
    return composed or isinstance(loss, AnchoredLoss)


def _counted(term: Term, output: LossOutput, factors: Tensor, weights: Tensor | None) -> LossOutput:
    if weights is not None and term.loss.coupled:
        # It has weighted its pairs already, which no factor reaches afterwards.
        raise ValueError(
            f"weights: got some with use_weighting and {term.name}, a mean over all tokens; needs"
            " another term, such as one with nll='sequence_mean', or pairs without weights, which"
            " lists give theirs"
        )
    losses = factors * output.losses
    return replace(output, loss=mean(losses, weights), losses=losses)


def _weighted(values: Sequence[tuple[float, Tensor]]) -> Tensor:
    (weight, value), *others = values
    total = weight * value
    for weight, value in others:
        total = torch.add(total, value, alpha=weight)
    return total
