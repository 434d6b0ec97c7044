"""Metrics of training steps: kept where they are until they are logged, then means over ranks.

Those of single tokens, as TRL logs them (entropy, mean logits, accuracy), cost an evaluation of
the head a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.data.columns import DESIRABLE, GROUPS, REWARDS, SEQUENCE_IDS, WEIGHTS
from fused_prefopt.distributed import gather_objects
from fused_prefopt.losses.metrics import (
    LIST_PAIRS,
    LOGITS_CHOSEN,
    LOGITS_REJECTED,
    NONFINITE,
    REWARDS_CHOSEN,
    REWARDS_MARGINS,
    REWARDS_REJECTED,
    is_unweighted,
)
from fused_prefopt.models.batch import CollatedRows
from fused_prefopt.ops import token_statistics
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import LMHead, LossOutput, divisors

# Metrics, and what each of them is a mean over.
Weighed = tuple[dict[str, Tensor], dict[str, Tensor]]
# Name → (value, weight) of one step.
Step = Mapping[str, tuple[float, float]]


class StepMetrics:
    """Metrics of the steps since the last log, on their own device, so that no step waits for it.

    What is logged is TRL's: of every step the mean over the batch of all ranks, of `nonfinite` the
    number in it, then the mean over the steps that have a value.
    """

    def __init__(self) -> None:
        self._names: list[list[str]] = []
        self._values: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Keep a step's metrics.

        Args:
            metrics: 0-d tensors of this rank, means over its batch.
            weights: 0-d tensors, how many pairs, completions or tokens each is a mean over, or the
                sum of their weights; 0 where it has no value.
        """
        pairs = [torch.stack([metrics[name].double(), weights[name].double()]) for name in metrics]
        if not pairs:
            return
        keep = self._keep
        if torch.compiler.is_compiling():
            # Lists that grow: a compiled call would be compiled anew for each length. Disabled by
            # a decorator, importing this would import Triton.
            keep = torch.compiler.disable(keep)
        keep(list(metrics), torch.stack(pairs))

    def _keep(self, names: list[str], values: Tensor) -> None:
        self._names.append(names)
        self._values.append(values)

    def forget(self) -> None:
        """Drop what was kept."""
        self._names, self._values = [], []

    def pop(self, copies: int = 1) -> dict[str, float]:
        """Means over ranks and steps since the last call. Every rank must make the call.

        Args:
            copies: ranks that have each batch.
        """
        steps: list[Step] = []
        if self._values:
            numbers = iter(torch.cat(self._values).tolist())
            steps = [{name: tuple(next(numbers)) for name in names} for names in self._names]
        self.forget()
        # As objects: a rank without a batch has no names to agree on.
        ranks: list[list[Step]] = gather_objects(steps)
        longest = max(len(steps) for steps in ranks)
        merged = [
            _merged([steps[i] for steps in ranks if i < len(steps)], copies) for i in range(longest)
        ]
        names = dict.fromkeys(name for step in merged for name in step)
        return {name: _mean([step[name] for step in merged if name in step]) for name in names}


def _merged(ranks: list[Step], copies: int) -> dict[str, float]:
    """One step of all ranks: weighted means, standard deviations of the whole, exact margins."""
    means = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [rank[name] for rank in ranks if name in rank and rank[name][1] > 0]
        if parts:
            means[name] = _weighted(parts)
    if NONFINITE in means:
        # A number, where the others are means.
        means[NONFINITE] = sum(rank[NONFINITE][0] for rank in ranks if NONFINITE in rank) / copies
    for name in [name for name in means if name.endswith("/std") and len(ranks) > 1]:
        center = f"{name.removesuffix('/std')}/mean"
        squares = [
            (rank[name][0] ** 2 + rank[center][0] ** 2, rank[name][1])
            for rank in ranks
            if name in rank and rank[name][1] > 0
        ]
        # In this order a NaN stays one.
        means[name] = max(_weighted(squares) - means[center] ** 2, 0.0) ** 0.5
    halves = [means[name] for name in (REWARDS_CHOSEN, REWARDS_REJECTED) if name in means]
    if len(halves) == 2:
        means[REWARDS_MARGINS] = halves[0] - halves[1]
    else:
        means.pop(REWARDS_MARGINS, None)
    return means


def _weighted(parts: list[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in parts) / sum(weight for _, weight in parts)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Lists:
    """The lists of a batch that a loss on pairs takes so.

    Args:
        groups: (S,) integers, equal for the completions of one list.
        rewards: (S,) scores.
    """

    groups: Tensor
    rewards: Tensor

    @classmethod
    def of(cls, loss_fn: PreferenceLoss, extras: Mapping[str, Tensor | None]) -> Lists | None:
        """The lists of a batch with these fields of `LogpBatch`; None where it has others."""
        groups, rewards = extras[GROUPS], extras[REWARDS]
        if not loss_fn.loss.pairwise or groups is None or rewards is None:
            return None
        return cls(groups, rewards)

    @property
    def best(self) -> Tensor:
        """(S,) bool, whether no completion of the list has a higher score: the chosen ones."""
        higher = self.rewards[None] > self.rewards[:, None]
        return (self._together & higher).any(1).logical_not()

    def totals(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """0-d numbers of lists: all, and those with a pair, or the sum of their weights (S,)."""
        parts = 1 / self._together.sum(1).double()
        differ = (self._together & (self.rewards[None] != self.rewards[:, None])).any(1)
        own = parts.where(differ, 0.0)
        return parts.sum(), (own if weights is None else own * weights).sum()

    @property
    def _together(self) -> Tensor:
        return self.groups[:, None] == self.groups


def metric_weights(
    output: LossOutput,
    desirable: Tensor | None,
    given: Tensor | None,
    lists: Lists | None = None,
) -> dict[str, Tensor]:
    """How many pairs, completions or lists a metric is a mean over, or the sum of their weights.

    Args:
        output: of the loss.
        desirable: (S,) bool for single completions; None for pairs.
        given: (S,) weights of the batch, or None.
        lists: those of which the pairs are, each of which counts alike, or None.
    """
    size = output.losses.shape[-1]
    every = output.losses.new_full((), size, dtype=torch.int64)
    if lists is not None:
        every, total = lists.totals(given)
        of_all = {name for name in output.metrics if is_unweighted(name) or name == LIST_PAIRS}
        return {name: every if name in of_all else total for name in output.metrics}
    # A pair's weight stands in both halves.
    own = output.losses.new_ones(size, dtype=torch.int64) if given is None else given[:size]
    weights = dict.fromkeys(output.metrics, own.sum())
    if desirable is not None:
        members = {
            "chosen": own.where(desirable, 0).sum(),
            "rejected": own.where(desirable.logical_not(), 0).sum(),
        }
        for name in weights:
            side = name.rpartition("/")[2]
            weights[name] = members.get(side, weights[name])
    return weights | {name: every for name in weights if is_unweighted(name)}


@torch.no_grad()
def token_metrics(
    loss_fn: PreferenceLoss,
    rows: CollatedRows,
    hidden: Tensor,
    head: LMHead,
    extras: Mapping[str, Tensor | None],
) -> Weighed:
    """Means over the completions' tokens, by TRL's names.

    Args:
        loss_fn: whose options the pass takes.
        rows: the batch.
        hidden: its last hidden states.
        head: the head.
        extras: the batch's fields of `LogpBatch`. Its weights count, and those of the tokens. Of
            pairs the first half is chosen, of lists the best, of single completions the desirable.

    Returns:
        Metrics and the numbers of tokens, or sums of their weights, they are means over: `entropy`
        in nats, `logits/chosen`, `logits/rejected` (means over the vocabulary), and for pairs
        `mean_token_accuracy`, the share of the chosen completions' tokens that are the most likely
        ones.
    """
    options = loss_fn.evaluation_options
    tokens = token_statistics(hidden, head, rows.labels, **rows.layout, **options)
    lists, weights = Lists.of(loss_fn, extras), extras[WEIGHTS]
    desirable = None if loss_fn.loss.pairwise else extras[DESIRABLE]
    if lists is not None:
        desirable = lists.best
    counted = _counted(rows)
    chosen = _of_tokens(rows, desirable)
    means = {
        "entropy": (tokens.entropies, counted),
        LOGITS_CHOSEN: (tokens.mean_logits, counted & chosen),
        LOGITS_REJECTED: (tokens.mean_logits, counted & ~chosen),
    }
    if loss_fn.loss.pairwise:
        means["mean_token_accuracy"] = (tokens.correct.double(), counted & chosen)
    worth, metrics, totals = _worth(rows, weights), {}, {}
    for name, (values, members) in means.items():
        values = values.double().where(members, 0.0)
        if worth is None:
            totals[name] = members.sum()
        else:
            values, totals[name] = worth * values, worth.where(members, 0.0).sum()
        metrics[name] = values.sum() / divisors(totals[name])
    return metrics, totals


def _counted(rows: CollatedRows) -> Tensor:
    """Which labels are predicted: with `shift` nothing predicts a sequence's first token."""
    counted = rows.labels != -100
    if rows.layout["shift"]:
        ids = rows.layout.get(SEQUENCE_IDS)
        first = torch.zeros_like(counted)
        first[..., :1].fill_(True)
        if ids is not None:
            first[1:] = ids[1:] != ids[:-1]
        counted = counted & ~first
    return counted


def _of_tokens(rows: CollatedRows, desirable: Tensor | None) -> Tensor:
    """Whether each label's sequence is a chosen one."""
    if desirable is None:
        ids = rows.layout.get(SEQUENCE_IDS)
        sequences = rows.layout["num_sequences"] if ids is not None else rows.labels.shape[0]
        desirable = torch.arange(sequences, device=rows.labels.device) < sequences // 2
    return _by_token(rows, desirable)


def _worth(rows: CollatedRows, weights: Tensor | None) -> Tensor | None:
    """float64 weight of each label, its own times its sequence's; None where all count alike."""
    worth = None if weights is None else _by_token(rows, weights.double())
    if rows.token_weights is None:
        return worth
    own = rows.token_weights.double()
    return own if worth is None else own * worth


def _by_token(rows: CollatedRows, values: Tensor) -> Tensor:
    """(S,) values of the sequences at each of their labels."""
    ids = rows.layout.get(SEQUENCE_IDS)
    return values[:, None].expand(rows.labels.shape) if ids is None else values[ids]
