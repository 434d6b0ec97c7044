"""Truncation of a prompt and its completion to a length, as TRL's collators do it."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

# Of tokens, or of what each of them has.
Tokens = TypeVar("Tokens", Tensor, list[int])
# What is kept of a sequence that is too long.
TRUNCATION_MODES = ("keep_start", "keep_end")


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
