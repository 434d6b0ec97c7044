"""The truth: eager float64 log-probs and gradients, and the cases they are compared on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_prefopt import LMHead, sequence_logps, token_logps

# Every head transform; `padded` stands for a valid_vocab below V.
TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 12.0},
    "scale": {"logit_scale": 0.3},
    "temperature": {"temperature": 0.7},
    "padded": {"padding": 5},
    "all": {"bias": True, "softcap": 9.0, "logit_scale": 1.7, "temperature": 1.3, "padding": 3},
}
TRAINING_PATHS = ("stash", "local", "recompute")
PATHS = ("evaluate", *TRAINING_PATHS)
KERNEL_ENGINES = ("cublas", "triton")
# Megabytes that force the smallest tiles.
SMALLEST = 1e-9


def covering(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of levels in which every two levels of two factors meet, in a fixed order.

    Many fewer than the product of the factors. Factors that act on each other go in as one, whose
    levels are their own product.
    """
    levels = [list(factor) for factor in factors]
    cells = [[(place, level) for level in range(len(each))] for place, each in enumerate(levels)]
    left = {pair for one, other in combinations(cells, 2) for pair in product(one, other)}
    rows = []
    while left:
        chosen = dict(min(left))
        for place, candidates in enumerate(cells):
            if place not in chosen:
                met = [
                    sum(tuple(sorted((cell, each))) in left for each in chosen.items())
                    for cell in candidates
                ]
                chosen[place] = met.index(max(met))
        left -= set(combinations(sorted(chosen.items()), 2))
        rows.append(tuple(levels[place][chosen[place]] for place in range(len(levels))))
    return rows


def on_engines(rows: Iterable[Any], engine: int = 0) -> list[Any]:
    """Parameter sets with an engine at one place: on a CPU Triton's run in the interpreter."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    marks = {name: pytest.mark.interpreted for name in KERNEL_ENGINES}
    return [pytest.param(*row, marks=marks.get(row[engine], ())) for row in rows]


ENGINES = on_engines(("torch", *KERNEL_ENGINES))


@dataclass(frozen=True)
class Case:
    """hidden (S, T, D), weight (V, D), bias (V,) or None, labels (S, T), head options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab(self) -> int:
        return self.options.get("valid_vocab") or self.weight.shape[0]

    @property
    def head(self) -> LMHead:
        return LMHead(self.weight, self.bias, **self.options)

    def double(self) -> Case:
        """The same numbers in float64."""
        bias = None if self.bias is None else self.bias.detach().double()
        hidden, weight = self.hidden.detach().double(), self.weight.detach().double()
        return replace(self, hidden=hidden, weight=weight, bias=bias)

    def rounded(self, dtype: torch.dtype) -> Case:
        """Hidden, weight and bias in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)


def make_case(
    sequences: int = 3,
    length: int = 7,
    hidden_size: int = 11,
    vocab: int = 29,
    *,
    dtype: torch.dtype = torch.float32,
    largest: float = 30.0,
    bias: bool = False,
    padding: int = 0,
    labelled: float = 0.6,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A random case whose largest |hidden @ weight.T| is `largest`.

    Args:
        largest: of the plain logits.
        bias: with a bias.
        padding: rows at the end of the weight that are no vocabulary.
        labelled: share of positions that carry a label.
        options: softcap, logit_scale, temperature of the head.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = draw(sequences, length, hidden_size), draw(vocab, hidden_size)
    peak = (hidden @ weight.t()).abs().max() if hidden.numel() else torch.tensor(1.0)
    weight *= largest / peak
    labels = torch.randint(0, vocab - padding, (sequences, length), generator=generator)
    dropped = torch.rand(sequences, length, generator=generator) >= labelled
    if padding:
        options["valid_vocab"] = vocab - padding
    case = Case(hidden, weight, draw(vocab) if bias else None, labels, options)
    return replace(case.rounded(dtype), labels=labels.masked_fill(dropped, -100))


def true_logits(case: Case) -> Tensor:
    """Logits (..., vocab) of a case, in its own dtype."""
    options = case.options
    logits = case.hidden @ case.weight.t()
    if case.bias is not None:
        logits = logits + case.bias
    logits = logits * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits[..., : case.vocab] / options.get("temperature", 1.0)


def picked(logps: Tensor, targets: Tensor) -> Tensor:
    """Log-probs of the targets, 0 where there is none."""
    labelled = targets != -100
    found = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.where(labelled, 0.0)


def true_logps(case: Case, *, shift: bool = True) -> Tensor:
    """Token log-probs (S, T) of a case by eager PyTorch, in its own dtype, differentiable."""
    logps = true_logits(case).log_softmax(-1)
    # Entry t belongs to label t, which row t − 1 predicts.
    return aligned(logps, case.labels) if shift else picked(logps, case.labels)


def aligned(logps: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of labels (S, T), each from the row before it; 0 at the start and where ignored."""
    return torch.cat([torch.zeros_like(logps[:, :1, 0]), picked(logps[:, :-1], labels[:, 1:])], 1)


@dataclass(frozen=True)
class Result:
    """sums (S,), tokens (S, T), and gradients of hidden, weight and bias (None: not asked for)."""

    sums: Tensor
    tokens: Tensor
    grads: tuple[Tensor | None, ...]


def upstream_of(case: Case, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random d loss / d sums (S,) and d loss / d tokens (S, T), in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return draw(case.labels.shape[0]), draw(*case.labels.shape)


def needs_of(path: str) -> tuple[bool, bool, bool]:
    """Which of hidden, weight and bias a path can train."""
    return {"evaluate": (False,) * 3, "stash": (True, False, False)}.get(path, (True,) * 3)


def leaves_of(case: Case, needs: tuple[bool, bool, bool]) -> Case:
    """A copy of the case whose tensors are leaves that require gradients as `needs` says."""
    tensors = (case.hidden, case.weight, case.bias)
    hidden, weight, bias = (
        None if value is None else value.detach().requires_grad_(need)
        for value, need in zip(tensors, needs, strict=True)
    )
    return replace(case, hidden=hidden, weight=weight, bias=bias)


def computed(case: Case, *, needs: tuple[bool, bool, bool], shift: bool = True, **options: Any):
    """Ours: a `Result` in the case's own dtype; the loss uses both the sums and the tokens."""
    case = leaves_of(case, needs)
    sums = sequence_logps(case.hidden, case.head, case.labels, shift=shift, **options).sums
    tokens = token_logps(case.hidden, case.head, case.labels, shift=shift, **options)
    return _differentiated(case, sums, tokens)


def true_result(case: Case, *, needs: tuple[bool, bool, bool], shift: bool = True) -> Result:
    """The truth: the same `Result` by eager float64 on the same numbers."""
    case = leaves_of(case.double(), needs)
    tokens = true_logps(case, shift=shift)
    return _differentiated(case, tokens.sum(1), tokens)


def _differentiated(case: Case, sums: Tensor, tokens: Tensor) -> Result:
    tensors = (case.hidden, case.weight, case.bias)
    if sums.requires_grad:
        of_sums, of_tokens = (each.to(sums.device) for each in upstream_of(case))
        ((sums.double() * of_sums).sum() + (tokens.double() * of_tokens).sum()).backward()
    grads = tuple(None if value is None else value.grad for value in tensors)
    return Result(sums.detach(), tokens.detach(), grads)


def relative(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ (Frobenius); 0 where both are zero."""
    distance = (got.double() - truth.double()).norm()
    return float(distance / truth.double().norm()) if bool(distance > 0) else 0.0


def largest_error(got: Tensor, truth: Tensor) -> float:
    return (
        float((got.detach().double() - truth.detach().double()).abs().max()) if got.numel() else 0.0
    )


def assert_gradients(got: Result, truth: Result, tolerance: float) -> None:
    """Each gradient is present where the truth has one, and within the relative tolerance."""
    for name, ours, right in zip(("hidden", "weight", "bias"), got.grads, truth.grads, strict=True):
        assert (ours is None) == (right is None), name
        if ours is not None:
            assert ours.shape == right.shape, name
            assert relative(ours, right) <= tolerance, (name, relative(ours, right))


def assert_right(
    case: Case,
    values: float,
    gradients: float,
    *,
    needs: tuple[bool, bool, bool] | None = None,
    shift: bool = True,
    path: str = "auto",
    **options: Any,
) -> Result:
    """Ours, whose token log-probs and gradients are within the tolerances of eager float64's.

    Args:
        values: absolute, in nats.
        gradients: relative (Frobenius).
        needs: which of hidden, weight and bias train; None: all that the path can.
        shift, path, options: of the call.
    """
    needs = needs_of(path) if needs is None else needs
    truth = true_result(case, needs=needs, shift=shift)
    got = computed(case, needs=needs, shift=shift, path=path, **options)
    assert largest_error(got.tokens, truth.tokens) <= values
    assert_gradients(got, truth, gradients)
    return got


def nothing_labelled(case: Case) -> Case:
    return replace(case, labels=torch.full_like(case.labels, -100))


def tight(path: str, workspace_mb: float = SMALLEST) -> dict[str, float]:
    """The workspace as an option of a call; `local` does not cut its own, which must fit."""
    return {} if path == "local" else {"workspace_mb": workspace_mb}
