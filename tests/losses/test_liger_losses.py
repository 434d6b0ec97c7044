"""Our losses against Liger's on the same hidden states; where Liger is wrong, the difference."""

from __future__ import annotations

import pytest
import torch

from fused_prefopt import PreferenceLoss

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")

S, T, D, V = 6, 9, 5, 23


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and labels of unequal lengths; labels[t] belongs to hidden[t]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(S, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(0, V, (S, T), generator=generator)
    lengths = torch.tensor([3, 9, 5, 4, 2, 9])
    return hidden, weight, labels.masked_fill(torch.arange(T) >= lengths[:, None], -100)


def liger(name: str, hidden, weight, labels, /, call=None, **options) -> torch.Tensor:
    loss_fn = getattr(chunked_loss, f"LigerFusedLinear{name}Loss")(compiled=False, **options)
    if name == "KTO":
        return loss_fn(hidden, weight, labels, **call)[0]
    return loss_fn(weight, hidden, labels, **(call or {}))[0]


def ours(name: str, hidden, weight, labels, /, call=None, **options) -> torch.Tensor:
    loss_fn = PreferenceLoss(name, **options)
    return loss_fn(hidden, weight, labels, shift=False, **(call or {})).loss


def assert_equal(first, second) -> None:
    """Loss and both gradients of two functions of hidden states, head and labels."""
    results = []
    for function in (first, second):
        hidden, weight, labels = problem()
        hidden.requires_grad_()
        weight.requires_grad_()
        loss = function(hidden, weight, labels)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_cpo_equals_liger(weight):
    assert_equal(
        lambda *inputs: ours("cpo", *inputs, nll_weight=weight),
        lambda *inputs: liger("CPO", *inputs, alpha=weight),
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_equals_liger(label_smoothing):
    options = {"beta": 2.0, "gamma": 0.5, "label_smoothing": label_smoothing}
    assert_equal(
        lambda *inputs: ours("simpo", *inputs, **options),
        lambda *inputs: liger("SimPO", *inputs, compute_nll_loss=False, **options),
    )


def test_orpo_equals_liger_but_for_the_mean_of_its_nll():
    # Liger's NLL is the mean over all chosen tokens, the paper's and ours over each completion.
    def difference(*inputs):
        means = ours("sft", *inputs, nll="sequence_mean"), ours("sft", *inputs)
        return ours("orpo", *inputs, weight=0.3) - means[0] + means[1]

    assert_equal(difference, lambda *inputs: liger("ORPO", *inputs, beta=0.3))
    plain = ours("orpo", *problem(), weight=0.3)
    assert abs(plain - liger("ORPO", *problem(), beta=0.3)) > 1e-3


@pytest.mark.parametrize("kl", [0.0, 0.8])
def test_kto_equals_liger(kl):
    desirable = torch.tensor([True, False, False, True, True, False])
    divergence = torch.tensor(kl)
    assert_equal(
        lambda *inputs: ours(
            "kto",
            *inputs,
            call={"reference": torch.zeros(S), "desirable": desirable, "kl": divergence},
        ),
        lambda *inputs: liger(
            "KTO", *inputs, call={"preference_labels": desirable, "kl": divergence}
        ),
    )


def test_liger_takes_a_negative_kl_where_kto_clamps_it():
    desirable = torch.tensor([True, False] * 3)
    fields = {"reference": torch.zeros(S), "desirable": desirable}
    negative, none = torch.tensor(-3.0), torch.tensor(0.0)
    call = {"preference_labels": desirable}
    unclamped = liger("KTO", *problem(), call={**call, "kl": negative})
    clamped = liger("KTO", *problem(), call={**call, "kl": none})
    assert abs(unclamped - clamped) > 1e-3
    found = ours("kto", *problem(), call={**fields, "kl": negative})
    torch.testing.assert_close(found, clamped, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "theirs"), [("simpo", "SimPO"), ("orpo", "ORPO")], ids=["simpo", "orpo"]
)
def test_an_empty_completion_is_nan_in_liger_and_finite_here(name, theirs):
    hidden, weight, labels = problem()
    labels[1] = -100
    assert liger(theirs, hidden, weight, labels, compute_nll_loss=False).isnan()
    hidden.requires_grad_()
    loss = ours(name, hidden, weight, labels)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all()


def test_a_certain_completion_is_not_finite_in_ligers_orpo_and_finite_here():
    hidden, weight, labels = torch.zeros(2, 3, 2), torch.zeros(4, 2), torch.zeros(2, 3).long()
    hidden[0, :, 0], weight[0, 0] = 40.0, 1.0
    hidden.requires_grad_()
    theirs = liger("ORPO", hidden, weight, labels, compute_nll_loss=False)
    (gradient,) = torch.autograd.grad(theirs, hidden)
    assert not (theirs.isfinite() and gradient.isfinite().all())
    loss = ours("orpo", hidden, weight, labels)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and gradient.isfinite().all()


def test_liger_ignores_the_label_smoothing_of_dpo():
    plain, smoothed = (
        liger("DPO", *problem(), use_ref_model=False, label_smoothing=epsilon)
        for epsilon in (0.0, 0.3)
    )
    assert torch.equal(plain, smoothed)
    call = {"reference": torch.zeros(S)}
    found, mixed = (
        ours("dpo", *problem(), call=call, label_smoothing=epsilon) for epsilon in (0.0, 0.3)
    )
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    assert abs(mixed - found) > 1e-3


def test_liger_has_no_ipo():
    with pytest.raises((NotImplementedError, ValueError)):
        liger("DPO", *problem(), use_ref_model=False, loss_type="ipo")
    call = {"reference": torch.zeros(S)}
    assert ours("ipo", *problem(), call=call, length_normalized=True).isfinite()
