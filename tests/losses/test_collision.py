"""`collision`, Σ over tokens of log Σ_v π(v)²: a column of the data that reaches WPO's weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_cases import random_batch

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator


def pairs(*names: str, scale: float = 1.0) -> list[dict]:
    return [
        {
            "prompt_ids": [5, 6],
            "chosen_ids": [7, 8, 9],
            "rejected_ids": [3, 4],
            "ref_chosen_logps": -9.0,
            "ref_rejected_logps": -7.0,
            **{name: scale * (-1.5 - index - 0.25 * len(name)) for name in names},
        }
        for index in range(3)
    ]


COLUMNS = ("collision_chosen", "collision_rejected")


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"shared_prompt": True}], ids=str)
def test_the_columns_of_pairs_become_one_field(layout):
    batch = PairCollator(0, **layout)(pairs(*COLUMNS))
    assert batch["collision"].tolist() == [-5.5, -6.5, -7.5, -6.0, -7.0, -8.0]
    assert batch["collision"].dtype == torch.float32
    assert "collision" not in PairCollator(0, **layout)(pairs())
    with pytest.raises(ValueError, match="missing column 'collision_rejected'"):
        PairCollator(0, **layout)(pairs("collision_chosen"))


def test_the_column_of_points_is_passed_on():
    features = [
        {"prompt_ids": [1], "completion_ids": [2, 3], "collision": value} for value in (-1, -2)
    ]
    assert PointCollator(0)(features)["collision"].tolist() == [-1.0, -2.0]


def test_it_reaches_the_weights_through_a_model():
    pytest.importorskip("transformers")
    from tiny_models import tiny_llama

    from fused_prefopt.integrations.transformers import preference_outputs

    model, loss_fn = tiny_llama(), fp.PreferenceLoss("wpo")
    given = preference_outputs(model, loss_fn, PairCollator(0)(pairs(*COLUMNS)))
    without = preference_outputs(model, loss_fn, PairCollator(0)(pairs(*COLUMNS, scale=0.0)))
    # exp(−C̄_w − C̄_l) of 3 and 2 tokens.
    factors = [((5.5 + index) / 3 + (6.0 + index) / 2) for index in range(3)]
    wanted = without.losses * torch.tensor(factors).exp()
    torch.testing.assert_close(given.losses, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_fused_call_computes_it(packed):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(19, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 19, (4, 7), generator=generator)
    labels[:, :2], labels[1, 5:], labels[2] = -100, -100, -100
    reference = -20 * torch.rand(4, generator=generator, dtype=torch.float64)

    logps = (hidden @ weight.T).log_softmax(-1)[:, :-1]
    targets = labels[:, 1:]
    counted = targets >= 0
    chosen = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    batch = fp.LogpBatch(
        (chosen * counted).sum(1),
        counted.sum(1),
        reference,
        collision=((2 * logps).logsumexp(-1) * counted).sum(1).detach(),
    )
    wanted = fp.PreferenceLoss("wpo").from_logps(batch)

    call = {"hidden": hidden, "labels": labels}
    if packed:
        order = torch.tensor([2, 0, 3, 1])
        call = {name: value[order].flatten(0, 1) for name, value in call.items()}
        call |= {"sequence_ids": order.repeat_interleave(7), "num_sequences": 4}
    found = fp.PreferenceLoss("wpo")(head=weight, reference=reference, **call)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-10, atol=1e-13)
    for leaf in (hidden, weight):
        gradients = [
            torch.autograd.grad(each.loss, leaf, retain_graph=True)[0] for each in (found, wanted)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_without_it_the_weights_are_likelihoods_and_losses_that_want_none_do_not_look():
    batch = dataclasses.replace(random_batch(), collision=None)
    result = fp.PreferenceLoss("wpo").from_logps(batch)
    means = (batch.policy / batch.lengths).detach()
    weights = (means[:4] + means[4:]).exp()
    plain = fp.PreferenceLoss("dpo").from_logps(batch)
    torch.testing.assert_close(result.losses, weights * plain.losses, rtol=1e-12, atol=0)
    for name, info in fp.available_losses().items():
        results = [
            fp.PreferenceLoss(name).from_logps(each).loss for each in (random_batch(), batch)
        ]
        assert torch.equal(*results) is ("collision" not in info.wants), name


def test_a_compiled_loss_computes_it_too():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(19, 5, generator=generator)
    labels = torch.randint(0, 19, (4, 7), generator=generator)
    loss_fn, reference = fp.PreferenceLoss("wpo"), torch.full((4,), -20.0)

    def loss(hidden):
        return loss_fn(hidden, weight, labels, reference=reference).loss

    results = [each(hidden) for each in (torch.compile(loss, backend="aot_eager"), loss)]
    gradients = [torch.autograd.grad(result, hidden)[0] for result in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
