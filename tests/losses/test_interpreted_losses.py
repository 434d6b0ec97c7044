"""Every loss on the Triton engines, interpreted on CPU.

Truth is the same loss in float64 on eager log-probs of the same fp32 inputs.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_cases import VARIANTS
from test_loss_fused import draws, eager

from fused_prefopt import LogpBatch, PreferenceLoss, available_losses

pytestmark = pytest.mark.interpreted

# Every loss and option on both engines; the paths take turns, and each engine meets each of them.
TURNS = itertools.cycle(["local", "recompute", "stash", "evaluate", "recompute"])
CASES = [
    (name, options, engine, next(TURNS))
    for name, options in VARIANTS
    for engine in ("cublas", "triton")
]
# Every registered loss on the paths of both engines that are not among them.
FURTHER = [
    case
    for case in itertools.product(
        available_losses(), [{}], ("cublas", "triton"), ("local", "recompute", "stash", "evaluate")
    )
    if case not in CASES
]


def single(values: dict) -> dict:
    """float32 for float64."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in values.items()
    }


@pytest.mark.parametrize(
    ("name", "options", "engine", "path"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)],
    ids=str,
)
def test_fused_equals_eager(name, options, engine, path):
    extras = draws()
    labels, prompt_labels = extras.pop("labels")
    extras = single(extras)
    true = {
        key: value.double() if value.is_floating_point() else value for key, value in extras.items()
    }
    inputs = [[values.pop("hidden"), values.pop("weight")] for values in (extras, true)]
    learns = 0 if path == "evaluate" else 1 if path == "stash" else 2
    for leaf in (*inputs[0][:learns], *inputs[1][:learns]):
        leaf.requires_grad_()
    fused = PreferenceLoss(name, path=path, engine=engine, **options)
    known = PreferenceLoss(name, **options)
    prompt, _ = eager(*(leaf.detach() for leaf in inputs[1]), prompt_labels)
    # Two steps where the statistics of the first reach the second.
    for _ in range(1 if known.statistics is None else 2):
        got = fused(*inputs[0], labels, prompt_labels=prompt_labels, **extras)
        policy, lengths = eager(*inputs[1], labels)
        wanted = known.from_logps(LogpBatch(policy, lengths, prompt=prompt, **true))
        pairs = [(got.losses, wanted.losses), (got.loss, wanted.loss)]
        if learns:
            leaves = [each[:learns] for each in inputs]
            pairs += zip(
                torch.autograd.grad(got.loss, leaves[0]),
                torch.autograd.grad(wanted.loss, leaves[1]),
                strict=True,
            )
        for found, truth in pairs:
            assert found.dtype == torch.float32
            scale = max(1.0, truth.abs().max().item())
            assert (found - truth).abs().max() <= 2e-5 * scale
