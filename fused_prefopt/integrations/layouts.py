"""Batches without a row for each sequence: who asks for them, and what they ask of the others.

Packed sequences share one row, and a pair with its prompt once has one row for both sides. They
ask something of the other options, of the model, and of whoever deals batches out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data import ListCollator
from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    INPUT_IDS,
    PAIR_IDS,
    PROMPT_IDS,
    SEGMENTS,
    SEQUENCE_IDS,
)
from fused_prefopt.data.shared_prompts import IN_PADDING
from fused_prefopt.models.causal_lm import text_config
from fused_prefopt.models.layout_check import (
    require_mask_attention,
    require_separate_sequences,
    require_separate_sides,
)
from fused_prefopt.models.model_call import prompt_learners
from fused_prefopt.models.peft_head import lacks_rows

# Options of a configuration; without any TRL's collator pads.
LAYOUTS = PADDING_FREE, SHARED_PROMPT = ("padding_free", "shared_prompt")


def layout_of(config: Any, data_collator: Any) -> str | None:
    """The one of `LAYOUTS` that a configuration asks for, None for padded rows.

    Args:
        config: of a fused trainer.
        data_collator: which the trainer is given, or None.

    Raises:
        ValueError: it asks for both, or for one beside what makes another layout.
    """
    layouts = [name for name in LAYOUTS if getattr(config, name, False)]
    if not layouts:
        return None
    layout = layouts[0]
    if len(layouts) > 1:
        raise ValueError("shared_prompt: got True with padding_free=True, wanted one of them")
    if data_collator is not None:
        raise ValueError(
            f"data_collator: got one with {layout}=True, which takes a collator of its own; needs"
            f" None, or {layout}=False and a `data.PairCollator` that has the option"
        )
    if layout == PADDING_FREE and config.pad_to_multiple_of is not None:
        raise ValueError(
            f"pad_to_multiple_of: got {config.pad_to_multiple_of} with padding_free=True, which"
            " pads nothing; needs None"
        )
    return layout


def has_row_for_each(collator: Any) -> bool:
    """Whether a collator's batches have a row for each sequence; a foreign one's have."""
    return bool(getattr(collator, "has_row_for_each", True))


def keep_batches_whole(trainer: Any, *, pairwise: bool) -> None:
    """Let each process collate its own batches, as it does where data are no stream.

    Of a stream accelerate otherwise joins those of one process and deals out their rows: to one
    process the chosen halves, to another the rejected ones. Packed sequences and shared prompts
    have no row each, and images rows of their own (patches).

    Args:
        trainer: a `transformers.Trainer`, before it has a data loader.
        pairwise: whether its loss judges pairs.

    Raises:
        ValueError: its configuration asks for such a deal, which would cut what belongs together.
    """
    cut, together = None, "pairs, whose two rows" if pairwise else None
    if isinstance(trainer.data_collator, ListCollator):
        together = "lists, whose rows"
    if getattr(trainer, "_is_vision_dataset", False):
        cut = "images, which have others; needs dispatch_batches=False"
    elif not has_row_for_each(trainer.data_collator):
        cut = (
            "a layout that has none for each sequence (padding_free, shared_prompt); needs"
            " dispatch_batches=False or padded batches"
        )
    elif together is not None and trainer.accelerator.num_processes > 1:
        cut = f"{together} may go to two processes; needs dispatch_batches=False"
    if trainer.accelerator.dispatch_batches:
        if cut is None:
            return
        raise ValueError(
            f"accelerator_config: got dispatch_batches=True, which deals out rows, with {cut}"
        )
    trainer.accelerator.dataloader_config.dispatch_batches = False


def require_layout(trainer: Any, *models: nn.Module) -> None:
    """Raise ValueError if a model's attention cannot keep a layout's sequences apart.

    Where it takes a trial and the weights are not whole on the trainer's device yet, the first
    batch decides.

    Args:
        trainer: a `transformers.Trainer` on pairs or points of token ids.
        *models: those that its batches meet, without the wrappers of distributed training.
    """
    collator = trainer.data_collator
    if has_row_for_each(collator):
        return
    shared = getattr(collator, "shared_prompt", False)
    for model in models:
        if prompt_learners(model):
            raise ValueError(lacks_rows(SEGMENTS if shared else SEQUENCE_IDS))
        if shared:
            slides = getattr(text_config(model), "sliding_window", None) is not None
            require_mask_attention(model, _longest_row(trainer) if slides else 1)
        if _is_ready(model, trainer.accelerator.device):
            device = next(model.parameters()).device
            tried = require_separate_sides if shared else require_separate_sequences
            # As it is in training: flash attention takes no fp32.
            with trainer.accelerator.autocast():
                tried(model, torch.zeros(1, 1, dtype=torch.int64).to(device))


def _longest_row(trainer: Any) -> int:
    """Tokens of the longest row that the trainer's collator makes of its data sets' rows."""
    evaluated = trainer.eval_dataset
    sets = list(evaluated.values()) if isinstance(evaluated, Mapping) else [evaluated]
    return max(
        (
            trainer.data_collator([row])[INPUT_IDS].shape[1]
            for data in (trainer.train_dataset, *sets)
            if hasattr(data, "select_columns") and hasattr(data, "__len__")
            for row in data.select_columns([PROMPT_IDS, *PAIR_IDS])
        ),
        default=1,
    )


def _is_ready(model: nn.Module, device: torch.device) -> bool:
    """Whether a model can be called as it is: neither sharded nor partitioned nor elsewhere."""
    return all(
        type(value) is nn.Parameter
        and value.numel() > 0
        and value.device.type == device.type
        and not hasattr(value, "ds_id")
        for value in model.parameters()
    )


def number_of_tokens(batch: Mapping[str, Any]) -> Tensor | int:
    """Tokens that go through the backbone: no padding, and a shared prompt once.

    Args:
        batch: of a collator; a GPU is not waited for.
    """
    if ATTENTION_MASK in batch:
        return batch[ATTENTION_MASK].sum()
    if SEGMENTS in batch:
        return (batch[SEGMENTS] != IN_PADDING).sum()
    return batch[INPUT_IDS].numel()
