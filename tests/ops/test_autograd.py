"""The registered ops as torch's autograd, autocast, checkpointing and opcheck see them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from divergences import make_two, ours
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from truth import (
    SMALLEST,
    TRAINING_PATHS,
    TRANSFORMS,
    Case,
    assert_gradients,
    assert_right,
    computed,
    largest_error,
    leaves_of,
    make_case,
    needs_of,
    relative,
    true_result,
)
from waits import OpCalls

import fused_prefopt as fp
from fused_prefopt import LMHead, LowRank, sequence_logps, token_logps, token_policy
from fused_prefopt.ops import plan


@pytest.mark.parametrize("path", TRAINING_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", ["plain", "all"])
def test_autocast_rounds_the_operands_and_nothing_else(transform, dtype, path):
    case = make_case(3, 9, 17, 43, largest=12.0, **TRANSFORMS[transform])
    truth = true_result(case.rounded(dtype), needs=needs_of(path))
    with torch.autocast("cpu", dtype):
        got = computed(case, needs=needs_of(path), path=path)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    assert got.sums.dtype == torch.float32
    assert all(grad is None or grad.dtype == torch.float32 for grad in got.grads)
    assert_gradients(got, truth, 4e-3)


def test_autocast_with_a_half_precision_backbone_and_a_backward_outside():
    case = make_case(3, 9, 17, 43, largest=12.0)
    case = replace(case, hidden=case.hidden.bfloat16())
    truth = true_result(case.rounded(torch.bfloat16), needs=(True, True, False))
    leaves = leaves_of(case, (True, True, False))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = token_logps(leaves.hidden, leaves.head, leaves.labels)
    assert largest_error(tokens, truth.tokens) <= 1e-5
    tokens.sum().backward()
    assert leaves.hidden.grad.dtype == torch.bfloat16
    assert leaves.weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    case = make_case(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(case, 1e-13, 1e-12, needs=(True, True, False))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_gradient_checkpointing(path, reentrant):
    case = leaves_of(make_case(3, 6, **TRANSFORMS["all"]), needs_of(path))
    leaves = [t for t in (case.hidden, case.weight, case.bias) if t.requires_grad]

    def sums(hidden, weight, bias):
        head = LMHead(weight, bias, **case.options)
        return sequence_logps(hidden, head, case.labels, path=path).sums

    def checkpointed(*given):
        return checkpoint(sums, *given, use_reentrant=reentrant)

    found = []
    for function in (sums, checkpointed):
        out = function(case.hidden, case.weight, case.bias)
        (out * torch.linspace(-1, 2, len(out))).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("path", ["local", "recompute"])
def test_gradient_accumulation_over_micro_batches(path):
    case, needs = make_case(6, 7, bias=True), (True, True, True)
    whole = leaves_of(case, needs)
    sequence_logps(whole.hidden, whole.head, whole.labels, path=path).sums.sum().backward()
    parts = leaves_of(case, needs)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        sums = sequence_logps(parts.hidden[rows], parts.head, parts.labels[rows], path=path).sums
        sums.sum().backward()
    for name in ("hidden", "weight", "bias"):
        got, wanted = getattr(parts, name).grad, getattr(whole, name).grad
        assert relative(got, wanted) <= 1e-6


def test_the_leaves_are_never_written():
    case = leaves_of(make_case(**TRANSFORMS["all"]), (True,) * 3)
    before = [t.detach().clone() for t in (case.hidden, case.weight, case.bias, case.labels)]
    for path in ("local", "recompute"):
        out = sequence_logps(case.hidden, case.head, case.labels, path=path, workspace_mb=1)
        out.sums.sum().backward()
    after = (case.hidden, case.weight, case.bias, case.labels)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_global_precision_settings_are_restored():
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no CPU matmul precision")
    before = matmul.fp32_precision
    case = leaves_of(make_case(dtype=torch.bfloat16), (True, True, False))
    sequence_logps(case.hidden, case.head, case.labels).sums.sum().backward()
    assert matmul.fp32_precision == before


def test_inference_mode():
    case = make_case()
    wanted = sequence_logps(case.hidden, case.head, case.labels)
    with torch.inference_mode():
        got = sequence_logps(case.hidden, case.head, case.labels)
    assert torch.equal(got.sums, wanted.sums) and got.plan.path == "evaluate"


def registered_calls(call: Any, trained: list[Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Ops that a call and its backward run, with arguments whose leaves train as the call's do."""
    watching = OpCalls()
    with watching:
        out = call()
        if trained:
            torch.autograd.grad(out.double().sum(), trained)
    places = {each.data_ptr() for each in trained}

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        trains = value.is_floating_point() and value.data_ptr() in places
        return value.detach().requires_grad_(trains)

    return [(op, tuple(leaf(each) for each in given)) for op, given, _ in watching.found]


def opcheck(op: Any, given: tuple[Any, ...], *, dynamic: bool = True) -> None:
    """All of `torch.library.opcheck`; a backward has no gradient of its own to be checked."""
    utils = ["test_schema", "test_faketensor"]
    if "backward" in str(op):
        given = tuple(each.detach() if isinstance(each, Tensor) else each for each in given)
    else:
        utils.append("test_autograd_registration")
    if dynamic:
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, given, test_utils=utils)


# (path, transform, view of the weight, whether labels are counted, entropies, kept rows)
OP_CASES = [
    ("evaluate", "plain", "contiguous", False, False, 0),
    ("stash", "softcap", "contiguous", True, False, 0),
    ("stash", "plain", "contiguous", False, False, 0),
    ("local", "all", "contiguous", True, False, 0),
    ("local", "plain", "transposed", False, False, 0),
    ("recompute", "all", "contiguous", False, False, 0),
    ("recompute", "bias", "transposed", True, False, 0),
    ("recompute", "all", "contiguous", True, True, 0),
    ("recompute", "all", "contiguous", False, False, 3),
    ("recompute", "plain", "transposed", True, False, 3),
]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("path", "transform", "view", "counted", "entropy", "kept"), OP_CASES)
def test_opcheck(path, transform, view, counted, entropy, kept, layout, monkeypatch):
    case = make_case(2, 5, 4, 70, dtype=torch.float64, **TRANSFORMS[transform])
    calls = calls_of(case, path, view, counted, entropy, kept, layout, monkeypatch)
    # What is kept comes with another ticket each time, which the comparison with a second call
    # would call wrong; the compiled tests compare its values and gradients instead.
    opcheck(*calls[0], dynamic=path != "local" and not kept)
    assert len(calls) == 1 + (path != "evaluate")
    for backward in calls[1:]:
        opcheck(*backward)


@pytest.mark.parametrize(
    ("path", "rank", "drop_mass"),
    [("stash", 2, 0.0), ("local", 2, 0.0), ("local", 0, 0.01), ("recompute", 2, 0.0)]
    + [("recompute", 0, 0.01)],
)
def test_opcheck_of_low_rank_terms_and_dropped_mass(path, rank, drop_mass, monkeypatch):
    case = make_case(2, 5, 4, 70, **TRANSFORMS["all"])
    more = {"drop_mass": drop_mass} if drop_mass else {}
    view = "transposed" if path == "recompute" else "contiguous"
    calls = calls_of(case, path, view, False, False, 0, "padded", monkeypatch, rank=rank, **more)
    assert len(calls) == 2
    opcheck(*calls[1])


def calls_of(
    case: Case, path, view, counted, entropy, kept, layout, monkeypatch, *, rank=0, **options
) -> list[tuple[Any, tuple[Any, ...]]]:
    """The forward's and the backward's call of one public call, whose rows have no shift."""
    if view == "transposed":
        case = replace(case, weight=case.weight.t().contiguous().t())
    case = leaves_of(case, needs_of(path))
    trained = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
    trained = [t for t in trained if t.requires_grad]
    head, hidden, labels = case.head, case.hidden, case.labels
    if rank:
        shapes = ((rank, head.weight.shape[1]), (head.weight.shape[0], rank))
        generator = torch.Generator().manual_seed(4)
        a, b = (torch.randn(size, generator=generator, dtype=hidden.dtype) for size in shapes)
        a.requires_grad_()
        b.requires_grad_(path != "stash")
        head = replace(head, low_rank=(LowRank(a, b),))
        trained += [t for t in (a, b) if t.requires_grad]
    if layout == "packed":
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        options |= {"sequence_ids": torch.arange(len(labels)) % 3, "num_sequences": 3}
    if counted:
        options["num_labels"] = int((labels != -100).sum())
    if kept:
        monkeypatch.setattr(plan.Room, "kept", lambda room, count, workspace: min(kept, count))
    else:
        options["path"] = path

    def call() -> Tensor:
        if entropy:
            policy = token_policy(hidden, head, labels, shift=False, **options)
            return policy.logps + policy.entropies
        return sequence_logps(hidden, head, labels, shift=False, **options).sums

    return registered_calls(call, trained)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("counted", [False, True])
def test_opcheck_of_divergences(counted, layout):
    two = make_two(2, 5, 4, 70, transform="all", other="bias", dtype=torch.float64)
    labels = two.policy.labels
    options = {"num_labels": int((labels != -100).sum())} if counted else {}
    if layout == "packed":
        ids = torch.arange(labels.numel()) % 3
        two = type(two)(*(flat(case) for case in two))
        options |= {"sequence_ids": ids, "num_sequences": 3, "perturbation": 0.3}
    policy = leaves_of(two.policy, (True, True, True))

    def call() -> Tensor:
        out = ours(two._replace(policy=policy), shift=False, **options)
        return out.kl + out.policy

    calls = registered_calls(call, [policy.hidden, policy.weight, policy.bias])
    assert len(calls) == 2
    for each in calls:
        opcheck(*each)


def flat(case: Case) -> Case:
    return replace(case, hidden=case.hidden.flatten(0, 1), labels=case.labels.flatten())


def test_one_call_of_the_op_sums_the_gradients_of_both_its_outputs():
    case = leaves_of(make_case(2, 5, 4, 9, dtype=torch.float64), (True, True, False))
    leaves, ids = [case.hidden, case.weight], torch.arange(10) % 3

    def call() -> Tensor:
        options = {"sequence_ids": ids, "path": "recompute", "workspace_mb": SMALLEST}
        rows, labels = case.hidden.flatten(0, 1), case.labels.flatten()
        return sequence_logps(rows, case.head, labels, shift=False, **options).sums

    (op, given), _ = registered_calls(call, leaves)
    leaves = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
    logps, sums, *_ = op(*given)
    assert torch.equal(sums, torch.stack([logps[ids == s].sum() for s in range(3)]))
    generator = torch.Generator().manual_seed(5)
    of_logps, of_sums = (
        torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in (logps, sums)
    )
    both = torch.autograd.grad((logps, sums), leaves, (of_logps, of_sums), retain_graph=True)
    one = torch.autograd.grad(logps, leaves, of_logps + of_sums[ids])
    for found, wanted in zip(both, one, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


HIDDEN = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(2, 5, 4)
WEIGHT = torch.linspace(-2, 2, 36, dtype=torch.float64).reshape(9, 4)
LABELS = torch.arange(10).reshape(2, 5) % 9
TERM = {"a": torch.ones(2, 4, dtype=torch.float64), "b": torch.ones(9, 2, dtype=torch.float64)}

# Forward-mode differentiation would see zeros: what is differentiated → (function, where).
CALLS = {
    "sequence_logps of hidden": (lambda x: fp.sequence_logps(x, WEIGHT, LABELS).sums, HIDDEN),
    "sequence_logps of the weight": (lambda w: fp.sequence_logps(HIDDEN, w, LABELS).sums, WEIGHT),
    "sequence_logps of the bias": (
        lambda b: fp.sequence_logps(HIDDEN, fp.LMHead(WEIGHT, b), LABELS).sums,
        torch.zeros(9, dtype=torch.float64),
    ),
    "sequence_logps of a low-rank term": (
        lambda a: (
            fp.sequence_logps(
                HIDDEN, fp.LMHead(WEIGHT, low_rank=(fp.LowRank(a, TERM["b"]),)), LABELS
            ).sums
        ),
        TERM["a"],
    ),
    "token_logps": (lambda x: fp.token_logps(x, WEIGHT, LABELS), HIDDEN),
    "token_policy": (lambda x: fp.token_policy(x, WEIGHT, LABELS).entropies, HIDDEN),
    "token_statistics": (lambda x: fp.token_statistics(x, WEIGHT, LABELS).entropies, HIDDEN),
    "sequence_kl": (lambda x: fp.sequence_kl(x, WEIGHT, HIDDEN, WEIGHT, LABELS).kl, HIDDEN),
    "sequence_kl of the reference": (
        lambda x: fp.sequence_kl(HIDDEN, WEIGHT, x, WEIGHT, LABELS).kl,
        HIDDEN,
    ),
    "PreferenceLoss": (lambda x: fp.PreferenceLoss("simpo")(x, WEIGHT, LABELS).loss, HIDDEN),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "dual numbers"])
def test_forward_mode_is_an_error(name, mode):
    function, point = CALLS[name]
    with pytest.raises(RuntimeError, match="no forward-mode derivative.*torch.autograd.grad"):
        if mode == "jvp":
            torch.func.jvp(function, (point,), (torch.ones_like(point),))
        elif mode == "jacfwd":
            torch.func.jacfwd(function)(point)
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(point, torch.ones_like(point)))


def test_losses_of_known_log_probs_have_a_forward_mode():
    loss_fn = fp.PreferenceLoss("simpo")
    lengths = torch.tensor([3, 4])

    def loss(policy):
        return loss_fn.from_logps(fp.LogpBatch(policy, lengths)).loss

    policy = torch.tensor([-4.0, -6.0], dtype=torch.float64)
    direction = torch.tensor([0.3, -0.7], dtype=torch.float64)
    _, slope = torch.func.jvp(loss, (policy,), (direction,))
    leaf = policy.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(slope, (wanted * direction).sum())


def test_a_dual_level_around_a_call_without_duals_changes_nothing():
    wanted = fp.sequence_logps(HIDDEN, WEIGHT, LABELS).sums
    with forward_ad.dual_level():
        assert torch.equal(fp.sequence_logps(HIDDEN, WEIGHT, LABELS).sums, wanted)
