"""The op on the Triton engines, interpreted on CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policies import policies
from truth import (
    SMALLEST,
    TRANSFORMS,
    assert_gradients,
    computed,
    largest_error,
    leaves_of,
    make_case,
    needs_of,
    relative,
    true_result,
    upstream_of,
)

from fused_prefopt import (
    LMHead,
    LowRank,
    PreferenceLoss,
    sequence_logps,
    token_logps,
    token_statistics,
)
from fused_prefopt.ops import dropped_mass
from fused_prefopt.ops.plan import PATHS

pytestmark = pytest.mark.interpreted

ENGINES = ["cublas", "triton"]
# Log-probs absolute in nats, gradients relative (Frobenius), against float64.
TOLERANCE = {
    torch.float32: (1e-5, 3e-6),
    torch.float16: (1e-5, 1e-3),
    torch.bfloat16: (1e-5, 8e-3),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_engines_match_float64(engine, path, transform, dtype):
    case = make_case(3, 13, 24, 101, dtype=dtype, **TRANSFORMS[transform])
    needs = needs_of(path)
    truth = true_result(case, needs=needs)
    got = computed(case, needs=needs, path=path, engine=engine)
    values, gradients = TOLERANCE[dtype]
    assert largest_error(got.tokens, truth.tokens) <= values
    if path != "evaluate":
        assert_gradients(got, truth, gradients)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", ["local", "recompute"])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dropped_mass_equals_the_torch_engines(engine, path, transform, dtype, monkeypatch):
    monkeypatch.setattr(dropped_mass, "PART", 32)
    case = make_case(3, 13, 24, 301, dtype=dtype, **TRANSFORMS[transform])
    options = {"needs": needs_of(path), "path": path, "drop_mass": 0.3}
    wanted = computed(case, engine="torch", **options)
    got = computed(case, engine=engine, **options)
    values, gradients = TOLERANCE[dtype]
    assert largest_error(got.tokens, wanted.tokens) <= values
    assert_gradients(got, wanted, gradients)
    exact = computed(case, engine=engine, needs=needs_of(path), path=path)
    assert relative(got.grads[1], exact.grads[1]) > 2 * gradients


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workspace_mb", [256, SMALLEST])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_policies_match_float64(engine, workspace_mb, transform, dtype):
    case = make_case(3, 13, 24, 101, dtype=dtype, largest=12.0, **TRANSFORMS[transform])
    got, truth = policies(case, needs_of("recompute"), engine=engine, workspace_mb=workspace_mb)
    values, gradients = TOLERANCE[dtype]
    assert largest_error(got.sums, truth.sums) <= values
    assert largest_error(got.tokens, truth.tokens) <= values
    assert_gradients(got, truth, gradients)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 3, 2), (5, 7, 11, 257), (2, 70, 33, 64)])
@pytest.mark.usefixtures("tiny_tiles")
def test_ragged_shapes_in_many_tiles(engine, path, shape):
    case = make_case(*shape)
    needs = (needs_of(path)[0], needs_of(path)[1], False)
    # `local` does not cut its workspace: it must fit.
    megabytes = {} if path == "local" else {"workspace_mb": SMALLEST}
    truth = true_result(case, needs=needs)
    got = computed(case, needs=needs, path=path, engine=engine, **megabytes)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    if path != "evaluate":
        assert_gradients(got, truth, 3e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
def test_nothing_labelled(engine, path):
    case = make_case(3, 5, bias=True)
    case = replace(case, labels=torch.full_like(case.labels, -100))
    got = computed(case, needs=needs_of(path), path=path, engine=engine)
    assert torch.equal(got.sums, torch.zeros(3))
    for grad in got.grads:
        assert grad is None or torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", ["stash", "local", "recompute"])
def test_two_runs_and_a_second_backward_agree_to_the_bit(engine, path):
    def run() -> list[list[torch.Tensor]]:
        case = leaves_of(make_case(3, 13, 24, 101), needs_of(path))
        out = sequence_logps(case.hidden, case.head, case.labels, path=path, engine=engine)
        leaves = [t for t in (case.hidden, case.weight) if t.requires_grad]
        loss = out.sums.square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        return [
            [out.sums.detach(), *first],
            [out.sums.detach(), *torch.autograd.grad(loss, leaves)],
        ]

    (one, again), (other, _) = run(), run()
    for left, right, kept in zip(one, other, again, strict=True):
        assert torch.equal(left, right) and torch.equal(left, kept)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["dpo", "simpo", "alpha-dpo", "gamma-dpo", "gamma-simpo", "dro"])
def test_the_whole_loss_path_equals_the_torch_engine(engine, name):
    results = []
    for choice in ("torch", engine):
        case = leaves_of(make_case(6, 9, 16, 53, largest=9.0), (True, True, False))
        loss_fn = PreferenceLoss(name, engine=choice)
        generator = torch.Generator().manual_seed(1)

        def draw(generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(6, generator=generator)

        steps = []
        for _ in range(3):
            result = loss_fn(
                case.hidden,
                case.head,
                case.labels,
                reference=draw() - 20,
                rewards=draw(),
                prompt=draw() - 9,
                prompt_reference=draw() - 9,
                groups=torch.tensor([0, 0, 1, 1, 1, 2]),
            )
            gradients = torch.autograd.grad(result.loss, (case.hidden, case.weight))
            steps += [result.loss.detach(), result.losses.detach(), result.rewards, *gradients]
            steps += [result.metrics[key] for key in sorted(result.metrics)]
        results.append(steps)
    for ours, wanted in zip(*results, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        assert (ours - wanted).abs().max() <= 2e-5 * scale


def test_an_engine_without_contiguous_operands_is_right():
    case = make_case(2, 6, 16, 40)
    strided = replace(
        case,
        hidden=case.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight=case.weight.t().contiguous().t(),
    )
    truth = true_result(case, needs=(True, True, False))
    for engine in ENGINES:
        got = computed(strided, needs=(True, True, False), path="recompute", engine=engine)
        assert largest_error(got.tokens, truth.tokens) <= 1e-5
        assert_gradients(got, truth, 3e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_float64_is_refused(engine):
    case = make_case(dtype=torch.float64)
    with pytest.raises(ValueError, match="computes in fp32 at most, got float64"):
        sequence_logps(case.hidden, case.head, case.labels, engine=engine)


@pytest.mark.parametrize("transform", ["plain", "all"])
def test_token_statistics_equal_the_torch_engines(transform):
    case = make_case(3, 13, 24, 101, **TRANSFORMS[transform])
    ours = token_statistics(case.hidden, case.head, case.labels, engine="triton")
    wanted = token_statistics(case.hidden, case.head, case.labels, engine="torch")
    assert torch.equal(ours.correct, wanted.correct)
    for name in ("logps", "entropies", "collisions", "mean_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)


# The interpreter multiplies no bf16 tiles.
GPU_CASES = [("cublas", torch.bfloat16), ("cublas", torch.float16), ("triton", torch.float16)]


@pytest.mark.parametrize(("engine", "dtype"), GPU_CASES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_narrow_operands(engine, dtype, path, transform, scale):
    case = make_case(3, 13, 24, 101, dtype=dtype, **TRANSFORMS[transform])
    needs = needs_of(path)
    truth = true_result(case, needs=needs)
    # Master weights in fp32, as under autocast: their gradients can show what fp16 cannot.
    wide = replace(case, weight=case.weight.float(), hidden=case.hidden)
    wide = leaves_of(wide, needs)
    out = sequence_logps(wide.hidden, wide.head, wide.labels, path=path, engine=engine)
    tokens = token_logps(wide.hidden, wide.head, wide.labels, path=path, engine=engine)
    assert largest_error(tokens, truth.tokens) <= 1e-5
    if path == "evaluate":
        return
    of_sums, of_tokens = upstream_of(case)
    loss = (out.sums.double() * of_sums).sum() + (tokens.double() * of_tokens).sum()
    (loss * scale).backward()
    if needs[1]:
        assert relative(wide.weight.grad / scale, truth.grads[1]) <= TOLERANCE[dtype][1]
    if scale == 1.0:
        assert relative(wide.hidden.grad, truth.grads[0]) <= TOLERANCE[dtype][1]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_bf16_gradient_of_the_weight_is_rounded_once():
    case = make_case(3, 40, 24, 101, dtype=torch.bfloat16)
    truth = true_result(case, needs=(True, True, False))
    got = computed(case, needs=(True, True, False), path="recompute", engine="cublas")
    assert_gradients(got, truth, 8e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
def test_low_rank_terms_equal_the_torch_engines(engine, path):
    case = leaves_of(make_case(3, 13, 24, 101, **TRANSFORMS["all"]), needs_of(path))
    trained = path in ("local", "recompute")
    a, b = (torch.randn(size).requires_grad_(trained) for size in ((5, 24), (101, 5)))
    head = LMHead(case.weight, case.bias, **case.options, low_rank=(LowRank(a, b, 0.2),))
    results = []
    for name in (engine, "torch"):
        out = sequence_logps(case.hidden, head, case.labels, path=path, engine=name)
        leaves = [t for t in (case.hidden, case.weight, case.bias, a, b) if t.requires_grad]
        grads = torch.autograd.grad(out.sums.sum(), leaves) if leaves else ()
        results.append((out.sums.detach(), *grads))
    for ours, wanted in zip(*results, strict=True):
        assert relative(ours, wanted) <= 3e-6
