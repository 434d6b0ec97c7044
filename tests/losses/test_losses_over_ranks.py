"""Losses that span the batch: several ranks with unequal batches against one with all pairs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import random_batch

from fused_prefopt import LogpBatch, PreferenceLoss, available_losses
from fused_prefopt.losses import (
    ChosenNll,
    DynamicMargin,
    DynamicScale,
    MeanLogp,
    PairwiseLoss,
    SoftMinimum,
    register,
)
from fused_prefopt.losses.registry import _NAMES, _SPECS

# Pairs per rank and step: unequal, and none on one of the ranks.
SPLITS = {2: [(3, 1), (0, 4), (2, 2)], 3: [(3, 1, 0), (1, 2, 4), (0, 0, 2)]}
LOSSES = [
    ("cpo", {}),
    ("sft", {}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot-unpaired", {}),
    ("dr-dpo", {"temperature": 0.5}),
    ("test-joint", {}),
]
SPANNING = {name for name, info in available_losses().items() if info.coupled}
# Those with nothing of their own above, with their defaults.
LOSSES += [(name, {}) for name in sorted(SPANNING - {name for name, _ in LOSSES})]
FURTHER = ("rewards", "prompt", "prompt_reference", "sequence_kl", "collision")
T, D, V = 6, 5, 17


@register("test-joint", paper="every way in which pairs can meet, at once")
def joint(*, beta: float = 2.5) -> PairwiseLoss:
    return PairwiseLoss(
        MeanLogp(beta=beta),
        DynamicMargin(gamma=0.5, queue_size=16, sample_size=8),
        regularisers=(ChosenNll(nll="token_mean"),),
        scale=DynamicScale(alpha=0.3),
        reduction=SoftMinimum(),
    )


# Registered for the names above alone: the tests of every loss must not meet it.
JOINT = _SPECS.pop("test-joint")
_NAMES.pop("test-joint")


def loss_of(name: str, options: dict) -> PreferenceLoss:
    _SPECS["test-joint"], _NAMES["test-joint"] = JOINT, "test-joint"
    try:
        return PreferenceLoss(name, **options)
    finally:
        del _SPECS["test-joint"], _NAMES["test-joint"]


def batches(world: int) -> list[dict[str, torch.Tensor]]:
    """Hidden states, labels and reference sums of all pairs of each step, pairs first."""
    generator = torch.Generator().manual_seed(world)
    found = []
    for split in SPLITS[world]:
        pairs = sum(split)
        labels = torch.randint(0, V, (pairs, 2, T), generator=generator)
        ends = torch.randint(2, T + 1, (pairs, 2, 1), generator=generator)
        spread = torch.linspace(-1, 2, 2 * pairs, dtype=torch.float64).reshape(pairs, 2)
        found.append(
            {
                "hidden": torch.randn(pairs, 2, T, D, generator=generator, dtype=torch.float64),
                "labels": labels.masked_fill(torch.arange(T) >= ends, -100),
                "reference": -9 * torch.rand(pairs, 2, generator=generator, dtype=torch.float64),
                **{name: (spread * (2 + i)).sin() for i, name in enumerate(FURTHER)},
            }
        )
    return found


def results_of(rank: int | None, world: int) -> list[dict[str, torch.Tensor]]:
    """Loss, losses, metrics and gradients of every loss and step; of one rank, or of all pairs."""
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = []
    for name, options in LOSSES:
        loss_fn = loss_of(name, options)
        for step, (whole, split) in enumerate(zip(batches(world), SPLITS[world], strict=True)):
            start = 0 if rank is None else sum(split[:rank])
            here = slice(start, None if rank is None else start + split[rank])
            # Chosen first: (P, 2, …) → (2P, …).
            own = {key: value[here].transpose(0, 1).flatten(0, 1) for key, value in whole.items()}
            hidden, head = own["hidden"].requires_grad_(), weight.clone().requires_grad_()
            call = (hidden, head, own["labels"])
            extras = {name: own[name] for name in ("reference", *FURTHER)}
            if rank is not None and step == rank:
                # One rank alone evaluates: nothing is exchanged, and nothing remembered.
                loss_fn.eval()(*call, **extras)
                loss_fn.train()
            result = loss_fn(*call, **extras)
            result.loss.backward()
            by_pair = {
                "losses": result.losses.detach(),
                "target_margins": result.target_margins,
                "rewards": result.rewards.reshape(2, -1).t(),
                "hidden": hidden.grad.reshape(2, -1, T, D).transpose(0, 1),
            }
            metrics = torch.stack(list(result.metrics.values()))
            found.append(
                {"loss": result.loss.detach(), "head": head.grad, "metrics": metrics, **by_pair}
            )
    return found


def _work(rank: int, world: int, folder: str) -> None:
    file = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world)
    torch.save(results_of(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_mean_over_ranks_is_the_loss_of_all_pairs(world, tmp_path):
    mp.spawn(_work, args=(world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for whole, *parts in zip(results_of(None, world), *ranks, strict=True):
        for part in parts:
            close(part["loss"], whole["loss"])
            close(part["metrics"], whole["metrics"])
        close(sum(part["head"] for part in parts) / world, whole["head"])
        close(torch.cat([part["hidden"] for part in parts]) / world, whole["hidden"])
        for name in ("losses", "rewards", "target_margins"):
            close(torch.cat([part[name] for part in parts]), whole[name])


def test_which_losses_span_the_batch():
    assert {name for name, _ in LOSSES} - {"test-joint"} == SPANNING
    for name, nll in (("cpo", "sum"), ("cpo", "sequence_mean"), ("sft", "sum")):
        assert not PreferenceLoss(name, nll=nll).loss.coupled
    assert not PreferenceLoss("cpo", nll_weight=0.0).loss.coupled


# Of γ-PO's pool each rank knows which pairs are its own: see the test above.
CUT = [
    name
    for name in available_losses()
    if not isinstance(getattr(PreferenceLoss(name).loss, "margin", None), DynamicMargin)
]


@pytest.mark.parametrize("name", CUT)
def test_whether_a_loss_is_the_mean_of_its_parts(name):
    loss, batch = PreferenceLoss(name).loss, random_batch(24, seed=5)
    # References of other sequences, so that sorting them is not sorting the policy.
    batch = dataclasses.replace(batch, groups=None, reference=batch.reference.roll(5))
    statistics = loss.statistics()
    summary = None if statistics is None else statistics(loss.observe(batch))
    total = 0.0
    for rows in torch.arange(24).reshape(2, 2, 6).unbind(1):
        fields = {key: getattr(batch, key)[rows.flatten()] for key in batch.given - {"kl"}}
        total += loss(LogpBatch(**fields, kl=batch.kl), summary).loss.item()
    wanted = loss(batch, summary).loss.item()
    assert math.isclose(total / 2, wanted, rel_tol=1e-9) is not loss.coupled
