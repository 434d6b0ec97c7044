"""Truncation: a prompt and its completion cut as TRL's collators do it, and what became of rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

# Prompt and completion of one side of a row, as token ids.
Side = tuple[Sequence[int], Sequence[int]]
# Of tokens, or of what each of them has.
Tokens = TypeVar("Tokens", Tensor, list[int])
# What is kept of a sequence that is too long.
TRUNCATION_MODES = ("keep_start", "keep_end")
logger = logging.getLogger(__name__)


def cut_side(
    prompt: Tokens, completion: Tokens, max_length: int | None, truncation_mode: str
) -> tuple[Tokens, Tokens]:
    """A prompt and its completion within `max_length` tokens, as TRL's collators cut them.

    Args:
        prompt: token ids.
        completion: token ids.
        max_length: of both together; None cuts nothing.
        truncation_mode: "keep_start" leaves out the last tokens, "keep_end" the first.
    """
    gone = 0 if max_length is None else len(prompt) + len(completion) - max_length
    if gone <= 0:
        return prompt, completion
    if truncation_mode == "keep_start":
        return prompt[:max_length], completion[: max(len(completion) - gone, 0)]
    return prompt[gone:], completion[max(gone - len(prompt), 0) :]


@dataclass
class RowCounts:
    """Counts of rows that were read, cut, and dropped as nothing can be learnt from them.

    Attributes:
        what: the rows are, to begin the message: "pairs".
        max_length: tokens of prompt and completion together; None cuts nothing.
        max_prompt_length: tokens of the prompt alone; None sets no such limit.
        pairwise: whether a row has two sides.
        read: rows.
        kept: rows with a label on every side, their sides different.
        completions: rows of which a completion was cut.
        prompts: rows of which a prompt was cut.
        touched: rows of which either was cut.
        equal: rows dropped as their two sides are the same tokens.
        empty: rows dropped as a side has no label left.
    """

    what: str
    max_length: int | None
    max_prompt_length: int | None = None
    pairwise: bool = True
    read: int = 0
    kept: int = 0
    completions: int = 0
    prompts: int = 0
    touched: int = 0
    equal: int = 0
    empty: int = 0

    def keeps(self, whole: Sequence[Side], cut: Sequence[Side]) -> bool:
        """Count a row and say whether it is kept.

        Args:
            whole: prompt and completion of each side before they were cut.
            cut: the same afterwards.
        """
        prompt_cut, completion_cut = (
            any(len(before[i]) > len(after[i]) for before, after in zip(whole, cut, strict=True))
            for i in (0, 1)
        )
        self.read += 1
        self.prompts += prompt_cut
        self.completions += completion_cut
        self.touched += prompt_cut or completion_cut
        # Nothing predicts a sequence's first token.
        if any(len(completion) - (not prompt) < 1 for prompt, completion in cut):
            self.empty += 1
        elif self.pairwise and _lists(cut[0]) == _lists(cut[1]):
            self.equal += 1
        else:
            self.kept += 1
            return True
        return False

    def add_empty(self, rows: int) -> None:
        """Count rows that were dropped elsewhere, as their prompt left their completion no room."""
        self.read += rows
        self.empty += rows
        self.completions += rows
        self.touched += rows

    @property
    def message(self) -> str:
        """All counts, and what to raise where something was cut."""
        equal = f"sides equal {self.equal}, " if self.pairwise else ""
        said = (
            f"{self.what}: read {self.read}, kept {self.kept}; completions truncated"
            f" {self.completions}, prompts truncated {self.prompts}, {equal}without a completion"
            f" {self.empty}"
        )
        return said + self._advice

    @property
    def _advice(self) -> str:
        """What to raise where something was cut."""
        if not self.touched:
            return ""
        prompts_apart = self.max_prompt_length is not None
        limits = [
            f"{name} ({limit})"
            for name, limit, counts in (
                ("max_length", self.max_length, self.completions or not prompts_apart),
                ("max_prompt_length", self.max_prompt_length, self.prompts and prompts_apart),
            )
            if counts
        ]
        share = self.touched / self.read
        most = f", which cuts {share:.0%} of the rows" if self._cuts_most else ""
        return f"; raise {' or '.join(limits)}{most}"

    def log(self) -> None:
        """Log the message, as a warning if rows were dropped or more than half of them cut."""
        warns = self.kept < self.read or self._cuts_most
        logger.log(logging.WARNING if warns else logging.INFO, "%s", self.message)

    def require_some(self, name: str) -> None:
        """Raise ValueError unless rows are left.

        Args:
            name: of the argument that they came in.
        """
        if not self.read:
            raise ValueError(f"{name}: got no rows, needs at least one")
        if not self.kept:
            raise ValueError(f"{name}: no row is left, needs at least one; {self.message}")

    @property
    def _cuts_most(self) -> bool:
        return 2 * self.touched > self.read


@dataclass
class ListCounts(RowCounts):
    """Counts of completions in lists, and of the lists, each a row.

    Attributes:
        pairwise: as a completion has one side, False.
        lists: that were read.
        kept_lists: of two completions or more whose scores are not all one.
    """

    pairwise: bool = False
    lists: int = 0
    kept_lists: int = 0

    def kept_of(
        self, whole: Sequence[Side], cut: Sequence[Side], scores: Sequence[float]
    ) -> list[int]:
        """Count a list and say which of its completions are kept, by place; none of a dropped list.

        A completion is dropped that has no label left, or the tokens of one before it.

        Args:
            whole: prompt and completion of each before they were cut.
            cut: the same afterwards.
            scores: of each.
        """
        seen: list[tuple[list[int], list[int]]] = []
        places = []
        for place, sides in enumerate(zip(whole, cut, strict=True)):
            before, after = sides
            kept = self.keeps([before], [after])
            if kept and _lists(after) in seen:
                self.kept, self.equal = self.kept - 1, self.equal + 1
            elif kept:
                seen.append(_lists(after))
                places.append(place)
        self.lists += 1
        if len({scores[place] for place in places}) > 1:
            self.kept_lists += 1
            return places
        self.kept -= len(places)
        return []

    @property
    def message(self) -> str:
        """All counts, and what to raise where something was cut."""
        return (
            f"{self.what}: read {self.lists} of {self.read} completions, kept {self.kept_lists} of"
            f" {self.kept}; without two different scores {self.lists - self.kept_lists};"
            f" completions truncated {self.completions}, prompts truncated {self.prompts}, the same"
            f" as another {self.equal}, without a completion {self.empty}{self._advice}"
        )


def _lists(side: Side) -> tuple[list[int], list[int]]:
    prompt, completion = side
    return list(prompt), list(completion)
