"""Launches of compiled kernels, each compared with float64: what tests of the emulator change.

Small, but of an architecture's own tiles: more steps than a pipeline has stages, and nothing a
multiple of anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

# Whoever imports this is skipped where there is no Triton.
pytest.importorskip("triton")
import torch  # noqa: E402
from loss_cases import random_batch  # noqa: E402
from torch import Tensor  # noqa: E402

from fused_prefopt.kernels.architectures import ARCHITECTURES  # noqa: E402
from fused_prefopt.kernels.fold_logits import fold_logits, merge_partials  # noqa: E402
from fused_prefopt.kernels.fold_rows import fold_rows  # noqa: E402
from fused_prefopt.kernels.recompute_gradient import recompute_gradient  # noqa: E402
from fused_prefopt.kernels.sequence_sums import sequence_sums  # noqa: E402
from fused_prefopt.loss_kernel import launch_loss  # noqa: E402
from fused_prefopt.losses import DynamicMargin, LogRatio, PairwiseLoss  # noqa: E402
from fused_prefopt.types import LogpBatch  # noqa: E402

BF16 = torch.bfloat16
LOWEST = torch.finfo(torch.float32).min
# One rounding to bf16, and what the sums before it are off by.
ROUNDED = {"rtol": 2.0**-8 * 1.01 + 3e-5, "atol": 1e-6}
ROWS, VOCAB, DEPTH = 133, 150, 336
SOFTCAP = 30.0
# As `HeadMath` hands it over: logits = ceiling · tanh(alpha · (hidden · weight + bias)).
HEAD = {"alpha": 4.0 / SOFTCAP, "ceiling": SOFTCAP}
TILES = {"block": ARCHITECTURES[0].block(2, rich=True), "descriptors": False}


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows, weight and bias in bf16, targets, and the (rows, vocab) logits in float64."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, DEPTH).to(BF16), torch.randn(VOCAB, DEPTH)
    weight = (weight * 25 / (hidden.double() @ weight.double().t()).abs().max()).to(BF16)
    bias = torch.randn(VOCAB).to(BF16)
    logits = hidden.double() @ weight.double().t() + bias.double()
    logits = SOFTCAP * torch.tanh(logits * HEAD["alpha"])
    return hidden, weight, bias, torch.randint(VOCAB, (ROWS,)), logits


def fold_logits_kept() -> None:
    """Two programs each way, whose exponentials are kept."""
    hidden, weight, bias, targets, logits = operands()
    maximum, total, logit = torch.full((ROWS,), LOWEST), torch.zeros(ROWS), torch.zeros(ROWS)
    kept = torch.full((ROWS, VOCAB + 3), torch.nan, dtype=BF16)
    given = (hidden, weight, bias, targets, logit)
    partials = fold_logits(*given, **HEAD, **TILES, kept=kept[:, :VOCAB])
    merge_partials(partials, maximum, total)
    assert (maximum.double() + total.double().log() - logits.logsumexp(1)).abs().max() <= 1e-5
    assert (logit - _of_targets(logits, targets)).abs().max() <= 1e-5
    peaks = [part.amax(1) for part in logits.split(partials.width, 1)]
    assert (partials.maximum - torch.stack(peaks)).abs().max() <= 1e-5
    above = partials.maximum.double().repeat_interleave(partials.width, 0)[:VOCAB].t()
    torch.testing.assert_close(kept[:, :VOCAB].double(), (logits - above).exp(), **ROUNDED)
    assert kept[:, VOCAB:].isnan().all()


def fold_rows_kept() -> None:
    torch.manual_seed(0)
    products, bias = torch.randn(5, 777) * 9, torch.randn(777).to(BF16)
    products[3] = 200 * torch.rand(777)
    logits = SOFTCAP * torch.tanh((products.double() + bias.double()) * 1.3 / SOFTCAP)
    targets, kept = torch.randint(0, 777, (5,)), torch.full((5, 780), torch.nan, dtype=BF16)
    maximum, total, logit = torch.full((5,), LOWEST), torch.zeros(5), torch.zeros(5)
    more: dict[str, Any] = {"alpha": 1.3 / SOFTCAP, "ceiling": SOFTCAP, "kept": kept[:, :777]}
    fold_rows(products, bias, targets, maximum, total, logit, **more)
    assert (maximum.double() + total.double().log() - logits.logsumexp(1)).abs().max() <= 1e-5
    assert (logit - _of_targets(logits, targets)).abs().max() <= 1e-5
    wanted = (logits - maximum.double()[:, None]).exp()
    torch.testing.assert_close(kept[:, :777].double(), wanted, **ROUNDED)
    assert kept[:, 777:].isnan().all()


def recomputed_gradient() -> None:
    hidden, weight, bias, targets, logits = operands()
    logsumexps, found = logits.logsumexp(1), _of_targets(logits, targets)
    residuals = (found - logsumexps).expm1() * (1 - (found / SOFTCAP) ** 2)
    scale, store = torch.randn(ROWS), torch.full((ROWS, VOCAB + 3), torch.nan, dtype=BF16)
    sums = recompute_gradient(
        hidden,
        weight,
        bias,
        logsumexps.float(),
        targets=targets,
        residuals=residuals.float(),
        scale=scale,
        out=store[:, :VOCAB],
        **HEAD,
        **TILES,
        sums=True,
    )
    wanted = logits.softmax(1)
    wanted[torch.arange(ROWS), targets] -= 1
    wanted *= (1 - (logits / SOFTCAP) ** 2) * scale.double()[:, None]
    bound = wanted.abs() * ROUNDED["rtol"] + scale.abs()[:, None] * 1e-7
    assert ((store[:, :VOCAB].double() - wanted).abs() <= bound).all()
    assert sums is not None
    assert (sums - wanted.sum(0)).norm() <= 1e-5 * wanted.sum(0).norm()
    assert store[:, VOCAB:].isnan().all()


def dynamic_pair_loss() -> None:
    """γ-PO with a queue of margins that the second batch draws from."""
    loss = PairwiseLoss(
        LogRatio(beta=0.5), DynamicMargin(gamma=2.0, tau=5.0, queue_size=400, sample_size=400)
    )
    ours, truth = loss.statistics(), loss.statistics()
    for seed in (0, 1):
        batch = random_batch(2 * 150, seed, torch.float32)
        policy = batch.policy.detach().clone()
        if seed == 0:
            # They do not enter, so that ranks are no lane's own number.
            policy[[1, 2, 31, 70, 71, 140]] = torch.nan
        batch = replace(batch, policy=policy.requires_grad_())
        exact = _doubled(batch)
        got = launch_loss(loss, ours, batch)
        wanted = loss(exact, truth(loss.observe(exact)))
        for name in ("losses", "loss", "rewards", "target_margins"):
            _close(getattr(got, name), getattr(wanted, name))
        (found,) = torch.autograd.grad(got.losses.sum(), batch.policy)
        (right,) = torch.autograd.grad(wanted.losses.sum(), exact.policy)
        _close(found, right)
        for key, value in wanted.metrics.items():
            _close(got.metrics[key], value)
        for key, value in truth.state_dict().items():
            _close(ours.state_dict()[key].nan_to_num(), value.nan_to_num())


def _doubled(batch: LogpBatch) -> LogpBatch:
    floats = {
        name: value.detach().double()
        for name, value in vars(batch).items()
        if value is not None and value.is_floating_point()
    }
    return replace(batch, **floats | {"policy": floats["policy"].requires_grad_()})


def _close(got: Tensor, wanted: Tensor) -> None:
    got, wanted = got.detach().double(), wanted.detach().double()
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


def summed_sequences() -> None:
    """Of lengths that end in every part of a block of 1024 rows."""
    torch.manual_seed(0)
    lengths = torch.tensor([3, 130, 300, 400, 0, 520, 700, 800, 900, 1020, 1025, 2100])
    ids = torch.arange(12).repeat_interleave(lengths)
    values = torch.randn(len(ids)) * 100
    sums, found = sequence_sums(values, ids, 12, True)
    wanted = torch.zeros(12, dtype=torch.float64).index_add(0, ids, values.double())
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-7, atol=0)
    assert torch.equal(found, lengths)


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0]


# Name of a kernel → its launch.
SUBJECTS: dict[str, Callable[[], None]] = {
    "_fold_logits_kernel": fold_logits_kept,
    "_fold_rows_kernel": fold_rows_kept,
    "_recompute_gradient_kernel": recomputed_gradient,
    "_pair_loss_kernel": dynamic_pair_loss,
    "_sequence_sums_kernel": summed_sequences,
}
