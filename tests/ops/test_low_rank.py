"""Heads with low-rank terms (LoRA on the head) against eager float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from truth import (
    KERNEL_ENGINES,
    PATHS,
    SMALLEST,
    TRAINING_PATHS,
    TRANSFORMS,
    Case,
    covering,
    leaves_of,
    make_case,
    needs_of,
    relative,
    true_logps,
)

from fused_prefopt import LMHead, LowRank, sequence_logps, token_logps, token_statistics

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1.5e-3}
# Of sums of about ten tokens. A projected hidden state is rounded to half precision before it meets
# its matmul, as any hidden state is; eager's logits are a quarter as exact.
NATS = {torch.float32: 5e-5, torch.bfloat16: 0.15, torch.float16: 0.03}
NAMES = ("hidden", "weight", "bias", "a", "b")
SCALING = 1.5


def low_rank_of(case: Case, rank: int = 3, seed: int = 2) -> tuple[Tensor, Tensor]:
    """a (r, D) and b (V, r), whose product is of the weight's size."""
    generator = torch.Generator().manual_seed(seed)
    vocab, hidden_size = case.weight.shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(case.weight.dtype)

    return draw(rank, hidden_size), draw(vocab, rank) * case.weight.std() / rank


def leaves(case: Case, path: str) -> dict[str, Tensor]:
    """Every tensor; those require a gradient that the path can train."""
    a, b = low_rank_of(case)
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias, "a": a, "b": b}
    trained = ("hidden", "a") if path == "stash" else NAMES
    return {
        name: value.detach().clone().requires_grad_(name in trained)
        for name, value in tensors.items()
        if value is not None
    }


def upstream(case: Case) -> Tensor:
    return torch.randn(case.labels.shape[0], generator=torch.Generator().manual_seed(3))


def ours(case: Case, tensors: dict[str, Tensor], **options) -> Tensor:
    term = LowRank(tensors["a"], tensors["b"], SCALING)
    head = LMHead(tensors["weight"], tensors.get("bias"), **case.options, low_rank=(term,))
    return sequence_logps(tensors["hidden"], head, case.labels, **options).sums


def truth(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """Of the merged weight, in the tensors' dtype."""
    merged = tensors["weight"] + SCALING * tensors["b"] @ tensors["a"]
    case = replace(case, hidden=tensors["hidden"], weight=merged, bias=tensors.get("bias"))
    return true_logps(case).sum(1)


def gradients(sums: Tensor, case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {name: value for name, value in tensors.items() if value.requires_grad}
    found = torch.autograd.grad(sums @ upstream(case).to(sums.dtype), tuple(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize(
    ("where", "transform", "dtype"),
    covering(product(TRAINING_PATHS, [256, SMALLEST]), TRANSFORMS, TOLERANCE),
)
@pytest.mark.usefixtures("tiny_tiles")
def test_gradients_match_float64(where, transform, dtype):
    path, workspace_mb = where
    if path == "local" and workspace_mb == SMALLEST:
        workspace_mb = 1
    case = make_case(4, 19, 23, 131, dtype=dtype, largest=15.0, **TRANSFORMS[transform])
    tensors = leaves(case, path)
    exact = {name: value.detach().double() for name, value in tensors.items()}
    exact = {name: exact[name].requires_grad_(tensors[name].requires_grad) for name in exact}
    wanted = truth(case.double(), exact)
    got = ours(case, tensors, path=path, workspace_mb=workspace_mb)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=NATS[dtype])
    right = gradients(wanted, case, exact)
    for name, value in gradients(got, case, tensors).items():
        assert value.dtype == tensors[name].dtype
        assert relative(value, right[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_gradcheck(path, transform):
    case = make_case(2, 4, 3, 8, dtype=torch.float64, largest=3.0, **TRANSFORMS[transform])
    tensors = leaves(case, path)
    names = tuple(tensors)

    def outputs(*values: Tensor) -> Tensor:
        return ours(case, dict(zip(names, values, strict=True)), path=path)

    assert torch.autograd.gradcheck(outputs, tuple(tensors.values()))


@pytest.mark.parametrize("needed", NAMES)
def test_only_the_gradient_that_is_needed(needed):
    case = make_case(**TRANSFORMS["all"])
    tensors = leaves(case, "recompute")
    every = gradients(ours(case, tensors, path="recompute"), case, tensors)
    for name, value in tensors.items():
        value.requires_grad_(name == needed)
    (only,) = gradients(ours(case, tensors, path="recompute"), case, tensors).values()
    torch.testing.assert_close(only, every[needed], rtol=1e-5, atol=1e-6)


def test_frozen_terms_take_the_path_of_a_frozen_head():
    case = make_case()
    tensors = leaves(case, "stash")
    term = LowRank(tensors["a"], tensors["b"], SCALING)
    head = LMHead(tensors["weight"], low_rank=(term,))
    assert sequence_logps(tensors["hidden"], head, case.labels).plan.path == "stash"
    trained = LowRank(tensors["a"], tensors["b"].detach().requires_grad_())
    head = LMHead(tensors["weight"], low_rank=(trained,))
    assert sequence_logps(tensors["hidden"], head, case.labels).plan.path == "local"


def test_several_terms_add_up():
    case = make_case(dtype=torch.float64)
    terms = tuple(LowRank(*low_rank_of(case, rank, seed), 0.5) for rank, seed in ((2, 5), (3, 6)))
    head = LMHead(case.weight, low_rank=terms)
    merged = case.weight + sum(0.5 * term.b @ term.a for term in terms)
    wanted = true_logps(replace(case, weight=merged))
    torch.testing.assert_close(token_logps(case.hidden, head, case.labels), wanted)
    statistics = token_statistics(case.hidden, head, case.labels)
    torch.testing.assert_close(statistics.logps, wanted)
    torch.testing.assert_close(head.logits(case.hidden), case.hidden @ merged.t())


def test_dropout_draws_as_a_layer_before_the_projection_would():
    case = make_case(dtype=torch.float64)
    a, b = low_rank_of(case)
    torch.manual_seed(0)
    got = token_logps(
        case.hidden, LMHead(case.weight, low_rank=(LowRank(a, b, 1, 0.4),)), case.labels
    )
    torch.manual_seed(0)
    dropped = torch.nn.Dropout(0.4)(case.hidden)
    logps = (case.hidden @ case.weight.t() + dropped @ a.t() @ b.t()).log_softmax(-1)
    targets = case.labels[:, 1:]
    picked = logps[:, :-1].gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got[:, 1:], picked.where(targets != -100, 0.0))


def test_shapes_that_do_not_fit_are_named():
    weight = torch.zeros(7, 4)
    with pytest.raises(ValueError, match="b: got shape"):
        LowRank(torch.zeros(2, 4), torch.zeros(7, 3))
    with pytest.raises(ValueError, match="a: got shape"):
        LMHead(weight, low_rank=(LowRank(torch.zeros(2, 5), torch.zeros(7, 2)),))
    with pytest.raises(ValueError, match="b: got shape"):
        LMHead(weight, low_rank=(LowRank(torch.zeros(2, 4), torch.zeros(6, 2)),))
    with pytest.raises(ValueError, match="dropout: got 1"):
        LowRank(torch.zeros(2, 4), torch.zeros(7, 2), dropout=1.0)


@pytest.mark.interpreted
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
@pytest.mark.parametrize("path", PATHS)
def test_kernels_equal_the_torch_engine(engine, path):
    case = leaves_of(make_case(3, 13, 24, 101, **TRANSFORMS["all"]), needs_of(path))
    trained = path in ("local", "recompute")
    a, b = (term.detach().requires_grad_(trained) for term in low_rank_of(case, 5))
    head = LMHead(case.weight, case.bias, **case.options, low_rank=(LowRank(a, b, 0.2),))
    results = []
    for name in (engine, "torch"):
        out = sequence_logps(case.hidden, head, case.labels, path=path, engine=name)
        leaves = [t for t in (case.hidden, case.weight, case.bias, a, b) if t.requires_grad]
        grads = torch.autograd.grad(out.sums.sum(), leaves) if leaves else ()
        results.append((out.sums.detach(), *grads))
    for ours, wanted in zip(*results, strict=True):
        assert relative(ours, wanted) <= 3e-6
