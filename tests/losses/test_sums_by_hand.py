"""Sums with all that meets them at once, fused, against formulas written out in float64.

Weights of pairs and of tokens or LD-DPO's α, statistics of two terms, prompts that train, over
steps of training and evaluation.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fused_prefopt as fp
from fused_prefopt.losses.metrics import TERM_LOSS

S, T, D, V, PROMPT, PAST = 8, 11, 6, 29, 3, 6
WEIGHTS = torch.tensor([2.0, 0.0, 1.5, 0.5], dtype=torch.float64)
# Label → weight, name and hyperparameters.
TERMS = {
    "dpo": (0.8, "dpo", {"beta": 0.1}),
    "bco-pair": (0.2, "bco-pair", {"beta": 0.1}),
    "sft": (1.0, "sft", {}),
    "whole": (0.4, "sft", {"nll": "whole_token_mean"}),
    "alpha-dpo": (0.25, "alpha-dpo", {"beta": 10.0, "gamma": 4.0, "alpha": 0.05}),
    "gamma-dpo": (
        1.5,
        "gamma-dpo",
        {"beta": 0.1, "gamma": 0.5, "tau": 10.0, "queue_size": PAST, "sample_size": 64},
    ),
    "f-dpo": (0.1, "f-dpo", {"beta": 0.1, "link": "squared", "length_normalized": True}),
}
SUMS = [("gamma-dpo", "sft", "alpha-dpo", "dpo"), ("whole", "bco-pair", "gamma-dpo", "f-dpo")]


def summed(hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor | None = None):
    """Log-probs (S, T − 1) of the tokens, their weights, and the sums of both."""
    every = (hidden @ weight.T)[:, :-1].log_softmax(-1)
    there = (labels[:, 1:] != -100).double()
    if factors is not None:
        there = there * factors[:, 1:]
    tokens = every.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * there
    return tokens, there, tokens.sum(1), there.sum(1)


class ByHand:
    """The terms' losses, with what they remember."""

    def __init__(self) -> None:
        self.moments, self.seen = torch.zeros(2, dtype=torch.float64), 0.0
        self.past: list[float] = []

    def losses(self, sums, lengths, reference, prompts, trains: bool) -> dict[str, Tensor]:
        """Batch losses by the labels of `TERMS`."""
        (chosen, rejected), (many, few) = sums.chunk(2), lengths.chunk(2)
        ratios = (sums - reference).chunk(2)
        prompt, tokens = (each[: S // 2] for each in prompts)

        def mean(losses: Tensor) -> Tensor:
            return (WEIGHTS * losses).sum() / len(WEIGHTS)

        margins = 0.1 * (ratios[0] - ratios[1])
        gap = (ratios[0] / many - ratios[1] / few).detach()
        if trains:
            now = torch.stack([gap.mean(), gap.square().mean()])
            self.moments, self.seen = 0.9 * self.moments + 0.1 * now, 0.9 * self.seen + 0.1
        center, square = self.moments / self.seen
        adaptive = 4 + 0.05 * 10 * (gap - center) / (square - center**2).sqrt()
        bent = [(math.log(2) + logsigmoid(each)) for each in ratios]
        found = {
            "dpo": mean(-logsigmoid(margins)),
            "bco-pair": mean(-logsigmoid(0.1 * ratios[0]) - logsigmoid(-0.1 * ratios[1])),
            "sft": -(WEIGHTS * chosen).sum() / many.sum(),
            "whole": -(WEIGHTS * (chosen + prompt)).sum() / (many + tokens).sum(),
            "alpha-dpo": mean(-logsigmoid(10 * (chosen / many - rejected / few) - adaptive)),
            "gamma-dpo": mean(-logsigmoid(margins - self.shared(margins.detach()))),
            "f-dpo": mean((bent[0] / many - bent[1] / few - 5).square()),
        }
        if trains:
            self.past = [*self.past, *margins.tolist()][-PAST:]
        return found

    def shared(self, margins: Tensor) -> Tensor:
        """γ-PO's Algorithm 2; all of the past is in the sample."""
        pool = torch.cat([margins, torch.tensor(self.past, dtype=torch.float64)])
        number, rate = len(pool), 0.5 / 10
        shares = torch.full((number,), 1 / number, dtype=torch.float64)
        for _ in range(20):
            excess = pool - 0.5 * number * shares
            slope = 10 * (1 + (number * (shares + 1e-10)).log()) + 0.5 / (1 + excess.exp())
            shares = shares * (-rate * slope).exp()
            shares = shares / shares.sum()
        return (0.5 * number * shares)[: len(margins)]


def check(labels: tuple[str, ...], case: str, engine: str, dtype: torch.dtype, tolerance: float):
    names = ("weight", "name", "hyperparameters")
    terms = [dict(zip(names, TERMS[label], strict=True)) for label in labels]
    tail = 0.4 if case == "ld_alpha" else None
    loss_fn, truth = fp.PreferenceLoss(terms, engine=engine, ld_alpha=tail), ByHand()
    logged = [f"{TERM_LOSS}{name}" for name in loss_fn.hyperparameters]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        hidden, other, head = (
            torch.randn(*shape, generator=generator).double()
            for shape in ((S, T, D), (S, T, D), (V, D))
        )
        ids, places = torch.randint(V, (S, T), generator=generator), torch.arange(T)
        ends = torch.randint(PROMPT + 1, T + 1, (S, 1), generator=generator)
        completions = ids.masked_fill((places < PROMPT) | (places >= ends), -100)
        prompts = ids.masked_fill(places >= PROMPT, -100)
        factors = None
        if case == "token_weights":
            factors = 2 * torch.rand(S, T, generator=generator).double() + 0.1
        leaves = [each.clone().requires_grad_() for each in (hidden, head)]
        tokens, there, sums, lengths = summed(*leaves, completions, factors)
        reference, _, known, _ = summed(hidden + 0.3 * other, head, completions, factors)
        if tail is not None:
            shared = lengths.reshape(2, -1).amin(0).repeat(2)
            beyond = there * (there.cumsum(1) > shared[:, None])
            sums = sums - (1 - tail) * (tokens * beyond).sum(1)
            known = known - (1 - tail) * (reference * beyond).sum(1)
        _, _, *of_prompts = summed(*leaves, prompts)
        parts = truth.losses(sums, lengths, known, of_prompts, trains=step != 2)
        wanted = sum(TERMS[label][0] * parts[label] for label in labels)
        slopes = torch.autograd.grad(wanted, leaves)

        inputs = [each.to(dtype).requires_grad_() for each in (hidden.clone(), head.clone())]
        output = loss_fn.train(step != 2)(
            *inputs,
            completions,
            prompt_labels=prompts,
            token_weights=None if factors is None else factors.to(dtype),
            reference=known.to(dtype),
            weights=WEIGHTS.repeat(2).to(dtype),
        )
        close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        torch.testing.assert_close(output.loss, wanted, **close)
        for found, slope in zip(torch.autograd.grad(output.loss, inputs), slopes, strict=True):
            assert (found - slope).norm() <= tolerance * slope.norm()
        for name, label in zip(logged, labels, strict=True):
            torch.testing.assert_close(output.metrics[name], parts[label].detach(), **close)


cases = pytest.mark.parametrize("case", ["plain", "token_weights", "ld_alpha"])


@cases
@pytest.mark.parametrize("labels", SUMS)
def test_a_weighted_sum_of_hidden_states(labels, case):
    check(labels, case, "torch", torch.float64, 1e-12)


@pytest.mark.interpreted
@cases
@pytest.mark.parametrize("labels", SUMS)
def test_a_weighted_sum_by_kernels(labels, case):
    check(labels, case, "triton", torch.float32, 3e-6)
