"""Losses that take the reference model's hidden states: TDPO, α-DPO's token level, DPO."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from divergences import eager_tokens
from reference_losses import LOSSES, loss_and_gradients, loss_of, pairs, true_loss
from truth import leaves_of, relative

from fused_prefopt import LogpBatch, PreferenceLoss, sequence_logps
from fused_prefopt.losses.whole_batch import whole_batch


@pytest.mark.parametrize("workspace_mb", [256, 1e-9])
@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_is_measured_where_it_is_needed(name, workspace_mb):
    two = pairs()
    loss_fn = loss_of(name)
    loss_fn.op_options["workspace_mb"] = workspace_mb
    got = loss_and_gradients(loss_fn, two)
    for ours, wanted in zip(got, true_loss(name, two), strict=True):
        assert relative(ours, wanted) <= 2e-5


def test_what_is_given_goes_before_what_is_measured():
    two = pairs()
    case, other = two.policy, two.reference
    given = sequence_logps(other.hidden, other.head, other.labels).sums - 3
    result = PreferenceLoss("dpo")(
        case.hidden,
        case.head,
        case.labels,
        reference=given,
        ref_hidden=other.hidden,
        ref_head=other.head,
    )
    wanted = PreferenceLoss("dpo")(case.hidden, case.head, case.labels, reference=given)
    assert torch.equal(result.losses, wanted.losses)
    known = torch.linspace(0, 2, 6)
    result = PreferenceLoss("tdpo1")(
        case.hidden,
        case.head,
        case.labels,
        sequence_kl=known,
        ref_hidden=other.hidden,
        ref_head=other.head,
    )
    measured = sequence_logps(other.hidden, other.head, other.labels).sums
    fields = {"reference": measured, "sequence_kl": known}
    wanted = PreferenceLoss("tdpo1")(case.hidden, case.head, case.labels, **fields)
    assert torch.equal(result.losses, wanted.losses)


def test_one_half_of_a_reference_is_refused():
    two = pairs()
    case, other = two.policy, two.reference
    given = (case.hidden, case.head, case.labels)
    with pytest.raises(ValueError, match="ref_head: got None with `ref_hidden`"):
        PreferenceLoss("tdpo1")(*given, ref_hidden=other.hidden)
    with pytest.raises(ValueError, match="ref_hidden: got None with `ref_head`"):
        PreferenceLoss("tdpo1")(*given, ref_head=other.head)
    with pytest.raises(ValueError, match="tdpo1 needs `reference`"):
        PreferenceLoss("tdpo1")(*given)
    with pytest.raises(ValueError, match="ref_hidden: got one with `ld_alpha`"):
        PreferenceLoss("dpo", ld_alpha=0.5)(*given, ref_hidden=other.hidden, ref_head=other.head)


def test_a_batch_of_all_ranks_keeps_the_gradient_of_both():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        logps, kls = (torch.randn(4, requires_grad=True) for _ in range(2))
        whole = whole_batch(LogpBatch(logps, torch.ones(4, dtype=torch.int64), sequence_kl=kls))
        slopes = torch.arange(4.0)
        ((whole.batch.policy + 2 * whole.batch.sequence_kl) * slopes).sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(whole.batch.sequence_kl, kls)
    assert torch.equal(logps.grad, slopes) and torch.equal(kls.grad, 2 * slopes)


def test_the_exact_divergence_is_among_the_metrics():
    two = pairs()
    case, other = two.policy, two.reference
    given = (case.hidden, case.head, case.labels)
    result = PreferenceLoss("tdpo1")(*given, ref_hidden=other.hidden, ref_head=other.head)
    chosen, rejected = eager_tokens(two.double())[0].sum(1).chunk(2)
    assert result.metrics["sequence_kl/chosen"].item() == pytest.approx(
        chosen.mean().item(), rel=1e-5
    )
    assert result.metrics["sequence_kl/rejected"].item() == pytest.approx(
        rejected.mean().item(), rel=1e-5
    )
    plain = PreferenceLoss("dpo")(*given, ref_hidden=other.hidden, ref_head=other.head)
    assert not [name for name in plain.metrics if name.startswith("sequence_kl")]


@pytest.mark.parametrize("options", [{"path": "local"}, {"drop_mass": 0.1}])
def test_options_that_the_divergence_cannot_follow_are_refused(options):
    two = pairs()
    case, other = leaves_of(two.policy, (True, True, True)), two.reference
    given = (case.hidden, case.head, case.labels)
    with pytest.raises(ValueError, match="path: got .* needs 'recompute' and all mass"):
        PreferenceLoss("tdpo1", **options)(*given, ref_hidden=other.hidden, ref_head=other.head)
