"""Rows of TRL's prepared data sets: counted as its collators cut them, dropped if they are dead."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fused_prefopt.data.columns import PAIR
from fused_prefopt.data.truncation import RowCounts, Side

_SIDES = {True: ("chosen_ids", "rejected_ids"), False: ("completion_ids",)}
_MISMATCHED = "KL_completion_ids"
logger = logging.getLogger(__name__)


class KeepsTeachingRows:
    """Mixin for a trainer of TRL's: no row without a label, or with two equal sides, is trained on.

    TRL's collators cut rows to `max_length` without a word. Here every data set's rows are cut the
    same way when it is prepared, counted in one log message, and dropped where nothing can be
    learnt of them; of a streamed data set they are dropped on the way, and the first is told.
    """

    config_type: ClassVar[Any]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        pairwise = self.config_type.pairwise
        first = next(iter(dataset))
        prepared = super()._prepare_dataset(  # type: ignore[misc]
            dataset, processing_class, args, dataset_name
        )
        # Single completions TRL cuts at the end, whatever the options say.
        mode = args.truncation_mode if pairwise else "keep_start"
        cut = _Cut(args.max_length, mode, pairwise)
        if not hasattr(prepared, "__len__"):
            return prepared.filter(_Streamed(cut, dataset_name))
        # TRL makes two rows of a pair for a trainer on single completions.
        halves = 2 if not pairwise and all(name in first for name in PAIR) else 1
        counts = RowCounts(f"{dataset_name} data", args.max_length, pairwise=pairwise)
        columns = prepared.select_columns(["prompt_ids", *_SIDES[pairwise]])
        kept = [index for index, row in enumerate(columns) if counts.keeps(*cut(row))]
        # TRL itself drops rows whose prompt fills `max_length`.
        counts.add_empty(halves * len(dataset) - len(prepared))
        counts.require_some(f"{dataset_name} data")
        if args.should_log:
            counts.log()
        if len(kept) == len(prepared):
            return prepared
        prepared = prepared.select(kept)
        if _MISMATCHED not in prepared.column_names:
            return prepared
        return prepared.map(_mismatched, batched=True, batch_size=args.per_device_train_batch_size)


@dataclass(frozen=True)
class _Cut:
    """A row's sides whole, and as TRL's collators cut them."""

    max_length: int | None
    mode: str
    pairwise: bool

    def __call__(self, row: Mapping[str, Any]) -> tuple[list[Side], list[Side]]:
        whole = [(row["prompt_ids"], row[name]) for name in _SIDES[self.pairwise]]
        return whole, [self._side(*side) for side in whole]

    def _side(self, prompt: list[int], completion: list[int]) -> Side:
        length = len(prompt) + len(completion)
        if self.max_length is None or length <= self.max_length:
            return prompt, completion
        if self.mode == "keep_start":
            return prompt[: self.max_length], completion[: max(self.max_length - len(prompt), 0)]
        gone = length - self.max_length
        return prompt[gone:], completion[max(gone - len(prompt), 0) :]


class _Streamed:
    """What keeps the rows of a stream that teach anything, and tells of the first that does not."""

    def __init__(self, cut: _Cut, name: str) -> None:
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
    completions = rows["completion_ids"]
    return {_MISMATCHED: [completions[-1], *completions[:-1]]}
