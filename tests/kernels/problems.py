"""Operands of a head with float64 logits, and the kernels' launchers called on a slab of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from machines import INTERPRETED, per_machine
from torch import Tensor

# Whoever imports this is skipped where there is no Triton.
pytest.importorskip("triton")

from fused_prefopt.kernels.architectures import Block  # noqa: E402
from fused_prefopt.kernels.fold_logits import Partials, fold_logits  # noqa: E402
from fused_prefopt.kernels.fold_rows import fold_rows  # noqa: E402
from fused_prefopt.kernels.logits_gradient import logits_gradient  # noqa: E402
from fused_prefopt.kernels.recompute_gradient import recompute_gradient  # noqa: E402
from fused_prefopt.ops.tuning import tuning_of  # noqa: E402

LOWEST = torch.finfo(torch.float32).min
# Rows, vocabulary, hidden size of each shape, by the bytes of an operand: where the interpreter
# runs tiles of 16 × 32, primes, multiples of the block and of nothing; of the architectures' tiles
# more than one each way, more steps than their pipeline has stages, a hidden size that is no
# multiple of the tile's, and rows that are not whole 16 bytes.
_SMALL = {"one": (1, 1, 1), "tiny": (7, 13, 11)}
_INTERPRETED = _SMALL | {
    "row": (1, 257, 16),
    "even": (37, 131, 48),
    "whole": (32, 64, 32),
    "odd": (53, 97, 19),
}
_EXECUTED = {
    2: _SMALL
    | {
        "deep": (129, 459, 448),
        "even": (137, 301, 128),
        "uneven": (130, 515, 200),
        "odd": (133, 270, 77),
    },
    4: _SMALL
    | {
        "deep": (65, 67, 224),
        "even": (70, 150, 64),
        "uneven": (65, 131, 44),
        "odd": (67, 130, 33),
    },
}
SHAPES = list(per_machine(_INTERPRETED, _EXECUTED[2]))
# None: as the target's tiles are loaded.
DESCRIPTORS = per_machine([False, True], [None])
# (factor, softcap)
TRANSFORMS = [(1.0, None), (1.3, 30.0), (0.02, None)]
WHOLE = slice(None)
CPU = torch.device("cpu")


def shape_of(name: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, vocabulary and hidden size of one of `SHAPES`."""
    return per_machine(_INTERPRETED, _EXECUTED[dtype.itemsize])[name]


def shape_of_tiles(dtype: torch.dtype, rich: bool) -> Block:
    """The interpreter's, or those of the architecture that is executed."""
    if INTERPRETED:
        return Block(rows=16, vocab=32, depth=16, group=2, warps=4, stages=2)
    return tuning_of(CPU).architecture.block(dtype.itemsize, rich)


@dataclass
class Statistics:
    """Running ones of rows, each (c,) fp32: as the launchers update them."""

    rows: int
    maximum: Tensor = field(init=False)
    total: Tensor = field(init=False)
    target_logit: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.maximum = torch.full((self.rows,), LOWEST)
        self.total, self.target_logit = torch.zeros(2, self.rows)

    @property
    def logsumexps(self) -> Tensor:
        return self.maximum.double() + self.total.double().log()

    @property
    def logps(self) -> Tensor:
        return (self.target_logit - self.maximum) - self.total.log()


@dataclass(frozen=True)
class Problem:
    """Operands of a head, and their logits in float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    logits: Tensor
    alpha: float
    ceiling: float | None

    @property
    def head(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "ceiling": self.ceiling}

    @property
    def logsumexps(self) -> Tensor:
        return self.logits.logsumexp(1)

    @property
    def slope(self) -> Tensor | float:
        """Of the softcap."""
        return 1.0 if self.ceiling is None else 1 - (self.logits / self.ceiling) ** 2

    @property
    def target_logits(self) -> Tensor:
        return self.logits.gather(1, self.targets[:, None])[:, 0]

    @property
    def products(self) -> Tensor:
        """(c, v) fp32, as a matmul leaves them."""
        return (self.hidden.double() @ self.weight.double().t()).float()

    def gradient(self, scale: Tensor) -> Tensor:
        """(c, v) float64 scale · (softmax − one-hot) · slope."""
        wanted = self.logits.softmax(1)
        wanted[torch.arange(len(self.targets)), self.targets] -= 1
        return wanted * self.slope * scale.double()[:, None]

    def of_targets(self, scale: Tensor) -> dict[str, Tensor]:
        """What the gradients' launchers want to know of the targets."""
        found = self.target_logits
        slope = 1.0 if self.ceiling is None else 1 - (found / self.ceiling) ** 2
        residuals = ((found - self.logsumexps).expm1() * slope).float()
        return {"targets": self.targets, "residuals": residuals, "scale": scale}

    def _bias(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def tiles(self, rich: bool, descriptors: bool | None) -> dict[str, Any]:
        """As `TritonEngine` chooses them; `rich`: more happens to a tile than a plain fold."""
        unaligned = self.hidden.shape[1] * self.hidden.itemsize % 16 > 0
        rich = rich or unaligned or self.ceiling is not None
        if descriptors is None:
            descriptors = not INTERPRETED and tuning_of(CPU).descriptors
        return {"block": shape_of_tiles(self.hidden.dtype, rich), "descriptors": descriptors}

    def fold(
        self,
        statistics: Statistics,
        columns: slice = WHOLE,
        descriptors: bool | None = None,
        **more: Any,
    ) -> Partials:
        return fold_logits(
            self.hidden,
            self.weight[columns],
            self._bias(columns),
            self.targets,
            statistics.target_logit,
            **self.head,
            **self.tiles(bool(more), descriptors),
            first=columns.start or 0,
            **more,
        )

    def fold_products(self, statistics: Statistics, columns: slice) -> None:
        fold_rows(
            self.products[:, columns],
            self._bias(columns),
            self.targets,
            statistics.maximum,
            statistics.total,
            statistics.target_logit,
            **self.head,
            first=columns.start,
        )

    def recompute(
        self,
        scale: Tensor,
        out: Tensor,
        columns: slice = WHOLE,
        descriptors: bool | None = None,
        sums: bool = True,
    ) -> Tensor | None:
        return recompute_gradient(
            self.hidden,
            self.weight[columns],
            self._bias(columns),
            self.logsumexps.float(),
            **self.of_targets(scale),
            out=out,
            **self.head,
            **self.tiles(sums, descriptors),
            first=columns.start or 0,
            sums=sums,
        )

    def from_products(
        self, scale: Tensor, products: Tensor, out: Tensor, columns: slice = WHOLE
    ) -> Tensor | None:
        return logits_gradient(
            products,
            self.logsumexps.float(),
            out,
            **self.of_targets(scale),
            bias=self._bias(columns),
            **self.head,
            first=columns.start or 0,
            sums=True,
        )


def problem(shape, dtype, *, bias=False, transform=(1.0, None)) -> Problem:
    rows, vocab, depth = shape
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, depth).to(dtype), torch.randn(vocab, depth)
    weight = (weight * 25 / (hidden.double() @ weight.double().t()).abs().max()).to(dtype)
    added = torch.randn(vocab).to(dtype) if bias else None
    alpha, softcap = transform
    logits = hidden.double() @ weight.double().t() + (0 if added is None else added.double())
    logits, ceiling = logits * alpha, None
    if softcap is not None:
        alpha, ceiling, logits = alpha / softcap, softcap, softcap * torch.tanh(logits / softcap)
    return Problem(hidden, weight, added, torch.randint(vocab, (rows,)), logits, alpha, ceiling)


def in_the_middle(dtype: torch.dtype, cap: float | None) -> Problem:
    """Of 160 vocabulary entries, with targets in all parts of them."""
    given = problem((9, 160, 24), dtype, bias=True, transform=(1.0, cap))
    given.targets.copy_(torch.tensor([0, 31, 32, 63, 64, 95, 96, 159, 70]))
    return given


def assert_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative in the Frobenius norm."""
    assert got.isfinite().all()
    assert (got.double() - wanted).norm() <= tolerance * max(1e-30, wanted.norm().item())


def assert_exponentials(got: Tensor, exponents: Tensor) -> None:
    """exp of fp32 numbers, which moves by as much, relative, as the number does in its last place.

    A GPU takes it as 2^(x · log2 e), whose exponent it rounds.
    """
    wanted, exponents = exponents.double().exp(), exponents.double()
    unit = 3e-7 + 2.0**-23 * exponents.abs()
    # Below the normal numbers it may be 0.
    assert ((got.double() - wanted).abs() <= unit * wanted + 2.0**-126).all()


def assert_folded(statistics: Statistics, given: Problem, columns: slice) -> None:
    """Those of one slab, whose targets outside of it have left the 123 that was there."""
    inside = (given.targets >= columns.start) & (given.targets < columns.stop)
    assert 0 < int(inside.sum()) < len(inside)
    exact = given.logits[:, columns].logsumexp(1)
    assert (statistics.logsumexps - exact).abs().max() <= 1e-5
    found = statistics.target_logit
    assert (found[inside] - given.target_logits[inside]).abs().max() <= 1e-5
    assert (found[~inside] == 123).all()
