"""Every loss and option fused with the head, on every path, against eager log-probs."""

from __future__ import annotations

import pytest
import torch
from loss_cases import VARIANTS

from fused_prefopt import LogpBatch, PreferenceLoss

S, T, D, V = 6, 8, 5, 29
# Path and whether the head trains; `evaluate` has no gradient.
PATHS = [("local", True), ("recompute", True), ("stash", False), ("evaluate", None)]


def draws() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, V, (S, T), generator=generator)
    prompt_labels = labels.clone()
    labels[:, :3], prompt_labels[:, 3:] = -100, -100
    labels[1, 5:], labels[4] = -100, -100
    extras = {
        "reference": -draw(S).abs() * 15,
        "rewards": draw(S),
        "desirable": torch.tensor([True, True, False, True, False, False]),
        "prompt_reference": -draw(S).abs() * 9,
        "groups": torch.arange(S) // 2,
        "sequence_kl": draw(S).abs(),
        "collision": -draw(S).abs() * 9,
    }
    hidden, weight = draw(S, T, D), draw(V, D)
    return {"hidden": hidden, "weight": weight, "labels": (labels, prompt_labels), **extras}


def eager(hidden, weight, labels):
    logps = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (targets >= 0)).sum(1), (targets >= 0).sum(1)


@pytest.mark.parametrize(("path", "trains"), PATHS, ids=[path for path, _ in PATHS])
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_fused_equals_eager(name, options, path, trains):
    extras = draws()
    hidden, weight = extras.pop("hidden"), extras.pop("weight")
    labels, prompt_labels = extras.pop("labels")
    inputs = [hidden] if trains is False else [hidden, weight]
    for each in inputs:
        each.requires_grad_(trains is not None)
    fused = PreferenceLoss(name, path=path, **options)
    known = PreferenceLoss(name, **options)
    prompt, _ = eager(hidden.detach(), weight.detach(), prompt_labels)
    # Two steps, so that statistics of the first reach the second.
    for _ in range(2):
        got = fused(hidden, weight, labels, prompt_labels=prompt_labels, **extras)
        policy, lengths = eager(hidden, weight, labels)
        wanted = known.from_logps(LogpBatch(policy, lengths, prompt=prompt, **extras))
        torch.testing.assert_close(got.losses, wanted.losses, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-9, atol=1e-11)
        if trains is not None:
            gradients = [torch.autograd.grad(result.loss, inputs) for result in (got, wanted)]
            for found, true in zip(*gradients, strict=True):
                torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-10)
