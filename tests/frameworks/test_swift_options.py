"""ms-swift's options, as its trainers hold them, and the entry that is ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("swift", reason="needs ms-swift")

from fused_prefopt.integrations.ms_swift.options import options_of

PAIRS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "beta": 0.1,
    "label_smoothing": 0,
    "rpo_alpha": None,
    "discopop_tau": 0.05,
    "ld_alpha": None,
}
ALONE = {"loss_type": "simpo", "beta": 2.0, "label_smoothing": 0, "cpo_alpha": 1.0}
ALONE |= {"simpo_gamma": 1}
POINTS = {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
GIVEN = {"dpo": PAIRS, "cpo": ALONE, "kto": POINTS, "orpo": {"beta": 0.1}}


def of(kind, entry=None, **options):
    return options_of(kind, SimpleNamespace(**GIVEN[kind] | options), entry or {})


def test_options_of_ms_swift_are_a_loss():
    summed = {"loss_type": ["robust", "sft"], "loss_weights": [0.8, 1.0], "label_smoothing": 0.1}
    loss = of("dpo", {"workspace_mb": 8}, **summed, rpo_alpha=0.2).build_loss()
    assert loss.name == "0.8 robust-dpo + sft + 0.2 sft"
    assert loss.hyperparameters["robust-dpo"]["unbiased"]
    assert loss.op_options["workspace_mb"] == 8
    mixed = of("dpo", loss_type=["sigmoid", "bco_pair"], loss_weights=[0.8, 0.2]).build_loss()
    assert mixed.name == "0.8 dpo + 0.2 bco-pair"
    assert mixed.hyperparameters["bco-pair"]["reward_shift"] == "batch_mean"
    assert of("dpo", ld_alpha=0.5).build_loss().ld_alpha == 0.5
    smoothed = of("cpo", label_smoothing=0.1, cpo_alpha=0.0).build_loss().hyperparameters
    assert smoothed == {"beta": 2.0, "gamma": 1, "label_smoothing": 0.1, "link": "logistic"}
    contrastive = of("cpo", loss_type="sigmoid", label_smoothing=0.1, cpo_alpha=0.5).build_loss()
    assert (contrastive.name, contrastive.hyperparameters["label_smoothing"]) == ("cpo", 0.1)
    assert contrastive.hyperparameters["nll_weight"] == 0.5
    assert of("kto", desirable_weight=2).build_loss().hyperparameters["desirable_weight"] == 2


def test_the_loss_of_an_entry_has_its_own_defaults():
    entry = {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}}
    found = of("dpo", entry).build_loss().hyperparameters
    assert (found["beta"], found["alpha"]) == (10.0, 0.1)
    assert of("dpo", entry, beta=3.0).build_loss().hyperparameters["beta"] == 3.0
    assert of("cpo", {"loss": "gamma-simpo"}).build_loss().hyperparameters["beta"] == 10.0
    weighed = of("kto", {"loss": "kto"}, undesirable_weight=2.0).build_loss()
    assert weighed.hyperparameters["undesirable_weight"] == 2.0


@pytest.mark.parametrize(
    ("kind", "entry", "options", "message"),
    [
        ("dpo", {"beta": 1.0}, {}, "got beta=1.0 without a loss"),
        ("dpo", {"loss": "dpo", "beta": 1.0}, {"beta": 0.5}, "beta: got 0.5 and 1.0"),
        ("dpo", {"loss": "dpo"}, {"loss_type": ["ipo"]}, "loss_type: got .'ipo'., an option of ms"),
        ("cpo", {"loss": "simpo"}, {"simpo_gamma": 2}, "simpo_gamma: got 2, an option of ms-swift"),
        ("cpo", {}, {"loss_type": "ipo"}, "loss_type: got 'ipo', which squares"),
        ("cpo", {}, {"loss_type": "hinge", "label_smoothing": 0.1}, "0.1 with hinge, needs 0"),
        ("dpo", {}, {"rpo_alpha": 0.1, "ld_alpha": 0.5}, "ld_alpha: got 0.5 with 'sft'"),
        ("dpo", {}, {"loss_type": ["hinge"], "label_smoothing": 0.1}, "0.1 with hinge, needs 0"),
        ("kto", {}, {"loss_type": "dpo"}, "wanted one of 'kto', 'apo_zero_unpaired'"),
        ("dpo", {}, {"loss_type": ["gamma-simpo"]}, "did you mean 'gamma-simpo' or"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind, entry, options, message):
    with pytest.raises(ValueError, match=message):
        of(kind, entry, **options)
