"""Rows of TRL's data sets: checked, cut, weighed, and dropped where they are dead.

A row is dead where nothing can be learnt of it: no label is left, or its two sides are equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETION,
    COMPLETION_IDS,
    COMPLETION_MASK,
    LABEL,
    MISMATCHED,
    PAIR,
    PAIR_IDS,
    PROMPT_IDS,
    TOKEN_WEIGHTS,
    TOKENS,
    WEIGHT,
    finite_number,
    judgement,
    row_at,
    weight,
)
from fused_prefopt.data.token_weights import refuse_token_weights, spread, token_weights
from fused_prefopt.data.tokenise import RowCounts, Side
from fused_prefopt.data.truncation import cut_side

# Token ids of a row's sides, of pairs and of single completions.
_SIDES = {True: PAIR_IDS, False: (COMPLETION_IDS,)}
logger = logging.getLogger(__name__)


def require_values(name: str, data: Any, columns: Iterable[str]) -> None:
    """Raise ValueError, with the row's number, if a row has what no loss can take.

    A stream is left to the collators.

    Args:
        name: of the data set, as TRL calls it: "train", "eval" or a key of several.
        data: a `datasets.Dataset`.
        columns: those to look at, where they are there: scores and log-probs, which are finite
            numbers or None, `LABEL`, which is a bool, 0 or 1, and `WEIGHT`, which is a number >= 0.
    """
    if not isinstance(data, Dataset):
        return
    for column in columns:
        if column not in data.column_names:
            continue
        # A slice of the column, not its rows one by one.
        for row, value in enumerate(data[column][:]):
            where = f"{row_at(row)} of {_argument(name)}"
            if column == LABEL:
                judgement(column, value, where)
            elif column == WEIGHT:
                weight(column, value, where)
            elif value is not None:
                finite_number(column, value, where)


def require_sides(name: str, row: Mapping[str, Any], pairwise: bool) -> None:
    """Raise ValueError if a row of token ids, not of texts, is of the other trainer's kind.

    Args:
        name: of the data set, as TRL calls it.
        row: its first one.
        pairwise: whether the trainer is one on pairs.
    """
    wanted = (PROMPT_IDS, *_SIDES[pairwise])
    found = [each for each in TOKENS if each in row]
    has_texts = CHOSEN in row or COMPLETION in row
    if found and not has_texts and not all(each in row for each in wanted):
        other = "KTO" if pairwise else "DPO"
        raise ValueError(
            f"{_argument(name)}: got token ids in {', '.join(found)}, wanted {', '.join(wanted)};"
            f" rows of the other kind are for Fused{other}Trainer"
        )


def _argument(name: str) -> str:
    return f"{name}_dataset" if name in ("train", "eval") else f"eval_dataset[{name!r}]"


class KeepsTeachingRows:
    """Mixin for a trainer of TRL's: no row without a label, or with two equal sides, is trained on.

    TRL's collators cut rows to `max_length` without a word. Here every data set's rows are cut the
    same way when it is prepared, counted in one log message, and dropped where nothing can be
    learnt of them; of a streamed data set they are dropped on the way, and the first is told. Rows
    of token ids, which TRL would make of texts, are taken as they are.
    """

    config_type: ClassVar[Any]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        pairwise = self.config_type.pairwise
        first = next(iter(dataset))
        has_ids = all(name in first for name in (PROMPT_IDS, *_SIDES[pairwise]))
        if has_ids:
            prepared = self._with_mismatched(dataset, args)
        else:
            refuse_token_weights(first, f"{row_at(0)} of the {dataset_name} data")
            prepared = super()._prepare_dataset(  # type: ignore[misc]
                dataset, processing_class, args, dataset_name
            )
        cut = Cut.of(args, pairwise)
        if not hasattr(prepared, "__len__"):
            return prepared.filter(StreamedRows(cut, dataset_name))
        # TRL makes two rows of a pair for a trainer on single completions.
        unpaired = not pairwise and not has_ids and all(name in first for name in PAIR)
        halves = 2 if unpaired else 1
        counts = RowCounts(f"{dataset_name} data", args.max_length, pairwise=pairwise)
        columns = prepared.select_columns([PROMPT_IDS, *_SIDES[pairwise]])
        kept = [index for index, row in enumerate(columns) if counts.keeps(*cut(row))]
        # TRL itself drops rows whose prompt fills `max_length`.
        counts.add_empty(halves * len(dataset) - len(prepared))
        counts.require_some(f"{dataset_name} data")
        if args.should_log:
            counts.log()
        if len(kept) == len(prepared):
            return prepared
        return self._with_mismatched(prepared.select(kept), args)

    def _with_mismatched(self, rows: Any, args: Any) -> Any:
        """Rows whose completions also stand behind another prompt, where the loss wants that."""
        if not getattr(self, "calculate_KL", False):
            return rows
        return rows.map(_mismatched, batched=True, batch_size=args.per_device_train_batch_size)


@dataclass(frozen=True)
class Cut:
    """A row's sides whole, and as TRL's collators cut them."""

    max_length: int | None
    mode: str
    pairwise: bool

    @classmethod
    def of(cls, args: Any, pairwise: bool) -> Cut:
        """The cut that the configuration of a trainer asks for."""
        # Single completions TRL cuts at the end, whatever the options say.
        mode = args.truncation_mode if pairwise else "keep_start"
        return cls(args.max_length, mode, pairwise)

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[Side], list[Side]]:
        whole = [(row[PROMPT_IDS], row[name]) for name in _SIDES[self.pairwise]]
        return whole, [cut_side(*side, self.max_length, self.mode) for side in whole]


@dataclass
class WeightedTokens:
    """A collator of rows of token ids that also lays out the weights of the tokens, where given.

    Args:
        collator: of TRL, or of this package, which may have laid them out already.
        cut: the collator's.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    cut: Cut

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        sides = {"": _SIDES[self.cut.pairwise]}
        if not self.cut.pairwise:
            sides[MISMATCHED] = (f"{MISMATCHED}{COMPLETION_IDS}",)
        for prefix, columns in sides.items():
            name, mask = f"{prefix}{TOKEN_WEIGHTS}", batch.get(f"{prefix}{COMPLETION_MASK}")
            if mask is None or name in batch:
                continue
            weights = token_weights(examples, columns, self.cut.max_length, self.cut.mode)
            if weights is not None:
                batch[name] = spread(weights, mask)
        return batch


class StreamedRows:
    """Filter of a stream for rows that teach anything, which tells of the first that does not."""

    def __init__(self, cut: Cut, name: str) -> None:
        self.cut = cut
        self.name = name
        self.told = False

    def __call__(self, row: Mapping[str, Any]) -> bool:
        counts = RowCounts(self.name, self.cut.max_length, pairwise=self.cut.pairwise)
        kept = counts.keeps(*self.cut(row))
        if not kept and not self.told:
            self.told = True
            logger.warning(
                "%s data: dropped a row %s, and will drop all others like it; max_length is %s",
                self.name,
                "with two equal sides" if counts.equal else "without a labelled token",
                self.cut.max_length,
            )
        return kept


def _mismatched(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """TRL's completions behind another prompt of their batch, of the rows that are left."""
    names = {name: f"{MISMATCHED}{name}" for name in (COMPLETION_IDS, TOKEN_WEIGHTS)}
    return {
        other: [rows[name][-1], *rows[name][:-1]] for name, other in names.items() if name in rows
    }
