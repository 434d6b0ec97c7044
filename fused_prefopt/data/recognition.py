"""Which adapter reads the rows of a data set, told by their columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fused_prefopt.checks import closest
from fused_prefopt.data.columns import LABELS, PAIR, RATINGS

Row = Mapping[str, Any]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# Adapter → the rows that it reads.
FORMS = {
    "preference": "chosen, rejected (texts or chats) and prompt, or without it",
    "hh_rlhf": f"chosen, rejected: texts from {HUMAN!r} on, without prompt",
    "ultrafeedback_binarized": "chosen, rejected: whole chats, beside a prompt that is a text",
    "completions": f"prompt, completion and any of {', '.join((*LABELS, *RATINGS))}",
    "ultrafeedback": "instruction, completions",
}
_NEEDED = {
    "pairs": PAIR,
    "completions": ("completion",),
    "ultrafeedback": ("instruction", "completions"),
}


@dataclass(frozen=True)
class Recognised:
    """An adapter and what it takes the rows for.

    Attributes:
        adapter: its name in `data.adapters.READERS`.
        what: the rows are, such as "rated completions".
    """

    adapter: str
    what: str


def recognise(row: Row) -> Recognised:
    """The one adapter that fits a data set's first row.

    Args:
        row: of a data set.

    Raises:
        ValueError: none fits, or several do; the message lists them and the columns.
    """
    kinds = [kind for kind, names in _NEEDED.items() if all(name in row for name in names)]
    if len(kinds) > 1:
        # Where rows of several kinds share a table, the columns of the others are None.
        filled = {name for name, value in row.items() if value is not None}
        kinds = [kind for kind in kinds if filled.issuperset(_NEEDED[kind])]
    if len(kinds) > 1:
        raise ValueError(_message(row, f"which fit {' and '.join(kinds)}"))
    if kinds == ["pairs"]:
        return _pairs(row)
    if kinds == ["completions"]:
        return _completions(row)
    if kinds == ["ultrafeedback"]:
        return Recognised("ultrafeedback", "completions of UltraFeedback")
    missing = [name for names in _NEEDED.values() for name in names if name not in row]
    hints = [f"{name!r}{closest(name, row)}" for name in missing if closest(name, row)]
    raise ValueError(_message(row, "which no adapter reads", *hints))


def _pairs(row: Row) -> Recognised:
    prompt, sides = row.get("prompt"), [row[name] for name in PAIR]
    if all(isinstance(side, str) for side in sides):
        if prompt is None and all(side.startswith(HUMAN) for side in sides):
            return Recognised("hh_rlhf", "pairs of dialogues in HH-RLHF's form")
    elif isinstance(prompt, str):
        if all(isinstance(side, list) and len(side) > 1 for side in sides):
            return Recognised("ultrafeedback_binarized", "pairs of whole chats")
        problem = "with answers that are neither texts, as the prompt is, nor whole chats"
        raise ValueError(_message(row, problem))
    return Recognised("preference", "preference pairs")


def _completions(row: Row) -> Recognised:
    kinds = {
        "labelled": any(name in row for name in LABELS),
        "rated": any(name in row for name in RATINGS),
    }
    found = [kind for kind, there in kinds.items() if there]
    if not found:
        raise ValueError(_message(row, "completions that nothing judges"))
    return Recognised("completions", f"{' and '.join(found)} completions")


def _message(row: Row, problem: str, *hints: str) -> str:
    forms = "; ".join(f"{name} ({columns})" for name, columns in FORMS.items())
    near = f" (missing {', '.join(hints)})" if hints else ""
    return (
        f"columns: got {', '.join(map(repr, row))}, {problem}{near}; needs those of one adapter:"
        f" {forms}; rename columns, or choose an adapter with `adapter: NAME`"
    )
