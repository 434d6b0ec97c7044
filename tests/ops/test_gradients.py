"""Gradients of the op: by any set of trained tensors, in any dtypes, where numbers are extreme."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from truth import (
    SMALLEST,
    TRAINING_PATHS,
    TRANSFORMS,
    assert_gradients,
    assert_right,
    computed,
    covering,
    leaves_of,
    make_case,
    needs_of,
    relative,
    tight,
    true_logps,
    true_result,
)
from waits import OpCalls

from fused_prefopt import LMHead, sequence_logps, token_logps
from fused_prefopt.ops.cutting import Tiles
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.tile import KeptTile, RowGradients
from fused_prefopt.ops.torch_engine import TorchEngine

NEEDS = {
    "".join(name * need for name, need in zip("hwb", needs, strict=True)): needs
    for needs in product([True, False], repeat=3)
    if any(needs)
}
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("path", "transform", "tiles"), covering(TRAINING_PATHS, TRANSFORMS, ["tiny", "whole"])
)
def test_gradcheck(path, transform, tiles, request):
    options = {"path": path}
    if tiles == "tiny":
        request.getfixturevalue("tiny_tiles")
        options |= tight(path)
    case = make_case(2, 4, 3, 8, dtype=torch.float64, largest=3.0, **TRANSFORMS[transform])
    case = leaves_of(case, needs_of(path))

    def outputs(hidden, weight, bias):
        head = LMHead(weight, bias, **case.options)
        sums = sequence_logps(hidden, head, case.labels, **options).sums
        return sums, token_logps(hidden, head, case.labels, **options)

    assert torch.autograd.gradcheck(outputs, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_half_precision_gradients_beat_eager(path, dtype):
    case, needs = make_case(4, 37, 96, 331, dtype=dtype), needs_of(path)
    truth, got = true_result(case, needs=needs), computed(case, needs=needs, path=path)
    eager, exact = leaves_of(case, needs), leaves_of(case.double(), needs)
    true_logps(eager).float().sum().backward()
    true_logps(exact).sum().backward()
    assert relative(got.grads[0], truth.grads[0]) < relative(eager.hidden.grad, exact.hidden.grad)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.usefixtures("tiny_tiles")
def test_all_paths_and_tilings_agree(transform):
    case = make_case(**TRANSFORMS[transform])
    whole = computed(case, needs=(True, True, True), path="local")
    tiled = computed(case, needs=(True, True, True), path="recompute", workspace_mb=SMALLEST)
    stash = computed(case, needs=(True, False, False), path="stash", workspace_mb=SMALLEST)
    assert_gradients(tiled, whole, 2e-6)
    assert relative(stash.grads[0], whole.grads[0]) <= 2e-6


@pytest.mark.parametrize("path", ["local", "recompute"])
@pytest.mark.parametrize("needs", NEEDS)
def test_only_the_gradients_that_are_needed(path, needs):
    needs, calls = NEEDS[needs], OpCalls()
    with calls:
        assert_right(make_case(**TRANSFORMS["all"]), 1e-5, 2e-6, needs=needs, path=path)
    # The others are not computed: the registered backward returns nothing in their place.
    backwards = [out[:3] for op, _, out in calls.found if str(op).count("backward")]
    assert len(backwards) == 2
    for found in backwards:
        assert [grad.numel() > 0 for grad in found] == list(needs)


@pytest.mark.parametrize("path", ["local", "recompute"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float16),
    ],
)
def test_mixed_dtypes_compute_in_hiddens_and_return_each_its_own(path, dtypes):
    case = make_case(3, 9, 17, 43, dtype=torch.float64, bias=True, largest=12.0)
    tensors = (case.hidden, case.weight, case.bias)
    hidden, weight, bias = (t.to(d) for t, d in zip(tensors, dtypes, strict=True))
    case = replace(case, hidden=hidden, weight=weight, bias=bias)
    truth = true_result(case.rounded(dtypes[0]), needs=(True,) * 3)
    got = computed(case, needs=(True,) * 3, path=path)
    assert torch.allclose(got.tokens.double(), truth.tokens, rtol=0, atol=1e-5)
    assert [grad.dtype for grad in got.grads] == list(dtypes)
    assert_gradients(got, truth, 4e-3)


def test_a_frozen_head_mixed_with_half_precision_hidden():
    case = make_case(3, 9, 17, 43, dtype=torch.float64, largest=12.0)
    case = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.float())
    truth = true_result(case.rounded(torch.bfloat16), needs=needs_of("stash"))
    got = computed(case, needs=needs_of("stash"))
    assert got.grads[0].dtype == torch.bfloat16
    assert_gradients(got, truth, 4e-3)


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_means_are_differentiable_and_safe_at_length_zero(path):
    case = make_case(3, 5)
    case.labels[1] = -100
    exact, case = leaves_of(case.double(), needs_of(path)), leaves_of(case, needs_of(path))
    out = sequence_logps(case.hidden, case.head, case.labels, path=path)
    out.means.sum().backward()
    (true_logps(exact).sum(1) / out.lengths.clamp(min=1)).sum().backward()
    assert torch.equal(case.hidden.grad[1], torch.zeros_like(case.hidden[1]))
    assert relative(case.hidden.grad, exact.hidden.grad) <= 2e-6


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_unlabelled_rows_get_exactly_zero(path):
    case = make_case(3, 9)
    got = computed(case, needs=needs_of(path), path=path, shift=False)
    assert (got.grads[0][case.labels == -100] == 0).all()
    assert (got.grads[0][case.labels != -100] != 0).any(-1).all()


@pytest.mark.parametrize("path", ["local", "recompute"])
def test_padded_vocabulary_gets_exactly_zero(path):
    case = make_case(padding=6, bias=True)
    got = computed(case, needs=(True,) * 3, path=path)
    assert (got.grads[1][-6:] == 0).all() and (got.grads[2][-6:] == 0).all()
    assert (got.grads[1][:-6] != 0).any(-1).all()


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_double_backward_is_a_clear_error(path):
    case = leaves_of(make_case(), needs_of(path))
    loss = sequence_logps(case.hidden, case.head, case.labels, path=path).sums.square().sum()
    (grad,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.square().sum().backward()


def test_the_softcap_slope_of_probabilities_that_underflowed_is_zero_times_finite():
    # Without the CPU's floor under the exponent, exp(logit − max) may be exactly zero.
    math = HeadMath(softcap=100.0, logit_scale=1.0, temperature=0.5, dtype=torch.float32)
    kept, top, target = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([190.0]), torch.tensor([1])
    # The target's logit is -190, its log-prob that much below the log-sum-exp.
    residuals = math.target_residual(torch.tensor([-380.0]), top)
    rows = RowGradients(top, residuals, torch.ones(1))
    engine, out = TorchEngine(math, Tiles(1, 3, 3, 1, True), kept.device), torch.empty(1, 3)
    found = KeptTile(kept, top.unsqueeze(0), 3, target)
    sums = engine.kept_gradient(found, rows, out, bias=True)
    slope = 1 - (190 * 0.5 / 100) ** 2
    wanted = torch.tensor([[slope, -slope, 0.0]])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sums, wanted[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_a_softcap_wider_than_the_floating_point_exponent(path):
    case = make_case(3, 7, 11, 60, largest=300.0, softcap=150.0, temperature=0.7)
    truth = true_result(case, needs=needs_of(path))
    got = computed(case, needs=needs_of(path), path=path)
    assert_gradients(got, truth, 2e-4)


@pytest.mark.parametrize("path", ["stash", "local", "recompute"])
def test_a_nearly_certain_target_keeps_its_digits_in_bf16(path):
    # p = 0.9991 rounds to 1 in bf16, in which `local` keeps it; p − 1 must not round to 0.
    hidden = torch.tensor([[[7.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.eye(2, dtype=torch.bfloat16, requires_grad=path != "stash")
    labels = torch.tensor([[0]])
    out = sequence_logps(hidden, weight, labels, shift=False, path=path)
    out.sums.sum().backward()
    rest = torch.sigmoid(torch.tensor(-7.0, dtype=torch.float64)).item()
    assert hidden.grad[0, 0].tolist() == pytest.approx([rest, -rest], rel=4e-3)
    if path != "stash":
        assert weight.grad[:, 0].tolist() == pytest.approx([7 * rest, -7 * rest], rel=4e-3)
