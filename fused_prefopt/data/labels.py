"""The labels of a collated batch, and how many they are, counted before it is on a GPU."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.checks import require_shape
from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    COMPLETION_MASK,
    GROUPS,
    INPUT_IDS,
    LABEL_COUNTS,
    SEQUENCE_IDS,
)


class LabelCounts(UserDict[str, Any]):
    """Numbers of labelled rows of a batch, after the shift, which never leave the host.

    A mapping without items, which a move to a device or to pinned memory leaves as it is. What
    cuts, joins, gathers or broadcasts batches (accelerate's `dispatch_batches`) makes a new one of
    its items, and so without the numbers, which would be those of another batch.

    Args:
        items: none.
        shape: of the batch's `completion_mask`.
        completion: labelled rows of the completions.
        prompt: of the prompts.

    Attributes:
        groups: number of the batch's groups, None where it has none or is not counted yet.
    """

    def __init__(
        self,
        items: Mapping[str, Any] | None = None,
        /,
        *,
        shape: tuple[int, ...] | None = None,
        completion: int | None = None,
        prompt: int | None = None,
    ) -> None:
        super().__init__(items or {})
        self._shape, self._completion, self._prompt = shape, completion, prompt
        self.groups: int | None = None

    def to(self, *_: Any, **__: Any) -> LabelCounts:
        """Itself: on every device's host."""
        return self

    def pin_memory(self, *_: Any) -> LabelCounts:
        """Itself."""
        return self

    def of(self, batch: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Those of the completions and of the prompts, None where they are another batch's."""
        if self._shape != tuple(batch[COMPLETION_MASK].shape):
            return None, None
        return self._completion, self._prompt


def count_labels(batch: Mapping[str, Any]) -> LabelCounts:
    """Count what `sequence_logps` would count, and on a GPU wait for.

    Args:
        batch: of a collator, on the CPU; padded or packed.
    """
    ids = batch.get(SEQUENCE_IDS)

    def count(labels: Tensor) -> int:
        predicted = labels[..., 1:] != -100
        if ids is not None:
            predicted = predicted & (ids[..., 1:] == ids[..., :-1])
        return int(predicted.sum())

    return LabelCounts(
        shape=tuple(batch[COMPLETION_MASK].shape),
        completion=count(labels_of(batch)),
        prompt=count(prompt_labels_of(batch)),
    )


def counts_of(batch: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The numbers of labelled rows that a batch carries: completions, prompts; or None.

    Args:
        batch: of a collator, on any device.
    """
    counts = batch.get(LABEL_COUNTS)
    # A compiled call would be compiled anew for each number.
    if not isinstance(counts, LabelCounts) or torch.compiler.is_compiling():
        return None, None
    return counts.of(batch)


def count_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, whose counts know how many groups it has, where it has some.

    Args:
        batch: of a collator, on the CPU.
    """
    counts = batch.get(LABEL_COUNTS)
    if GROUPS in batch and isinstance(counts, LabelCounts):
        counts.groups = batch[GROUPS].unique().numel()
    return batch


def number_of_groups(batch: Mapping[str, Any]) -> int:
    """The groups of a batch that has some; a GPU is waited for where nobody has counted them.

    Args:
        batch: of a collator, on any device.
    """
    counts = batch.get(LABEL_COUNTS)
    if isinstance(counts, LabelCounts) and counts.groups is not None:
        return counts.groups
    return batch[GROUPS].unique().numel()


def labels_of(batch: Mapping[str, Any], ignore_index: int = -100) -> Tensor:
    """Labels of the completion tokens, not shifted (Hugging Face's convention).

    Args:
        batch: from a collator.
        ignore_index: label of every other position.

    Returns:
        The shape of `input_ids`, int64.
    """
    mask = batch[COMPLETION_MASK]
    require_shape(COMPLETION_MASK, mask, batch[INPUT_IDS].shape)
    return batch[INPUT_IDS].masked_fill(mask == 0, ignore_index)


def prompt_labels_of(batch: Mapping[str, Any], ignore_index: int = -100) -> Tensor:
    """Labels of the prompt tokens, not shifted; nothing predicts a sequence's first token.

    Args:
        batch: from a collator.
        ignore_index: label of every other position.

    Returns:
        The shape of `input_ids`, int64.
    """
    hidden = batch[COMPLETION_MASK] != 0
    if ATTENTION_MASK in batch:
        hidden = hidden | (batch[ATTENTION_MASK] == 0)
    return batch[INPUT_IDS].masked_fill(hidden, ignore_index)
