"""ε-DPO: the authors' recipe on log-probs, both heads' logits behind it, its state, sums of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from divergences import Two, make_two
from loss_cases import random_batch
from truth import leaves_of, on_engines, picked, relative, true_logits

from fused_prefopt import PreferenceLoss
from fused_prefopt.statistics import SteppedPenalty
from fused_prefopt.types import LogpBatch

SIZES = (6, 2, 10, 4)
EPSILON = 0.2


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Code:
    """The authors' trainer after its forward passes, in Python's floats.

    β moves once `accumulated` batches have been seen.
    """

    def __init__(self, beta: float, epsilon: float, accumulated: int) -> None:
        self.beta, self.epsilon, self.accumulated = beta, epsilon, accumulated
        self.steps: list[list[int]] = []

    def step(self, batch: LogpBatch, training: bool = True):
        weaker, own, stronger, ratio = (
            [w - lost for w, lost in zip(*values.detach().chunk(2), strict=True)]
            for values in (
                batch.extrapolated,
                batch.policy,
                batch.interpolated,
                batch.policy - batch.reference,
            )
        )
        steps = [
            int(p > x > n) - int(n > x > p) for p, x, n in zip(weaker, own, stronger, strict=True)
        ]
        betas = [self.beta / (1 + self.epsilon * step) for step in steps]
        losses = [-math.log(sigmoid(b * x.item())) for b, x in zip(betas, ratio, strict=True)]
        slopes = [-b * sigmoid(-b * x.item()) for b, x in zip(betas, ratio, strict=True)]
        if training:
            self.steps.append(steps)
            if len(self.steps) == self.accumulated:
                every = sum(self.steps, [])
                self.beta /= 1 + self.epsilon * sum(every) / len(every)
                self.steps = []
        return steps, losses, slopes


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_authors_recipe(accumulated):
    code = Code(0.1, EPSILON, accumulated)
    loss_fn = PreferenceLoss("epsilon-dpo", epsilon=EPSILON, update_every=accumulated)
    seen = set()
    for seed, size in enumerate((*SIZES, *SIZES)):
        batch = random_batch(size, seed)
        steps, losses, slopes = code.step(batch)
        seen |= set(steps)
        found = loss_fn.from_logps(batch)
        assert found.losses.tolist() == pytest.approx(losses, rel=1e-12)
        (gradient,) = torch.autograd.grad(found.loss, batch.policy)
        wanted = [sign * slope / len(slopes) for sign in (1, -1) for slope in slopes]
        assert gradient.tolist() == pytest.approx(wanted, rel=1e-12)
        aside = random_batch(6, 50 + seed)
        _, wanted, _ = code.step(aside, training=False)
        assert loss_fn.eval().from_logps(aside).losses.tolist() == pytest.approx(wanted, rel=1e-12)
        loss_fn.train()
    assert seen == {-1, 0, 1} and abs(code.beta - 0.1) > 1e-3


def test_a_penalty_that_was_saved_goes_on():
    whole, first, second = (
        PreferenceLoss("e-dpo", epsilon=EPSILON, update_every=2) for _ in range(3)
    )
    for seed in range(3):  # amid an accumulation
        for each in (whole, first):
            each.from_logps(random_batch(8, seed))
    second.load_state_dict(first.state_dict(), strict=True)
    for seed in range(3, 6):
        batch = random_batch(8, seed)
        assert torch.equal(whole.from_logps(batch).losses, second.from_logps(batch).losses)
    assert whole.statistics.scale.factor != 1


def test_only_finite_pairs_move_the_penalty():
    batch = random_batch(8, 3)
    broken = batch.extrapolated.clone()
    broken[2] = math.nan
    loss_fn = PreferenceLoss("eps-dpo", epsilon=EPSILON)
    found = loss_fn.from_logps(dataclasses.replace(batch, extrapolated=broken))
    assert found.losses.isnan().tolist() == [False, False, True, False]
    rest = [0, 1, 3, 4, 5, 7]
    clean = PreferenceLoss("eps-dpo", epsilon=EPSILON)
    names = ("policy", "lengths", "reference", "extrapolated", "interpolated")
    clean.from_logps(LogpBatch(**{name: getattr(batch, name)[rest] for name in names}))
    assert loss_fn.statistics.nonfinite == 1
    assert loss_fn.statistics.scale.factor == clean.statistics.scale.factor != 1


@pytest.mark.parametrize("option", [{"epsilon": 1.0}, {"epsilon": 0}, {"update_every": 0}])
def test_options_out_of_range(option):
    for make in (SteppedPenalty, lambda **given: PreferenceLoss("epsilon-dpo", **given)):
        with pytest.raises(ValueError, match=next(iter(option))):
            make(**option)


# From hidden states


def eager(two: Two, beta: float, epsilon: float) -> torch.Tensor:
    """(P,) losses from the logits of both heads."""
    labels = two.policy.labels[:, 1:]
    z, r = (true_logits(case)[:, :-1] for case in two)
    logps = {
        name: picked((own * z + (1 - own) * r).log_softmax(-1), labels).sum(1)
        for name, own in {"+": 1 + epsilon, "=": 1.0, "-": 1 - epsilon, "ref": 0.0}.items()
    }
    gaps = {name: values.chunk(2)[0] - values.chunk(2)[1] for name, values in logps.items()}
    rising = (gaps["+"] > gaps["="]) & (gaps["="] > gaps["-"])
    falling = (gaps["+"] < gaps["="]) & (gaps["="] < gaps["-"])
    betas = beta / (1 + epsilon * (rising.double() - falling.double()))
    return -torch.nn.functional.logsigmoid(betas * (gaps["="] - gaps["ref"]))


def arguments(two: Two, packed: bool) -> tuple[tuple, dict]:
    policy, reference = two
    if not packed:
        given = {"ref_hidden": reference.hidden, "ref_head": reference.head}
        return (policy.hidden, policy.head, policy.labels), given
    sequences, length = policy.labels.shape
    ids = torch.arange(sequences).repeat_interleave(length)
    layout = {"sequence_ids": ids, "num_sequences": sequences}
    given = {"ref_hidden": reference.hidden.flatten(0, 1), "ref_head": reference.head}
    return (policy.hidden.flatten(0, 1), policy.head, policy.labels.flatten()), given | layout


@pytest.mark.parametrize(
    ("engine", "packed"), on_engines([("torch", False), ("torch", True), ("cublas", True)])
)
def test_the_fused_loss_equals_eager_logits(engine, packed):
    two = make_two(10, 9, 13, 43, transform="all", other="bias", largest=3.0, seed=1)
    loss_fn, beta = PreferenceLoss("epsilon-dpo", epsilon=EPSILON, engine=engine), 0.1
    for _ in range(2):  # The second time with another β.
        case = leaves_of(two.policy, (True, True, True))
        positional, given = arguments(two._replace(policy=case), packed)
        found = loss_fn(*positional, **given)
        exact = two.double()
        leaves = leaves_of(exact.policy, (True, True, True))
        losses = eager(exact._replace(policy=leaves), beta, EPSILON)
        torch.testing.assert_close(found.losses.double(), losses, rtol=1e-5, atol=1e-6)
        found.loss.backward()
        losses.mean().backward()
        for name in ("hidden", "weight", "bias"):
            got, wanted = getattr(case, name).grad, getattr(leaves, name).grad
            assert relative(got, wanted) <= 1e-5
        beta = 0.1 * loss_fn.statistics.scale.factor.item()
    assert abs(beta - 0.1) > 1e-3


def test_a_policy_that_is_its_reference_has_no_steps():
    policy = make_two(8, 9, largest=30.0).policy
    positional, given = arguments(Two(policy, policy), False)
    loss_fn = PreferenceLoss("epsilon-dpo")
    found = loss_fn(*positional, **given)
    assert torch.equal(found.losses, PreferenceLoss("dpo")(*positional, **given).losses)
    assert loss_fn.statistics.scale.factor == 1


def test_sums_share_the_pass_and_one_epsilon():
    two = make_two(8, 9, 13, 43, largest=3.0)
    positional, given = arguments(two, False)
    both = PreferenceLoss("0.5 epsilon-dpo + tdpo2", epsilon=EPSILON)(*positional, **given)
    alone = [
        PreferenceLoss(name, **options)(*positional, **given).losses
        for name, options in (("epsilon-dpo", {"epsilon": EPSILON}), ("tdpo2", {}))
    ]
    torch.testing.assert_close(both.losses, 0.5 * alone[0] + alone[1], rtol=1e-6, atol=1e-6)
    terms = [
        {"name": "epsilon-dpo", "hyperparameters": {"epsilon": 0.1, "beta": beta}}
        for beta in (0.1, 0.2)
    ]
    assert PreferenceLoss(terms)(*positional, **given).loss.isfinite()
    terms[1]["hyperparameters"]["epsilon"] = 0.3
    with pytest.raises(ValueError, match=r"epsilon: got \[0.1, 0.3\] in one sum, wanted one"):
        PreferenceLoss(terms)
    with pytest.raises(ValueError, match="needs 'recompute' and all mass"):
        PreferenceLoss("epsilon-dpo", path="local")(*positional, **given)
    with pytest.raises(ValueError, match=r"epsilon-dpo needs `extrapolated`: \(S,\) summed"):
        PreferenceLoss("epsilon-dpo")(*positional, reference=torch.zeros(8))
