"""A margin added by name to the registered losses: what it equals, who refuses it, what is kept."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io

import pytest
import torch
from loss_cases import compute, eager_logps, extras_of, hidden_batch, random_batch

import fused_prefopt as fp
from fused_prefopt import losses
from fused_prefopt.loss_kernel import pair_form
from fused_prefopt.losses import (
    ConstantMargin,
    DynamicMargin,
    PairwiseLoss,
    SumMargin,
    find,
    gap_of,
)
from fused_prefopt.losses.adaptive_margin import AdaptiveMargin

DYNAMIC = {"name": "dynamic", "gamma": 0.5, "tau": 2.0, "queue_size": 16}
ADAPTIVE = {"name": "Adaptive", "alpha": 0.3, "gamma": 0.2}
BUILT = {name: find(name).build() for name in fp.available_losses()}


def heeds_margins(loss: losses.PairwiseLoss | losses.AnchoredLoss) -> bool:
    """Whether the slopes of a loss depend on where target margins lie."""
    if not isinstance(loss, PairwiseLoss):
        return False
    margins = torch.linspace(-5, 5, 41, dtype=torch.float64, requires_grad=True)
    at_zero, at_one = (
        torch.autograd.grad(loss.link(margins, torch.full_like(margins, gamma)).sum(), margins)[0]
        for gamma in (0.0, 1.0)
    )
    moves = not torch.equal(at_zero, at_one)
    return moves and (loss.ranking is None or loss.ranking.takes_margins)


TAKERS = [name for name, loss in BUILT.items() if heeds_margins(loss)]
REMEMBER = [name for name in TAKERS if BUILT[name].margin.statistics() is not None]
BATCHES = [random_batch(8, seed) for seed in range(4)]


def by_hand(loss: PairwiseLoss, given: dict) -> losses.DynamicMargin | AdaptiveMargin:
    """The part that a mapping names, put together here."""
    if given is DYNAMIC:
        return DynamicMargin(gamma=0.5, tau=2.0, queue_size=16)
    batch, beta = BATCHES[0], getattr(loss.reward, "beta", 1.0)
    longer = dataclasses.replace(batch, lengths=2 * batch.lengths)
    per_token = not torch.equal(loss.reward(batch), loss.reward(longer))
    gap = gap_of("ratio", length_normalized=per_token)
    return AdaptiveMargin(gap=gap, gamma=0.2, alpha=0.3, scale=beta)


@dataclasses.dataclass(frozen=True)
class Apart:
    """A loss's own margin and given numbers: the sum without the parts that add it."""

    own: losses.ConstantMargin
    numbers: torch.Tensor
    needs: frozenset[str] = frozenset()

    def statistics(self):
        return self.own.statistics()

    def observe(self, batch, reward_margins):
        return self.own.observe(batch, reward_margins)

    def __call__(self, batch, reward_margins, summary=None):
        return self.own(batch, reward_margins, summary) + self.numbers


@pytest.mark.parametrize("given", [DYNAMIC, ADAPTIVE], ids=["dynamic", "adaptive"])
@pytest.mark.parametrize("name", [name for name in TAKERS if name not in REMEMBER])
def test_the_margin_is_added_to_the_losses_own(name, given):
    loss, loss_fn = BUILT[name], fp.PreferenceLoss(name, margin=given)
    margin = by_hand(loss, given)
    assert loss_fn.loss.needs == loss.needs | margin.needs
    statistics, of_scale = margin.statistics(), loss.statistics()
    for batch in BATCHES[:2]:
        found = loss_fn.from_logps(batch)
        chosen, rejected = loss.reward(batch).detach().chunk(2)
        margins = chosen - rejected
        numbers = margin(batch, margins, statistics(margin.observe(batch, margins)))
        apart = dataclasses.replace(loss, margin=Apart(loss.margin, numbers))
        wanted = compute(apart, batch, of_scale)
        for ours, true in (
            (found.target_margins, wanted.target_margins),
            (found.losses, wanted.losses),
            (found.loss, wanted.loss),
            *[[torch.autograd.grad(each.loss, batch.policy)[0] for each in (found, wanted)]],
        ):
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)
    assert f"margin={given!r}" in repr(loss_fn)


@pytest.mark.parametrize("given", [DYNAMIC, ADAPTIVE], ids=["dynamic", "adaptive"])
@pytest.mark.parametrize("name", [name for name in TAKERS if name not in REMEMBER])
def test_the_statistic_is_resumed(name, given):
    whole, before, after = (fp.PreferenceLoss(name, margin=given) for _ in range(3))
    wanted = [whole.from_logps(batch).losses for batch in BATCHES]
    for batch in BATCHES[:2]:
        before.from_logps(batch)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    for batch, true in zip(BATCHES[2:], wanted[2:], strict=True):
        assert torch.equal(after.from_logps(batch).losses, true)
    fresh = fp.PreferenceLoss(name, margin=given)
    assert not torch.equal(fresh.from_logps(BATCHES[2]).losses, wanted[2])


@pytest.mark.parametrize("name", [name for name in BUILT if name not in TAKERS])
def test_losses_to_which_it_makes_no_difference_refuse_one(name):
    with pytest.raises(ValueError, match=f"margin: got .* for {name}, to which a target margin"):
        fp.PreferenceLoss(name, margin=DYNAMIC)


@pytest.mark.parametrize("name", REMEMBER)
def test_of_two_margins_one_may_remember(name):
    own = type(BUILT[name].margin).__name__
    for given, kind in ((DYNAMIC, "DynamicMargin"), (ADAPTIVE, "AdaptiveMargin")):
        message = f"margin of {name}: got {kind} beside {own}, each of which keeps a statistic, w"
        with pytest.raises(ValueError, match=message):
            fp.PreferenceLoss(f"sft + 0.5 {name}", margin=given)
    given = {"name": "length", "alpha": 0.05}
    loss_fn = fp.PreferenceLoss(name, margin=given)
    plain, statistics = BUILT[name], BUILT[name].statistics()
    for batch in BATCHES[:2]:
        found = loss_fn.from_logps(batch).target_margins
        chosen, rejected = batch.lengths.double().chunk(2)
        wanted = compute(plain, batch, statistics).target_margins + 0.05 * (chosen - rejected)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_margin_by_name_or_as_a_part_makes_the_registered_losses():
    dynamic = fp.PreferenceLoss("dpo", margin={"name": "dynamic", "gamma": 0.5})
    assert dynamic.loss == BUILT["gamma-dpo"]
    assert dynamic.loss == fp.PreferenceLoss("dpo", margin=DynamicMargin(gamma=0.5)).loss
    setting = "alpha-dpo/llama-3-8b-instruct-v0.2"
    shared = {"beta": 10.0, "gamma": 4.0}
    adaptive = fp.PreferenceLoss("simpo", margin={"name": "adaptive", "alpha": 0.2}, **shared)
    assert adaptive.loss == fp.PreferenceLoss(setting).loss
    length = fp.PreferenceLoss("dpo", margin={"name": "LENGTH", "alpha": 0.05})
    assert length.loss == BUILT["length-dpo"]
    offset = {"name": "offset", "offset": "identity"}
    assert fp.PreferenceLoss("dpo", margin=offset).loss == find("odpo").build(offset="identity")
    kl = fp.PreferenceLoss("dpo", margin={"name": "sequence_kl", "scale": 0.1})
    assert kl.loss == BUILT["tdpo1"]
    drop = fp.PreferenceLoss("dpo", beta=0.3, margin={"name": "drop", "scale": 0.3 * 50})
    assert drop.loss == BUILT["dpo-positive"]
    score = fp.PreferenceLoss("ipo", margin={"name": "score"})
    assert score.loss.needs == {"reference", "rewards"}
    # A published setting is a loss as any other.
    more = fp.PreferenceLoss(setting, margin={"name": "constant", "gamma": 0.5}).loss
    assert more == fp.PreferenceLoss(setting, gamma=4.5).loss
    assert fp.PreferenceLoss("dpo", margin={"name": "constant"}).loss == BUILT["dpo"]


def test_what_has_a_kernel_keeps_it():
    for name, margin in (
        ("dpo", DYNAMIC),
        ("cpo", ADAPTIVE),
        ("simpo", ADAPTIVE),
        ("ipo", {"name": "constant", "gamma": 1.0}),
        ("alpha-dpo", ConstantMargin(gamma=1.0)),
    ):
        loss = fp.PreferenceLoss(name, margin=margin).loss
        plain = dataclasses.replace(loss, regularisers=())
        assert pair_form(plain) is not None, name
    for name in ("simpo", "length-dpo"):
        loss = fp.PreferenceLoss(name, margin=DYNAMIC).loss
        assert isinstance(loss.margin, SumMargin) and pair_form(loss) is None


def test_the_terms_of_a_sum_that_have_a_margin_get_it():
    text = "0.8 dpo + 0.2 bco-pair + sft + 0.5 simpo + 0 ipo"
    loss_fn = fp.PreferenceLoss(text, margin=DYNAMIC)
    terms = {term.name: term.loss for term in loss_fn.loss.terms}
    for name in ("dpo", "simpo"):
        assert terms[name] == fp.PreferenceLoss(name, margin=DYNAMIC).loss
    for name in ("bco-pair", "sft", "ipo"):
        assert terms[name] == BUILT[name]
    assert set(dict(loss_fn.statistics.named_children())) == {"dpo", "simpo"}
    plain = fp.PreferenceLoss("0.2 bco-pair + sft")
    parts = [fp.PreferenceLoss(name, margin=DYNAMIC) for name in ("dpo", "simpo")]
    for batch in BATCHES[:2]:
        found = loss_fn.from_logps(batch).loss
        first, second = (each.from_logps(batch).loss for each in parts)
        wanted = 0.8 * first + 0.5 * second + plain.from_logps(batch).loss
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for text in ("bco-pair + sft", "0 dpo + sft", [{"name": "dro"}]):
        with pytest.raises(ValueError, match="to which a target margin makes no difference"):
            fp.PreferenceLoss(text, margin=DYNAMIC)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            0.5,
            "got 0.5, wanted a mapping such as {'name': 'dynamic'.* or a part such as losses",
        ),
        ("dynamic", "got 'dynamic', wanted a mapping"),
        (DynamicMargin, "got <class .*, wanted a mapping such as .* or a part"),
        ({"gamma": 0.5}, "got {'gamma': 0.5}, wanted a mapping such as"),
        ({"name": "dynamc"}, "name: got 'dynamc' .did you mean 'dynamic'.., wanted one of 'adapt"),
        ({"name": "dynamic"}, "gamma: got none for dynamic, needs a value"),
        ({"name": "dynamic", "gama": 1}, "dynamic: got 'gama' .did you mean 'gamma'.., wanted ga"),
        ({"name": "dynamic", "gamma": -1}, "gamma: got -1, wanted a finite number >= 0"),
        (DYNAMIC | {"queue": "no"}, "queue: got 'no', wanted True or False"),
        (ADAPTIVE | {"reward": 1}, "adaptive: got 'reward', wanted gamma, alpha"),
        (ADAPTIVE | {"beta": 1}, "adaptive: got 'beta', wanted gamma, alpha"),
        (ADAPTIVE | {"statistics": "em"}, "statistics: got 'em' .did you mean 'ema'"),
        (
            ADAPTIVE | {"implicit_reference": "sequence_kl", "length_normalized": True},
            "length_normalized: got True with 'sequence_kl', whose gap is always of whole",
        ),
        (
            ADAPTIVE | {"length_normalized": "no"},
            "length_normalized: got 'no', wanted a bool or None",
        ),
        ({"name": "score", "alpha": 1}, "score: got 'alpha', wanted no options"),
    ],
    ids=str,
)
def test_what_names_no_margin_is_refused(given, message):
    with pytest.raises(ValueError, match=f"margin of dpo: {message}"):
        fp.PreferenceLoss("dpo", margin=given)


def test_no_loss_has_a_hyperparameter_of_the_name_of_an_option():
    options = set(inspect.signature(fp.PreferenceLoss).parameters)
    for name, info in fp.available_losses().items():
        assert not options & set(info.defaults), name


def test_a_part_and_its_sum_leave_what_they_are_given_alone():
    given = copy.deepcopy(DYNAMIC)
    loss_fn = fp.PreferenceLoss("length-dpo", margin=given)
    assert given == DYNAMIC and loss_fn.margin is given
    own, added = loss_fn.loss.margin.own, loss_fn.loss.margin.added
    assert own == BUILT["length-dpo"].margin and added == by_hand(BUILT["dpo"], DYNAMIC)
    other = SumMargin(own=added, added=own)
    margins = torch.linspace(-1, 1, 4, dtype=torch.float64)
    pool = added.statistics()(margins)
    each = [part(BATCHES[0], margins, pool) for part in (loss_fn.loss.margin, other)]
    torch.testing.assert_close(*each, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["ipo", "length-dpo", "beta-simpo", "0.8 cpo + 0.2 odpo"])
@pytest.mark.parametrize("path", ["local", "recompute"])
def test_the_fused_call_equals_the_loss_on_eager_log_probs(name, path):
    batch = hidden_batch()
    extras = extras_of(batch)
    leaves = [batch[key].clone().requires_grad_() for key in ("hidden", "weight")]
    for given in (DYNAMIC, ADAPTIVE):
        fused, plain = (fp.PreferenceLoss(name, path=path, margin=given) for _ in range(2))
        for _ in range(2):
            found = fused(*leaves, batch["labels"], **extras)
            policy, lengths = eager_logps(*leaves, batch["labels"])
            wanted = plain.from_logps(fp.LogpBatch(policy, lengths, **extras))
            torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-9, atol=1e-11)
            slopes = [torch.autograd.grad(each.loss, leaves) for each in (found, wanted)]
            torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-10)
