"""Losses of both models' hidden states, ours and by eager float64 divergences."""

from __future__ import annotations

import torch
from divergences import Two, eager_tokens, make_two, near
from truth import leaves_of

from fused_prefopt import LogpBatch, PreferenceLoss

LOSSES = {
    "tdpo1": {},
    "tdpo2": {"alpha": 0.7},
    "alpha-dpo": {"implicit_reference": "sequence_kl", "alpha": 0.1},
    "alpha-dpo, differentiable": {
        "implicit_reference": "sequence_kl",
        "alpha": 0.1,
        "stop_gradient": False,
    },
    "dpo": {},
    "simpo": {},
}


def loss_of(name: str) -> PreferenceLoss:
    return PreferenceLoss(name.partition(",")[0], **LOSSES[name])


def pairs(dtype=torch.float32) -> Two:
    return near(make_two(6, 9, 16, 53, transform="all", largest=9.0, dtype=dtype), 0.5)


def loss_and_gradients(loss_fn: PreferenceLoss, two: Two) -> tuple[torch.Tensor, ...]:
    """Loss, losses and gradients, from the hidden states of both models."""
    case, other = leaves_of(two.policy, (True, True, True)), two.reference
    result = loss_fn(
        case.hidden, case.head, case.labels, ref_hidden=other.hidden, ref_head=other.head
    )
    gradients = torch.autograd.grad(result.loss, (case.hidden, case.weight, case.bias))
    return result.loss.detach(), result.losses.detach(), *gradients


def true_loss(name: str, two: Two) -> tuple[torch.Tensor, ...]:
    """Loss, losses and gradients by eager float64 log-probs and divergences."""
    two = two.double()
    two = two._replace(policy=leaves_of(two.policy, (True, True, True)))
    kls, logps, references = (values.sum(1) for values in eager_tokens(two))
    lengths = (two.policy.labels[:, 1:] != -100).sum(1)
    batch = LogpBatch(logps, lengths, reference=references.detach(), sequence_kl=kls)
    result, case = loss_of(name).from_logps(batch), two.policy
    gradients = torch.autograd.grad(result.loss, (case.hidden, case.weight, case.bias))
    return result.loss.detach(), result.losses.detach(), *gradients
