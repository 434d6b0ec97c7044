"""The options of a fused loss as other frameworks' configurations hold them: in one mapping."""

from __future__ import annotations

import pytest

from fused_prefopt import PreferenceLoss
from fused_prefopt.integrations.options import (
    PairOptions,
    PointOptions,
    enter,
    read_mapping,
    refuse_beside_a_loss,
    refuse_without_a_loss,
)

GIVEN = {"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}, "log_tokens": True, "beta": None}


@pytest.mark.parametrize(
    "given",
    [
        GIVEN,
        '{"loss": "alpha-dpo", "loss_kwargs": {"alpha": 0.1}, "log_tokens": true, "beta": null}',
        str(GIVEN),
        GIVEN | {"loss_kwargs": '{"alpha": 0.1}'},
    ],
    ids=["a mapping", "JSON", "as Python prints it", "JSON inside"],
)
def test_a_mapping_is_read(given):
    assert read_mapping(given) == GIVEN
    assert read_mapping(None) == read_mapping("") == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("alpha-dpo", "^fused_prefopt: got 'alpha-dpo', wanted a mapping such as {.loss.: .dpo.}"),
        ('["dpo"]', "wanted a mapping"),
        (["dpo"], "wanted a mapping"),
        ('{"los": "dpo"}', "^fused_prefopt: got 'los' .did you mean 'loss'"),
        ({1: "dpo"}, "^fused_prefopt: got 1, wanted one of"),
        ({"loss_kwargs": "alpha=0.1"}, "^fused_prefopt.loss_kwargs: got 'alpha=0.1', wanted a map"),
        ({"log_tokens": "false"}, "^fused_prefopt.log_tokens: got 'false', wanted true or false"),
    ],
)
def test_what_is_no_such_mapping_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_mapping(given)


def test_a_margin_more_is_among_the_hyperparameters():
    text = '{"loss": "ipo", "loss_kwargs": {"tau": 0.5, "margin": {"name": "dynamic", "gamma": 1}}}'
    options = read_mapping(text)
    found = PairOptions(**options, ld_alpha=0.5).build_loss()
    wanted = PreferenceLoss("ipo", **options["loss_kwargs"])
    assert found.loss == wanted.loss and found.loss.margin.added.gamma == 1
    with pytest.raises(ValueError, match="margin: got .* for dro, to which a target margin"):
        margin = {"margin": {"name": "dynamic", "gamma": 1}}
        PointOptions(loss="dro", loss_kwargs=margin).build_loss()


def test_what_contradicts_the_loss_is_refused():
    found = {"beta": 0.1}
    enter(found, "beta", 0.1, "rl_beta")
    enter(found, "gamma", 0.5, "simpo_gamma")
    assert found == {"beta": 0.1, "gamma": 0.5}
    with pytest.raises(ValueError, match=r"^rl_beta: got 0.2 and beta=0.1 in loss_kwargs, needs"):
        enter(found, "beta", 0.2, "rl_beta")
    with pytest.raises(ValueError, match="^tau: got 1, an option of X's own losses, with loss 'i"):
        refuse_beside_a_loss({"tau": 1}, "X", "ipo")
    with pytest.raises(ValueError, match="^fused_prefopt: got beta=1.0 without a loss, needs one"):
        refuse_without_a_loss({"beta": 1.0}, "X")
