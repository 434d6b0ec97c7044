"""NaN and infinite log-probs never reach what a loss remembers: every stateful loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from loss_cases import VARIANTS, random_batch

from fused_prefopt import LogpBatch, PreferenceLoss
from fused_prefopt.losses import DynamicMargin, DynamicScale, MeanLogp, PairwiseLoss

STATEFUL = [
    (name, options)
    for name, options in VARIANTS
    if PreferenceLoss(name, **options).statistics is not None
]
JOINT = PairwiseLoss(
    MeanLogp(beta=2.5),
    DynamicMargin(gamma=0.5, queue_size=16, sample_size=8),
    scale=DynamicScale(alpha=0.3),
)
FIELDS = ("policy", "reference", "sequence_kl")


def loss_fn_of(name: str, options: dict) -> PreferenceLoss:
    if name != "joint":
        return PreferenceLoss(name, **options)
    loss_fn = PreferenceLoss("simpo")
    loss_fn.loss, loss_fn.statistics = JOINT, JOINT.statistics()
    return loss_fn


def poisoned(batch: LogpBatch, value: float, rows: slice | None = None) -> LogpBatch:
    """The batch with `value` in each of `FIELDS`, in a row of its own, or in all of some rows."""
    values = {name: getattr(batch, name).detach().clone() for name in FIELDS}
    for number, field in enumerate(values.values()):
        field[2 * number if rows is None else rows] = value
    return dataclasses.replace(batch, **values)


def assert_state(found: PreferenceLoss, wanted: PreferenceLoss, skipped: int) -> None:
    """Equal states, all finite but for empty places of a queue; so many values more skipped."""
    state, true = found.state_dict(), wanted.state_dict()
    assert state.keys() == true.keys()
    for name, value in state.items():
        if name.endswith("margins"):
            empty = value.isnan()
            assert not value.isinf().any() and not empty[int(empty.sum()) :].any()
            assert torch.equal(empty, true[name].isnan())
        else:
            assert value.isfinite().all(), name
        more = skipped if name.endswith("nonfinite") else 0
        torch.testing.assert_close(value, true[name] + more, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "options"), [*STATEFUL, ("joint", {})], ids=str)
def test_bad_values_are_skipped_and_counted(name, options, value):
    dirty, clean = loss_fn_of(name, options), loss_fn_of(name, options)
    skipped = 0
    for seed in range(4):
        batch = poisoned(random_batch(14, seed), value)
        observed = dirty.loss.observe(batch)
        bad = observed.isfinite().logical_not().reshape(-1, observed.shape[-1]).any(0)
        assert 1 <= bad.sum() <= 2
        result = dirty.from_logps(batch)
        assert result.losses[~bad].isfinite().sum() >= 4
        clean.statistics(observed[..., ~bad])
        skipped += int(bad.sum())
        assert_state(dirty, clean, skipped)
    later = random_batch(14, 9)
    losses = [each.from_logps(later).losses for each in (dirty, clean)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)
    assert losses[0].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(("name", "options"), [*STATEFUL, ("joint", {})], ids=str)
def test_a_batch_of_nothing_else_leaves_the_rest_of_the_state(name, options, value):
    dirty, clean = loss_fn_of(name, options), loss_fn_of(name, options)
    for loss_fn in (dirty, clean):
        loss_fn.from_logps(random_batch(14, 0))
    batch = poisoned(random_batch(14, 1), value, rows=slice(None))
    observed = dirty.loss.observe(batch)
    dirty.from_logps(batch)
    clean.statistics(observed[..., :0])
    assert_state(dirty, clean, observed.shape[-1])


@pytest.mark.parametrize(("name", "options"), [*STATEFUL, ("joint", {})], ids=str)
def test_nan_hidden_states_of_one_completion(name, options):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(8, 5, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (8, 5), generator=generator)
    extras = {"reference": -torch.ones(8).double(), "sequence_kl": torch.arange(8.0).double()}
    loss_fn = loss_fn_of(name, options)
    extras |= {"extrapolated": -torch.arange(8.0).double(), "interpolated": -torch.ones(8).double()}
    extras["desirable"] = torch.arange(8) % 2 == 0
    extras["groups"] = torch.arange(8) // 2
    for key in ("rewards", "prompt", "prompt_reference"):
        extras[key] = torch.linspace(-2, 1, 8, dtype=torch.float64)
    extras = {key: extras[key] for key in loss_fn.loss.needs}
    loss_fn(hidden, weight, labels, **extras)
    hidden[1, 2] = math.nan
    loss_fn(hidden, weight, labels, **extras)
    for key, state in loss_fn.state_dict().items():
        if not key.endswith("margins"):
            assert state.isfinite().all(), key
    # What the statistic looks at has no policy in it: there is nothing to skip.
    blind = options.get("implicit_reference") in ("reference", "inverse_reference", "sequence_kl")
    assert loss_fn.statistics.nonfinite.item() == (0 if blind else 1)
    hidden[1, 2] = 0.0
    assert loss_fn(hidden, weight, labels, **extras).losses.isfinite().all()
