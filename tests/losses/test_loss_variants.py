"""The further losses by hand, Bradley–Terry, and the published settings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector

from fused_prefopt.losses import (
    available_losses,
    bradley_terry_loss,
    find,
    length_desensitized,
    preset,
    published_settings,
    tail_labels,
)
from fused_prefopt.types import LogpBatch


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def two_pairs() -> LogpBatch:
    """Δ = 2, −4 | −1, 1; L̄ = −2, −3 | −4, −1."""
    return LogpBatch(
        policy=vector(-10, -6, -20, -3),
        reference=vector(-12, -2, -19, -4),
        lengths=torch.tensor([5, 2, 5, 3]),
    )


def losses(name: str, batch: LogpBatch | None = None, **options) -> list[float]:
    return compute(find(name).build(**options), batch or two_pairs()).losses.tolist()


def test_anchored_losses_by_hand():
    # β = 0.5: r = 1, −2 | −0.5, 0.5.
    pairs = [(1.0, -0.5), (-2.0, 0.5)]
    wanted = {
        "nca-pair": [softplus(-w) + (softplus(w) + softplus(r)) / 2 for w, r in pairs],
        "bco-pair": [softplus(-w) + softplus(r) for w, r in pairs],
        "sppo-hard": [((w - 0.5) ** 2 + (r + 0.5) ** 2) / 0.25 for w, r in pairs],
        "apo-zero": [1 - sigmoid(w) + sigmoid(r) for w, r in pairs],
        "apo-down": [sigmoid(w) + 1 - sigmoid(w - r) for w, r in pairs],
    }
    for name, values in wanted.items():
        assert losses(name, beta=0.5) == pytest.approx(values, rel=1e-12)


def test_links_by_hand():
    # m = 1.5, −2.5.
    assert losses("hinge", beta=0.5) == [0.0, 3.5]
    values = []
    for m in (1.5, -2.5):
        q = sigmoid(m)
        values.append(q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1))
    assert losses("exo-pair", beta=0.5, label_smoothing=0.1) == pytest.approx(values, rel=1e-12)
    share = [sigmoid(m / 0.5) for m in (1.5, -2.5)]
    values = [
        (1 - s) * softplus(-m) + s * math.exp(-m) for s, m in zip(share, (1.5, -2.5), strict=True)
    ]
    assert losses("discopop", beta=0.5, temperature=0.5) == pytest.approx(values, rel=1e-12)


def test_transport_by_hand():
    # Paired: L_w − L_l = 10, −3 and 7, 2 under the reference; sorted −3 against 2, 10 against 7.
    assert losses("aot", beta=0.5) == pytest.approx([softplus(-1.5), softplus(2.5)])
    # Unpaired: Δ_w = 2, −4 and Δ_l = −1, 1; sorted −4 against −1, 2 against 1.
    assert losses("aot-unpaired", beta=0.5) == pytest.approx([softplus(-0.5), softplus(1.5)])


def test_transport_does_not_see_who_is_paired_with_whom():
    batch = random_batch(12)
    order = torch.tensor([0, 1, 2, 3, 4, 5, 9, 7, 11, 6, 10, 8])
    fields = {name: getattr(batch, name)[order] for name in batch.given - {"kl"}}
    shuffled = LogpBatch(**fields)
    values = [compute(find("aot-unpaired").build(), each).loss for each in (batch, shuffled)]
    torch.testing.assert_close(*values)


def test_likelihood_of_the_chosen_by_hand():
    assert losses("sft") == pytest.approx([16 / 7] * 2)
    assert losses("sft", nll="sum") == [10.0, 6.0]
    assert losses("sft", nll="sequence_mean") == [2.0, 3.0]


def test_curved_rewards_by_hand():
    chosen, rejected = (2.0, -4.0), (-1.0, 1.0)
    curves = {
        "forward_kl": lambda x: 1 - math.exp(-x),
        "js_divergence": lambda x: math.log(2 * math.exp(x) / (math.exp(x) + 1)),
        "alpha_divergence": lambda x: (math.exp(0.5 * x) - 1) / 0.5,
    }
    for divergence, curve in curves.items():
        values = [
            softplus(-0.1 * (curve(w) - curve(r))) for w, r in zip(chosen, rejected, strict=True)
        ]
        found = losses("f-dpo", divergence=divergence, alpha=1.5)
        assert found == pytest.approx(values, rel=1e-12)


def test_variants_by_hand():
    # m = 1.5, −2.5 at β = 0.5; the second chosen completion fell by 4 nats.
    assert losses("dpo-positive", beta=0.5, penalty=3.0) == pytest.approx(
        [softplus(-1.5), softplus(2.5 + 6.0)]
    )
    assert losses("dpo-shift", beta=0.5, share=0.8) == pytest.approx(
        [softplus(-1.0 - 0.4), softplus(2.0 + 0.4)]
    )
    reward = [2 * (1 - math.exp(-0.5 * mean)) / 0.5 for mean in (-2.0, -3.0, -4.0, -1.0)]
    assert losses("alpha-po", beta=2.0, gamma=0.3, alpha=0.5) == pytest.approx(
        [softplus(0.3 - reward[0] + reward[2]), softplus(0.3 - reward[1] + reward[3])]
    )
    assert losses("wpo", beta=0.5) == pytest.approx(
        [math.exp(-6.0) * softplus(-1.5), math.exp(-4.0) * softplus(2.5)]
    )
    aligned = dataclasses.replace(two_pairs(), collision=vector(-5, -4, -5, -3))
    assert losses("wpo", aligned, beta=0.5) == pytest.approx(
        [math.exp(-6.0 + 2.0) * softplus(-1.5), math.exp(-4.0 + 3.0) * softplus(2.5)]
    )
    result = compute(find("dr-dpo").build(beta=0.5, temperature=0.5), two_pairs())
    odds = (sigmoid(1.5) ** 2 + sigmoid(-2.5) ** 2) / 2
    assert result.loss.item() == pytest.approx(-0.5 * math.log(odds))
    assert result.losses.tolist() == pytest.approx([softplus(-1.5), softplus(2.5)])


def test_scaled_losses_by_hand():
    # m = 1.5, −2.5: M₀ = −0.5; ρ = 1 + 0.2 · (2, −2).
    values = [softplus(-1.4 * 1.5), softplus(0.6 * 2.5)]
    assert losses("beta-dpo", beta=0.5, alpha=0.2) == pytest.approx(values)
    # Of a first batch M is M₀.
    values = [softplus(-1.5), softplus(2.5)]
    assert losses("beta-dpo", beta=0.5, alpha=0.2, level="batch") == pytest.approx(values)
    # A strong α meets the floor.
    values = [softplus(-21 * 1.5), softplus(1e-3 * 2.5)]
    assert losses("beta-dpo", beta=0.5, alpha=10.0) == pytest.approx(values)


def test_bradley_terry_by_hand():
    chosen = vector(2.0, -1.0).requires_grad_()
    loss = bradley_terry_loss(chosen, vector(0.5, 1.0))
    assert loss.item() == pytest.approx((softplus(-1.5) + softplus(2.0)) / 2)
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert gradient.tolist() == pytest.approx([-sigmoid(-1.5) / 2, -sigmoid(2.0) / 2])
    margin = bradley_terry_loss(chosen, vector(0.5, 1.0), margin=0.5)
    assert margin.item() == pytest.approx((softplus(-1.0) + softplus(2.5)) / 2)
    each = bradley_terry_loss(chosen, vector(0.5, 1.0), margin=vector(0.5, -1.0))
    assert each.item() == pytest.approx((softplus(-1.0) + softplus(1.0)) / 2)
    assert bradley_terry_loss(vector(), vector()).item() == 0.0
    assert bradley_terry_loss(vector(-1e4), vector(1e4)).item() == 2e4


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((vector(1.0), vector(1.0, 2.0)), r"rejected_scores: got shape \(2,\), wanted \(1\)"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "chosen_scores: got shape"),
        ((torch.ones(2).long(), torch.ones(2).long()), "chosen_scores: got dtype"),
        ((vector(1.0), vector(2.0), vector(1.0, 2.0)), "margin: got shape"),
    ],
)
def test_bradley_terry_shapes(arguments, wanted):
    with pytest.raises(ValueError, match=wanted):
        bradley_terry_loss(*arguments)


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
    batch = two_pairs()
    tail, tail_reference = vector(-4, 0, 0, -2), vector(-3, 0, 0, -1)
    weighted = length_desensitized(batch, tail, tail_reference, alpha=0.25)
    assert weighted.policy.tolist() == [-7.0, -6.0, -20.0, -1.5]
    assert weighted.reference.tolist() == [-9.75, -2.0, -19.0, -3.25]
    whole = length_desensitized(batch, tail, tail_reference, alpha=1.0)
    assert torch.equal(whole.policy, batch.policy)
    with pytest.raises(ValueError, match="alpha: got 1.5"):
        length_desensitized(batch, tail, tail_reference, alpha=1.5)
    with pytest.raises(ValueError, match="tail: got shape"):
        length_desensitized(batch, tail[:2], tail_reference, alpha=0.5)


def test_published_settings_are_those_of_the_papers():
    assert preset("gamma-simpo/llama-3-8b-instruct") == (
        "gamma-simpo",
        {"beta": 10.0, "gamma": 4.0, "tau": 10.0},
    )
    assert preset("Alpha_DPO/Mistral-7B-Instruct")[1] == pytest.approx(
        {"beta": 2.5, "gamma": 0.375, "alpha": 0.05}
    )
    settings = published_settings()
    assert len(settings) == 8
    assert settings["gamma-simpo/qwen2.5-7b-instruct"].hyperparameters["tau"] == 3.0
    assert settings["alpha-dpo/gemma-2-9b-it"].learning_rate == 8e-7
    for name, setting in settings.items():
        assert name.split("/")[0] == setting.loss in available_losses()
        loss = find(setting.loss).build(**setting.hyperparameters)
        assert compute(loss, random_batch()).loss.isfinite()
    preset("alpha-dpo/gemma-2-9b-it")[1]["beta"] = 0.0
    assert preset("alpha-dpo/gemma-2-9b-it")[1]["beta"] == 10.0


def test_unknown_setting():
    with pytest.raises(ValueError, match="did you mean 'gamma-simpo/llama-3-8b-instruct'.*list"):
        preset("gamma-simpo/llama3-8b-instruct")


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("exo-pair", {"label_smoothing": 0.0}, "label_smoothing: got 0.0, wanted .* > 0"),
        ("discopop", {"temperature": 2.0}, "temperature: got 2.0"),
        ("dpo-shift", {"share": 0.0}, "share: got 0.0"),
        ("dpo-positive", {"penalty": -1.0}, "penalty: got -1.0"),
        ("dr-dpo", {"temperature": 0.0}, "temperature: got 0.0"),
        ("f-dpo", {"divergence": "kl"}, "divergence: got 'kl', wanted one of 'reverse_kl'"),
        ("f-dpo", {"alpha": math.inf}, "alpha: got inf"),
        ("beta-dpo", {"level": "token"}, "level: got 'token', wanted one of 'pair', 'batch'"),
        ("beta-dpo", {"alpha": -1.0}, "alpha: got -1.0"),
        ("beta-dpo", {"statistics": "code"}, "statistics: got 'code', wanted one of 'ema', 'ref"),
        ("beta-dpo", {"statistics": "reference", "beta": 0.0}, "beta: got 0.0, wanted"),
        ("gamma-dpo", {"label_smoothing": 0.6}, "label_smoothing: got 0.6"),
        ("sppo-hard", {"beta": 0.0}, "beta: got 0.0"),
        ("sft", {"nll": "mean"}, "nll: got 'mean'"),
        ("ipo", {"tau": 0.0}, "tau: got 0.0, wanted a finite number > 0"),
        ("cpo", {"nll": "mean"}, "nll: got 'mean', wanted one of 'sum'"),
        ("tdpo2", {"alpha": math.nan}, "alpha: got nan"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight: got -1.0"),
    ],
)
def test_hyperparameters_out_of_range(name, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        find(name).build(**options)


def test_kto_without_a_kl_needs_its_summary():
    batch = dataclasses.replace(random_batch(6), kl=None)
    with pytest.raises(ValueError, match="summary: got NoneType, wanted the Moments"):
        find("kto").build()(batch)
