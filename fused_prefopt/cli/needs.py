"""What a loss needs: the columns that give it, or what a training computes and at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fused_prefopt.cli.console import UserError
from fused_prefopt.data.columns import (
    COLLISION,
    COMPLETIONS,
    COMPLETIONS_IDS,
    GROUPS,
    PAIR_FIELDS,
    POINT_FIELDS,
    PROMPT,
    PROMPT_LENGTHS,
    PROMPT_REFERENCE,
    REFERENCE,
    REWARDS,
    SEQUENCE_KL,
    WEIGHT,
    WEIGHTS,
    is_given,
)
from fused_prefopt.losses import TransportLoss, WeightedSum
from fused_prefopt.losses.protocol import OF_BOTH_HEADS, WHAT_IT_IS, Loss
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import BESIDE_KL_COST_IN_P, COST_IN_P, KL_COST_IN_P

Rows = Sequence[dict[str, object]]
# Fields of `LogpBatch` that a training computes itself, of the policy and of the reference model.
OF_POLICY = frozenset({PROMPT, PROMPT_LENGTHS, COLLISION})
OF_REFERENCE = OF_BOTH_HEADS | {REFERENCE, PROMPT_REFERENCE}
_EVALUATION = COST_IN_P["evaluate"]


@dataclass(frozen=True)
class Cost:
    """Matmuls of a training step with the heads, in P, beside the passes of the backbones.

    Attributes:
        trained: at least and at most, where the policy's head trains.
        frozen: where it does not.
        reference: of a reference that is kept beside the policy, in each step; one whose log-probs
            are computed before training costs it once.
        prompts: what `trained` is, of the prompts' tokens: there P is a matmul of their rows.
        frozen_prompts: what `frozen` is, of the same.
        reference_prompts: what `reference` is, of the same.
        both_models: the reference is part of `trained` and `frozen`, and stays beside the policy.
    """

    trained: tuple[float, float]
    frozen: float
    reference: float = 0.0
    prompts: tuple[float, float] = (0.0, 0.0)
    frozen_prompts: float = 0.0
    reference_prompts: float = 0.0
    both_models: bool = False

    @property
    def most(self) -> float:
        """P of all parts together, where the head trains and every token is one of a kind."""
        return self.trained[1] + self.reference + self.prompts[1] + self.reference_prompts


def cost_of(loss: Loss) -> Cost:
    """Cost of a loss's step as `PreferenceLoss` computes it, with the op's own path."""
    needs = loss.needs
    trained, frozen = (COST_IN_P["local"], COST_IN_P["recompute"]), COST_IN_P["stash"]
    prompts, frozen_prompts = (0.0, 0.0), 0.0
    if PROMPT in needs:
        prompts, frozen_prompts = (_EVALUATION, _EVALUATION), _EVALUATION
        if PROMPT_LENGTHS in needs:
            # With a gradient; what is kept of them gives way to the completions' (`kept_buffer`).
            prompts, frozen_prompts = (trained[1], trained[1]), frozen
    both = bool(needs & OF_BOTH_HEADS)
    if both:
        # A frozen head spares the product that is its gradient.
        whole = KL_COST_IN_P if SEQUENCE_KL in needs else BESIDE_KL_COST_IN_P
        trained, frozen = (whole, whole), whole - _EVALUATION
    more = _EVALUATION if COLLISION in loss.wants else 0.0
    return Cost(
        trained=(trained[0] + more, trained[1] + more),
        frozen=frozen + more,
        reference=_EVALUATION if REFERENCE in needs and not both else 0.0,
        prompts=prompts,
        frozen_prompts=frozen_prompts,
        reference_prompts=_EVALUATION if PROMPT_REFERENCE in needs else 0.0,
        both_models=both,
    )


def columns_of(loss: Loss, rows: Rows, field: str) -> tuple[str, ...] | None:
    """The columns of rows that give a loss a field, none of a list's own number; or None.

    Args:
        loss: any.
        rows: records or features, of the kind that the loss judges.
        field: of `LogpBatch`.
    """
    columns: Mapping[str, Sequence[str]] = PAIR_FIELDS if loss.pairwise else POINT_FIELDS
    if _are_lists(rows):
        columns = {REWARDS: (REWARDS,), GROUPS: (), WEIGHTS: (WEIGHT,)}
    found = columns.get(field)
    return None if found is None else tuple(found)


@dataclass(frozen=True)
class Lack:
    """What a loss needs and rows do not have.

    Attributes:
        field: of `LogpBatch`.
        columns: that would give it, or None where no column does.
        rows: how many lack one of them.
    """

    field: str
    columns: tuple[str, ...] | None
    rows: int


def first_lack(loss: Loss, rows: Rows) -> Lack | None:
    """The first field that a loss needs, and neither the rows give nor a training computes.

    Args:
        loss: any.
        rows: records or features, of the kind that the loss judges.
    """
    for field in sorted(loss.needs - OF_POLICY - OF_REFERENCE):
        columns = columns_of(loss, rows, field)
        lacking = sum(any(name not in row for name in columns or ()) for row in rows)
        if lacking or columns is None:
            return Lack(field, columns, lacking)
    return None


def refused_weights(loss: Loss, rows: Rows) -> str | None:
    """What gives pairs weights that a loss refuses which sorts them, or None."""
    terms = [term.loss for term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    if not any(isinstance(term, TransportLoss) for term in terms):
        return None
    if is_given(rows, WEIGHT):
        return f"a column {WEIGHT!r}"
    return "lists" if _are_lists(rows) else None


def weigh_nothing(rows: Rows) -> bool:
    """Whether the rows' weights leave nothing to train on."""
    return is_given(rows, WEIGHT) and not any(row[WEIGHT] for row in rows)


def check_fields(loss_fn: PreferenceLoss, rows: Rows) -> None:
    """Raise unless every row has what the loss needs.

    Args:
        loss_fn: the loss.
        rows: features of the kind that it judges.

    Raises:
        ValueError: there is no row.
        UserError: a field or column is missing, or the weights do not fit; the message begins with
            the key to change.
    """
    if not rows:
        raise ValueError(f"got no usable row, needs some that {loss_fn.name} can judge")
    refused = refused_weights(loss_fn.loss, rows)
    if refused is not None:
        raise UserError(
            f"loss: got {loss_fn.name}, which sorts the pairs, with {refused}, needs pairs without"
            " weights, or another loss"
        )
    if weigh_nothing(rows):
        raise UserError(f"dataset: got a {WEIGHT!r} of 0 in every row, needs one above")
    lack = first_lack(loss_fn.loss, rows)
    if lack is None:
        return
    if lack.columns is None:
        raise UserError(
            f"loss: {loss_fn.name} needs `{lack.field}`, {WHAT_IT_IS[lack.field]}, which this"
            " command does not compute"
        )
    raise UserError(
        f"dataset: got no {' and '.join(lack.columns)}, needs it for {loss_fn.name}; {lack.rows} of"
        f" {len(rows)} rows are without: add it to them, drop them, or name another loss"
    )


def _are_lists(rows: Rows) -> bool:
    return bool(rows) and not rows[0].keys().isdisjoint((COMPLETIONS, COMPLETIONS_IDS))
