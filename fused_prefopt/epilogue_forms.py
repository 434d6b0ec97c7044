"""How a composed loss and its statistic look to the loss epilogue: a form and its state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fused_prefopt.kernels.forms import LARGEST, Link, Margin, Moments, PairForm, contracts
from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DynamicMargin,
    Hinge,
    Logistic,
    LogRatio,
    MeanLogp,
    PairwiseLoss,
    Robust,
    Squared,
    SumLogp,
    UnbiasedRobust,
    gap_of,
)
from fused_prefopt.losses.gaps import Gap, SequenceKlGap
from fused_prefopt.losses.metrics import mean
from fused_prefopt.statistics import (
    BatchMoments,
    DatasetMoments,
    MarginPool,
    MarginQueue,
    ReferenceMoments,
    RunningMoments,
    Statistic,
)
from fused_prefopt.types import LogpBatch

# Coefficient of L_ref beside L's, and whether the reward is per token.
_REWARDS: dict[type, tuple[int, int]] = {LogRatio: (-1, 0), MeanLogp: (0, 1), SumLogp: (0, 0)}
# Coefficients of L and L_ref.
_COEFFICIENTS = {
    "ratio": (1, -1),
    "policy": (1, 0),
    "reference": (0, 1),
    "inverse_reference": (0, -1),
}
_GAPS: dict[Gap | SequenceKlGap, dict[str, int]] = {
    gap_of(name, length_normalized=per_token): {
        "gap_policy": policy,
        "gap_reference": reference,
        "gap_per_token": int(per_token),
    }
    for name, (policy, reference) in _COEFFICIENTS.items()
    for per_token in (False, True)
} | {SequenceKlGap(): {"gap_kl": 1}}
_OWN_MOMENTS: dict[type, Moments] = {
    BatchMoments: Moments.BATCH,
    RunningMoments: Moments.CORRECTED,
    ReferenceMoments: Moments.UNCORRECTED,
}


@dataclass(frozen=True)
class PairState:
    """What the epilogue reads of a statistic, and updates in it; see `pair_epilogue`.

    Attributes:
        average, weight: moments, running or given.
        pool: given margins.
        order, queue: of the drawn and the remembered margins.
        nonfinite: count of the skipped values.
        drawn_by: state of the queue's generator after the draw, to be set once all is done.
    """

    average: Tensor | None = None
    weight: Tensor | None = None
    pool: Tensor | None = None
    order: Tensor | None = None
    queue: Tensor | None = None
    nonfinite: Tensor | None = None
    drawn_by: Tensor | None = None


def pair_form(loss: PairwiseLoss) -> PairForm | None:
    """The loss without its statistic, or None where a part of it is unknown to the kernel."""
    reward, link, margin = _REWARDS.get(type(loss.reward)), _link(loss.link), _margin(loss.margin)
    if reward is None or link is None or margin is None or _has_more_parts(loss):
        return None
    beta: float = loss.reward.beta  # type: ignore[attr-defined]
    reference, per_token = reward
    kind, a, b = link
    return PairForm(
        reward_reference=reference,
        reward_per_token=per_token,
        link=kind,
        link_a=a,
        link_b=b,
        beta=beta,
        **margin,
    )


def _has_more_parts(loss: PairwiseLoss) -> bool:
    scaled = loss.scale is not None or loss.weighting is not None
    return scaled or bool(loss.regularisers) or loss.reduction is not mean


def _margin(margin: Any) -> dict[str, Any] | None:
    if type(margin) is ConstantMargin:
        return {"gamma": margin.gamma}
    if type(margin) is DynamicMargin:
        known = margin.solver == "mirror" and not margin.centered
        if not known or not contracts(margin.gamma, margin.tau):
            return None
        numbers = {"gamma": margin.gamma, "tau": margin.tau, "steps": margin.steps}
        return {"margin": Margin.DYNAMIC, **numbers}
    if type(margin) is AdaptiveMargin:
        gap = _gap(margin.gap)
        if gap is None:
            return None
        return {
            "margin": Margin.ADAPTIVE,
            "gamma": margin.gamma,
            "alpha": margin.alpha * margin.scale,
            "passes_gradient": not margin.stop_gradient,
            **gap,
        }
    return None


def _gap(gap: Any) -> dict[str, int] | None:
    # By exact type: another gap may compute something else, or not even have a hash.
    return _GAPS.get(gap) if type(gap) in (Gap, SequenceKlGap) else None


def _link(link: Any) -> tuple[Link, float, float] | None:
    if type(link) is Logistic:
        kind = Link.SMOOTHED if link.label_smoothing else Link.LOGISTIC
        return kind, link.label_smoothing, 0.0
    if type(link) is Robust:
        return Link.TWO_SIDED, 1 - link.epsilon, link.epsilon
    if type(link) is UnbiasedRobust:
        kept = 1 - 2 * link.epsilon
        return Link.TWO_SIDED, (1 - link.epsilon) / kept, -link.epsilon / kept
    if type(link) is Hinge:
        return Link.HINGE, link.delta, 0.0
    return (Link.SQUARED, 0.0, 0.0) if type(link) is Squared else None


def covers(loss: PairwiseLoss, statistic: Statistic | None, batch: LogpBatch) -> bool:
    """Whether the kernel can do the work of this statistic on this batch."""
    pairs = batch.size // 2
    if pairs > LARGEST:
        return False
    margin = loss.margin
    if isinstance(margin, AdaptiveMargin) and not margin.stop_gradient:
        if batch.sequence_kl is not None and batch.sequence_kl.requires_grad:
            return False  # The kernel has the log-probs' gradient alone.
    if isinstance(margin, DynamicMargin):
        fits = type(statistic) is MarginQueue and pairs + _draws(statistic, pairs) <= LARGEST
    elif isinstance(margin, AdaptiveMargin) and margin.normalisation is not None:
        fits = type(statistic) is DatasetMoments or type(statistic) in _OWN_MOMENTS
    else:
        fits = statistic is None
    return fits and (statistic is None or statistic.nonfinite.device == batch.policy.device)


def with_state(
    form: PairForm, statistic: Statistic | None, pairs: int
) -> tuple[PairForm, PairState]:
    """The form with what it takes from the statistic of a single process."""
    if statistic is None:
        return form, PairState()
    form = replace(form, update=int(statistic.training))
    if isinstance(statistic, MarginQueue):
        return _with_queue(form, statistic, pairs)
    kept = {"nonfinite": statistic.nonfinite}
    if isinstance(statistic, DatasetMoments):
        return replace(form, moments=Moments.GIVEN), PairState(
            statistic.mean, statistic.std, **kept
        )
    form = replace(form, moments=_OWN_MOMENTS[type(statistic)])
    if isinstance(statistic, RunningMoments):
        form = replace(form, momentum=statistic.momentum)
        return form, PairState(statistic.average, statistic.weight, **kept)
    return form, PairState(**kept)


def with_summary(form: PairForm, summary: Any) -> tuple[PairForm, PairState]:
    """The form with what a statistic returned that has been updated already."""
    if isinstance(summary, MarginPool):
        return replace(form, start=summary.start), PairState(pool=summary.margins)
    return replace(form, moments=Moments.GIVEN), PairState(summary.mean, summary.std)


def gathers(statistic: Statistic | None) -> bool:
    """Whether the statistic is over several ranks: it must then see the batch itself."""
    return statistic is not None and statistic.gathers


def _draws(queue: MarginQueue, pairs: int) -> int:
    return min(max(0, queue.sample_size - pairs), queue.margins.shape[0])


def _with_queue(form: PairForm, queue: MarginQueue, pairs: int) -> tuple[PairForm, PairState]:
    """The same random numbers as the queue itself would draw, from a copy of its generator."""
    draws, generator = _draws(queue, pairs), queue.generator.clone_state()
    order = queue.order(generator)
    state = PairState(
        order=order if draws else None,
        queue=queue.margins,
        nonfinite=queue.nonfinite,
        drawn_by=generator.get_state() if queue.training else None,
    )
    return replace(form, draws=draws), state
