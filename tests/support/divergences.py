"""KL(reference || policy) with its gradients: ours and eager float64's, and the cases of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from truth import TRANSFORMS, Case, Result, leaves_of, make_case, picked, true_logits

from fused_prefopt import SequenceKl, sequence_kl

ALL = (True, True, True)


class Two(NamedTuple):
    """A policy, and its reference on the same labels."""

    policy: Case
    reference: Case

    def double(self) -> Two:
        """The same numbers in float64."""
        return Two(self.policy.double(), self.reference.double())


def make_two(
    sequences: int = 3,
    length: int = 7,
    hidden_size: int = 11,
    vocab: int = 29,
    *,
    transform: str = "plain",
    other: str = "plain",
    **options: Any,
) -> Two:
    """Two random cases whose heads differ in hidden size, logits and transforms."""
    options = {"largest": 20.0, **options}
    own, others = dict(TRANSFORMS[transform]), dict(TRANSFORMS[other])
    # Both vocabularies end at the same entry.
    own["padding"] = padding = own.get("padding", 0)
    others["padding"] = 0
    policy = make_case(sequences, length, hidden_size, vocab, **own, **options)
    size = (sequences, length, hidden_size + 3, vocab - padding)
    reference = make_case(*size, **others, **{**options, "seed": 7})
    return Two(policy, replace(reference, labels=policy.labels))


def near(two: Two, distance: float) -> Two:
    """The policy, and a reference that is the same model but for some noise."""
    generator = torch.Generator().manual_seed(3)
    policy = two.policy
    noise = torch.randn(policy.hidden.shape, generator=generator) * distance
    return Two(policy, replace(policy, hidden=policy.hidden + noise.to(policy.hidden.dtype)))


def eager_tokens(two: Two, *, shift: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """KL, policy log-prob and reference log-prob of each row (S, T or T − 1), 0 without label."""
    labels = two.policy.labels
    logps, others = (true_logits(case).log_softmax(-1) for case in two)
    if shift:
        labels, logps, others = labels[:, 1:], logps[:, :-1], others[:, :-1]
    # A token that neither may say adds nothing.
    terms = (others.exp() * (others - logps)).where(others > -torch.inf, 0.0)
    return terms.sum(-1).where(labels != -100, 0.0), picked(logps, labels), picked(others, labels)


def ours(two: Two, **options: Any) -> SequenceKl:
    policy, reference = two
    return sequence_kl(
        policy.hidden, policy.head, reference.hidden, reference.head, policy.labels, **options
    )


def by_token(two: Two, **options: Any) -> SequenceKl:
    """`sequence_kl` of every row, each as a sequence of its own: S · T of them."""
    policy, reference = two
    return sequence_kl(
        policy.hidden.flatten(0, 1),
        policy.head,
        reference.hidden.flatten(0, 1),
        reference.head,
        policy.labels.flatten(),
        shift=False,
        sequence_ids=torch.arange(policy.labels.numel()),
        **options,
    )


def computed_kl(
    two: Two, needs: tuple[bool, bool, bool] = ALL, weights: Tensor | None = None, **options: Any
) -> Result:
    """Ours: kl in `sums`, log-probs in `tokens`, and the gradients of both under `weights`."""
    two = two._replace(policy=leaves_of(two.policy, needs))
    out = ours(two, **options)
    return _differentiated(two, out.kl, out.policy, weights)


def true_kl(
    two: Two, needs: tuple[bool, bool, bool] = ALL, weights: Tensor | None = None
) -> Result:
    """The truth: the same by eager float64 on the same numbers."""
    two = two.double()
    two = two._replace(policy=leaves_of(two.policy, needs))
    kls, logps, _ = eager_tokens(two)
    return _differentiated(two, kls.sum(1), logps.sum(1), weights)


def weights_of(two: Two) -> Tensor:
    """(2, S) float64 random d loss / d kl and d loss / d policy."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, two.policy.labels.shape[0], generator=generator, dtype=torch.float64)


def _differentiated(two: Two, kl: Tensor, policy: Tensor, weights: Tensor | None) -> Result:
    of_kl, of_policy = weights_of(two) if weights is None else weights
    if kl.requires_grad:
        ((kl.double() * of_kl).sum() + (policy.double() * of_policy).sum()).backward()
    case = two.policy
    grads = (case.hidden.grad, case.weight.grad, None if case.bias is None else case.bias.grad)
    return Result(kl.detach(), policy.detach(), grads)
