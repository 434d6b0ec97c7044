"""The registry: names, needs, hyperparameters, messages, and published settings."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import compute, random_batch, vector

from fused_prefopt.losses import (
    PairwiseLoss,
    SumLogp,
    available_losses,
    check_needs,
    find,
    preset,
    published_settings,
    register,
    registry,
)
from fused_prefopt.types import LogpBatch

FIELDS = tuple(field.name for field in dataclasses.fields(LogpBatch))
REGISTERED = available_losses()

ALPHA_DPO = {
    "beta": 10.0,
    "gamma": 4.0,
    "alpha": 0.05,
    "length_normalized": True,
    "implicit_reference": "ratio",
    "margin_scale": "beta",
    "normalize": True,
    "stop_gradient": True,
    "statistics": "ema",
    "momentum": 0.9,
    "mean": None,
    "std": None,
}
GAMMA_PO = {
    "tau": 10.0,
    "solver": "mirror",
    "steps": 20,
    "queue": True,
    "queue_size": 2048,
    "sample_size": 256,
    "seed": 0,
}
CENTERED = {"centered": False, "label_smoothing": 0.0}
PER_TOKEN = {"length_normalized": False}
BETA_DPO = {
    "beta": 0.1,
    "gamma": 0.0,
    "alpha": 0.1,
    "momentum": 0.9,
    "level": "pair",
    "statistics": "ema",
}
CHI_PO = {
    "beta": 0.1,
    "power": 1.0,
    "kl_weight": 1.0,
    "smallest": -88.0,
    "largest": 20.0,
    "r_max": None,
}
ROBUST = {"epsilon": 0.1, "gamma": 0.0, "unbiased": False}
GOLD = {"nll_weight": 1.0, "nll": "token_mean"}
KTO = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
BASU = {"power": -0.5, "scale": 4.0, "smallest_ratio": 0.01}
CALIBRATED = {"nll_weight": 0.001, "tau_good": 3.2}
# Aliases, needs beyond `policy` and `lengths`, hyperparameters with their defaults.
TABLE: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict]] = {
    "dpo": (("sigmoid",), ("reference",), {"beta": 0.1, "label_smoothing": 0.0, **PER_TOKEN}),
    "simpo": ((), (), {"beta": 2.5, "gamma": 1.0, "label_smoothing": 0.0, "link": "logistic"}),
    "simper": ((), (), {}),
    "repo": ((), (), {"gamma": 0.4}),
    "focal-po": (("focalpo",), ("reference",), {"beta": 0.1, "focus": 0.05, **PER_TOKEN}),
    "chi-po": (("chipo",), ("reference",), CHI_PO),
    "robust-dpo": (("rdpo",), ("reference",), {"beta": 0.1, **ROBUST, **PER_TOKEN}),
    "robust-simpo": (("rsimpo",), (), {"beta": 2.5, **ROBUST}),
    "ipo": ((), ("reference",), {"tau": 0.1, "length_normalized": False}),
    "cpo": (
        (),
        (),
        {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 1.0, "nll": "token_mean"},
    ),
    "tpo": (
        (),
        ("gold", "gold_lengths"),
        {"beta": 0.01, **GOLD, "link": "logistic", "label_smoothing": 0.0},
    ),
    "tpo-l": (
        (),
        ("gold", "gold_lengths"),
        {"beta": 0.01, "gamma": 0.5, **GOLD, "label_smoothing": 0.0},
    ),
    "orpo": ((), (), {"weight": 0.1, "nll": "sequence_mean"}),
    "length-dpo": (("r-dpo",), ("reference",), {"beta": 0.1, "alpha": 0.05}),
    "slic-hf": ((), (), {"delta": 1.0, "nll_weight": 0.1}),
    "odpo": (
        (),
        ("reference", "rewards"),
        {"beta": 0.1, "alpha": 1.0, "offset": "log", **PER_TOKEN},
    ),
    "madpo": (
        (),
        ("reference", "rewards"),
        {"beta": 0.1, "largest": 2.0, "smallest": 0.5, "slope": 1.0, "tau": math.log(999)},
    ),
    "omni-dpo": (
        ("uni-dpo",),
        ("reference", "rewards"),
        {"beta": 2.0, "eta": 0.7, "tau_ref": 0.8, "focus": 3.0, **CALIBRATED},
    ),
    "reward-distillation": (("rpo",), ("reference", "rewards"), {"beta": 0.1}),
    "cal-dpo": ((), ("reference",), {"beta": 0.1}),
    "tdpo1": ((), ("reference", "sequence_kl"), {"beta": 0.1}),
    "tdpo2": ((), ("reference", "sequence_kl"), {"beta": 0.1, "alpha": 0.5}),
    "kto": ((), ("desirable", "reference"), KTO),
    "bco-pair": (
        (),
        ("reference",),
        {"beta": 0.1, "reward_shift": "none", "momentum": 0.9, **PER_TOKEN},
    ),
    "bco": (
        (),
        ("desirable", "reference"),
        {**KTO, "reward_shift": "ema", "momentum": 0.9},
    ),
    "beta-dpo": ((), ("reference",), {**BETA_DPO, **PER_TOKEN}),
    "beta-simpo": ((), (), BETA_DPO),
    "epsilon-dpo": (
        ("eps-dpo", "e-dpo"),
        ("extrapolated", "interpolated", "reference"),
        {"beta": 0.1, "epsilon": 0.01, "update_every": 1},
    ),
    "alpha-dpo": ((), ("reference",), ALPHA_DPO),
    "gamma-dpo": (
        (),
        ("reference",),
        {"beta": 0.1, "gamma": 0.5, **GAMMA_PO, **CENTERED, **PER_TOKEN},
    ),
    "gamma-simpo": ((), (), {"beta": 10.0, "gamma": 4.0, **GAMMA_PO}),
    "dro": (
        (),
        ("prompt", "prompt_reference", "reference", "rewards"),
        {"beta": 0.1, "log_z0": 50.0},
    ),
    "dpo-positive": (("dpop",), ("reference",), {"beta": 0.3, "penalty": 50.0}),
    "bpo": (("sba",), ("reference",), {"beta": 0.1, **BASU, "largest_ratio": None}),
    "bpo-simpo": ((), (), {"beta": 2.5, "gamma": 1.0, **BASU, "largest_ratio": 30.0}),
    "bdpo": ((), ("reference",), {"beta": 0.1, "mixture": 0.5}),
    "alpha-po": (("alphapo",), (), {"beta": 2.5, "gamma": 1.0, "alpha": 0.25}),
}
# What TRL calls its losses of pairs and points that the table names no other way.
TRL = (
    "hinge exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft"
    " sigmoid_norm kto apo_zero_unpaired sigmoid ipo"
)


@pytest.mark.parametrize("name", TABLE)
def test_names_needs_and_defaults_are_the_tables(name):
    # A loss that is registered later needs no line.
    assert TABLE.keys() <= REGISTERED.keys()
    aliases, needs, defaults = TABLE[name]
    info = REGISTERED[name]
    assert (info.aliases, info.needs, info.defaults) == (aliases, needs, defaults)
    assert all(find(alias).name == name for alias in aliases)


@pytest.mark.parametrize("name", TRL.split())
def test_the_losses_of_trl_go_by_its_names(name):
    spec = find(name)
    assert name.replace("_", "-") in (spec.name, *spec.aliases)
    assert spec.build() is not None


def test_needs_follow_the_hyperparameters():
    build = find("alpha-dpo").build
    assert build().needs == {"reference"}
    assert build(implicit_reference="policy").needs == frozenset()
    assert build(implicit_reference="sequence_kl").needs == {"sequence_kl"}
    assert find("tpo").build(nll_weight=0.0).needs == frozenset()


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_losses_describe_themselves(name):
    info = REGISTERED[name]
    spec = find(name)
    assert info.paper and spec.factory.__doc__
    assert all(f"\n        {option}: " in spec.factory.__doc__ for option in info.defaults)
    assert set(info.needs) <= set(FIELDS)
    assert all(find(alias) is spec for alias in info.aliases)
    assert find(name.upper().replace("-", "_")) is spec
    assert spec.build(**info.defaults) == spec.build()


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name, info in REGISTERED.items() for field in info.needs],
)
def test_missing_field(name, field):
    loss = find(name).build()
    batch = dataclasses.replace(random_batch(), **{field: None})
    with pytest.raises(ValueError, match=f"{name} needs `{field}`"):
        check_needs(name, loss.needs, batch.given)
    with pytest.raises(ValueError, match=f"this loss needs `{field}`"):
        compute(loss, batch)


def test_unknown_loss():
    with pytest.raises(ValueError, match="'gama-dpo' .did you mean 'gamma-dpo'.*losses` lists all"):
        find("gama-dpo")


def test_unknown_hyperparameter():
    with pytest.raises(TypeError, match="dpo has no hyperparameter 'betta' .did.*'beta'.*=0.1"):
        find("dpo").build(betta=1.0)
    with pytest.raises(TypeError, match="simper has no hyperparameter 'beta'; it accepts none"):
        find("simper").build(beta=1.0)


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("dpo", {"beta": 0.0}, "beta: got 0.0, wanted a finite number > 0"),
        ("dpo", {"beta": "0.1"}, "beta: got '0.1', wanted a finite number > 0"),
        ("dpo", {"label_smoothing": 0.6}, "label_smoothing: got 0.6, wanted .* <= 0.5"),
        ("simpo", {"gamma": math.inf}, "gamma: got inf, wanted a finite number"),
        ("alpha-dpo", {"alpha": math.nan}, "alpha: got nan"),
        ("alpha-dpo", {"momentum": 1.0}, "momentum: got 1.0, wanted .* < 1"),
        ("alpha-dpo", {"statistics": "sum"}, "statistics: got 'sum', wanted one of 'ema'"),
        ("alpha-dpo", {"statistics": "dataset"}, "'dataset' needs `mean` and `std`"),
        ("alpha-dpo", {"mean": 1.0}, "wanted None unless statistics='dataset'"),
        ("alpha-dpo", {"implicit_reference": "x"}, "implicit_reference: got 'x', wanted one of"),
        ("alpha-dpo", {"margin_scale": "x"}, "margin_scale: got 'x', wanted one of 'beta', 'unit'"),
        ("gamma-dpo", {"tau": 0}, "tau: got 0, wanted a finite number > 0"),
        ("gamma-dpo", {"gamma": -1.0}, "gamma: got -1.0, wanted a finite number >= 0"),
        ("gamma-dpo", {"steps": 0}, "steps: got 0, wanted an integer >= 1"),
        ("gamma-dpo", {"queue_size": 2.5}, "queue_size: got 2.5, wanted an integer >= 1"),
        ("gamma-dpo", {"solver": "newton"}, "solver: got 'newton', wanted one of"),
        ("gamma-dpo", {"solver": "exact", "tau": 0.01}, "tau: got 0.01 with gamma 0.5"),
        ("dro", {"log_z0": math.nan}, "log_z0: got nan"),
        ("exo-pair", {"label_smoothing": 0.0}, "label_smoothing: got 0.0, wanted .* > 0"),
        ("discopop", {"temperature": 2.0}, "temperature: got 2.0"),
        ("dpo-shift", {"share": 0.0}, "share: got 0.0"),
        ("dpo-positive", {"penalty": -1.0}, "penalty: got -1.0"),
        ("dr-dpo", {"temperature": 0.0}, "temperature: got 0.0"),
        ("f-dpo", {"divergence": "kl"}, "divergence: got 'kl', wanted one of 'reverse_kl'"),
        ("f-dpo", {"alpha": math.inf}, "alpha: got inf"),
        ("f-dpo", {"alpha": 0.3}, "alpha: got 0.3 with .* 'js_divergence', needs 'alpha_div"),
        ("f-dpo", {"temperature": 0.3}, "temperature: got 0.3 with link 'logistic', needs 'blend"),
        ("beta-dpo", {"level": "token"}, "level: got 'token', wanted one of 'pair', 'batch'"),
        ("beta-dpo", {"alpha": -1.0}, "alpha: got -1.0"),
        ("beta-dpo", {"statistics": "code"}, "statistics: got 'code', wanted one of 'ema', 'ref"),
        ("beta-dpo", {"statistics": "reference", "beta": 0.0}, "beta: got 0.0, wanted"),
        ("gamma-dpo", {"label_smoothing": 0.6}, "label_smoothing: got 0.6"),
        ("sppo-hard", {"beta": 0.0}, "beta: got 0.0"),
        ("sft", {"nll": "mean"}, "nll: got 'mean'"),
        ("bpo", {"power": -1.0}, "power: got -1.0, wanted .* > -1"),
        ("bpo", {"largest_ratio": 0.01}, "largest_ratio: got 0.01, wanted .* > 0.01"),
        ("bpo-simpo", {"smallest_ratio": -1.0}, "smallest_ratio: got -1.0, wanted .* >= 0"),
        ("bdpo", {"mixture": 0.0}, "mixture: got 0.0, wanted .* > 0"),
        ("madpo", {"largest": 1.0}, "largest: got 1.0, wanted .* > 1"),
        ("madpo", {"smallest": 1.0}, "smallest: got 1.0, wanted .* < 1"),
        ("madpo", {"slope": 0.0}, "slope: got 0.0"),
        ("omni-dpo", {"focus": -1.0}, "focus: got -1.0"),
        ("omni-dpo", {"tau_good": math.nan}, "tau_good: got nan"),
        ("ipo", {"tau": 0.0}, "tau: got 0.0, wanted a finite number > 0"),
        ("simpo", {"link": "hinge", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with 'hing"),
        ("repo", {"gamma": math.inf}, "gamma: got inf"),
        ("focal-po", {"focus": -0.1}, "focus: got -0.1, wanted a finite number >= 0"),
        ("chi-po", {"power": 0.0}, "power: got 0.0, wanted a finite number > 0"),
        ("chi-po", {"kl_weight": 0.0}, "kl_weight: got 0.0"),
        ("chi-po", {"largest": 100.0}, "largest: got 100.0, wanted .* <= 80"),
        ("chi-po", {"smallest": 20.0}, "smallest: got 20.0, wanted .* < 20"),
        ("chi-po", {"r_max": 0.0}, "r_max: got 0.0, wanted a finite number > 0"),
        ("cpo", {"nll": "mean"}, "nll: got 'mean', wanted one of 'sum'"),
        ("tpo", {"nll_weight": -1.0}, "nll_weight: got -1.0"),
        ("tpo", {"nll": "whole_token_mean"}, "nll: got 'whole_token_mean' .*, wanted one of 'sum'"),
        ("tpo", {"link": "hinge", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with link"),
        ("tpo", {"link": "squared", "beta": 0.0}, "beta: got 0.0"),
        ("tdpo2", {"alpha": math.nan}, "alpha: got nan"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight: got -1.0"),
        ("bco", {"reward_shift": "sum"}, "reward_shift: got 'sum', wanted one of 'none', 'ema'"),
        ("bco-pair", {"momentum": 1.0}, "momentum: got 1.0, wanted .* < 1"),
    ],
)
def test_hyperparameters_out_of_range(name, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        find(name).build(**options)


def test_registering_one_function_is_enough(monkeypatch):
    for kept in ("_SPECS", "_NAMES"):
        monkeypatch.setattr(registry, kept, dict(getattr(registry, kept)))

    @register("test-hinge", paper="none", aliases=("test-slic",))
    def hinge(*, beta: float = 0.1) -> PairwiseLoss:
        return PairwiseLoss(SumLogp(beta=beta), link=lambda m, margin: (1 + margin - m).relu())

    assert available_losses()["test-hinge"].defaults == {"beta": 0.1}
    batch = LogpBatch(policy=vector(-5, -10), lengths=torch.tensor([2, 2]))
    assert compute(find("test_slic").build(), batch).losses.tolist() == pytest.approx([0.5])
    with pytest.raises(ValueError, match="already a name of 'test-hinge'"):
        register("test-slic", paper="none")(hinge)
    with pytest.raises(ValueError, match="beta must be keyword-only with a default"):
        register("test-other", paper="none")(lambda beta: None)


@pytest.mark.parametrize("name", available_losses())
def test_no_hyperparameter_takes_a_value_of_another_kind(name):
    for option, default in available_losses()[name].defaults.items():
        wrong = [[1], {}] + ([] if isinstance(default, str | None) else ["no"])
        wrong += [1, None] if isinstance(default, bool) else []
        for value in wrong:
            with pytest.raises((ValueError, TypeError), match=option):
                find(name).build(**{option: value})


def test_published_settings_are_those_of_the_papers():
    assert preset("gamma-simpo/llama-3-8b-instruct") == (
        "gamma-simpo",
        {"beta": 10.0, "gamma": 4.0, "tau": 10.0},
    )
    assert preset("Alpha_DPO/Mistral-7B-Instruct")[1] == pytest.approx(
        {"beta": 2.5, "gamma": 0.375, "alpha": 0.05}
    )
    settings = published_settings()
    assert preset("omni-dpo/qwen2.5-7b")[1] == {"beta": 3.5, "tau_ref": 0.8}
    assert preset("epsilon-dpo/llama-3-8b-instruct")[1] == {"beta": 0.01, "epsilon": 0.01}
    assert len(settings) == 22
    assert preset("repo/llama-3-8b-instruct-v0.2") == ("repo", {"gamma": 0.6})
    assert settings["repo/mistral-7b-instruct"].learning_rate == 6e-7
    assert preset("simper/mistral-7b-base") == ("simper", {})
    assert settings["simper/mistral-7b-base"].learning_rate == 3e-7
    assert settings["gamma-simpo/qwen2.5-7b-instruct"].hyperparameters["tau"] == 3.0
    assert settings["alpha-dpo/gemma-2-9b-it"].learning_rate == 8e-7
    for name, setting in settings.items():
        assert name.split("/")[0] == setting.loss in available_losses()
        loss = find(setting.loss).build(**setting.hyperparameters)
        assert compute(loss, random_batch()).loss.isfinite()
    preset("alpha-dpo/gemma-2-9b-it")[1]["beta"] = 0.0
    assert preset("alpha-dpo/gemma-2-9b-it")[1]["beta"] == 10.0
