"""Our losses, of log-probs and of hidden states, against TRL's own `_compute_loss`, driven.

The trainers are not built: `_compute_loss` runs on a stand-in for `self`, with a stand-in model
that returns given token log-probs, and reference sums as if they had been precomputed.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fused_prefopt import PreferenceLoss
from fused_prefopt.losses import (
    PairwiseLoss,
    bradley_terry_loss,
    find,
    length_desensitized,
    tail_labels,
)
from fused_prefopt.types import LogpBatch

pytest.importorskip("trl")
pytest.importorskip("transformers")
from trl import DPOTrainer, RewardTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

S, T, PROMPT, D, V = 10, 13, 4, 5, 31


def stand_in(values: dict[str, torch.Tensor], **settings) -> tuple[SimpleNamespace, object]:
    """What `_compute_loss` reads of a trainer, and a model that returns `values`."""

    def model(**_):
        return SimpleNamespace(**values)

    def same(value):
        return value

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, num_processes=1
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(**settings),
        **settings,
    )
    return trainer, model


class Sequences:
    """Hidden states of sequences with a prompt, their head, and the log-probs that TRL sees."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        ends = torch.randint(PROMPT + 1, T + 1, (S,), generator=generator)
        places = torch.arange(T)
        self.mask = ((places >= PROMPT) & (places < ends[:, None])).long()
        shifted = self.mask[:, 1:]
        self.hidden, self.weight = draw(S, T, D).requires_grad_(), draw(V, D).requires_grad_()
        ids = torch.randint(0, V, (S, T), generator=generator)
        self.labels = ids.masked_fill(self.mask == 0, -100)
        logps = (self.hidden @ self.weight.T).log_softmax(-1)[:, :-1]
        self.tokens = logps.gather(-1, ids[:, 1:, None])[..., 0] * shifted
        collision = (2 * logps.detach()).logsumexp(-1)
        self.desirable = torch.arange(S) % 3 > 0
        self.batch = LogpBatch(
            policy=self.tokens.sum(1),
            lengths=shifted.sum(1),
            reference=self.tokens.detach().sum(1) + draw(S) * 2,
            desirable=self.desirable,
            collision=(collision * shifted).sum(1),
        )
        self.shared = {
            "log_probs": self.tokens,
            "entropy": torch.ones_like(self.tokens),
            "mean_logits": torch.ones_like(self.tokens),
            "is_top1": torch.ones_like(self.tokens).bool(),
            "log_sum_sq_probs": collision,
        }
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones(S, T, dtype=torch.long),
            "completion_mask": self.mask,
        }

    def fused(self, name: str, **options) -> torch.Tensor:
        """Our loss of the hidden states."""
        loss_fn = PreferenceLoss(name, **options)
        return loss_fn(self.hidden, self.weight, self.labels, reference=self.batch.reference).loss


def trl_pairs(data: Sequences, loss_type: str, **settings) -> tuple[torch.Tensor, dict]:
    """TRL's DPO loss and metrics."""
    defaults = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "discopop_tau": 0.05,
        "use_weighting": False,
        "loss_types": [loss_type],
        "loss_weights": [1.0],
    }
    trainer, model = stand_in(data.shared, **(defaults | settings))
    reference = data.batch.reference.chunk(2)
    inputs = {
        **data.inputs,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def assert_equal(data: Sequences, ours: torch.Tensor, theirs: torch.Tensor, rtol=1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-10)
    leaves = (data.hidden, data.weight)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-10)


SMOOTHED = {"label_smoothing": 0.1}
PAIRS = [
    # TRL's loss type and settings, our loss and hyperparameters.
    ("sigmoid", {}, "dpo", {}),
    ("hinge", {"beta": 0.3}, "hinge", {"beta": 0.3}),
    ("ipo", {}, "ipo", {"length_normalized": True}),
    ("exo_pair", SMOOTHED, "exo-pair", SMOOTHED),
    ("exo_pair", {"label_smoothing": 1e-3}, "exo-pair", {}),
    ("nca_pair", {}, "nca-pair", {}),
    ("robust", SMOOTHED, "robust-dpo", {"epsilon": 0.1, "unbiased": True}),
    ("bco_pair", {}, "bco-pair", {}),
    ("sppo_hard", {}, "sppo-hard", {}),
    ("aot", {}, "aot", {}),
    ("aot", SMOOTHED, "aot", SMOOTHED),
    ("aot_unpaired", {}, "aot-unpaired", {}),
    ("aot_unpaired", SMOOTHED, "aot-unpaired", SMOOTHED),
    ("apo_zero", {}, "apo-zero", {}),
    ("apo_down", {}, "apo-down", {}),
    ("discopop", {}, "discopop", {}),
    ("discopop", {"discopop_tau": 0.3}, "discopop", {"temperature": 0.3}),
    ("sft", {}, "sft", {}),
    ("sigmoid_norm", {}, "sigmoid-norm", {}),
    ("sigmoid", {"f_divergence_type": "forward_kl"}, "f-dpo", {"divergence": "forward_kl"}),
    ("sigmoid", {"f_divergence_type": "js_divergence"}, "f-dpo", {"divergence": "js_divergence"}),
    ("sigmoid", {"use_weighting": True}, "wpo", {}),
]
DIVIDED = {"ipo", "sigmoid_norm"}


@pytest.mark.parametrize(("loss_type", "settings", "name", "options"), PAIRS, ids=str)
def test_pair_losses_equal_trl(loss_type, settings, name, options):
    data = Sequences()
    theirs, logged = trl_pairs(data, loss_type, **settings)
    ours = find(name).build(**options)(data.batch)
    # TRL's ε of this loss is float32 whatever the log-probs are.
    for loss in (ours.loss, data.fused(name, **options)):
        assert_equal(data, loss, theirs, rtol=1e-6 if loss_type == "exo_pair" else 1e-9)
    for metric in ("logps/chosen", "logps/rejected"):
        assert ours.metrics[metric].item() == pytest.approx(logged[metric], rel=1e-12)
    curved = "f_divergence_type" in settings
    if loss_type not in DIVIDED | {"sft"} and not curved:
        for metric in ("chosen", "rejected", "accuracies", "margins"):
            found = ours.metrics[f"rewards/{metric}"].item()
            assert found == pytest.approx(logged[f"rewards/{metric}"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_the_alpha_divergence_equals_trl(alpha):
    # TRL's own clamp knows no float64.
    data = Sequences(torch.float32)
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    theirs, _ = trl_pairs(data, "sigmoid", **settings)
    ours = find("f-dpo").build(divergence="alpha_divergence", alpha=alpha)(data.batch)
    assert_equal(data, ours.loss, theirs, rtol=2e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("loss_type", ["hinge", "exo_pair", "robust", "discopop"])
def test_divergences_compose_with_links_as_in_trl(divergence, loss_type):
    data = Sequences()
    smoothing = 0.0 if loss_type in ("hinge", "discopop") else 0.1
    settings = {"f_divergence_type": divergence, "label_smoothing": smoothing}
    theirs, _ = trl_pairs(data, loss_type, **settings)
    names = {"hinge": "hinge", "exo_pair": "exo-pair", "robust": "robust-dpo"}
    options = {
        "exo_pair": {"label_smoothing": 0.1},
        "robust": {"epsilon": 0.1, "unbiased": True},
    }
    build = find(names.get(loss_type, loss_type)).build
    link = build(**options.get(loss_type, {})).link
    reward = find("f-dpo").build(divergence=divergence).reward
    ours = PairwiseLoss(reward, link=link)(data.batch).loss
    assert_equal(data, ours, theirs, rtol=1e-6 if loss_type == "exo_pair" else 1e-9)


@pytest.mark.parametrize("loss_type", ["ipo", "apo_zero", "nca_pair", "sigmoid_norm"])
def test_weighted_losses_of_trl_are_ours_times_the_weights(loss_type):
    data = Sequences()
    theirs, _ = trl_pairs(data, loss_type, use_weighting=True)
    options = {"length_normalized": True} if loss_type == "ipo" else {}
    losses = find(loss_type).build(**options)(data.batch).losses
    weights = find("wpo").build().weighting(data.batch)
    assert_equal(data, (weights * losses).mean(), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("loss_type", "settings", "name", "options"),
    [
        ("sigmoid", {}, "dpo", {}),
        ("sigmoid", {"use_weighting": True}, "wpo", {}),
        ("ipo", {}, "ipo", {"length_normalized": True}),
        *((each, {}, each.replace("_", "-"), {}) for each in ("nca_pair", "aot", "apo_down")),
    ],
    ids=str,
)
def test_length_desensitised_losses_equal_trl(loss_type, settings, name, options, alpha):
    data = Sequences()
    tail = (tail_labels(data.labels)[:, 1:] != -100).double()
    assert 0 < tail.sum() < data.mask.sum()
    tail_reference = torch.linspace(-3, 0, S, dtype=torch.float64)
    # TRL takes precomputed reference sums as they are: with their tails already weighted.
    weighted = length_desensitized(
        data.batch, (data.tokens * tail).sum(1), tail_reference, alpha=alpha
    )
    data.batch = dataclasses.replace(data.batch, reference=weighted.reference)
    theirs, _ = trl_pairs(data, loss_type, ld_alpha=alpha, **settings)
    known = find(name).build(**options)(weighted).loss
    for ours in (known, data.fused(name, ld_alpha=alpha, **options)):
        assert_equal(data, ours, theirs)


def test_label_smoothing_of_the_plain_loss_differs_on_purpose():
    # TRL 1.16 ignores it for "sigmoid"; ours is the mixture, which its "aot" of one pair is too.
    data = Sequences()
    plain, _ = trl_pairs(data, "sigmoid")
    smoothed, _ = trl_pairs(data, "sigmoid", label_smoothing=0.3)
    assert torch.equal(plain, smoothed)
    ours = find("dpo").build(label_smoothing=0.3)(data.batch).loss
    assert abs(ours.item() - plain.item()) > 1e-3


def trl_points(data: Sequences, loss_type: str, kl: float, **settings):
    """TRL's KTO loss and metrics, with its KL estimate at `kl`."""
    policy_kl = torch.full((S, 1), kl, dtype=torch.float64)
    trainer, model = stand_in(
        data.shared, loss_type=loss_type, calculate_KL=loss_type == "kto", **settings
    )
    trainer._compute_kl_logps = lambda model, batch: policy_kl[:, 0]
    inputs = {
        **data.inputs,
        "label": data.desirable,
        "ref_logps": data.batch.reference,
        "ref_KL_logps": torch.zeros(S, dtype=torch.float64),
    }
    loss = KTOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("kl", [0.7, -0.4])
@pytest.mark.parametrize(
    "weights", [{}, {"desirable_weight": 1.0, "undesirable_weight": 1.33}], ids=str
)
def test_kto_equals_trl(kl, weights):
    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **weights}
    data = Sequences()
    theirs, logged = trl_points(data, "kto", kl, **settings)
    batch = dataclasses.replace(data.batch, kl=torch.tensor(kl, dtype=torch.float64))
    ours = find("kto").build(**settings)(batch)
    assert_equal(data, ours.loss, theirs)
    shared = logged.keys() & ours.metrics.keys()
    assert len(shared) == 6
    for metric in shared:
        assert ours.metrics[metric].item() == pytest.approx(logged[metric], rel=1e-9), metric


def test_apo_zero_unpaired_equals_trl():
    settings = {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    data = Sequences()
    theirs, _ = trl_points(data, "apo_zero_unpaired", 0.0, **settings)
    ours = find("apo-zero-unpaired").build(**settings)(data.batch)
    assert_equal(data, ours.loss, theirs)


def cpo_losses(loss_type: str, data: Sequences, **settings) -> torch.Tensor:
    """TRL's CPO preference term, in which "simpo" takes mean log-probs."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    options = {
        "alpha": 0.0,
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_type": loss_type,
        **settings,
    }
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), **options)
    logps = data.batch.policy / data.batch.lengths if loss_type == "simpo" else data.batch.policy
    return cpo.CPOTrainer.cpo_loss(trainer, *logps.chunk(2))[0].mean()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_equals_trl(label_smoothing):
    data = Sequences()
    settings = {"beta": 2.5, "label_smoothing": label_smoothing}
    theirs = cpo_losses("simpo", data, simpo_gamma=1.0, **settings)
    ours = find("simpo").build(gamma=1.0, **settings)(data.batch)
    assert_equal(data, ours.loss, theirs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo_equals_trl_with_its_token_mean(label_smoothing):
    data = Sequences()
    nll, _ = trl_pairs(data, "sft")
    theirs = cpo_losses("sigmoid", data, label_smoothing=label_smoothing) + 0.7 * nll
    ours = find("cpo").build(nll_weight=0.7, label_smoothing=label_smoothing)(data.batch)
    assert_equal(data, ours.loss, theirs)


def test_slic_equals_trls_hinge_with_the_likelihood_of_the_chosen():
    data = Sequences()
    chosen = data.batch.policy.chunk(2)[0]
    theirs = cpo_losses("hinge", data, beta=1.0) - 0.1 * chosen.mean()
    assert_equal(data, find("slic-hf").build()(data.batch).loss, theirs)


@pytest.mark.parametrize("margin", [None, 0.7])
def test_bradley_terry_equals_trl(margin):
    scores = torch.linspace(-2, 3, S, dtype=torch.float64).sin().requires_grad_()
    trainer, model = stand_in({"logits": scores[:, None]}, center_rewards_coefficient=None)
    inputs = {"attention_mask": torch.ones(S, T)}
    if margin is not None:
        inputs["margin"] = margin
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    ours = bradley_terry_loss(*scores.chunk(2), margin=margin or 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_alpha_po_equals_trl():
    data = Sequences()
    theirs = cpo_losses("simpo", data, alpha=0.25, beta=2.5, simpo_gamma=1.0)
    assert_equal(data, find("alpha-po").build()(data.batch).loss, theirs)


def test_orpo_equals_trl():
    orpo = pytest.importorskip("trl.experimental.orpo")
    data = Sequences(torch.float32)
    means = data.batch.policy / data.batch.lengths
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), beta=0.1)
    ratios = orpo.ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))[0]
    theirs = (-means.chunk(2)[0] - ratios).mean()
    assert_equal(data, find("orpo").build(weight=0.1)(data.batch).loss, theirs, rtol=2e-5)


def test_discopop_of_a_pair_far_off_is_nan_in_trl_and_finite_here():
    data = Sequences()
    data.batch.reference[0] += 2e4
    theirs, _ = trl_pairs(data, "discopop")
    assert theirs.isnan()
    ours = find("discopop").build()(data.batch)
    (gradient,) = torch.autograd.grad(ours.loss, data.hidden)
    assert ours.losses.isfinite().all() and gradient.isfinite().all()
    assert ours.losses[0].item() == pytest.approx(-ours.metrics["rewards/margins"].item() * 5, 0.1)


def test_the_forward_kl_far_off_is_nan_in_trl_and_finite_here():
    data = Sequences(torch.float32)
    data.batch.reference[[0, 5]] += 2e4
    theirs, _ = trl_pairs(data, "sigmoid", f_divergence_type="forward_kl")
    assert theirs.isnan()
    ours = find("f-dpo").build(divergence="forward_kl")(data.batch)
    (gradient,) = torch.autograd.grad(ours.loss, data.hidden)
    assert ours.losses.isfinite().all() and gradient.isfinite().all()
