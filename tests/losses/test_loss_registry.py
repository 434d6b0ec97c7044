"""The registry: names, needs, hyperparameters, messages."""

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
    register,
)
from fused_prefopt.losses.registry import _NAMES, _SPECS
from fused_prefopt.types import LogpBatch

FIELDS = tuple(field.name for field in dataclasses.fields(LogpBatch))
REGISTERED = available_losses()


def test_what_the_losses_need():
    assert REGISTERED["dpo"].needs == ("reference",)
    assert REGISTERED["simpo"].needs == ()
    assert REGISTERED["alpha-dpo"].needs == ("reference",)
    assert REGISTERED["gamma-simpo"].needs == ()
    assert REGISTERED["dro"].needs == ("prompt", "prompt_reference", "reference", "rewards")
    build = find("alpha-dpo").build
    assert build(implicit_reference="policy").needs == frozenset()
    assert build(implicit_reference="sequence_kl").needs == {"sequence_kl"}


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
    ],
)
def test_hyperparameters_out_of_range(name, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        find(name).build(**options)


def test_registering_one_function_is_enough():
    @register("test-hinge", paper="none", aliases=("test-slic",))
    def hinge(*, beta: float = 0.1) -> PairwiseLoss:
        return PairwiseLoss(SumLogp(beta=beta), link=lambda m, margin: (1 + margin - m).relu())

    try:
        assert available_losses()["test-hinge"].defaults == {"beta": 0.1}
        batch = LogpBatch(policy=vector(-5, -10), lengths=torch.tensor([2, 2]))
        assert compute(find("test_slic").build(), batch).losses.tolist() == pytest.approx([0.5])
        with pytest.raises(ValueError, match="already a name of 'test-hinge'"):
            register("test-slic", paper="none")(hinge)
        with pytest.raises(ValueError, match="beta must be keyword-only with a default"):
            register("test-other", paper="none")(lambda beta: None)
    finally:
        del _SPECS["test-hinge"], _NAMES["test-hinge"], _NAMES["test-slic"]


@pytest.mark.parametrize("name", available_losses())
def test_no_hyperparameter_takes_a_value_of_another_kind(name):
    for option, default in available_losses()[name].defaults.items():
        wrong = [[1], {}] + ([] if isinstance(default, str | None) else ["no"])
        wrong += [1, None] if isinstance(default, bool) else []
        for value in wrong:
            with pytest.raises((ValueError, TypeError), match=option):
                find(name).build(**{option: value})
