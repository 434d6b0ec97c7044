"""Material of small trainings of the command line: a saved tiny model, files of pairs, logs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

_WORDS = "the cat sat on mat 1 2".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random texts over the tiny tokenizer's words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(2, 6))) for _ in range(count)]


def pairs(count: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Pairs whose chosen text ends in "cat" and whose rejected one in "mat"."""
    texts = sentences(2 * count, seed)
    return [
        {"prompt": prompt, "chosen": f"{text} cat", "rejected": f"{text} mat", **more}
        for prompt, text in zip(texts[::2], texts[1::2], strict=True)
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def write_model(folder: Path, seed: int = 0) -> str:
    """A tiny Llama and its tokenizer in a folder."""
    tiny_llama(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def log_of(folder: Path) -> list[dict[str, float]]:
    """The rows of training steps that a run logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]
