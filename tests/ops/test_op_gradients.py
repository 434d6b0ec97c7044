"""Gradients of the op: against float64, on every path, for every set of trained tensors."""

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
    computed,
    leaves_of,
    make_case,
    needs_of,
    relative,
    true_logps,
    true_result,
)

from fused_prefopt import LMHead, sequence_logps, token_logps
from fused_prefopt.ops.cutting import Tiles
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.tile import RowGradients
from fused_prefopt.ops.torch_engine import TorchEngine

# Ours against float64, relative, Frobenius.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
NEEDS = [needs for needs in product([True, False], repeat=3) if any(needs)]


@pytest.mark.parametrize("tiles", ["tiny", "whole"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_gradcheck(path, transform, tiles, request):
    if tiles == "tiny":
        request.getfixturevalue("tiny_tiles")
    tiny = tiles == "tiny" and path != "local"
    options = {"path": path, **({"workspace_mb": SMALLEST} if tiny else {})}
    case = make_case(2, 4, 3, 8, dtype=torch.float64, largest=3.0, **TRANSFORMS[transform])
    case = leaves_of(case, needs_of(path))

    def outputs(hidden, weight, bias):
        head = LMHead(weight, bias, **case.options)
        sums = sequence_logps(hidden, head, case.labels, **options).sums
        return sums, token_logps(hidden, head, case.labels, **options)

    assert torch.autograd.gradcheck(outputs, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_gradients_at_large_logits_match_float64(path, transform, dtype):
    case = make_case(4, 19, 23, 131, dtype=dtype, **TRANSFORMS[transform])
    truth = true_result(case, needs=needs_of(path))
    got = computed(case, needs=needs_of(path), path=path)
    assert_gradients(got, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_half_precision_gradients_beat_eager(path, dtype):
    case = make_case(4, 37, 96, 331, dtype=dtype)
    truth = true_result(case, needs=needs_of(path))
    got = computed(case, needs=needs_of(path), path=path)
    eager = leaves_of(case, needs_of(path))
    true_logps(eager).float().sum().backward()
    exact = leaves_of(case.double(), needs_of(path))
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
@pytest.mark.parametrize(
    "needs", NEEDS, ids=lambda needs: "".join("hwb"[i] * n for i, n in enumerate(needs))
)
def test_only_the_gradients_that_are_needed(path, needs):
    case = make_case(**TRANSFORMS["all"])
    truth = true_result(case, needs=needs)
    got = computed(case, needs=needs, path=path)
    assert [grad is None for grad in got.grads] == [not need for need in needs]
    assert_gradients(got, truth, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_that_are_not_needed_are_not_computed(needs, monkeypatch):
    from fused_prefopt.ops import registered_backward

    seen = []
    whole = registered_backward.backward
    monkeypatch.setattr(
        registered_backward, "backward", lambda *args: seen.append(whole(*args)) or seen[-1]
    )
    case = leaves_of(make_case(bias=True), needs)
    sequence_logps(case.hidden, case.head, case.labels, path="recompute").sums.sum().backward()
    (grads,) = seen
    computed = (grads.hidden, grads.weight, grads.bias)
    assert [grad is not None for grad in computed] == list(needs)


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
def test_a_second_backward_over_a_retained_graph_gives_the_same_gradient(path):
    case = leaves_of(make_case(**TRANSFORMS["all"]), needs_of(path))
    leaves = [t for t in (case.hidden, case.weight, case.bias) if t.requires_grad]
    loss = sequence_logps(case.hidden, case.head, case.labels, path=path).sums.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_losses_that_couple_the_batch(path):
    case, needs = make_case(4, 7, **TRANSFORMS["bias"]), needs_of(path)

    def loss_of(sums, lengths):
        chosen, rejected = (sums / lengths.clamp(min=1)).chunk(2)
        margins = chosen - rejected
        return -torch.nn.functional.logsigmoid(2 * (margins - margins.mean())).mean()

    ours, right = leaves_of(case, needs), leaves_of(case.double(), needs)
    out = sequence_logps(ours.hidden, ours.head, ours.labels, path=path)
    loss_of(out.sums, out.lengths).backward()
    loss_of(true_logps(right).sum(1), out.lengths).backward()
    assert relative(ours.hidden.grad, right.hidden.grad) <= 4e-6
    if needs[1]:
        assert relative(ours.weight.grad, right.weight.grad) <= 4e-6


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_means_are_differentiable_and_safe_at_length_zero(path):
    case = make_case(3, 5)
    labels = case.labels.clone()
    labels[1] = -100
    case = leaves_of(replace(case, labels=labels), needs_of(path))
    out = sequence_logps(case.hidden, case.head, case.labels, path=path)
    out.means.sum().backward()
    exact = leaves_of(case.double(), needs_of(path))
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
    sums = engine.kept_gradient(kept, top.unsqueeze(0), 3, 0, target, rows, out, bias=True)
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
