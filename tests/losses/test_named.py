"""How losses and their sums are named, and what is said of a name that cannot be read."""

from __future__ import annotations

import pytest

import fused_prefopt as fp
from fused_prefopt.losses import NamedLoss, named_loss, published_in, published_settings

SETTING = "gamma-simpo/llama-3-8b-instruct"


def term(name, weight=1.0, **hyperparameters):
    return {"name": name, "weight": weight, "hyperparameters": hyperparameters}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("dpo", [("dpo", 1.0)]),
        ("1.0 DPO", [("dpo", 1.0)]),
        ("dpo + 0.2 bco-pair + sft", [("dpo", 1.0), ("bco-pair", 0.2), ("sft", 1.0)]),
        (".8*sigmoid+.2 * BCO_pair+nll", [("dpo", 0.8), ("bco-pair", 0.2), ("sft", 1.0)]),
        ("1e-3 sft + 2.5E+1 tdpo2 + 0 ipo", [("sft", 1e-3), ("tdpo2", 25.0), ("ipo", 0.0)]),
        (["dpo", "0.2 sft + ipo"], [("dpo", 1.0), ("sft", 0.2), ("ipo", 1.0)]),
        ([{"name": "dpo"}, {"name": "sft", "weight": 2}], [("dpo", 1.0), ("sft", 2.0)]),
        (f"0.1 sft + {SETTING}", [("sft", 0.1), ("gamma-simpo", 1.0)]),
    ],
)
def test_terms_and_their_weights(name, read):
    named = named_loss(name, {})
    assert [(each.name, each.weight) for each in named.terms] == read
    assert named_loss(named.name, {}) == named
    assert isinstance(named, NamedLoss) and named.is_sum == (len(read) > 1)


def test_hyperparameters_reach_the_terms_that_have_them():
    found = named_loss(
        ["dpo", term("simpo", 0.5, beta=2.0), SETTING, "dpo", "sft"], {"beta": 0.3, "tau": 3.0}
    )
    published = published_settings()[SETTING].hyperparameters
    assert found.labels == ["dpo", "simpo", "gamma-simpo", "dpo-2", "sft"]
    values = found.hyperparameters
    assert [values[name].get("beta") for name in found.labels] == [0.3, 2.0, 0.3, 0.3, None]
    assert values["gamma-simpo"]["tau"] == 3.0
    assert values["gamma-simpo"]["gamma"] == published["gamma"]
    for each in found.terms:
        if "beta" in each.hyperparameters:
            assert each.loss.reward.beta == each.hyperparameters["beta"]
    alone = named_loss(SETTING, {"tau": 3.0})
    assert alone.hyperparameters["tau"] == 3.0 and alone.hyperparameters["beta"] == 10.0
    loss_fn = fp.PreferenceLoss("0.8 dpo + sft", beta=0.3, ld_alpha=0.5)
    said = "0.8 dpo(beta=0.3, label_smoothing=0.0, length_normalized=False)"
    said += " + sft(nll='token_mean'), ld_alpha=0.5"
    assert repr(loss_fn) == f"PreferenceLoss({said})"


def test_the_published_setting_of_a_name():
    setting = published_settings()[SETTING]
    assert published_in(SETTING.upper()) == published_in([term(SETTING), "0.1 sft"]) == setting
    assert published_in("dpo + sft") is None
    assert published_in([SETTING, "alpha-dpo/gemma-2-9b-it"]) is None


@pytest.mark.parametrize(
    ("name", "shared", "error", "message"),
    [
        ("dpo +", {}, ValueError, r"loss: got 'dpo \+', wanted a name, names joined by \+"),
        ("dpo - 0.2 sft", {}, ValueError, "loss: got 'dpo - 0.2 sft', wanted"),
        ("dpo sft", {}, ValueError, "loss: got 'dpo sft', wanted"),
        ("-1 dpo", {}, ValueError, "loss: got '-1 dpo', wanted"),
        ("", {}, ValueError, "loss: got '', wanted"),
        ([], {}, ValueError, r"loss: got \[\], wanted"),
        (None, {}, ValueError, "loss: got None, wanted"),
        ("dpo+0.2sft", {}, ValueError, "got '0.2sft' in .*, wanted a space or . between a weight"),
        ("0 dpo + 0 sft", {}, ValueError, "got '0 dpo . 0 sft', in which every weight is 0"),
        ([term("dpo", 0)], {}, ValueError, "in which every weight is 0, wanted one above"),
        (["dpo", 0.2], {}, ValueError, "loss: got 0.2 in a list, wanted"),
        ("dpo + 0.2 bcopair", {}, ValueError, "unknown loss 'bcopair' .did you mean 'bco-pair'"),
        ("sft + gamma-simpo/lama", {}, ValueError, "unknown setting 'gamma-simpo/lama'"),
        ([{"nam": "dpo"}], {}, ValueError, "got the key 'nam' .did you mean 'name'"),
        ([{"weight": 2}], {}, ValueError, "wanted the name of a loss in `name`"),
        ([term("dpo", -1)], {}, ValueError, "weight of dpo: got -1, wanted a finite number >= 0"),
        ([term("dpo", True)], {}, ValueError, "weight of dpo: got True"),
        ([{"name": "dpo", "hyperparameters": 3}], {}, ValueError, "hyperparameters of dpo: got 3"),
        ([term("dpo", betta=1)], {}, TypeError, "dpo has no hyperparameter 'betta'"),
        ([term("dpo", beta=-1)], {}, ValueError, "beta: got -1"),
        ("dpo + kto", {}, ValueError, "got dpo, on pairs, with kto, on single completions"),
        ("dpo + sft", {"bet": 1}, TypeError, r"dpo \+ sft has no .* 'bet' .did you mean 'beta'"),
        ("dpo", {"bet": 1}, TypeError, "dpo has no hyperparameter 'bet' .did you mean 'beta'"),
        ([term("dpo", beta=1.0), "sft"], {"beta": 2}, ValueError, "beta: got 2 for all terms of"),
        ([term("dpo", beta=1.0)], {"beta": 2}, ValueError, "beta: got 2 for all terms of dpo, and"),
    ],
)
def test_what_cannot_be_read_is_said(name, shared, error, message):
    with pytest.raises(error, match=message):
        fp.PreferenceLoss(name, **shared)
