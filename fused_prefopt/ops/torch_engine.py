"""The torch engine: what happens to one tile of logits (c rows × v vocabulary entries).

The loops over tiles are in `paths`; an engine supplies `tile_cost`, `operand_dtype`, `product`,
`logits`, `fold`, `residual` and `kept_residual`, and nothing else. Matmuls take their operands in
`operand_dtype` and leave an accumulator (fp32, or float64 for float64 inputs) that nothing rounds
before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.ops.plan import TileCost

# exp(-69) is about 1e-30. Probabilities below it change no sum, but as denormals they make a CPU
# matmul over them 20 times slower.
_SMALLEST_EXPONENT = -69.0


@dataclass(frozen=True)
class HeadMath:
    """The scalar part of an `LMHead`, and the dtype that its matmuls compute in."""

    softcap: float | None
    logit_scale: float
    temperature: float
    dtype: torch.dtype

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def kept(self) -> torch.dtype:
        """What `local` keeps its probabilities in; they meet a matmul in `dtype` anyway."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else self.accumulator

    @property
    def slope(self) -> float:
        """d logit / d (hidden @ weight.T + bias) where the softcap does not bend it."""
        return self.logit_scale / self.temperature

    def cap_slope(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """1 − tanh² of the softcap, from the logits it has left; any shape; `out` may be those."""
        assert self.softcap is not None
        tanh = torch.mul(logits, self.temperature / self.softcap, out=out)
        return tanh.square_().neg_().add_(1)


@dataclass(frozen=True)
class RowStatistics:
    """Running maximum, Σ exp(logit − maximum) and target logit of each row, all (n,)."""

    maximum: Tensor
    sum: Tensor
    target: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
        # The lowest finite number, not -inf: a slab whose logits are all -inf then gives zeros.
        lowest = torch.finfo(dtype).min
        maximum = torch.full((rows,), lowest, dtype=dtype, device=device)
        return cls(maximum, torch.zeros_like(maximum), torch.zeros_like(maximum))

    def __getitem__(self, rows: slice) -> RowStatistics:
        return RowStatistics(self.maximum[rows], self.sum[rows], self.target[rows])

    def logps(self) -> Tensor:
        return (self.target - self.maximum) - self.sum.log()

    def logsumexps(self) -> Tensor:
        return self.maximum + self.sum.log()


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matmul operands are stored in: CPU matmuls return their operands' dtype, so fp32."""
    if device.type == "cpu" and dtype != torch.float64:
        return torch.float32
    return dtype


def tile_cost(math: HeadMath, weight: torch.dtype, device: torch.device, path: str) -> TileCost:
    """What this engine's buffers take for a tile of a head whose weight has dtype `weight`."""
    operand, accumulator = operand_dtype(math.dtype, device), math.accumulator
    logit = accumulator.itemsize * (1 if math.softcap is None else 2)
    if operand != accumulator:
        logit += operand.itemsize
    # `recompute` holds the rows twice in its backward: for the logits, and scaled for the weight.
    hidden = operand.itemsize * (2 if path == "recompute" else 1)
    slabs = operand.itemsize if weight != operand else 0
    # On their way to a wider operand dtype, rows and slabs pass through the dtype computed in; and
    # oneDNN reorders a matmul's operands to it, in a buffer of up to the tile's size.
    if math.dtype != operand:
        logit += operand.itemsize
        hidden += math.dtype.itemsize
        slabs += 0 if weight == math.dtype else math.dtype.itemsize
    if weight != accumulator and path in ("local", "recompute"):
        slabs += accumulator.itemsize
    return TileCost(logit, hidden, slabs)


def matmul_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Let CPU matmuls of bf16 values held in fp32 use bf16 instructions: the operands are exact,
    the sums and the result stay fp32."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return _bf16_products()
    return nullcontext()


@contextmanager
def _bf16_products() -> Iterator[None]:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def product(
    left: Tensor, right: Tensor, out: Tensor, *, alpha: float = 1.0, accumulate: bool = False
) -> Tensor:
    """``out = [out +] alpha * left @ right``, summed in `out`'s dtype: (a, b) @ (b, c) → (a, c)."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=float(accumulate), alpha=alpha, out=out)
    return torch.addmm(
        out, left, right, beta=float(accumulate), alpha=alpha, out_dtype=out.dtype, out=out
    )


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, math: HeadMath, out: Tensor
) -> None:
    """Logits of one tile into `out`: hidden (c, D), weight (v, D), bias (v,), out (c, v)."""
    alpha = math.slope if math.softcap is None else math.logit_scale / math.softcap
    if bias is not None:
        out.copy_(bias).mul_(alpha)
    product(hidden, weight.t(), out, alpha=alpha, accumulate=bias is not None)
    if math.softcap is not None:
        out.tanh_().mul_(math.softcap / math.temperature)


def fold(tile: Tensor, statistics: RowStatistics, targets: Tensor, keep: bool) -> Tensor:
    """Fold a tile of logits into the running statistics.

    Args:
        tile: (c, v) logits.
        statistics: of the c rows, updated in place.
        targets: (c,) target index within the tile; outside [0, v) where the target is elsewhere.
        keep: leave exp(logit − new maximum) in the tile; else its contents are lost.

    Returns:
        (c,) factor exp(old maximum − new maximum), for what was summed up with the old maximum.
    """
    inside, column = _locate(targets, tile.shape[1])
    found = tile.gather(1, column).squeeze(1)
    statistics.target.copy_(found.where(inside, statistics.target))
    maximum = torch.maximum(statistics.maximum, tile.amax(1))
    factor = (statistics.maximum - maximum).exp_()
    _exp_below(tile, maximum)
    statistics.sum.mul_(factor).add_(tile.sum(1))
    statistics.maximum.copy_(maximum)
    return factor


def residual(
    tile: Tensor, logsumexps: Tensor, targets: Tensor, logps: Tensor, math: HeadMath
) -> None:
    """Overwrite a tile of logits by softmax − one-hot, times the softcap's slope.

    Args:
        tile: (c, v) logits.
        logsumexps: (c,) of the whole rows.
        targets: (c,) target index within the tile; outside [0, v) where the target is elsewhere.
        logps: (c,) log-probs of the targets.
    """
    slope = None if math.softcap is None else math.cap_slope(tile)
    _exp_below(tile, logsumexps)
    if slope is not None:
        tile.mul_(slope)
    _set_targets(tile, targets, target_residual(logps, logsumexps, math))


def kept_residual(
    kept: Tensor,
    maximum: Tensor,
    logsumexps: Tensor,
    targets: Tensor,
    logps: Tensor,
    math: HeadMath,
    out: Tensor,
) -> None:
    """The same residual from a tile that `fold` left as exp(logit − maximum), into `out`.

    Args:
        kept: (c, v) in `math.kept`, not changed.
        maximum: (c,) the running maxima of `fold` after this tile.
        logsumexps, targets, logps: (c,) as in `residual`.
    """
    torch.mul(kept, (maximum - logsumexps).exp_().unsqueeze(1), out=out)
    if math.softcap is not None:
        # Where `kept` has underflowed to 0 its log is -inf, and 0 times that slope would be NaN.
        logits = kept.to(out.dtype, copy=True).log_().clamp_(min=_SMALLEST_EXPONENT)
        logits.add_(maximum.unsqueeze(1))
        out.mul_(math.cap_slope(logits, out=logits))
    _set_targets(out, targets, target_residual(logps, logsumexps, math))


def target_residual(logps: Tensor, logsumexps: Tensor, math: HeadMath) -> Tensor:
    """(c,) residual of the targets, (p − 1) · slope, from their fp32 log-probs."""
    value = logps.expm1()
    return value if math.softcap is None else value * math.cap_slope(logps + logsumexps)


def _exp_below(tile: Tensor, ceiling: Tensor) -> None:
    tile.sub_(ceiling.unsqueeze(1))
    if tile.device.type == "cpu":
        tile.clamp_(min=_SMALLEST_EXPONENT)
    tile.exp_()


def _locate(targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    inside = (targets >= 0) & (targets < width)
    return inside, targets.clamp(0, width - 1).unsqueeze(1)


def _set_targets(tile: Tensor, targets: Tensor, values: Tensor) -> None:
    inside, column = _locate(targets, tile.shape[1])
    others = tile.gather(1, column).squeeze(1)
    tile.scatter_(1, column, values.where(inside, others).unsqueeze(1))
