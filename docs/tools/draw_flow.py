"""Draws docs/flow.svg, where a batch goes: `python docs/tools/draw_flow.py`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parents[1] / "flow.svg"
WIDTH, LEFT, BOX, HEIGHT, GAP = 440, 20, 400, 64, 42


@dataclass(frozen=True)
class Stage:
    """A step of a batch's way.

    Attributes:
        title: what it is.
        below: what it does.
        colour: of its edge.
        gives: what goes on to the next one, with its shape.
    """

    title: str
    below: str
    colour: str
    gives: str = ""


STAGES = (
    Stage("Rows", "prompt, chosen, rejected (or a completion, or a list)", "#5c6bc0", "token ids"),
    Stage(
        "Collator",
        "data/: chosen rows first, then rejected",
        "#5c6bc0",
        "ids, completion mask (S, T)",
    ),
    Stage("Backbone", "the model without its head", "#78909c", "hidden (S, T, D)"),
    Stage(
        "Op",
        "ops/: labelled rows × head; never logits (S, T, V)",
        "#00897b",
        "log-probs (S,), fp32",
    ),
    Stage("Loss", "losses/, beside the reference's log-probs (S,)", "#00897b", "loss, metrics"),
    Stage("Trainer", "TRL, transformers, …: backward, step, log", "#78909c"),
)


def picture() -> str:
    """The picture, an SVG on a ground of its own, so that it reads on light and dark pages."""
    step = HEIGHT + GAP
    height = 2 * LEFT + len(STAGES) * step - GAP
    middle = WIDTH / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" font-family="system-ui, sans-serif" role="img">',
        "<title>Where a batch goes: rows, collator, backbone, op, loss, trainer</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for index, stage in enumerate(STAGES):
        top = LEFT + index * step
        parts += [
            f'<rect x="{LEFT}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#f7f9fb"'
            f' stroke="{stage.colour}" stroke-width="2"/>',
            _text(middle, top + 27, stage.title, size=17, weight=600),
            _text(middle, top + 48, stage.below, size=14),
        ]
        if not stage.gives:
            continue
        end = top + step
        line = f'x1="{middle}" y1="{top + HEIGHT}" x2="{middle}" y2="{end - 7}"'
        parts += [
            f'<line {line} stroke="#37474f" stroke-width="2"/>',
            f'<path d="M{middle - 6} {end - 8} h12 L{middle} {end} z" fill="#37474f"/>',
            _text(middle + 14, end - 16, stage.gives, size=14, anchor="start"),
        ]
    return "\n".join([*parts, "</svg>", ""])


def _text(
    x: float, y: float, words: str, *, size: int, weight: int = 400, anchor: str = "middle"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="#263238"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
