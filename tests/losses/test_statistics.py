"""The statistics: what they remember, what they refuse, and that they are restored exactly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from loss_cases import vector

from fused_prefopt.statistics import (
    BalancedShift,
    BatchMoments,
    BatchwiseShift,
    DatasetMoments,
    JointStatistic,
    MarginQueue,
    PooledShift,
    ReferenceMean,
    ReferenceMoments,
    RunningMean,
    RunningMoments,
)


def of_values(kind):
    """A statistic of the two classes' rewards, shown values of one pair each, and their halves."""

    class OfValues(kind):
        def forward(self, values):
            return super().forward(torch.stack([values, values / 2, *torch.ones(2, len(values))]))

    return OfValues


BALANCED, POOLED, BATCHWISE = map(of_values, (BalancedShift, PooledShift, BatchwiseShift))
STATISTICS = {
    "ema": lambda: RunningMoments(0.9),
    "reference": lambda: ReferenceMoments(0.9),
    "batch": BatchMoments,
    "dataset": lambda: DatasetMoments(0.5, 2.0),
    "queue": lambda: MarginQueue(queue_size=16, sample_size=8, seed=3),
    "no queue": lambda: MarginQueue(queue_size=0),
    "mean": lambda: RunningMean(0.9),
    "reference mean": lambda: ReferenceMean(0.9),
    "balanced shift": lambda: BALANCED(0.9),
    "pooled shift": POOLED,
    "batchwise shift": BATCHWISE,
}
each_statistic = pytest.mark.parametrize("make", STATISTICS.values(), ids=STATISTICS.keys())


def stream(steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches of 1 to 5 values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + i % 5, generator=generator, dtype=torch.float64) for i in range(steps)]


def numbers(summary) -> list[torch.Tensor]:
    return [value for value in vars(summary).values() if isinstance(value, torch.Tensor)]


def assert_equal(first, second) -> None:
    for left, right in zip(numbers(first), numbers(second), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def snapshot(statistic) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in statistic.state_dict().items()}


def assert_state(statistic, state) -> None:
    for name, value in statistic.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def test_ema_by_hand():
    moments = RunningMoments(0.9)
    first = moments(vector(1.0, 3.0))
    assert first.mean.item() == pytest.approx(2.0)
    assert first.std.item() == pytest.approx(1.0)
    second = moments(vector(5.0))
    # Weights 0.09 and 0.1 of 0.19: E[x] = (0.18 + 0.5)/0.19, E[x²] = (0.45 + 2.5)/0.19.
    mean = 0.68 / 0.19
    assert second.mean.item() == pytest.approx(mean)
    assert second.std.item() == pytest.approx(math.sqrt(2.95 / 0.19 - mean**2))


def test_reference_by_hand():
    moments = ReferenceMoments(0.9)
    first = moments(vector(1.0, 3.0))
    assert first.mean.item() == pytest.approx(0.2)
    assert first.std.item() == pytest.approx(0.1 * math.sqrt(2))
    second = moments(vector(0.0, 0.0, 3.0))
    assert second.mean.item() == pytest.approx(0.9 * 0.2 + 0.1)
    assert second.std.item() == pytest.approx(0.09 * math.sqrt(2) + 0.1 * math.sqrt(3))


def test_batch_and_dataset_by_hand():
    moments = BatchMoments()
    moments(vector(-100.0, 7.0))
    summary = moments(vector(1.0, 3.0))
    assert (summary.mean.item(), summary.std.item()) == (2.0, 1.0)
    summary = DatasetMoments(0.5, 2.0)(vector(9.0))
    assert summary.standardise(vector(4.5)).tolist() == [2.0]


@pytest.mark.parametrize("kind", [RunningMoments, ReferenceMoments, BatchMoments])
def test_single_value_is_finite(kind):
    moments = kind()
    summary = moments(vector(4.0))
    assert (summary.mean.item(), summary.std.item()) == (pytest.approx(4.0), pytest.approx(1e-6))
    later = moments(vector(1.0, 2.0))
    assert later.mean.isfinite() and later.std.isfinite()


@pytest.mark.parametrize("kind", [RunningMoments, ReferenceMoments])
def test_eval_before_training_uses_the_batch(kind):
    moments = kind().eval()
    before = snapshot(moments)
    summary = moments(vector(1.0, 3.0))
    assert (summary.mean.item(), summary.std.item()) == (2.0, 1.0)
    assert_state(moments, before)


def test_running_mean_by_hand():
    level = RunningMean(0.9)
    first = level(vector(1.0, 3.0))
    assert (first.batch.item(), first.average.item()) == (2.0, pytest.approx(2.0))
    second = level(vector(5.0))
    assert second.batch.item() == 5.0
    assert second.average.item() == pytest.approx((0.09 * 2.0 + 0.1 * 5.0) / 0.19)
    nothing = level(vector(math.nan))
    assert nothing.batch.item() == nothing.average.item() == second.average.item()


def test_reference_mean_by_hand():
    level = ReferenceMean(0.9)
    first = level(vector(1.0, 3.0))
    assert (first.batch.item(), first.average.item()) == (2.0, 0.0)
    second = level(vector(5.0, math.nan))
    assert (second.batch.item(), second.average.item()) == (5.0, pytest.approx(0.2))
    nothing = level(vector(math.nan))
    assert nothing.batch.item() == nothing.average.item() == pytest.approx(0.9 * 0.2 + 0.5)
    frozen = level.eval()(vector(-4.0))
    assert (frozen.batch.item(), frozen.average.item()) == (-4.0, nothing.average.item())
    assert level.average.item() == nothing.average.item()


def test_joint_passes_each_row_on_and_fails_as_one(monkeypatch):
    joint = JointStatistic(MarginQueue(queue_size=4, sample_size=4), RunningMean(0.9))
    alone = RunningMean(0.9)
    for values in stream(6):
        pool, level = joint(torch.stack([values, -values]))
        assert torch.equal(pool.margins[: values.shape[0]], values)
        assert_equal(level, alone(-values))
    dirty = vector(1.0, math.nan)
    joint(torch.stack([dirty, dirty]))
    assert joint.nonfinite.item() == 1
    before = snapshot(joint)

    def fail(*_):
        raise RuntimeError("link down")

    monkeypatch.setattr("fused_prefopt.statistics.moments.sum_over_ranks", fail)
    with pytest.raises(RuntimeError, match="link down"):
        joint(vector(1.0, 2.0).expand(2, 2))
    assert_state(joint, before)
    joint.eval()(vector(1.0, 2.0).expand(2, 2))
    assert_state(joint, before)
    restored = JointStatistic(MarginQueue(queue_size=4, sample_size=4), RunningMean(0.9))
    restored.load_state_dict(before)
    monkeypatch.undo()
    joint.train()
    for values in stream(6, seed=1):
        pair = values.expand(2, -1)
        for one, other in zip(joint(pair), restored(pair), strict=True):
            assert_equal(one, other)


def test_queue_by_hand():
    queue = MarginQueue(queue_size=3, sample_size=4)
    assert queue(vector(1.0, 2.0)).margins.isfinite().sum() == 2
    pool = queue(vector(3.0))
    assert pool.margins[0] == 3.0
    past = pool.margins[1:]
    assert sorted(past[past.isfinite()].tolist()) == [1.0, 2.0]
    queue(vector(4.0, 5.0))
    # First in, first out: 1 and 2 have left.
    assert queue.margins.tolist() == [3.0, 4.0, 5.0]
    queue(vector(6.0, 7.0, 8.0, 9.0))
    assert queue.margins.tolist() == [7.0, 8.0, 9.0]


def test_queue_samples_without_replacement():
    queue = MarginQueue(queue_size=64, sample_size=16)
    queue(torch.arange(64, dtype=torch.float64))
    seen = set()
    for _ in range(20):
        drawn = queue.eval()(vector(-1.0)).margins
        queue.train()
        assert drawn.shape == (16,) and drawn[0] == -1.0
        assert len(set(drawn.tolist())) == 16
        seen.update(drawn.tolist())
        queue(torch.full((0,), 0.0, dtype=torch.float64))
    assert len(seen) > 50


def test_batch_of_the_sample_size_draws_nothing():
    queue = MarginQueue(queue_size=16, sample_size=2)
    queue(vector(1.0, 2.0))
    assert queue(vector(3.0, 4.0, 5.0)).margins.tolist() == [3.0, 4.0, 5.0]


@each_statistic
def test_eval_is_frozen(make):
    statistic = make()
    for values in stream(12):
        statistic(values)
    before = snapshot(statistic)
    statistic.eval()
    first = statistic(vector(0.5, math.nan))
    assert_equal(first, statistic(vector(0.5, math.nan)))
    assert_state(statistic, before)


@each_statistic
def test_a_saved_state_continues_bit_equal(make, tmp_path):
    through = make()
    batches = stream(30)
    for values in batches[:15]:
        through(values)
    restored = make()
    torch.save(through.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    copied = copy.deepcopy(through)
    for values in batches[15:]:
        summary = through(values)
        assert_equal(summary, restored(values))
        assert_equal(summary, copied(values))


@each_statistic
def test_parent_cast_keeps_float64(make):
    statistic = make()
    for values in stream(12):
        statistic(values)
    before = snapshot(statistic)
    torch.nn.ModuleList([statistic]).half().to(torch.bfloat16)
    assert_state(statistic, before)
    assert all(value.dtype != torch.bfloat16 for value in statistic.buffers())


@each_statistic
def test_steps_between_evaluations_are_those_without(make):
    plain, interrupted = make(), make()
    for values, other in zip(stream(20), stream(20, seed=1), strict=True):
        interrupted.eval()
        interrupted(other)
        interrupted.train()
        assert_equal(plain(values), interrupted(values))
    assert_state(interrupted, snapshot(plain))


@pytest.mark.parametrize(
    "kind",
    [
        RunningMoments,
        ReferenceMoments,
        BatchMoments,
        RunningMean,
        ReferenceMean,
        BALANCED,
        POOLED,
        BATCHWISE,
    ],
)
def test_a_value_whose_square_is_infinite_is_skipped_too(kind):
    clean, dirty = kind(), kind()
    clean(vector(1.0, 2.0))
    dirty(vector(1.0, -1e200, 2.0))
    state = snapshot(clean)
    state["nonfinite"] += 1
    assert_state(dirty, state)
    assert_equal(clean(vector(3.0, 4.5)), dirty(vector(3.0, 4.5)))


@each_statistic
def test_exception_leaves_the_state(make, monkeypatch):
    statistic = make()
    for values in stream(12):
        statistic(values)
    before = snapshot(statistic)

    def fail(*_args, **_kwargs):
        raise RuntimeError("link down")

    places = "moments.sum_over_ranks", "margin_queue.gather_over_ranks"
    for place in (*places, "reward_shift.sum_over_ranks"):
        monkeypatch.setattr(f"fused_prefopt.statistics.{place}", fail)
    with pytest.raises(RuntimeError, match="link down"):
        statistic(vector(1.0, 2.0))
    assert_state(statistic, before)


def test_exception_after_the_draw_leaves_the_generator(monkeypatch):
    queue = MarginQueue(queue_size=16, sample_size=8)
    queue(vector(1.0, 2.0))
    before = snapshot(queue)

    def fail(_current):
        raise MemoryError

    monkeypatch.setattr(queue, "_enqueued", fail)
    with pytest.raises(MemoryError):
        queue(vector(3.0))
    assert_state(queue, before)


@each_statistic
def test_summary_does_not_change_later(make):
    statistic = make()
    summary = statistic(vector(1.0, 2.0))
    kept = copy.deepcopy(summary)
    for values in stream(6):
        statistic(values)
    assert_equal(summary, kept)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RunningMoments(1.0), "momentum"),
        (lambda: DatasetMoments(0.0, 0.0), "std"),
        (lambda: DatasetMoments(math.nan, 1.0), "mean"),
        (lambda: RunningMean(-0.1), "momentum"),
        (lambda: ReferenceMean(1.0), "momentum"),
        (lambda: BalancedShift(1.0), "momentum"),
        (lambda: MarginQueue(queue_size=-1), "queue_size"),
        (lambda: MarginQueue(sample_size=0), "sample_size"),
    ],
)
def test_ranges(make, name):
    with pytest.raises(ValueError, match=name):
        make()
