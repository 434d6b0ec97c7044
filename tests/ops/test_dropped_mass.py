"""Backward without improbable parts of the vocabulary: its bound, and whose gradient it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth import (
    KERNEL_ENGINES,
    TRANSFORMS,
    Case,
    assert_gradients,
    computed,
    covering,
    largest_error,
    leaves_of,
    make_case,
    needs_of,
    relative,
    true_logits,
)

import fused_prefopt as fp
from fused_prefopt.ops import dropped_mass

PATHS = ("local", "recompute")
KERNELS = {torch.float32: (1e-5, 3e-6), torch.float16: (1e-5, 1e-3), torch.bfloat16: (1e-5, 8e-3)}
# Above the engine's tiles of one part, not a multiple of it.
VOCAB, PART = 150, 12


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(dropped_mass, "PART", PART)


def peaked(seed: int = 0, dtype=torch.float64, **options) -> Case:
    """A case whose rows differ in how many parts hold their probability."""
    case = make_case(4, 8, 24, VOCAB, dtype=torch.float64, largest=25.0, seed=seed, **options)
    sharpness = torch.linspace(0.05, 1.5, 32, dtype=torch.float64).view(4, 8, 1)
    return replace(case, hidden=case.hidden * sharpness).rounded(dtype)


def kept_entries(logits: Tensor, target: int, drop_mass: float) -> Tensor:
    """(V,) bool, by a greedy walk over the parts of one row of float64 logits."""
    shares = [part.sum() for part in logits.softmax(0).split(PART)]
    kept, total = torch.ones(len(shares), dtype=torch.bool), 0.0
    for part in sorted(range(len(shares)), key=lambda part: float(shares[part])):
        if part == target // PART:
            continue
        total += float(shares[part])
        if total > drop_mass:
            break
        kept[part] = False
    return kept.repeat_interleave(PART)[: logits.shape[0]]


def restricted_sum(case: Case, drop_mass: float) -> Tensor:
    """Sum of the log-probs, each among the entries that its row keeps."""
    logits, total = true_logits(case)[:, :-1], torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.flatten(0, 1), case.labels[:, 1:].flatten(), strict=True):
        if target == -100:
            continue
        kept = kept_entries(row.detach(), int(target), drop_mass)
        total = total + row[target] - row.masked_fill(~kept, -torch.inf).logsumexp(0)
    return total


@pytest.mark.parametrize("drop_mass", [1e-6, 1e-3, 0.05, 0.5])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("path", PATHS)
def test_it_is_the_gradient_of_the_log_prob_among_what_is_kept(path, transform, drop_mass):
    case = leaves_of(peaked(**TRANSFORMS[transform]), (True, True, True))
    restricted_sum(case, drop_mass).backward()
    ours = leaves_of(case, (True, True, True))
    out = fp.sequence_logps(ours.hidden, ours.head, ours.labels, path=path, drop_mass=drop_mass)
    out.sums.sum().backward()
    for name in ("hidden", "weight", "bias"):
        value, truth = getattr(ours, name), getattr(case, name)
        if value is not None:
            assert relative(value.grad, truth.grad) <= 1e-10, name


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    drop_mass=st.one_of(st.floats(1e-9, 0.9), st.floats(0.9, 1 - 1e-12)),
    scale=st.floats(0.01, 60.0),
    ties=st.booleans(),
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_gradient_of_the_logits_is_off_by_twice_the_mass_at_most(
    seed, drop_mass, scale, ties, path, dtype
):
    dropped_mass.PART = PART
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(1, 9, VOCAB, generator=generator, dtype=torch.float64)).to(dtype)
    if ties:
        logits = logits.round()
    labels = torch.randint(VOCAB, (1, 9), generator=generator)
    upstream = torch.randn(1, 9, generator=generator, dtype=torch.float64).to(dtype)
    # With the identity for a weight, the gradient of hidden is that of the logits.
    weight = torch.eye(VOCAB, dtype=dtype).requires_grad_()

    def gradient(**options) -> Tensor:
        hidden = logits.clone().requires_grad_()
        logps = fp.token_logps(hidden, weight, labels, shift=False, path=path, **options)
        (logps * upstream).sum().backward()
        return hidden.grad

    exact, ours = gradient(), gradient(drop_mass=drop_mass)
    # What rounding alone does to a row: to each probability, and to the logsumexp of large logits.
    noise = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]
    bound = 2 * drop_mass + noise
    assert ((ours - exact).abs().sum(-1) <= bound * upstream.abs()).all()
    assert (ours.sum(-1).abs() <= noise * upstream.abs()).all()


@pytest.mark.parametrize("path", PATHS)
def test_log_probs_are_exact_and_an_unlikely_target_is_kept(path):
    case = leaves_of(peaked(), (True, False, False))
    exact = fp.sequence_logps(case.hidden, case.head, case.labels)
    ours = fp.sequence_logps(case.hidden, case.head, case.labels, path=path, drop_mass=0.9)
    torch.testing.assert_close(ours.sums, exact.sums, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(ours.sums.sum(), case.hidden)
    targets = case.labels[:, 1:]
    labelled = targets != -100
    # Were the target's part left out, its column would push nothing.
    assert (gradient[:, :-1][labelled].norm(dim=-1) > 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_agree_to_the_bit(path):
    def run() -> list[Tensor]:
        case = leaves_of(peaked(dtype=torch.float32), (True, True, False))
        options = {"path": path, "drop_mass": 0.01}
        out = fp.sequence_logps(case.hidden, case.head, case.labels, **options)
        return [out.sums.detach(), *torch.autograd.grad(out.sums.sum(), (case.hidden, case.weight))]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


def test_small_workspaces_cut_parts_into_tiles(tiny_tiles):
    gradients = []
    for workspace_mb in (256, 1e-9):
        case = leaves_of(peaked(), (True, True, False))
        options = {"path": "recompute", "workspace_mb": workspace_mb, "drop_mass": 0.01}
        fp.sequence_logps(case.hidden, case.head, case.labels, **options).sums.sum().backward()
        gradients.append((case.hidden.grad, case.weight.grad))
    for one, other in zip(*gradients, strict=True):
        assert relative(one, other) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_heads_stay_exact_and_low_rank_terms_follow(dtype):
    case = leaves_of(peaked(dtype=dtype), (True, False, False))
    out = fp.sequence_logps(case.hidden, case.head, case.labels, drop_mass=1e-3)
    assert out.plan.path == "stash"
    a, b = (torch.randn(size).to(dtype).requires_grad_() for size in ((3, 24), (VOCAB, 3)))
    head = fp.LMHead(case.weight, low_rank=(fp.LowRank(a, b, 0.01),))
    found = []
    for drop_mass in (0.0, 1e-7):
        sums = fp.sequence_logps(case.hidden, head, case.labels, drop_mass=drop_mass).sums
        found.append(torch.autograd.grad(sums.sum(), (case.hidden, a, b)))
    for exact, ours in zip(*found, strict=True):
        assert relative(ours, exact) <= (2e-6 if dtype == torch.float32 else 8e-3)


def test_losses_take_it():
    case = leaves_of(peaked(), (True, True, False))
    exact = fp.PreferenceLoss("simpo")(case.hidden, case.head, case.labels).loss
    loss_fn = fp.PreferenceLoss("simpo", drop_mass=1e-3)
    torch.testing.assert_close(loss_fn(case.hidden, case.head, case.labels).loss, exact)
    with pytest.raises(ValueError, match="drop_mass: got 1.5"):
        fp.PreferenceLoss("simpo", drop_mass=1.5)(case.hidden, case.head, case.labels)


def test_without_labels_there_is_nothing_to_drop():
    case = leaves_of(peaked(), (True, True, False))
    labels = torch.full_like(case.labels, -100)
    fp.sequence_logps(case.hidden, case.head, labels, drop_mass=0.1).sums.sum().backward()
    assert not case.hidden.grad.any() and not case.weight.grad.any()


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("where", "transform", "dtype"),
    covering(product(KERNEL_ENGINES, PATHS), ["plain", "all"], KERNELS),
)
def test_kernels_drop_what_the_torch_engine_drops(where, transform, dtype, monkeypatch):
    engine, path = where
    monkeypatch.setattr(dropped_mass, "PART", 32)
    case = make_case(2, 9, 24, 301, dtype=dtype, **TRANSFORMS[transform])
    options = {"needs": needs_of(path), "path": path, "drop_mass": 0.3}
    wanted = computed(case, engine="torch", **options)
    got = computed(case, engine=engine, **options)
    values, gradients = KERNELS[dtype]
    assert largest_error(got.tokens, wanted.tokens) <= values
    assert_gradients(got, wanted, gradients)
    exact = computed(case, engine=engine, needs=needs_of(path), path=path)
    assert relative(got.grads[1], exact.grads[1]) > 2 * gradients
