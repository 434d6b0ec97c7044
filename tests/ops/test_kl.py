"""`sequence_kl` against eager float64 on every engine: values, gradients, layouts, edges.

One file of more than 450 lines: all of it compares one function with one truth.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from divergences import (
    Two,
    by_token,
    computed_kl,
    eager_tokens,
    make_two,
    near,
    ours,
    true_kl,
    weights_of,
)
from machines import OP, OP_OF_FEW, SIZES, dtypes
from reference_losses import LOSSES, loss_and_gradients, loss_of, pairs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from truth import (
    SMALLEST,
    TRANSFORMS,
    assert_gradients,
    covering,
    largest_error,
    leaves_of,
    make_case,
    on_engines,
    relative,
    true_logits,
)
from waits import LargestTensor

from fused_prefopt import LMHead, LowRank, sequence_kl, sequence_logps

# Per token, at |logit| <= 30, and gradients, relative (Frobenius): those of `sequence_logps`.
TORCH = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (1e-4, 4e-3), torch.float16: (1e-4, 1e-3)}
# Sums of up to 12 log-probs.
SUMS = 3e-5
PAIRS = [(name, "plain") for name in TRANSFORMS] + [("plain", "all"), ("softcap", "softcap")]


def token_kls(two: Two, **options) -> torch.Tensor:
    """(S, T) KL of every row: each is a sequence of its own."""
    return by_token(two, **options).kl.view(two.policy.labels.shape)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("transform", "other"), PAIRS)
@pytest.mark.parametrize("workspace_mb", [256, SMALLEST])
@pytest.mark.usefixtures("tiny_tiles")
def test_tokens_match_float64(transform, other, dtype, workspace_mb):
    # A temperature raises the logits: those of the plain heads alone reach 30.
    largest = 30.0 if transform == other == "plain" else 20.0
    two = make_two(transform=transform, other=other, dtype=dtype, largest=largest)
    truth = eager_tokens(two.double(), shift=False)[0]
    got = token_kls(two, workspace_mb=workspace_mb)
    assert truth.max() > 1
    assert largest_error(got, truth) <= TORCH[dtype][0]


@pytest.mark.parametrize("distance", [1.0, 0.1, 1e-3])
def test_fp32_is_as_exact_as_eager_near_the_reference(distance):
    two = near(make_two(4, 37, 96, 331, largest=30.0), distance)
    truth = eager_tokens(two.double(), shift=False)[0]
    eager = largest_error(eager_tokens(two, shift=False)[0], truth)
    got = token_kls(two)
    assert largest_error(got, truth) <= max(1.1 * eager, 1e-6)
    assert (got >= 0).all()


@pytest.mark.parametrize("dtype", TORCH)
def test_log_probs_of_both_are_those_of_the_op(dtype):
    two = make_two(4, 9, transform="all", other="bias", dtype=dtype)
    out = ours(two)
    for case, got in zip(two, (out.policy, out.reference), strict=True):
        wanted = sequence_logps(case.hidden, case.head, case.labels)
        assert largest_error(got, wanted.sums) <= 1e-4
        assert torch.equal(out.lengths, wanted.lengths)
    assert out.kl.dtype == out.policy.dtype == torch.float32


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("transform", "other"), PAIRS)
@pytest.mark.parametrize("workspace_mb", [256, SMALLEST])
@pytest.mark.usefixtures("tiny_tiles")
def test_gradients_match_float64(transform, other, dtype, workspace_mb):
    two = make_two(4, 9, 13, 43, transform=transform, other=other, dtype=dtype)
    got = computed_kl(two, workspace_mb=workspace_mb)
    assert_gradients(got, true_kl(two), TORCH[dtype][1])


@pytest.mark.parametrize("only", ["kl", "policy", "kl of half"])
def test_gradients_through_one_of_the_two(only):
    two = make_two(4, 9, 13, 43, transform="all")
    weights = weights_of(two)
    if only == "policy":
        weights[0] = 0
    elif only == "kl":
        weights[1] = 0
    else:
        weights[0, :2] = 0
    for workspace_mb in (256, SMALLEST):
        got = computed_kl(two, weights=weights, workspace_mb=workspace_mb)
        assert_gradients(got, true_kl(two, weights=weights), 2e-6)


def test_a_divergence_that_is_no_part_of_the_loss_costs_no_gradient():
    two = make_two(4, 9, 13, 43, transform="all", other="bias")
    two = two._replace(policy=leaves_of(two.policy, (True, True, True)))
    leaves = (two.policy.hidden, two.policy.weight, two.policy.bias)
    got = torch.autograd.grad(ours(two).policy.square().sum(), leaves)
    sums = sequence_logps(two.policy.hidden, two.policy.head, two.policy.labels).sums
    for one, other in zip(got, torch.autograd.grad(sums.square().sum(), leaves), strict=True):
        assert relative(one, other) <= 1e-6


@pytest.mark.parametrize(
    "needs", [needs for needs in product([True, False], repeat=3) if any(needs)]
)
def test_only_the_gradients_that_are_needed(needs):
    two = make_two(transform="all")
    got = computed_kl(two, needs)
    assert [grad is None for grad in got.grads] == [not need for need in needs]
    assert_gradients(got, true_kl(two, needs), 2e-6)


@pytest.mark.parametrize(("transform", "other"), [("plain", "plain"), ("all", "softcap")])
@pytest.mark.usefixtures("tiny_tiles")
def test_gradcheck(transform, other):
    options = {"dtype": torch.float64, "largest": 3.0}
    two = make_two(2, 4, 3, 8, transform=transform, other=other, **options)
    case = leaves_of(two.policy, (True, True, True))

    def outputs(hidden, weight, bias):
        policy = replace(case, hidden=hidden, weight=weight, bias=bias)
        out = ours(two._replace(policy=policy), workspace_mb=SMALLEST)
        return out.kl, out.policy

    assert torch.autograd.gradcheck(outputs, (case.hidden, case.weight, case.bias))


def test_the_reference_is_a_constant():
    two = make_two()
    reference = leaves_of(two.reference, (True, True, False))
    out = ours(Two(leaves_of(two.policy, (True, True, False)), reference))
    (out.kl.sum() + out.policy.sum()).backward()
    assert reference.hidden.grad is None and reference.weight.grad is None
    assert not out.reference.requires_grad
    assert not ours(Two(two.policy, reference)).kl.requires_grad


@pytest.mark.parametrize(
    ("engine", "dtype"),
    on_engines(
        [*product(["torch"], [torch.float32, torch.bfloat16, torch.float64])]
        + [("triton", torch.float32)]
    ),
)
def test_a_model_has_no_divergence_from_itself(engine, dtype):
    policy = make_case(3, 9, 16, 71, dtype=dtype, largest=30.0, bias=True, softcap=25.0)
    two = Two(leaves_of(policy, (True, True, True)), policy)
    out = ours(two, engine=engine)
    assert torch.equal(out.kl, torch.zeros_like(out.kl))
    assert torch.equal(out.policy, out.reference)
    out.kl.sum().backward()
    assert two.policy.hidden.grad.abs().max() <= 1e-6
    assert two.policy.weight.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("ranks", [(3, 0), (0, 2), (3, 2)])
def test_low_rank_terms_on_either_head(ranks):
    two = make_two(3, 9, 13, 43, transform="all", other="bias")
    generator = torch.Generator().manual_seed(5)

    def term(case, rank, dtype):
        if not rank:
            return ()
        a = torch.randn(rank, case.weight.shape[1], generator=generator).to(dtype)
        b = torch.randn(case.weight.shape[0], rank, generator=generator).to(dtype) / 3
        return (LowRank(a.requires_grad_(), b.requires_grad_(), 0.4),)

    results = []
    for dtype in (torch.float32, torch.float64):
        generator.manual_seed(5)
        cases = two if dtype == torch.float32 else two.double()
        policy = leaves_of(cases.policy, (True, True, True))
        terms = [term(case, rank, dtype) for case, rank in zip(cases, ranks, strict=True)]
        heads = [
            replace(c.head, low_rank=t) for c, t in zip((policy, cases[1]), terms, strict=True)
        ]
        out = sequence_kl(policy.hidden, heads[0], cases.reference.hidden, heads[1], policy.labels)
        kl, logps = out.kl, out.policy
        if dtype == torch.float64:
            rows = policy.hidden[:, :-1], cases.reference.hidden[:, :-1]
            p, q = (h.logits(x).log_softmax(-1) for h, x in zip(heads, rows, strict=True))
            there = policy.labels[:, 1:] != -100
            kl = (((q.exp() * (q - p)).sum(-1)) * there).sum(1)
            found = p.gather(-1, policy.labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
            logps = (found * there).sum(1)
        leaves = [policy.hidden, policy.weight, policy.bias]
        leaves += [value for each in terms[0] for value in (each.a, each.b)]
        loss = (kl.double() * weights_of(two)[0]).sum() + (logps.double() * 0.7).sum()
        results.append((kl.detach(), *torch.autograd.grad(loss, leaves)))
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) <= 3e-6


def test_the_packed_layout_and_the_number_of_labels():
    two = make_two(4, 9)
    labels = two.policy.labels
    padded = computed_kl(two, num_labels=int((labels[:, 1:] != -100).sum()))
    ids = torch.arange(4).repeat_interleave(9)
    flat = leaves_of(two.policy, (True, True, False))
    out = sequence_kl(
        flat.hidden.flatten(0, 1),
        flat.head,
        two.reference.hidden.flatten(0, 1),
        two.reference.head,
        labels.flatten(),
        sequence_ids=ids,
        num_sequences=6,
    )
    assert torch.equal(out.kl[:4].detach(), padded.sums)
    assert torch.equal(out.kl[4:], torch.zeros(2)) and torch.equal(out.lengths[4:], torch.zeros(2))
    weights = weights_of(two)
    ((out.kl[:4] * weights[0]).sum() + (out.policy[:4] * weights[1]).sum()).backward()
    assert torch.equal(flat.hidden.grad, padded.grads[0])


@pytest.mark.parametrize("empty", ["one sequence", "all"])
def test_sequences_without_labels(empty):
    two = make_two(3, 5, transform="bias")
    labels = two.policy.labels.clone()
    labels[1 if empty == "one sequence" else slice(None)] = -100
    two = two._replace(policy=replace(two.policy, labels=labels))
    got = computed_kl(two)
    assert got.sums[1] == 0 and got.tokens[1] == 0
    assert_gradients(got, true_kl(two), 2e-6)
    assert torch.equal(got.grads[0][1], torch.zeros_like(got.grads[0][1]))


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float64])
def test_both_heads_compute_in_hiddens_dtype(other):
    two = make_two(dtype=torch.float64, largest=12.0)
    policy = two.policy.rounded(torch.bfloat16)
    policy = replace(policy, weight=policy.weight.float())
    mixed = Two(policy, two.reference.rounded(other))
    rounded = Two(
        policy.rounded(torch.bfloat16), two.reference.rounded(other).rounded(policy.hidden.dtype)
    )
    got = computed_kl(mixed, (True, True, False))
    truth = true_kl(rounded, (True, True, False))
    assert largest_error(got.sums, truth.sums) <= 1e-4
    assert got.grads[0].dtype == torch.bfloat16 and got.grads[1].dtype == torch.float32
    assert_gradients(got, truth, 4e-3)


def test_autocast_rounds_the_operands_and_nothing_else():
    two = make_two(transform="all", largest=12.0)
    truth = true_kl(Two(*(case.rounded(torch.bfloat16) for case in two)))
    with torch.autocast("cpu", torch.bfloat16):
        got = computed_kl(two)
    assert largest_error(got.sums, truth.sums) <= 1e-4
    assert_gradients(got, truth, 4e-3)
    assert all(grad.dtype == torch.float32 for grad in got.grads)


def test_two_runs_are_bit_equal():
    two = make_two(4, 19, 23, 131, transform="all", other="bias")
    first, second = computed_kl(two), computed_kl(two)
    assert torch.equal(first.sums, second.sums)
    for one, other in zip(first.grads, second.grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("banned", [slice(0, 6), slice(9, 18), slice(20, 25)])
@pytest.mark.usefixtures("tiny_tiles")
def test_tokens_that_neither_model_may_say_add_nothing(banned):
    two = make_two(transform="bias", other="bias")
    labels = two.policy.labels.clone()
    labels[(labels >= banned.start) & (labels < banned.stop)] = 8
    for case in two:
        case.bias[banned] = -math.inf
    two = Two(*(replace(case, labels=labels) for case in two))
    got, truth = computed_kl(two, workspace_mb=SMALLEST), true_kl(two, (True, True, False))
    assert largest_error(got.sums, truth.sums) <= 1e-4
    assert_gradients(got.__class__(got.sums, got.tokens, (*got.grads[:2], None)), truth, 2e-6)


def test_what_only_the_reference_may_say_is_infinitely_far():
    two = make_two(3, 5, transform="bias")
    two.policy.bias[4] = -math.inf
    labels = two.policy.labels.clone()
    labels[labels == 4] = 5
    labels[0] = -100
    two = Two(replace(two.policy, labels=labels), two.reference)
    out = ours(two)
    assert out.kl.tolist() == [0, math.inf, math.inf]
    assert out.policy.isfinite().all()
    # What only the policy may say is no distance at all.
    back = ours(Two(replace(two.reference, labels=labels), two.policy))
    truth = eager_tokens(Two(replace(two.reference, labels=labels), two.policy).double())[0]
    assert largest_error(back.kl, truth.sum(1)) <= 1e-4


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_nan_stays_in_its_own_sequence(whose):
    two = make_two(4, 5, labelled=1.0)
    clean = ours(two).kl
    case = getattr(two, whose)
    hidden = case.hidden.clone()
    hidden[2, 1] = math.nan
    got = ours(two._replace(**{whose: replace(case, hidden=hidden)})).kl
    assert got[2].isnan()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_nan_gradients_stay_in_their_own_sequence(whose):
    two = make_two(4, 5, labelled=1.0)

    def gradient(two: Two):
        hidden = two.policy.hidden.clone().requires_grad_()
        out = ours(two._replace(policy=replace(two.policy, hidden=hidden)))
        # The square's slope is NaN where the divergence is.
        (out.kl.square().sum() + out.policy.sum()).backward()
        return hidden.grad

    clean = gradient(two)
    case = getattr(two, whose)
    hidden = case.hidden.clone()
    hidden[2, 1] = math.nan
    got = gradient(two._replace(**{whose: replace(case, hidden=hidden)}))
    assert got[2].isnan().any() and clean[[0, 1, 3]].any()
    torch.testing.assert_close(got[[0, 1, 3]], clean[[0, 1, 3]], rtol=1e-6, atol=1e-9)


def test_neither_pass_makes_a_tensor_of_tokens_by_vocabulary():
    two = make_two(1, 401, 8, 1000, labelled=1.0)
    two = two._replace(policy=leaves_of(two.policy, (True, True, False)))
    with LargestTensor() as largest:
        out = ours(two, workspace_mb=0.25)
        (out.kl + out.policy).sum().backward()
    assert two.policy.weight.grad.shape == (1000, 8)
    assert largest.entries <= 400 * 1000 / 8


def test_no_double_backward():
    two = make_two()
    two = two._replace(policy=leaves_of(two.policy, (True, True, False)))
    (grad,) = torch.autograd.grad(ours(two).kl.sum(), two.policy.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="sequence_kl cannot be differentiated twice"):
        grad.sum().backward()


def arguments(**changes):
    two = make_two(2, 5, 4, 11)
    policy, reference = two
    valid = {
        "hidden": policy.hidden,
        "head": policy.weight,
        "ref_hidden": reference.hidden,
        "ref_head": reference.weight,
        "labels": policy.labels,
    }
    return valid | changes


ERRORS = {
    "another vocabulary": (
        {"ref_head": torch.ones(12, 7)},
        "ref_head: got 12 vocabulary entries, wanted the 11 of `head`",
    ),
    "another padded vocabulary": (
        {"ref_head": LMHead(torch.ones(11, 7), valid_vocab=9)},
        "ref_head: got 9 vocabulary entries, wanted the 11 of `head`",
    ),
    "reference of another length": (
        {"ref_hidden": torch.ones(2, 6, 7)},
        r"ref_hidden: got shape \(2, 6, 7\), wanted \(2, 5, 7\)",
    ),
    "reference of another size": (
        {"ref_hidden": torch.ones(2, 5, 4)},
        r"ref_hidden: got shape \(2, 5, 4\), wanted \(2, 5, 7\)",
    ),
    "integer reference": (
        {"ref_hidden": torch.ones(2, 5, 7, dtype=torch.long)},
        "ref_hidden: got dtype torch.int64",
    ),
    "reference elsewhere": (
        {"ref_hidden": torch.ones(2, 5, 7, device="meta")},
        "ref_hidden: got device meta",
    ),
    "reference head elsewhere": (
        {"ref_head": torch.ones(11, 7, device="meta")},
        "ref_head: got device meta",
    ),
    "policy of another size": ({"hidden": torch.ones(2, 5, 3)}, r"hidden: got shape \(2, 5, 3\)"),
    "no workspace": ({"workspace_mb": 0}, "workspace_mb: got 0"),
    "unknown engine": ({"engine": "cuda"}, "engine: got 'cuda'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments(case):
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        sequence_kl(**arguments(**changes))


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("heads", "dtype", "size"),
    covering([*PAIRS[:-1], ("all", "softcap")], dtypes(*OP), SIZES),
)
def test_the_engine_of_kernels_matches_float64(heads, dtype, size):
    transform, other = heads
    two = make_two(*size, transform=transform, other=other, dtype=dtype)
    got, truth = computed_kl(two, engine="cublas"), true_kl(two)
    values = SUMS * size[1] / 13
    assert largest_error(got.sums, truth.sums) <= values
    assert largest_error(got.tokens, truth.tokens) <= values
    assert_gradients(got, truth, OP[dtype][1])


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("dtype", dtypes(torch.float32))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 3, 2), (3, 5, 11, 37), (1, 9, 33, 64)])
@pytest.mark.usefixtures("tiny_tiles")
def test_ragged_shapes_in_many_tiles_of_kernels(shape, dtype):
    two = make_two(*shape, largest=9.0, dtype=dtype)
    got, truth = computed_kl(two, engine="triton", workspace_mb=SMALLEST), true_kl(two)
    assert largest_error(got.sums, truth.sums) <= 1e-4
    assert_gradients(got, truth, OP_OF_FEW[dtype][1])


@pytest.mark.interpreted
@pytest.mark.executed
def test_banned_tokens_and_nothing_labelled_for_kernels():
    two = make_two(3, 5, transform="bias", other="bias")
    for case in two:
        case.bias[3:6] = -torch.inf
        case.labels[(case.labels >= 3) & (case.labels < 6)] = 8
    got, truth = ours(two, engine="triton"), eager_tokens(two.double())
    assert largest_error(got.kl, truth[0].sum(1)) <= 3e-5
    for case in two:
        case.labels.fill_(-100)
    got = computed_kl(two, engine="triton")
    assert torch.equal(got.sums, torch.zeros(3))
    assert not any(grad.any() for grad in got.grads)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("transform", "scale"), [("plain", 1.0), ("all", 1.0), ("all", 1e-9)])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_narrow_operands(dtype, transform, scale):
    two = make_two(3, 13, 24, 101, transform=transform, other="bias", dtype=dtype)
    needs = (True, True, False)
    truth = true_kl(two, needs)
    # Master weights in fp32, as under autocast: their gradients can show what fp16 cannot.
    wide = leaves_of(two.policy, needs)
    wide = replace(wide, weight=wide.weight.detach().float().requires_grad_())
    got = ours(two._replace(policy=wide), engine="cublas")
    assert largest_error(got.kl, truth.sums) <= SUMS
    of_kl, of_policy = weights_of(two)
    loss = (got.kl.double() * of_kl).sum() + (got.policy.double() * of_policy).sum()
    (loss * scale).backward()
    assert relative(wide.weight.grad / scale, truth.grads[1]) <= OP[dtype][1]
    if scale == 1.0:
        assert relative(wide.hidden.grad, truth.grads[0]) <= OP[dtype][1]


@pytest.mark.interpreted
@pytest.mark.parametrize("name", LOSSES)
def test_losses_beside_a_reference_equal_the_torch_engine(name):
    results = []
    for engine in ("torch", "cublas"):
        loss_fn = loss_of(name)
        loss_fn.op_options["engine"] = engine
        results.append(loss_and_gradients(loss_fn, pairs()))
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) <= 2e-5


def test_widely_spread_logits_are_finite_and_right():
    two = make_two(3, 7, 11, 200, largest=400.0)
    assert true_logits(two.policy).abs().max() > 300
    got, truth = computed_kl(two), true_kl(two)
    torch.testing.assert_close(got.sums.double(), truth.sums, rtol=1e-5, atol=1e-3)
    for grad, wanted in zip(got.grads[:2], truth.grads[:2], strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.fixture
def mesh_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["head", "ref_head"])
def test_one_whole_head_beside_one_that_is_spread_is_refused(name, mesh_of_one):
    given = arguments()
    given[name] = distribute_tensor(given[name], mesh_of_one, [Shard(0)])
    got, wanted = ("whole", "spread over ranks [0]")[:: 1 if name == "head" else -1]
    message = f"ref_head: got one that is {got}, wanted it to be {wanted} as `head` is"
    with pytest.raises(ValueError, match=re.escape(message)):
        sequence_kl(**given)
