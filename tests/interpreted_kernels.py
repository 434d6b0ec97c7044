"""The Triton kernels in the interpreter on CPU; `test_kernels.py` runs this file.

Interpretation is chosen when a kernel is defined, so it needs a process of its own, with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from truth import leaves_of, make_case, needs_of

from fused_prefopt import sequence_logps
from fused_prefopt.kernels.logits_gradient import residual_rows
from fused_prefopt.kernels.row_statistics import fold_rows


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("width", [1, 2, 64, 777, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_statistics_of_two_slabs(width, dtype, keep):
    torch.manual_seed(0)
    logits = torch.randn(7, 2 * width, dtype=torch.float64).to(dtype) * 9
    logits[3] = 200 * torch.rand(2 * width)
    logits[4, : width // 2] = -torch.inf
    targets = torch.randint(0, 2 * width, (7,))
    maximum = torch.full((7,), torch.finfo(dtype).min, dtype=dtype)
    total, target_logit = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for start in (0, width):
        # A strided view, as `local` passes them.
        tile = logits.clone()[:, start : start + width]
        before = maximum.clone()
        factor = fold_rows(tile, targets - start, maximum, total, target_logit, keep=keep)
        torch.testing.assert_close(factor, (before - maximum).exp())
        part = logits[:, start : start + width]
        kept = (part - maximum[:, None]).exp() if keep else part
        torch.testing.assert_close(tile, kept)
    truth = logits.double().logsumexp(1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    logsumexp = (maximum + total.log()).double()
    torch.testing.assert_close(logsumexp, truth, rtol=1e-7, atol=tolerance)
    assert torch.equal(target_logit, logits.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("width", [1, 64, 777, 5000])
def test_logits_gradient(width, cap):
    torch.manual_seed(0)
    logits = (torch.randn(6, width) * 9).clamp(-29, 29)
    targets = torch.tensor([0, width - 1, -1, width, width // 2, 0])
    logsumexps = logits.logsumexp(1) + 0.3
    tile = logits.clone()
    given = torch.randn(6)
    residual_rows(tile, targets, logsumexps, given, None if cap is None else 1 / cap)
    truth = (logits.double() - logsumexps.double()[:, None]).exp()
    if cap is not None:
        truth *= 1 - (logits.double() / cap) ** 2
    for row, target in enumerate(targets.tolist()):
        if 0 <= target < width:
            truth[row, target] = given[row].double()
    torch.testing.assert_close(tile.double(), truth, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("path", ["evaluate", "stash", "local", "recompute"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "softcap": 9.0, "logit_scale": 1.7, "temperature": 1.3, "padding": 3}],
    ids=["plain", "all transforms"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_triton_engine_equals_the_torch_engine(path, options, dtype):
    results = []
    for engine in ("torch", "triton"):
        case = leaves_of(make_case(dtype=dtype, **options), needs_of(path))
        out = sequence_logps(case.hidden, case.head, case.labels, path=path, engine=engine)
        assert out.plan.engine == engine
        trained = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
        trained = [t for t in trained if t.requires_grad]
        if path != "evaluate":
            out.sums.square().sum().backward()
        results.append([out.sums.detach(), *(t.grad for t in trained if path != "evaluate")])
    for ours, truth in zip(*results, strict=True):
        scale = truth.double().norm()
        tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3}[dtype]
        assert (ours.double() - truth.double()).norm() <= tolerance * scale
