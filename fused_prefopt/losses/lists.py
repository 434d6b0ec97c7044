"""Lists: K >= 2 rated completions of a prompt, as pairs, and losses of whole rankings of them.

A list enters a loss as all ordered pairs of its completions whose scores differ, the better one
first, so that every loss on pairs, with its margins and statistics, takes lists. A completion meets
the model once, in however many pairs it stands. Completions of equal score are not compared.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import is_on_host, require, require_number
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.losses.groups import places, sums
from fused_prefopt.losses.protocol import JudgedPairs, check_needs, halves, needed
from fused_prefopt.types import LogpBatch

# Not one number a completion, or made here.
_NOT_GATHERED = ("kl", "completions", "weights")


@dataclass(frozen=True)
class ListPairs:
    """Lists as pairs.

    Attributes:
        batch: 2C sequences, the better ones first, with `completions` and `weights`.
        mean: 0-d, pairs of a list.
    """

    batch: LogpBatch
    mean: Tensor


def pairs_of_lists(
    batch: LogpBatch, group: dist.ProcessGroup | None = None, *, all_ranks: bool = False
) -> ListPairs:
    """All C pairs of completions of one list, of which one has the higher score.

    Each list counts alike: the mean over the pairs, with their weights, is the mean over the lists
    of the mean over their pairs. A list without two different scores counts 0. On CUDA it waits for
    the number of pairs. It compares all S completions with each other: S² bytes, three times.

    Args:
        batch: S completions with `groups`, in any order, and `rewards`; its weights, where there
            are some, are those of lists, the same for all completions of one.
        group: the ranks that take part; None means all of them.
        all_ranks: the means are over the lists and the pairs of all ranks, which must all call.

    Raises:
        ValueError: there are no `rewards`, or one is NaN (a device-side assert on CUDA).
    """
    require_lists(batch.given)
    groups, scores = needed(batch, "groups"), needed(batch, "rewards")
    _require_scores(scores)
    together = groups[:, None] == groups
    better, worse = (together & (scores[:, None] > scores)).nonzero().unbind(1)
    members = torch.cat([better, worse])
    gathered = {
        item.name: getattr(batch, item.name)[members]
        for item in fields(batch)
        if item.name in batch.given and item.name not in _NOT_GATHERED
    }
    weights = batch.policy.new_ones(()) if batch.weights is None else batch.weights[members]
    numbers = places(groups)
    lists = numbers.max() + 1 if batch.size else numbers.new_zeros(())
    totals = torch.stack([lists.new_full((), better.shape[0]), lists]).to(torch.float64)
    pairs, lists = (sum_over_ranks(totals, group) if all_ranks else totals).unbind()
    mean = pairs / lists.clamp(min=1)
    own = numbers[members]
    counts = torch.zeros_like(numbers).scatter_add(0, own, torch.ones_like(own)) // 2
    weights = weights * (mean / counts[own]).to(batch.policy.dtype)
    found = LogpBatch(**gathered, kl=batch.kl, completions=members, weights=weights)
    return ListPairs(found, mean.to(batch.policy.dtype))


def require_lists(given: Collection[str]) -> None:
    """Raise ValueError unless the `LogpBatch` fields that make lists are all `given`."""
    check_needs("a batch of lists (with `groups`)", ("groups", "rewards"), given)


def _require_scores(scores: Tensor) -> None:
    """Raise ValueError if a score is NaN: nothing compares with it, and its row would be lost."""
    unknown = scores.isnan()

    def message() -> str:
        wanted = "rewards: wanted a score of every completion of a list, which may be infinite"
        if not is_on_host(unknown):
            return f"{wanted}, got NaN"
        return f"{wanted}, got NaN in row {int(unknown.nonzero()[0])}"

    require(unknown.any().logical_not(), message)


def _logsumexp(values: Tensor, place: Tensor, there: Tensor | None = None) -> Tensor:
    """(n,) log-sums of the exponentials of the (n,) values of each place, or of those `there`.

    -inf where a place has none.
    """
    if there is not None:
        values = values.masked_fill(there.logical_not(), -torch.inf)
    largest = torch.full_like(values, -torch.inf)
    largest = largest.scatter_reduce(0, place, values.detach(), "amax")
    # Infinite ones have no difference from the others.
    largest = largest.masked_fill(largest.isinf(), 0)
    total = sums((values - largest[place]).exp(), place)
    none = total == 0
    return (largest + total.where(none.logical_not(), 1.0).log()).masked_fill(none, -torch.inf)


@dataclass(frozen=True)
class _Members:
    """The completions of the lists that a batch's pairs are of, each once.

    Attributes:
        place: (2C,) where the completion of a sequence stands among all, in the order of the batch
            of lists.
        there: (2C,) bool, whether a place is taken.
        sequence: (2C,) a sequence that is the completion of the place.
        group: (2C,) the list of a place, as a number below 2C.
        pairs: (2C,) how many pairs a list has.
    """

    place: Tensor
    there: Tensor
    sequence: Tensor
    group: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, batch: LogpBatch) -> _Members:
        place, group = places(needed(batch, "completions")), places(needed(batch, "groups"))
        numbers = torch.arange(batch.size, device=place.device)
        first = torch.full_like(place, batch.size).scatter_reduce(0, place, numbers, "amin")
        there = first < batch.size
        sequence = first.where(there, 0)
        pairs = sums(torch.ones_like(group), group) // 2
        return cls(place, there, sequence, group[sequence], pairs)

    def of_pairs(self, of_lists: Tensor) -> Tensor:
        """(C,) what stands in (2C,) for the list of each pair."""
        return of_lists[self.group[halves(self.place)[0]]]


@dataclass(frozen=True, kw_only=True)
class PlackettLuce:
    """The likelihood of a ranking: each completion is chosen from those that it beats and itself.

    ``Σ_i −log [e^r_i / (e^r_i + Σ_j e^(r_j + γ_ij))]``, j the completions of lower score, which is
    the link of the soft minimum over j of ``r_i − r_j − γ_ij`` and of target 0. Of a list of two it
    is that of their pair, exactly. With the `Logistic` link it is this likelihood.

    Source: DPO (Rafailov et al. 2023, arXiv:2305.18290), appendix A.3, eq. 20, for all γ_ij = 0; of
    a best one among others of one score S-DPO (Chen et al. 2024, arXiv:2406.09215).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    takes_margins: ClassVar[bool] = True
    takes_sides: ClassVar[bool] = True

    def __call__(self, pairs: JudgedPairs) -> Tensor:
        """(C,) the loss of each pair's list."""
        excess = pairs.reward_margins - pairs.target_margins
        if pairs.batch.completions is None:
            return pairs.link(excess, torch.zeros_like(excess))
        members = _Members.of(pairs.batch)
        winners = halves(members.place)[0]
        shortfalls = torch.cat([-excess, -excess])
        own = torch.arange(pairs.batch.size, device=winners.device) < winners.shape[0]
        least = -_logsumexp(shortfalls, torch.cat([winners, winners]), own)
        wins = sums(own.long(), members.place) > 0
        losses = pairs.link(least.where(wins, 0.0), torch.zeros_like(least)).where(wins, 0.0)
        return members.of_pairs(sums(losses, members.group))


@dataclass(frozen=True, kw_only=True)
class TopOne:
    """Cross-entropy of being the best of a list: ``−Σ_i p_i log q_i``, ``q_i = e^r_i / Σ_j e^r_j``.

    ``p_i = e^(s_i/T) / Σ_j e^(s_j/T)``, over all completions of a list, s their scores.

    Args:
        temperature: T > 0, in units of score: the smaller, the more is the best one's alone.

    Raises:
        ValueError: `temperature` is out of range.

    Source: ListNet (Cao et al. 2007), the top-one model of its cross-entropy; λ-DPO (Sun et al.
    2025, arXiv:2506.19780), its loss of one objective, for given p.
    """

    temperature: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})
    takes_margins: ClassVar[bool] = False
    takes_sides: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, low=0, above=True)

    def __call__(self, pairs: JudgedPairs) -> Tensor:
        """(C,) the loss of each pair's list."""
        members = _Members.of(_as_lists(pairs.batch))
        scores = needed(pairs.batch, "rewards").to(pairs.rewards.dtype) / self.temperature
        logps = []
        for values in (scores, pairs.rewards):
            own = values[members.sequence]
            total = _logsumexp(own, members.group, members.there)
            logps.append(own - total[members.group])
        losses = (-logps[0].exp() * logps[1]).where(members.there, 0.0)
        return members.of_pairs(sums(losses, members.group))


@dataclass(frozen=True, kw_only=True)
class DiscountedGain:
    """LiPO-λ: pairs weigh what exchanging the two would change of the list's discounted gain.

    ``Σ_ij Δ_ij link(r_i − r_j − γ_ij)``, ``Δ_ij = sg |G_i − G_j| |1/D_i − 1/D_j|``,
    ``G = 2^s − 1``, ``D = log(1 + τ)``, s the scores and τ the rank by the rewards r, from 1;
    completions of equal reward stand in the order of the batch.

    Source: LiPO (Liu et al. 2024, arXiv:2402.01878), its λ loss and λ weight.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})
    takes_margins: ClassVar[bool] = True
    takes_sides: ClassVar[bool] = False

    def __call__(self, pairs: JudgedPairs) -> Tensor:
        """(C,) each pair's part of the loss of its list, times the list's pairs."""
        members = _Members.of(_as_lists(pairs.batch))
        discounts = 1 / _ranks(members, pairs.rewards.detach()).log1p()
        gains = needed(pairs.batch, "rewards").to(pairs.rewards.dtype).exp2() - 1
        chosen, rejected = halves(discounts[members.place])
        better, worse = halves(gains)
        weights = (better - worse).abs() * (chosen - rejected).abs()
        losses = pairs.link(pairs.reward_margins, pairs.target_margins)
        return members.of_pairs(members.pairs) * weights * losses


def _ranks(members: _Members, rewards: Tensor) -> Tensor:
    """(2C,) place of each completion in its list by the rewards (2C,), from 1, in their dtype."""
    own = rewards[members.sequence].masked_fill(members.there.logical_not(), -torch.inf)
    order = own.argsort(descending=True, stable=True)
    order = order[members.group[order].argsort(stable=True)]
    groups = members.group[order]
    numbers = torch.arange(own.shape[0], device=own.device)
    starts = torch.full_like(numbers, own.shape[0]).scatter_reduce(0, groups, numbers, "amin")
    return torch.empty_like(own).scatter(0, order, (numbers - starts[groups] + 1).to(own.dtype))


def _as_lists(batch: LogpBatch) -> LogpBatch:
    """A batch of pairs as lists of two, where it is not one of lists already."""
    if batch.completions is not None:
        return batch
    numbers = torch.arange(batch.size, device=batch.policy.device)
    return replace(batch, completions=numbers, groups=numbers % max(1, batch.size // 2))
