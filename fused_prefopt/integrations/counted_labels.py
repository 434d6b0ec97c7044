"""Labels are counted where they are still on CPU: in the collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fused_prefopt.data.labels import LABEL_COUNTS, count_labels

_MASK = "completion_mask"


@dataclass
class CountedLabels:
    """A collator whose batches carry `LabelCounts`, also of the mismatched completions of TRL's.

    Args:
        collator: any; batches without `completion_mask` stay as they are.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch."""
        batch = self.collator(examples)
        for name in [name for name in batch if name.endswith(_MASK)]:
            prefix = name.removesuffix(_MASK)
            part = {each[len(prefix) :]: batch[each] for each in batch if each.startswith(prefix)}
            if part[_MASK].device.type == "cpu" and "segments" not in part:
                batch[prefix + LABEL_COUNTS] = count_labels(part)
        return batch
