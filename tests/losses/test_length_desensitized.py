"""LD-DPO: log-probs cut at the length of the partner, and any loss on pairs with weighted tails."""

from __future__ import annotations

import pytest
import torch

import fused_prefopt as fp
from fused_prefopt.losses import length_desensitized, tail_labels

S, T, D, V = 6, 9, 5, 23
# As many labels on both sides of the second pair, none on one of the third.
LENGTHS = torch.tensor([6, 5, 0, 3, 5, 4])


def draws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, and labels behind a prompt of two tokens, the third row's gapped."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(S, T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (S, T), generator=generator)
    places = torch.arange(T) - 2
    labels = labels.masked_fill((places < 0) | (places >= LENGTHS[:, None]), -100)
    labels[1, 4], labels[1, 8] = -100, 7
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def tokens(hidden, weight, labels, shift):
    """Eager (S, T) log-probs of the labels, and how many labels there are up to each."""
    targets = labels.roll(-1, 1).masked_fill(torch.arange(T) == T - 1, -100) if shift else labels
    logps = (hidden @ weight.T).log_softmax(-1)
    found = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return found.where(targets >= 0, 0.0), (targets >= 0).cumsum(1)


def cut(hidden, weight, labels, shift):
    """Eager sums of the shared parts and of the tails."""
    logps, places = tokens(hidden, weight, labels, shift)
    chosen, rejected = places[:, -1].chunk(2)
    beyond = places > chosen.minimum(rejected).repeat(2)[:, None]
    return logps.where(~beyond, 0.0).sum(1), logps.where(beyond, 0.0).sum(1)


def called(layout: str, hidden, labels) -> tuple[tuple, dict]:
    if layout == "padded":
        return (hidden, labels), {}
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    ids = order.repeat_interleave(T)
    given = {"sequence_ids": ids, "num_sequences": S if layout == "packed" else None}
    return (hidden[order].flatten(0, 1), labels[order].flatten()), given


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("layout", ["padded", "packed", "uncounted"])
@pytest.mark.parametrize("path", ["local", "recompute", "stash"])
def test_the_parts_are_those_of_eager_log_probs(path, layout, shift):
    hidden, weight, labels = draws()
    leaves = [hidden, weight]
    if path == "stash":
        weight.requires_grad_(False)
        leaves = [hidden]
    (rows, targets), given = called(layout, hidden, labels)
    parts = fp.shared_and_tail_logps(rows, weight, targets, shift=shift, path=path, **given)
    wanted = cut(hidden, weight, labels, shift)
    assert wanted[1].count_nonzero() == 2
    upstream = torch.linspace(-1, 2, 2 * S, dtype=torch.float64)
    found = torch.cat([part.sums for part in parts])
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(values @ upstream, leaves, retain_graph=True)
        for values in (found, torch.cat(wanted))
    ]
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
    assert all(part.plan.path == path for part in parts)
    whole = fp.sequence_logps(rows, weight, targets, shift=shift, **given)
    torch.testing.assert_close(parts[0].sums + parts[1].sums, whole.sums, rtol=1e-12, atol=1e-12)
    assert torch.equal(parts[0].lengths + parts[1].lengths, whole.lengths)
    shared = whole.lengths[: S // 2].minimum(whole.lengths[S // 2 :])
    assert torch.equal(parts[0].lengths, shared.repeat(2))


def test_no_sequences_and_an_odd_number():
    hidden, labels = torch.zeros(0, 4, D), torch.zeros(0, 4, dtype=torch.long)
    parts = fp.shared_and_tail_logps(hidden, torch.ones(V, D), labels)
    assert [part.sums.shape for part in parts] == [(0,), (0,)]
    with pytest.raises(ValueError, match="labels: got 5 sequences, needs an even number"):
        fp.shared_and_tail_logps(torch.zeros(5, 4, D), torch.ones(V, D), torch.zeros(5, 4).long())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["dpo", "simpo", "gamma-simpo", "wpo"])
def test_a_loss_of_hidden_states_weighs_the_tails(name, layout, alpha):
    hidden, weight, labels = draws()
    reference = torch.linspace(-9, -2, S, dtype=torch.float64)
    (rows, targets), given = called(layout, hidden, labels)
    loss_fn = fp.PreferenceLoss(name, ld_alpha=alpha)
    found = loss_fn(rows, weight, targets, reference=reference, **given)
    shared, tail = cut(hidden, weight, labels, True)
    collision = (2 * (hidden @ weight.T).log_softmax(-1)).logsumexp(-1)
    counted = (labels[:, 1:] >= 0).double()
    batch = fp.LogpBatch(
        shared + tail,
        (labels[:, 1:] >= 0).sum(1),
        reference,
        collision=(collision[:, :-1] * counted).sum(1).detach(),
    )
    weighted = length_desensitized(batch, tail, None, alpha=alpha)
    torch.testing.assert_close(weighted.policy, shared + alpha * tail)
    wanted = fp.PreferenceLoss(name).from_logps(weighted)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(each.loss, (hidden, weight)) for each in (found, wanted)]
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)
    if alpha == 1.0:
        plain = fp.PreferenceLoss(name)(rows, weight, targets, reference=reference, **given)
        torch.testing.assert_close(found.losses, plain.losses, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"shared_prompt": True}], ids=str)
def test_through_a_model(layout):
    pytest.importorskip("transformers")
    from tiny_models import pair_features, tiny_llama

    from fused_prefopt.data import PairCollator
    from fused_prefopt.integrations.transformers import preference_outputs

    model = tiny_llama(attn_implementation="eager").double()
    features = [
        {**feature, "ref_chosen_logps": -9.0 - i, "ref_rejected_logps": -8.0}
        for i, feature in enumerate(pair_features(4))
    ]
    batch = PairCollator(0, **layout)(features)
    loss_fn = fp.PreferenceLoss("dpo", beta=0.5, ld_alpha=0.25)
    found = preference_outputs(model, loss_fn, batch)
    sums = []
    for side, other in (("chosen_ids", "rejected_ids"), ("rejected_ids", "chosen_ids")):
        for feature in features:
            start, shared = len(feature["prompt_ids"]), len(feature[other])
            ids = torch.tensor([feature["prompt_ids"] + feature[side]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, ids[0, 1:, None])[start - 1 :, 0]
            sums.append(picked[:shared].sum() + 0.25 * picked[shared:].sum())
    policy = torch.stack(sums)
    reference = torch.tensor([-9.0, -10, -11, -12, -8, -8, -8, -8], dtype=torch.float64)
    lengths = torch.ones(8, dtype=torch.long)
    wanted = fp.PreferenceLoss("dpo", beta=0.5).from_logps(
        fp.LogpBatch(policy, lengths, reference=reference)
    )
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "alpha", "wanted"),
    [
        ("dpo", 1.5, "ld_alpha: got 1.5, wanted a finite number >= 0 and <= 1"),
        ("kto", 0.5, "ld_alpha: got 0.5 for kto, needs a loss on pairs"),
    ],
)
def test_what_cannot_be_weighted(name, alpha, wanted):
    with pytest.raises(ValueError, match=wanted):
        fp.PreferenceLoss(name, ld_alpha=alpha)


def test_it_compiles_in_one_graph():
    hidden, weight, labels = draws()
    loss_fn = fp.PreferenceLoss("simpo", ld_alpha=0.3)

    def loss(hidden, weight):
        return loss_fn(hidden, weight, labels).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = [each(hidden, weight) for each in (compiled, loss)]
    gradients = [torch.autograd.grad(result, (hidden, weight)) for result in results]
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_tails_by_hand():
    labels = torch.tensor([[-100, 3, 4, 5, 6], [-100, 1, -100, -100, -100]])
    labels = torch.cat([labels, torch.tensor([[-100, -100, 7, 8, -100], [-100, 2, 2, -100, 9]])])
    assert tail_labels(labels).tolist() == [
        [-100, -100, -100, 5, 6],
        [-100] * 5,
        [-100] * 5,
        [-100, -100, 2, -100, 9],
    ]
    with pytest.raises(ValueError, match="3 sequences, wanted an even number"):
        tail_labels(labels[:3])
    with pytest.raises(ValueError, match="labels: got shape"):
        tail_labels(labels[0])


def test_weighted_tails_by_hand():
    fields = {"policy": [-10.0, -6, -20, -3], "reference": [-12.0, -2, -19, -4]}
    values = {name: torch.tensor(each, dtype=torch.float64) for name, each in fields.items()}
    batch = fp.LogpBatch(**values, lengths=torch.tensor([5, 2, 5, 3]))
    tail, tail_reference = torch.tensor([-4.0, 0, 0, -2]), torch.tensor([-3.0, 0, 0, -1])
    weighted = length_desensitized(batch, tail, tail_reference, alpha=0.25)
    assert weighted.policy.tolist() == [-7.0, -6.0, -20.0, -1.5]
    assert weighted.reference.tolist() == [-9.75, -2.0, -19.0, -3.25]
    with pytest.raises(ValueError, match="alpha: got 1.5"):
        length_desensitized(batch, tail, tail_reference, alpha=1.5)
    with pytest.raises(ValueError, match="tail: got shape"):
        length_desensitized(batch, tail[:2], tail_reference, alpha=0.5)
