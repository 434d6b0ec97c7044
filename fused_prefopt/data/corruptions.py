"""Ways to make a continuation worse by a known amount, for preference data with graded rewards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fused_prefopt.checks import require_choice

PHRASE_WORDS = 3


@dataclass(frozen=True)
class Corruption:
    """A worsened text.

    Attributes:
        text: what became of the continuation; begins with a space when the original does.
        severity: how bad it is, in (0, 1]; 0 when nothing changed.
    """

    text: str
    severity: float


def corrupt(kind: str, text: str, strength: float, rng: random.Random, foreign: str) -> Corruption:
    """Worsen a continuation.

    The severity is the fraction of the text that was really spoilt, times how much a spoilt part
    of that kind weighs: 1 for `foreign` and `repeat`, 0.8 for `shuffle`, 0.5 for `truncate`.

    Args:
        kind: "foreign" (the end is another document's text), "shuffle" (words change places),
            "repeat" (the end repeats one phrase) or "truncate" (the end is cut off mid-word).
        text: the true continuation.
        strength: fraction of the text to spoil, in (0, 1]; `repeat` leaves a phrase to repeat, and
            `shuffle` the second and later uses of a word.
        rng: source of every random choice.
        foreign: a continuation from another document.

    Raises:
        ValueError: unknown `kind`, `strength` outside (0, 1], or a text without words.
    """
    require_choice("kind", kind, CORRUPTIONS)
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, wanted a fraction in (0, 1]")
    if not text.strip():
        raise ValueError(f"text: got {text!r}, wanted at least one word")
    spoil, weight = CORRUPTIONS[kind]
    spoilt, fraction = spoil(text, strength, rng, foreign)
    return Corruption(spoilt, weight * fraction if spoilt != text else 0.0)


def _foreign(text: str, strength: float, rng: random.Random, foreign: str) -> tuple[str, float]:
    words = text.split()
    count = _count(strength, len(words))
    return _join(text, words[: len(words) - count] + foreign.split()[:count]), count / len(words)


def _shuffle(text: str, strength: float, rng: random.Random, foreign: str) -> tuple[str, float]:
    words = text.split()
    # One place per distinct word: a rotation over them then really moves every one.
    places = list({word: place for place, word in enumerate(words)}.values())
    rng.shuffle(places)
    places = places[: max(2, _count(strength, len(words)))]
    moved = list(words)
    for place, source in zip(places, places[1:] + places[:1], strict=True):
        moved[place] = words[source]
    return _join(text, moved), len(places) / len(words)


def _repeat(text: str, strength: float, rng: random.Random, foreign: str) -> tuple[str, float]:
    words = text.split()
    kept = max(min(PHRASE_WORDS, len(words) - 1), len(words) - _count(strength, len(words)), 1)
    phrase = words[max(0, kept - PHRASE_WORDS) : kept]
    count = len(words) - kept
    filler = [phrase[i % len(phrase)] for i in range(count)]
    return _join(text, words[:kept] + filler), count / len(words)


def _truncate(text: str, strength: float, rng: random.Random, foreign: str) -> tuple[str, float]:
    wanted = round(len(text) * (1 - strength))
    inside = [i for i in range(1, len(text)) if text[i - 1].isalnum() and text[i].isalnum()]
    cut = min(inside, key=lambda i: abs(i - wanted), default=len(text))
    return text[:cut], 1 - cut / len(text)


def _count(strength: float, words: int) -> int:
    return max(1, round(strength * words))


def _join(original: str, words: list[str]) -> str:
    return (" " if original[:1].isspace() else "") + " ".join(words)


_Spoil = Callable[[str, float, random.Random, str], tuple[str, float]]
CORRUPTIONS: dict[str, tuple[_Spoil, float]] = {
    "foreign": (_foreign, 1.0),
    "shuffle": (_shuffle, 0.8),
    "repeat": (_repeat, 1.0),
    "truncate": (_truncate, 0.5),
}
