"""Fused loss epilogues: a composed loss on known log-probs in one kernel launch, where it can be.

The kernels compute the slopes with the losses, so that the backward is a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_prefopt.devices import current
from fused_prefopt.epilogue_forms import (
    PairState,
    covers,
    gathers,
    pair_form,
    with_state,
    with_summary,
)
from fused_prefopt.kernels.forms import (
    LARGEST,
    LARGEST_GROUPED,
    PAIR_METRICS,
    POINT_METRICS,
    PairForm,
)
from fused_prefopt.losses import DirectRewardLoss, LogRatio, PairwiseLoss
from fused_prefopt.losses.protocol import Loss
from fused_prefopt.statistics import MarginPool, MarginQueue, Statistic
from fused_prefopt.types import LogpBatch, LossOutput

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run_epilogue(loss: Loss, statistics: Statistic | None, batch: LogpBatch) -> LossOutput | None:
    """The loss of a batch and the update of its statistic, in one launch.

    Covered are `PairwiseLoss` of the parts that `epilogue_forms` names, without scale, weighting
    and regularisers and not with the exact solver or centred margins, and `DirectRewardLoss`, on
    fp32 log-probs of at most 4096 pairs.

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
    others = (batch.reference, batch.rewards, batch.prompt, batch.prompt_reference)
    given = [value for value in (*others, batch.sequence_kl) if value is not None]
    return batch.policy.dtype == torch.float32 and all(value.dtype in _DTYPES for value in given)


def _direct_reward(loss: DirectRewardLoss, batch: LogpBatch) -> LossOutput | None:
    largest = LARGEST if batch.groups is None else LARGEST_GROUPED
    if type(loss.reward) is not LogRatio or batch.size > largest:
        return None
    fields = (batch.reference, batch.rewards, batch.prompt, batch.prompt_reference, batch.groups)
    data = [_data(value) for value in fields]
    losses, mean, details, metrics = _Epilogue.apply(
        batch.policy, point_loss, *data, loss.reward.beta, loss.log_z0
    )
    named = dict(zip(POINT_METRICS, metrics.unbind(), strict=True))
    return LossOutput(mean, losses, named, rewards=details[0])


def _pairwise(
    loss: PairwiseLoss, statistics: Statistic | None, batch: LogpBatch
) -> LossOutput | None:
    form = pair_form(loss)
    if form is None or not covers(loss, statistics, batch):
        return None
    if statistics is not None and gathers(statistics):
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
    losses, mean, details, metrics = _Epilogue.apply(
        batch.policy,
        pair_loss,
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
    named = dict(zip(PAIR_METRICS, metrics.unbind(), strict=True))
    if batch.reference is None:
        del named["kl/chosen"], named["kl/rejected"]
    return LossOutput(mean, losses, named, rewards=details[:2].flatten(), target_margins=details[2])


def _data(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().contiguous()


class _Epilogue(torch.autograd.Function):
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
def pair_loss(
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
    """Losses of (2P,) log-probs; the tensors are those of `pair_epilogue`.

    Args:
        integers, numbers: a packed `PairForm`.

    Returns:
        losses (P,), their mean (), slopes (2, P), no weights (0,), details (3, P), metrics.
    """
    from fused_prefopt.kernels.loss_epilogue import pair_epilogue

    form = PairForm.unpacked(integers, numbers)
    fields = (policy, lengths, reference, sequence_kl)
    state = (average, weight, pool, order, queue, nonfinite)
    with current(policy.device):
        losses, loss, slopes, details, metrics = pair_epilogue(*fields, *state, form)
    return losses, loss, slopes, policy.new_empty(0), details, metrics


@pair_loss.register_fake
def _(policy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = policy.shape[0] // 2
    sizes = ((pairs,), (), (2, pairs), (0,), (3, pairs), (len(PAIR_METRICS),))
    losses, loss, slopes, weights, details, metrics = (policy.new_empty(size) for size in sizes)
    return losses, loss, slopes, weights, details, metrics


@torch.library.custom_op("fused_prefopt::point_loss", mutates_args=())
def point_loss(
    policy: Tensor,
    reference: Tensor,
    scores: Tensor,
    prompt: Tensor,
    prompt_reference: Tensor,
    groups: Tensor | None,
    beta: float,
    log_z0: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """DRO's losses of (S,) log-probs; arguments and results are those of `point_epilogue`."""
    from fused_prefopt.kernels.pointwise_epilogue import point_epilogue

    fields = (policy, reference, scores, prompt, prompt_reference, groups)
    with current(policy.device):
        return point_epilogue(*fields, beta, log_z0)


@point_loss.register_fake
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
