"""Weights of tokens against eager float64 autograd: every path, layout and head, KL and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergences import eager_tokens, make_two
from loss_cases import compute, eager_logps, extras_of, hidden_batch
from torch import Tensor
from truth import (
    PATHS,
    TRAINING_PATHS,
    TRANSFORMS,
    Case,
    leaves_of,
    make_case,
    needs_of,
    on_engines,
    relative,
    tight,
    true_logps,
)
from waits import OpCalls, watched

import fused_prefopt as fp
from fused_prefopt import LogpBatch, PreferenceLoss, sequence_kl, sequence_logps
from fused_prefopt.losses import find


def weights_for(labels: Tensor) -> Tensor:
    """Random weights in the labels' shape, some of them 0, and some where there is no label."""
    generator = torch.Generator().manual_seed(4)
    weights = 2 * torch.rand(labels.shape, generator=generator)
    return weights.where(torch.rand(labels.shape, generator=generator) > 0.2, 0.0)


def leaves(case: Case) -> list[Tensor]:
    given = (case.hidden, case.weight, case.bias)
    return [value for value in given if value is not None and value.requires_grad]


def backward(case: Case, sums: Tensor) -> list[Tensor]:
    """Gradients of a loss whose slope by each sum is another one."""
    slopes = torch.linspace(-1, 2, len(sums), dtype=torch.float64)
    return list(
        torch.autograd.grad((sums.double() * slopes).sum(), leaves(case), retain_graph=True)
    )


def call(case: Case, layout: str, weights: Tensor, **options):
    """Ours of padded rows, of packed ones, or of packed ones in another order of sequences."""
    if layout == "padded":
        return sequence_logps(case.hidden, case.head, case.labels, token_weights=weights, **options)
    sequences, length = case.labels.shape
    order = torch.arange(sequences)
    if layout == "mixed":
        order = order.flip(0)
    packed = (case.hidden[order].flatten(0, 1), case.head, case.labels[order].flatten())
    given = {"sequence_ids": order.repeat_interleave(length), "num_sequences": sequences}
    return sequence_logps(*packed, **given, token_weights=weights[order].flatten(), **options)


@pytest.mark.parametrize("layout", ["padded", "packed", "mixed"])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize(
    ("engine", "path"), on_engines([(e, p) for e in ("torch", "cublas", "triton") for p in PATHS])
)
def test_sums_lengths_and_gradients_on_every_path(engine, path, transform, layout):
    case = make_case(3, 6, 7, 19, dtype=torch.float64, **TRANSFORMS[transform])
    if engine != "torch":
        case = case.rounded(torch.float32)
    weights = weights_for(case.labels)
    truth, ours = (leaves_of(each, needs_of(path)) for each in (case.double(), case))
    tokens = true_logps(truth) * weights
    labelled = torch.cat([torch.zeros(3, 1).bool(), case.labels[:, 1:] != -100], 1)
    out = call(ours, layout, weights, path=path, engine=engine, **tight(path))
    close = {"rtol": 1e-12, "atol": 1e-12} if engine == "torch" else {"rtol": 2e-6, "atol": 2e-5}
    torch.testing.assert_close(out.sums.detach().double(), tokens.sum(1).detach(), **close)
    torch.testing.assert_close(out.lengths.double(), (weights * labelled).double().sum(1), **close)
    torch.testing.assert_close(out.means, out.sums / out.lengths)
    assert out.lengths.dtype == out.sums.dtype == case.hidden.dtype
    if path != "evaluate":
        tolerance = 1e-12 if engine == "torch" else 2e-6
        for found, wanted in zip(
            backward(ours, out.sums), backward(truth, tokens.sum(1)), strict=True
        ):
            assert relative(found, wanted) <= tolerance


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_weights_of_zero_and_one_are_masked_labels_and_integers_are_repeats(path, shift):
    case = leaves_of(make_case(4, 7, dtype=torch.float64), needs_of(path))
    kept = weights_for(case.labels) > 0.7
    options = {"path": path, "shift": shift}
    masked = replace(case, labels=case.labels.where(kept, -100))
    one = sequence_logps(case.hidden, case.head, case.labels, token_weights=1.0 * kept, **options)
    other = sequence_logps(masked.hidden, masked.head, masked.labels, **options)
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-14, atol=0)
    assert torch.equal(one.lengths, other.lengths.double())
    for found, wanted in zip(backward(case, one.sums), backward(case, other.sums), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    # A completion whose tokens all count twice is twice its sum, and has its mean.
    twice = sequence_logps(
        case.hidden, case.head, case.labels, token_weights=torch.full(kept.shape, 2.0), **options
    )
    whole = sequence_logps(case.hidden, case.head, case.labels, **options)
    torch.testing.assert_close(twice.sums, 2 * whole.sums, rtol=1e-14, atol=0)
    torch.testing.assert_close(twice.means, whole.means, rtol=1e-14, atol=0)


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_the_pass_over_the_head_is_the_one_without_weights(path):
    case = leaves_of(make_case(4, 7), needs_of(path))
    found = []
    for weights in (None, weights_for(case.labels)):
        with OpCalls() as calls:
            out = sequence_logps(
                case.hidden, case.head, case.labels, path=path, token_weights=weights
            )
            out.sums.sum().backward()
        # Plan, numbers of calls, and what each of them returns and keeps.
        shapes = [[tuple(each.shape) for each in result] for _, _, result in calls.found]
        found.append((out.plan, [op for op, _, _ in calls.found], shapes))
    assert found[0] == found[1] and len(found[0][1]) == 2


def test_half_precision_is_weighted_after_fp32_sums():
    case = make_case(3, 9, dtype=torch.bfloat16)
    weights = weights_for(case.labels)
    out = sequence_logps(case.hidden, case.head, case.labels, token_weights=weights.bfloat16())
    truth = (true_logps(case.double()) * weights.bfloat16().double()).sum(1)
    assert out.sums.dtype == torch.float32
    torch.testing.assert_close(out.sums.double(), truth, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_divergences_are_weighted_alike(layout):
    two = make_two(4, 7, transform="all", dtype=torch.float64)
    weights = weights_for(two.policy.labels)
    two = two._replace(policy=leaves_of(two.policy, (True, True, True)))
    policy, reference = two
    inputs = [policy.hidden, policy.head, reference.hidden, reference.head, policy.labels, weights]
    options = {}
    if layout == "packed":
        inputs = [each.flatten(0, 1) if isinstance(each, Tensor) else each for each in inputs]
        options = {"sequence_ids": torch.arange(4).repeat_interleave(7), "num_sequences": 4}
    *inputs, given = inputs
    out = sequence_kl(*inputs, token_weights=given, **options)
    truths = [(each * weights[:, 1:]).sum(1) for each in eager_tokens(two)]
    for found, wanted in zip((out.kl, out.policy, out.reference), truths, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-10, atol=1e-12)
    for found, wanted in ((out.kl, truths[0]), (out.policy + out.kl, truths[1] + truths[0])):
        for ours, right in zip(backward(policy, found), backward(policy, wanted), strict=True):
            assert relative(ours, right) <= 1e-10


@pytest.mark.parametrize(
    "loss", ["dpo", "simpo", "alpha-dpo", "gamma-simpo", "wpo", "tdpo1", "dro"]
)
def test_losses_of_weighted_tokens(loss):
    batch = hidden_batch()
    weights = weights_for(batch["labels"]).double()
    weights[2] *= 0.05  # fewer than one token, all together
    hidden = batch["hidden"].requires_grad_()
    labels, targets = batch["labels"], batch["labels"][:, 1:]
    logps = (hidden[:, :-1] @ batch["weight"].T).log_softmax(-1)
    own = weights[:, 1:] * (targets >= 0)
    sums = (logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * own).sum(1)
    extras = {k: v for k, v in extras_of(batch).items() if k != "collision"}
    collision = ((2 * logps.detach()).exp().sum(-1).log() * own).sum(1)
    prompt = eager_logps(hidden, batch["weight"], batch["prompt_labels"])[0].detach()
    known = LogpBatch(sums, own.sum(1), prompt=prompt, collision=collision, **extras)
    truth = compute(find(loss).build(), known).loss
    given = {"prompt_labels": batch["prompt_labels"], "token_weights": weights}
    found = PreferenceLoss(loss)(hidden, batch["weight"], labels, **given, **extras).loss
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)
    wanted, ours = (torch.autograd.grad(each, hidden)[0] for each in (truth, found))
    torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-12)


def test_a_reference_of_hidden_states_has_the_same_weights():
    batch = hidden_batch()
    hidden, head, labels = batch["hidden"], batch["weight"], batch["labels"]
    weights = weights_for(labels)
    reference = (hidden.flip(1), head / 2)
    sums = sequence_logps(*reference, labels, token_weights=weights).sums
    given = {"token_weights": weights}
    for name in ("dpo", "tdpo1"):
        ours = PreferenceLoss(name)(
            hidden, head, labels, ref_hidden=reference[0], ref_head=reference[1], **given
        )
        kl = sequence_kl(hidden, head, *reference, labels, **given).kl
        known = {"reference": sums, "sequence_kl": kl, **given}
        wanted = PreferenceLoss(name)(hidden, head, labels, **known)
        torch.testing.assert_close(ours.loss, wanted.loss, rtol=1e-12, atol=0)


def test_weights_that_do_not_fit_are_refused():
    case = make_case()
    good = torch.ones(case.labels.shape)
    bad = good.clone()
    bad[1, 2] = -1.0
    for weights, message in (
        (good[:, 1:], r"token_weights: got shape \(3, 6\), wanted \(3, 7\)"),
        (good.long(), "token_weights: got dtype torch.int64"),
        (bad, r">= 0, got -1.0 in row \(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_logps(case.hidden, case.head, case.labels, token_weights=weights)
    with pytest.raises(ValueError, match="token_weights: got some with ld_alpha"):
        loss_fn = fp.PreferenceLoss("simpo", ld_alpha=0.5)
        loss_fn(case.hidden, case.head, case.labels, token_weights=good)


@pytest.mark.parametrize("loss", ["alpha-dpo", "dr-dpo", "sft", "kto", "tdpo1"])
def test_no_weight_is_waited_for(monkeypatch, loss):
    waits, batch = watched(monkeypatch), hidden_batch()
    hidden, head, labels = batch["hidden"].requires_grad_(), batch["weight"], batch["labels"]
    count = int((labels[:, 1:] != -100).sum())
    extras = {k: v for k, v in extras_of(batch).items() if k in ("reference", "desirable")}
    extras |= {"weights": torch.tensor([1.0, 0.0, 2.0] * 2), "ref_hidden": hidden.detach() + 1}
    loss_fn, given = PreferenceLoss(loss), {"token_weights": weights_for(labels), "ref_head": head}
    with waits:
        loss_fn(hidden, head, labels, num_labels=count, **extras, **given).loss.backward()
    assert waits.found == []
