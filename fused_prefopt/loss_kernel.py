"""Composed losses on known log-probs as one kernel launch, where there is a form for all parts.

The kernels compute the slopes with the losses, so that the backward is a product. A part without a
form, such as a new margin, needs no entry here: its losses run in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_prefopt.devices import current
from fused_prefopt.kernels.loss_form import (
    LARGEST,
    LARGEST_GROUPED,
    Link,
    Margin,
    Moments,
    PairForm,
    contracts,
)
from fused_prefopt.losses import (
    AdaptiveMargin,
    ConstantMargin,
    DirectRewardLoss,
    DynamicMargin,
    Hinge,
    Logistic,
    LogRatio,
    MeanLogp,
    MeanLogRatio,
    PairwiseLoss,
    Robust,
    Squared,
    SumLogp,
    UnbiasedRobust,
    gap_of,
)
from fused_prefopt.losses.adaptive_margin import Gap, SequenceKlGap
from fused_prefopt.losses.metrics import (
    KL_CHOSEN,
    KL_REJECTED,
    PAIR_METRICS,
    POINT_METRICS,
    mean,
    pairwise_metrics,
)
from fused_prefopt.losses.protocol import Loss, needed
from fused_prefopt.losses.weights import weights_of
from fused_prefopt.statistics import (
    BatchMoments,
    DatasetMoments,
    MarginPool,
    MarginQueue,
    ReferenceMoments,
    RunningMoments,
    Statistic,
)
from fused_prefopt.types import LogpBatch, LossOutput

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Coefficient of L_ref beside L's, and whether the reward is per token.
_REWARDS: dict[type, tuple[int, int]] = {LogRatio: (-1, 0), MeanLogRatio: (-1, 1)}
_REWARDS |= {MeanLogp: (0, 1), SumLogp: (0, 0)}
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


def launch_loss(loss: Loss, statistics: Statistic | None, batch: LogpBatch) -> LossOutput | None:
    """The loss of a batch and the update of its statistic, in one launch.

    Covered are `PairwiseLoss` of the parts that have a form here, without scale, weighting,
    ranking and regularisers and not with the exact solver or centred margins, and
    `DirectRewardLoss`, on fp32 log-probs of at most 4096 pairs.

    Args:
        loss: a composed loss.
        statistics: its statistic, updated in place in training mode; None where it has none.
        batch: per-sequence log-probs and what comes with them.

    Returns:
        What ``loss(batch, statistics(loss.observe(batch)))`` returns, to float32 rounding; None,
        with nothing done, where something is not covered.
    """
    if batch.size == 0 or not loss.needs <= batch.given or not _dtypes_fit(batch):
        return None
    if type(loss) is DirectRewardLoss:
        return _direct_reward(loss, batch)
    if type(loss) is PairwiseLoss and batch.size % 2 == 0:
        return _pairwise(loss, statistics, batch)
    return None


def _dtypes_fit(batch: LogpBatch) -> bool:
    # The kernels count tokens in integers: sums of their weights stay with torch.
    if batch.lengths.is_floating_point():
        return False
    others = (batch.reference, batch.rewards, batch.prompt, batch.prompt_reference)
    given = [value for value in (*others, batch.sequence_kl) if value is not None]
    return batch.policy.dtype == torch.float32 and all(value.dtype in _DTYPES for value in given)


def _direct_reward(loss: DirectRewardLoss, batch: LogpBatch) -> LossOutput | None:
    largest = LARGEST if batch.groups is None else LARGEST_GROUPED
    if type(loss.reward) is not LogRatio or batch.size > largest:
        return None
    fields = (batch.reference, batch.rewards, batch.prompt, batch.prompt_reference, batch.groups)
    data = [_data(value) for value in fields]
    losses, total, details, metrics = _LaunchedLoss.apply(
        batch.policy, point_loss_op, *data, loss.reward.beta, loss.log_z0
    )
    if batch.weights is not None:
        prompt_ratio = needed(batch, "prompt") - needed(batch, "prompt_reference")
        return loss.reduced(batch, losses, details[0], prompt_ratio.detach() + loss.log_z0)
    named = dict(zip(POINT_METRICS, metrics.unbind(), strict=True))
    return LossOutput(total, losses, named, rewards=details[0])


def _pairwise(
    loss: PairwiseLoss, statistics: Statistic | None, batch: LogpBatch
) -> LossOutput | None:
    form = pair_form(loss)
    if form is None or not covers(loss, statistics, batch):
        return None
    if statistics is not None and statistics.gathers:
        summary = statistics(loss.observe(batch))
        if isinstance(summary, MarginPool) and summary.margins.shape[0] > LARGEST:
            return loss(batch, summary)
        form, state = with_summary(form, summary)
    else:
        form, state = with_state(form, statistics, batch.size // 2)
    result = _launch_pairs(form, state, batch)
    if isinstance(statistics, MarginQueue) and state.drawn_by is not None:
        # Commit only now, when nothing can fail any more.
        statistics.generator.set_state(state.drawn_by)
    return result


def _launch_pairs(form: PairForm, state: PairState, batch: LogpBatch) -> LossOutput:
    losses, total, details, metrics = _LaunchedLoss.apply(
        batch.policy,
        pair_loss_op,
        _data(batch.lengths),
        _data(batch.reference),
        _data(batch.sequence_kl),
        state.average,
        state.weight,
        state.pool,
        state.order,
        state.queue,
        state.nonfinite,
        *form.packed(),
    )
    rewards, target_margins = details[:2].flatten(), details[2]
    named = dict(zip(PAIR_METRICS, metrics.unbind(), strict=True))
    if batch.reference is None:
        del named[KL_CHOSEN], named[KL_REJECTED]
    # The kernel's mean and metrics know no weights; its losses, with their slopes, need none.
    weights = weights_of(batch, pairwise=True)
    if weights is not None:
        total = mean(losses, weights)
        named = pairwise_metrics(batch, rewards, target_margins, losses)
    return LossOutput(total, losses, named, rewards=rewards, target_margins=target_margins)


def _data(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().contiguous()


@dataclass(frozen=True)
class PairState:
    """Tensors of a statistic that the kernel reads, and updates in place; see `kernels.pair_loss`.

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
    reference, per_token = reward
    kind, a, b = link
    return PairForm(
        reward_reference=reference,
        reward_per_token=per_token,
        link=kind,
        link_a=a,
        link_b=b,
        beta=loss.reward.beta,
        **margin,
    )


def _has_more_parts(loss: PairwiseLoss) -> bool:
    scaled = loss.scale is not None or loss.weighting is not None or loss.ranking is not None
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


def _draws(queue: MarginQueue, pairs: int) -> int:
    return min(max(0, queue.sample_size - pairs), queue.margins.shape[0])


def _with_queue(form: PairForm, queue: MarginQueue, pairs: int) -> tuple[PairForm, PairState]:
    """Random numbers as the queue itself would draw them, from a copy of its generator."""
    draws, generator = _draws(queue, pairs), queue.generator.clone_state()
    order = queue.order(generator)
    state = PairState(
        order=order if draws else None,
        queue=queue.margins,
        nonfinite=queue.nonfinite,
        drawn_by=generator.get_state() if queue.training else None,
    )
    return replace(form, draws=draws), state


class _LaunchedLoss(torch.autograd.Function):
    """Losses with their gradient towards the policy's log-probs; everything else is data."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor, op: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Launch `op`; (P,) losses, their mean, details and metrics of what it returns."""
        results = op(policy.detach().contiguous(), *arguments)
        losses, loss, slopes, weights, details, metrics = results
        ctx.save_for_backward(slopes, weights)
        ctx.mark_non_differentiable(details, metrics)
        ctx.set_materialize_grads(False)
        ctx.data = len(arguments) + 1
        return losses, loss, details, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """``slopes · (grad_losses + grad_loss · weights)``."""
        grad_losses, grad_loss = grads[:2]
        slopes, weights = ctx.saved_tensors  # (2, P) or (1, S); (S,) or (0,)
        upstream = grad_losses
        if grad_loss is not None:
            share = grad_loss * (weights if weights.numel() else 1 / slopes.shape[1])
            upstream = share if upstream is None else upstream + share
        grad = None if upstream is None else (slopes * upstream).flatten()
        return (grad, *(None,) * ctx.data)


_STATE = ("average", "weight", "queue", "nonfinite")


@torch.library.custom_op("fused_prefopt::pair_loss", mutates_args=_STATE)
def pair_loss_op(
    policy: Tensor,
    lengths: Tensor,
    reference: Tensor | None,
    sequence_kl: Tensor | None,
    average: Tensor | None,
    weight: Tensor | None,
    pool: Tensor | None,
    order: Tensor | None,
    queue: Tensor | None,
    nonfinite: Tensor | None,
    integers: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of (2P,) log-probs; the tensors are those of `kernels.pair_loss`.

    Args:
        integers, numbers: a packed `PairForm`.

    Returns:
        losses (P,), their mean (), slopes (2, P), no weights (0,), details (3, P), metrics.
    """
    from fused_prefopt.kernels.pair_loss import pair_loss

    form = PairForm.unpacked(integers, numbers)
    fields = (policy, lengths, reference, sequence_kl)
    state = (average, weight, pool, order, queue, nonfinite)
    with current(policy.device):
        losses, loss, slopes, details, metrics = pair_loss(*fields, *state, form)
    return losses, loss, slopes, policy.new_empty(0), details, metrics


@pair_loss_op.register_fake
def _(policy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = policy.shape[0] // 2
    sizes = ((pairs,), (), (2, pairs), (0,), (3, pairs), (len(PAIR_METRICS),))
    losses, loss, slopes, weights, details, metrics = (policy.new_empty(size) for size in sizes)
    return losses, loss, slopes, weights, details, metrics


@torch.library.custom_op("fused_prefopt::point_loss", mutates_args=())
def point_loss_op(
    policy: Tensor,
    reference: Tensor,
    scores: Tensor,
    prompt: Tensor,
    prompt_reference: Tensor,
    groups: Tensor | None,
    beta: float,
    log_z0: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DRO's losses of (S,) log-probs; arguments and results as in `kernels.point_loss`."""
    from fused_prefopt.kernels.point_loss import direct_reward

    fields = (policy, reference, scores, prompt, prompt_reference, groups)
    with current(policy.device):
        return direct_reward(*fields, beta, log_z0)


@point_loss_op.register_fake
def _(
    policy: Tensor,
    reference: Tensor,
    scores: Tensor,
    prompt: Tensor,
    prompt_reference: Tensor,
    groups: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = policy.shape[0]
    sizes = ((size,), (), (1, size), (size if groups is not None else 0,), (1, size))
    losses, loss, slopes, weights, details = (policy.new_empty(shape) for shape in sizes)
    return losses, loss, slopes, weights, details, policy.new_empty(len(POINT_METRICS))
