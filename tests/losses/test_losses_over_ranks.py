"""Losses that remember or span the batch: ranks with unequal batches against one with all pairs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loss_cases import VARIANTS, random_batch
from processes import start

from fused_prefopt import LogpBatch, PreferenceLoss
from fused_prefopt.integrations.metrics import StepMetrics, metric_weights
from fused_prefopt.losses import (
    ChosenNll,
    DynamicMargin,
    DynamicScale,
    MeanLogp,
    PairwiseLoss,
    SoftMinimum,
)
from fused_prefopt.losses.whole_batch import whole_batch

# Pairs per rank and step: unequal, and none on one of the ranks.
SPLITS = {
    2: [(3, 1), (2, 4), (0, 3), (5, 0), (1, 1)],
    3: [(3, 1, 0), (2, 1, 3), (0, 0, 3), (1, 3, 1), (1, 0, 1)],
}
MET = [
    (name, options)
    for name, options in VARIANTS
    if (loss := PreferenceLoss(name, **options).loss).coupled or loss.statistics() is not None
]
SMALL = {"queue_size": 16, "sample_size": 8}
# Sums of which one spans the batch by a term, and one keeps statistics alone.
MET += [
    ("0.8 dpo + 0.2 bco-pair + sft + 0.5 gamma-dpo + alpha-dpo", SMALL),
    ("gamma-simpo + 0.3 alpha-dpo + 0.1 dpo", SMALL),
]
# A margin more beside one that remembers nothing, and in a loss that spans the batch.
MET += [
    ("length-dpo", {"margin": {"name": "dynamic", "gamma": 0.5, **SMALL}}),
    ("sft + 0.5 tdpo1", {"margin": {"name": "adaptive", "alpha": 0.3}}),
]
# What pairs can remember of each other at once, and every way in which they can meet.
JOINT = PairwiseLoss(
    MeanLogp(beta=2.5),
    DynamicMargin(gamma=0.5, queue_size=16, sample_size=8),
    scale=DynamicScale(alpha=0.3),
)
SPANNING = dataclasses.replace(
    JOINT, regularisers=(ChosenNll(nll="token_mean"),), reduction=SoftMinimum()
)
SHARED = {"name": "dynamic", "gamma": 0.5, **SMALL}
OF_LISTS = [
    *((name, None) for name in ("cpo", "dr-dpo", "plackett-luce-dpo + 0.2 sft")),
    *((name, SHARED) for name in ("cpo", "0.5 lipo-lambda + dr-dpo + 0.1 listnet-dpo")),
    # These share what they know of the pairs.
    *((name, None) for name in ("gamma-simpo", "alpha-dpo", "beta-dpo")),
    ("plackett-luce-dpo", SHARED),
]
# Judged with weights of the pairs, after all the others.
WEIGHTED = ["dpo", "alpha-dpo", "dr-dpo", "cpo", SPANNING]


def loss_fns(states: list[dict] | None = None) -> list[PreferenceLoss]:
    """Fresh losses, or those that go on from what was saved."""
    found = [PreferenceLoss(name, **options) for name, options in MET]
    for loss in (JOINT, SPANNING, *WEIGHTED):
        if isinstance(loss, str):
            found.append(PreferenceLoss(loss))
            continue
        loss_fn = PreferenceLoss("simpo")
        loss_fn.loss, loss_fn.statistics = loss, loss.statistics()
        loss_fn.statistics.sees_all_ranks = loss.coupled
        found.append(loss_fn)
    for loss_fn, state in zip(found, states or [], strict=bool(states)):
        loss_fn.load_state_dict(state)
    return found


def batches(world: int) -> list[LogpBatch]:
    """One global batch of pairs for each split; the second holds a NaN pair."""
    found = []
    for step, split in enumerate(SPLITS[world]):
        batch = random_batch(2 * sum(split), 10 * world + step)
        policy = batch.policy.detach().clone()
        if step == 1:
            policy[4] = math.nan
        found.append(dataclasses.replace(batch, policy=policy, kl=None))
    return found


def part(batch: LogpBatch, pairs: slice) -> LogpBatch:
    def cut(values: torch.Tensor) -> torch.Tensor:
        chosen, rejected = values.chunk(2)
        return torch.cat([chosen[pairs], rejected[pairs]])

    return LogpBatch(**{name: cut(getattr(batch, name)) for name in batch.given})


def results(losses: list[PreferenceLoss], rank: int | None, world: int) -> list[dict]:
    """What each loss and step returns, pairs in the last dimension; of one rank, or of all."""
    found = []
    for number, loss_fn in enumerate(losses):
        for step, (batch, split) in enumerate(zip(batches(world), SPLITS[world], strict=True)):
            if number >= len(losses) - len(WEIGHTED):
                weights = torch.arange(batch.size // 2).double().remainder(3).repeat(2)
                batch = dataclasses.replace(batch, weights=weights)
            if rank is not None:
                start = sum(split[:rank])
                batch = part(batch, slice(start, start + split[rank]))
                if step == rank + 1:
                    # One rank alone evaluates: nothing is exchanged, and nothing remembered.
                    loss_fn.eval().from_logps(batch)
                    loss_fn.train()
            policy = batch.policy.requires_grad_()
            result = loss_fn.from_logps(batch)
            (gradient,) = torch.autograd.grad(result.loss, policy)
            pairs, spans = batch.size // 2, loss_fn.loss.coupled
            by_pair = {"losses": result.losses, "rewards": result.rewards}
            if result.target_margins is not None:
                by_pair["target_margins"] = result.target_margins
            if spans:
                by_pair["gradient"] = gradient / (1 if rank is None else world)
            else:
                # A mean over the pairs, or the completions, that are there.
                by_pair["gradient"] = gradient * pairs
            shaped = {
                name: values.detach().reshape(-1, pairs) if pairs else values.detach()
                for name, values in by_pair.items()
            }
            agreed = {}
            if batch.weights is not None:
                # What is logged, of all ranks, though some of them have no weight, or no pair.
                logged = StepMetrics()
                logged.add(result.metrics, metric_weights(result, None, batch.weights))
                agreed = {name: torch.tensor(value) for name, value in logged.pop().items()}
            elif spans:
                agreed = {"loss": result.loss.detach(), **result.metrics}
                del agreed["nonfinite"]
            summed = {"nonfinite": result.metrics["nonfinite"]}
            found.append({"by pair": shaped, "agreed": agreed, "summed": summed})
        if loss_fn.statistics is not None:
            counted = {"nonfinite": loss_fn.statistics.nonfinite.clone()}
            found.append({"by pair": {}, "agreed": counted, "summed": {}})
    return found


def of_lists(rank: int | None, world: int) -> dict[str, torch.Tensor]:
    """Losses of five lists: gradients where they span the batch, else the pairs' own."""
    batch, found = random_batch(12, seed=8), {}
    batch = dataclasses.replace(
        batch, groups=torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3] + [4] * 2), completions=None
    )
    whole, rows = batch.policy, slice(None)
    if rank is not None:
        # Two lists on the first rank, none on the third; each numbers its own.
        rows = [slice(0, 7), slice(7, 12), slice(12, 12)][rank]
        fields = {name: getattr(batch, name)[rows] for name in batch.given - {"kl"}}
        batch = LogpBatch(**fields | {"groups": 2**60 + fields["groups"] - 2 * rank})
    for name, margin in OF_LISTS:
        loss_fn = PreferenceLoss(name, margin=margin)
        result = loss_fn.from_logps(batch)
        key = f"{name} {margin}"
        if loss_fn.loss.coupled:
            (gradient,) = torch.autograd.grad(result.loss, whole)
            found[key] = gradient / (1 if rank is None else world)
        else:
            found[key] = result.losses.detach()
    return found


def _work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init{world}", rank=rank, world_size=world
    )
    losses = loss_fns()
    torch.save(results(losses, rank, world), f"{folder}/{world}-{rank}.pt")
    torch.save([each.state_dict() for each in losses], f"{folder}/states-{world}-{rank}.pt")
    torch.save(of_lists(rank, world), f"{folder}/lists-{world}-{rank}.pt")
    if world == 3:
        restored = loss_fns(torch.load(f"{folder}/states-2-0.pt"))
        torch.save(results(restored, rank, world), f"{folder}/restored-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two ranks, and then three, have computed and saved."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (2, 3):
        start(_work, world, world, str(folder))
    return folder


def assert_same(whole: list[dict], ranks: list[list[dict]]) -> None:
    for one, *parts in zip(whole, *ranks, strict=True):
        for name, value in one["agreed"].items():
            for each in parts:
                close(each["agreed"][name], value)
        for name, value in one["summed"].items():
            close(sum(each["summed"][name] for each in parts), value)
        for name, value in one["by pair"].items():
            close(torch.cat([each["by pair"][name] for each in parts if has(each, name)], 1), value)


def has(part: dict, name: str) -> bool:
    return part["by pair"][name].numel() > 0


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one(world, folder):
    whole = results(loss_fns(), None, world)
    assert_same(whole, [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)])
    # A NaN stays in its pair where nothing spans the batch.
    apart = [each["by pair"]["losses"] for each in whole if each["by pair"] and not each["agreed"]]
    assert len(apart) > 50 and all(losses.isnan().sum() <= 1 for losses in apart)
    counts = [int(each["summed"]["nonfinite"]) for each in whole if each["summed"]]
    assert {0, 1} <= set(counts)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_lists_on_several_processes_are_those_of_one(world, folder):
    parts = [torch.load(folder / f"lists-{world}-{rank}.pt") for rank in range(world)]
    for name, wanted in of_lists(None, world).items():
        assert wanted.any()
        own = [part[name] for part in parts]
        close(sum(own) if wanted.shape == (12,) else torch.cat(own), wanted)


@pytest.mark.slow
def test_what_two_processes_save_one_and_three_restore(folder):
    first, second = (torch.load(folder / f"states-2-{rank}.pt") for rank in range(2))
    alone = loss_fns()
    results(alone, None, 2)
    queues = 0
    for one, other, loss_fn in zip(first, second, alone, strict=True):
        for name, value in loss_fn.state_dict().items():
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)
            close(one[name], value)
            # A queue holds what one process would have remembered.
            if name == "statistics.margins" and value.numel():
                queues += 1
                assert value.isfinite().sum() == min(value.numel(), 19)
    assert queues >= 3
    restored = [torch.load(folder / f"restored-{rank}.pt") for rank in range(3)]
    assert_same(results(loss_fns(first), None, 3), restored)


# Of γ-PO's pool each rank knows which pairs are its own: see the tests above.
CUT = [
    (name, options)
    for name, options in [*VARIANTS, ("cpo", {"nll_weight": 0.0})]
    if not isinstance(getattr(PreferenceLoss(name, **options).loss, "margin", None), DynamicMargin)
]


@pytest.mark.parametrize(("name", "options"), CUT, ids=str)
def test_whether_a_loss_is_the_mean_of_its_parts(name, options):
    loss, batch = PreferenceLoss(name, **options).loss, random_batch(24, seed=5)
    # References of other sequences, so that sorting them is not sorting the policy.
    reference = batch.reference.roll(5)
    batch = dataclasses.replace(batch, groups=None, completions=None, reference=reference)
    statistics = loss.statistics()
    summary = None if statistics is None else statistics(loss.observe(batch))
    total = 0.0
    for rows in torch.arange(24).reshape(2, 2, 6).unbind(1):
        fields = {key: getattr(batch, key)[rows.flatten()] for key in batch.given - {"kl"}}
        total += loss(LogpBatch(**fields, kl=batch.kl), summary).loss.item()
    wanted = loss(batch, summary).loss.item()
    assert math.isclose(total / 2, wanted, rel_tol=1e-9) is not loss.coupled


def test_a_batch_of_all_ranks_keeps_every_gradient():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        logps, kls, golds = (torch.randn(4, requires_grad=True) for _ in range(3))
        ones = torch.ones(4, dtype=torch.int64)
        fields = {"sequence_kl": kls, "gold": golds, "gold_lengths": ones}
        batch, slopes = whole_batch(LogpBatch(logps, ones, **fields)).batch, torch.arange(4.0)
        ((batch.policy + 2 * batch.sequence_kl + 3 * batch.gold) * slopes).sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(batch.sequence_kl, kls) and torch.equal(batch.gold, golds)
    for factor, values in enumerate((logps, kls, golds), start=1):
        assert torch.equal(values.grad, factor * slopes)


def test_a_sum_of_means_over_unlike_things_has_no_share_of_a_rank():
    with pytest.raises(ValueError, match="^uneven_ranks: got True for dro .* needs terms of one"):
        PreferenceLoss("dro + kto", uneven_ranks=True)
    PreferenceLoss("dro + 0.5 dro", uneven_ranks=True)
