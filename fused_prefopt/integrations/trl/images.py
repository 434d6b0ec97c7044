"""Rows with images in TRL's trainers: tokens cut where it is seen, references computed ahead.

TRL makes token ids and pixels of such rows batch by batch, in its collators: none of what it does
to a data set of texts (tokenise, count, drop) is done to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.kto_trainer import DataCollatorForVisionUnpairedPreference

from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    CHOSEN_IDS,
    COMPLETION_IDS,
    COMPLETION_MASK,
    INPUT_IDS,
    KEPT_ROWS,
    MISMATCHED,
    PROMPT_IDS,
    REJECTED_IDS,
    feature_at,
)
from fused_prefopt.data.token_weights import refuse_token_weights
from fused_prefopt.integrations.trl.rows import Cut, StreamedRows
from fused_prefopt.models.model_call import TOKENWISE
from fused_prefopt.reference_cache import tokenizer_fingerprint

_TRLS = (DataCollatorForVisionPreference, DataCollatorForVisionUnpairedPreference)
_COLUMNS = ("image", "images")
_CUT = (*TOKENWISE, COMPLETION_MASK)


def has_images(dataset: Any) -> bool:
    """Whether the first row of a data set, if there is one, has images, as TRL tells."""
    first: Mapping[str, Any] = next(iter(dataset or ()), {})
    return any(name in first for name in _COLUMNS)


@contextmanager
def images_precomputed(trainer: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Let the constructor of a trainer of TRL's compute the reference of images ahead.

    It refuses to, though its pass over the data takes any batch of its collators. So the option is
    off until it has come to transformers' constructor, which tells its callbacks when it is done;
    what comes after that computes the reference.

    Args:
        trainer: whose constructor runs inside.
        arguments: of the constructor.
    """
    config = arguments["args"]
    if not config.precompute_ref_log_probs or not has_images(arguments.get("train_dataset")):
        yield
        return
    switch = _SwitchesPrecomputingOn(trainer)
    arguments["callbacks"] = [*(arguments.get("callbacks") or ()), switch]
    config.precompute_ref_log_probs = False
    try:
        yield
        trainer.remove_callback(switch)
    finally:
        config.precompute_ref_log_probs = True


class _SwitchesPrecomputingOn(TrainerCallback):
    """A callback that sets the option when transformers' constructor is done."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # TRL goes on with the one or the other.
        self.trainer.precompute_ref_logps = args.precompute_ref_log_probs = True


@dataclass
class ImageRows:
    """A collator of TRL's for images, whose rows are cut here; rows that teach nothing are dropped.

    A row is dropped, and the first is told, as of a streamed data set of texts: a side has no
    label left within `max_length`, or both are equal. The images stand in the prompt: where a row
    has a label left, so are all of its images' tokens.

    Args:
        collator: TRL's, which cuts nothing.
        max_length: tokens of prompt and completion together; None cuts nothing.
        pairwise: whether rows are pairs.
        drops: False keeps every row; a batch where one would be dropped it does not cut, but takes
            the labels off what would be cut.
    """

    collator: Any
    max_length: int | None
    pairwise: bool
    drops: bool = True

    @classmethod
    def of(cls, collator: Any, pairwise: bool, *, drops: bool = True) -> Any:
        """Such a collator of one of TRL's; any other collator as it is.

        Args:
            collator: of a trainer of TRL's.
            pairwise, drops: as above.
        """
        if not isinstance(collator, _TRLS):
            return collator
        return cls(replace(collator, max_length=None), collator.max_length, pairwise, drops)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with the examples that it is of under `KEPT_ROWS` where others are left out.

        Raises:
            ValueError: no example is left, or one has weights of tokens beside its texts.
        """
        for index, example in enumerate(examples):
            refuse_token_weights(example, feature_at(index))
        batch = self._whole(examples)
        kept = [index for index in range(len(examples)) if self._keeps(self._row(batch, index))]
        if len(kept) == len(examples):
            return self._cut(batch)
        if not self.drops:
            return self._unlabelled(batch)
        if not kept:
            wanted = "two different completions" if self.pairwise else "a completion"
            raise ValueError(
                f"max_length: got {self.max_length}, which leaves none of a batch's {len(examples)}"
                f" rows {wanted}; raise it, let None cut nothing, or drop the rows"
            )
        return self._cut(self._whole([examples[index] for index in kept])) | {KEPT_ROWS: kept}

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value[:, : self.max_length] if name.removeprefix(MISMATCHED) in _CUT else value
            for name, value in batch.items()
        }

    def _unlabelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Whole rows, as a model's images must be, with no label on what would be cut."""
        for name, mask in batch.items():
            if name.endswith(COMPLETION_MASK) and self.max_length is not None:
                mask[:, self.max_length :] = 0
        return batch

    def _whole(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # TRL's writes into the examples.
        return dict(self.collator([dict(example) for example in examples]))

    def _row(self, batch: Mapping[str, Any], index: int) -> dict[str, list[int]]:
        """Token ids of an example, by TRL's names."""
        if not self.pairwise:
            prompt, completion = _side(batch, index)
            return {PROMPT_IDS: prompt, COMPLETION_IDS: completion}
        prompt, chosen = _side(batch, index)
        _, rejected = _side(batch, index + len(batch[INPUT_IDS]) // 2)
        return {PROMPT_IDS: prompt, CHOSEN_IDS: chosen, REJECTED_IDS: rejected}

    @cached_property
    def _keeps(self) -> StreamedRows:
        keeps = StreamedRows(Cut(self.max_length, "keep_start", self.pairwise), "image")
        # Of what is not dropped there is nothing to tell.
        keeps.told = not self.drops
        return keeps


def _side(batch: Mapping[str, Tensor], row: int) -> tuple[list[int], list[int]]:
    ids, real, completion = (
        batch[name][row] for name in (INPUT_IDS, ATTENTION_MASK, COMPLETION_MASK)
    )
    real, completion = real != 0, completion != 0
    return ids[real & ~completion].tolist(), ids[real & completion].tolist()


def kept_examples(batch: dict[str, Any], examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples that a batch is of.

    Args:
        batch: of a collator that may be an `ImageRows`, whose `KEPT_ROWS` are taken away.
        examples: what the collator was given.
    """
    kept = batch.pop(KEPT_ROWS, None)
    return examples if kept is None else [examples[index] for index in kept]


def collator_fingerprint(collator: Any) -> str:
    """Hash of what a collator makes of the same images and texts.

    Args:
        collator: an `ImageRows`, or any other.
    """
    if not isinstance(collator, ImageRows):
        return Hasher.hash(collator)
    processor = collator.collator.processor
    parts = [
        type(processor).__name__,
        processor.to_dict(),
        processor.image_processor.to_dict(),
        tokenizer_fingerprint(processor.tokenizer),
        getattr(processor, "chat_template", None),
        collator.max_length,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
