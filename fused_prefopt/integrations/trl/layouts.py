"""Layouts of TRL's rows that the configuration of a trainer asks for, and what they contradict."""

from __future__ import annotations

from typing import Any

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
