"""Launches of the loss kernels: batches of a usual size, and the largest that one program takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.kernel_targets import STATISTICS, Case, Setting
from fused_prefopt.kernels.forms import LARGEST, LARGEST_GROUPED, Link, Margin, Moments, PairForm
from fused_prefopt.kernels.loss_epilogue import pair_epilogue
from fused_prefopt.kernels.margin_solver import mirror_margins
from fused_prefopt.kernels.pointwise_epilogue import point_epilogue

# Pairs or completions of a usual batch; places of the queue of past margins, and how large a pool
# is drawn from it, by default.
USUAL, PLACES, SAMPLE = 32, 2048, 256

# γ-PO's margin and α-DPO's: they do most beside the link.
_DYNAMIC = PairForm(
    margin=Margin.DYNAMIC, beta=2.5, gamma=1.5, tau=15.0, steps=20, update=1, reward_per_token=1
)
_ADAPTIVE = PairForm(
    margin=Margin.ADAPTIVE,
    gap_policy=1,
    gap_reference=-1,
    gap_per_token=1,
    moments=Moments.CORRECTED,
    passes_gradient=1,
    update=1,
    beta=10.0,
    gamma=4.0,
    alpha=0.05,
    momentum=0.9,
)


def _pair_loss(s: Setting, form: PairForm, pairs: int = USUAL) -> None:
    """With what the form's margin keeps: running moments, or past margins to draw from."""
    average = weight = order = queue = None
    if form.margin == Margin.ADAPTIVE:
        average, weight = s.new(2, dtype=torch.float64), s.new(dtype=torch.float64)
    if form.margin == Margin.DYNAMIC:
        queue = s.new(PLACES, dtype=torch.float64)
        order = s.indices(PLACES) if form.draws else None
    nonfinite = s.new(dtype=torch.int64) if form.update else None
    fields = (s.floats(2 * pairs), s.indices(2 * pairs), s.floats(2 * pairs), None)
    pair_epilogue(*fields, average, weight, None, order, queue, nonfinite, form)


def _point_loss(s: Setting, size: int = USUAL, *, groups: bool = False) -> None:
    indices = s.indices(size) if groups else None
    policy, reference, scores, prompt, prompt_reference = (s.floats(size) for _ in range(5))
    point_epilogue(policy, reference, scores, prompt, prompt_reference, indices, 0.1, 0.0)


def _mirror_margins(s: Setting, size: int = USUAL) -> None:
    mirror_margins(s.floats(size), _DYNAMIC.gamma, _DYNAMIC.tau)


def _case(
    launch: Callable[..., None], *arguments: Any, default: bool = True, **options: Any
) -> Case:
    """Of a launch that takes a setting first."""
    return Case(lambda s: launch(s, *arguments, **options), STATISTICS, default)


LOSS_CASES = {
    **{
        f"pair loss, {link.name.lower().replace('_', '-')}": _case(
            _pair_loss, PairForm(link=link, link_a=0.1)
        )
        for link in Link
    },
    "pair loss, adaptive": _case(_pair_loss, _ADAPTIVE),
    "pair loss, adaptive, largest": _case(_pair_loss, _ADAPTIVE, LARGEST, default=False),
    "pair loss, dynamic": _case(_pair_loss, replace(_DYNAMIC, draws=SAMPLE - USUAL)),
    "pair loss, dynamic, largest": _case(_pair_loss, _DYNAMIC, LARGEST, default=False),
    "direct reward": _case(_point_loss),
    "direct reward, groups": _case(_point_loss, groups=True),
    "direct reward, largest": _case(_point_loss, LARGEST, default=False),
    "direct reward, groups, largest": _case(
        _point_loss, LARGEST_GROUPED, groups=True, default=False
    ),
    "mirror margins": _case(_mirror_margins),
    "mirror margins, largest": _case(_mirror_margins, LARGEST, default=False),
}
