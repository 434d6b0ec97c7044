"""Preference data from documents: true continuations against ones worsened by a known amount."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fused_prefopt.checks import require_choice
from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETION,
    CORRUPTION,
    FLIPPED,
    GROUP,
    PROMPT,
    REJECTED,
    REWARD,
    SCORE_CHOSEN,
    SCORE_REJECTED,
)
from fused_prefopt.data.corpus import Document, paragraphs

PHRASE_WORDS = 3
PROMPT_FRACTION = (0.3, 0.5)
STRENGTH = (0.2, 1.0)


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


@dataclass(frozen=True)
class Prompt:
    """The start of a paragraph.

    Attributes:
        text: its first 30 to 50 % of words.
        continuation: the rest, beginning with a space: text + continuation is the paragraph.
        document: index of the document among those with a paragraph.
        key: names the paragraph; seeds whatever is drawn for it.
    """

    text: str
    continuation: str
    document: int
    key: str


class PromptPool:
    """All prompts of some documents.

    Args:
        documents: at least two of them with a paragraph, as foreign text comes from another one.
        seed: another seed gives other cuts and other corruptions.

    Raises:
        ValueError: fewer than two documents have a paragraph.
    """

    def __init__(self, documents: Iterable[Document], seed: int = 0) -> None:
        self.seed = seed
        self._by_document: list[list[Prompt]] = []
        for document in documents:
            index = len(self._by_document)
            found = [
                self._cut(text, index, f"{document.name}/{place}")
                for place, text in enumerate(paragraphs(document))
            ]
            if found:
                self._by_document.append(found)
        if len(self._by_document) < 2:
            raise ValueError(
                f"documents: got {len(self._by_document)} with a paragraph, wanted at least 2"
            )

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt, in document order."""
        return [prompt for group in self._by_document for prompt in group]

    def rng(self, prompt: Prompt, purpose: str) -> random.Random:
        """Random numbers that depend on the seed, the prompt and the purpose alone."""
        # A string seed is hashed with SHA-512: the same in every process and on every platform.
        return random.Random(f"{self.seed}/{purpose}/{prompt.key}")

    def corrupted(
        self, prompt: Prompt, count: int, kinds: Sequence[str] = tuple(CORRUPTIONS)
    ) -> list[tuple[str, Corruption]]:
        """Distinct worsened continuations of one prompt.

        Args:
            prompt: one of `prompts`.
            count: how many to draw; fewer come back when two coincide or nothing changed.
            kinds: names in `CORRUPTIONS`; each is used once before any is used again.

        Returns:
            (kind, corruption) for each.
        """
        rng = self.rng(prompt, "corruption")
        order = rng.sample(list(kinds), len(kinds))
        drawn: dict[str, tuple[str, Corruption]] = {}
        for i in range(count):
            kind = order[i % len(order)]
            strength = rng.uniform(*STRENGTH)
            result = corrupt(kind, prompt.continuation, strength, rng, self._foreign(prompt, rng))
            if result.severity > 0:
                drawn.setdefault(result.text, (kind, result))
        return list(drawn.values())

    def _cut(self, text: str, document: int, key: str) -> Prompt:
        words = text.split()
        share = random.Random(f"{self.seed}/cut/{key}").uniform(*PROMPT_FRACTION)
        size = round(share * len(words))
        return Prompt(" ".join(words[:size]), " " + " ".join(words[size:]), document, key)

    def _foreign(self, prompt: Prompt, rng: random.Random) -> str:
        other = rng.randrange(len(self._by_document) - 1)
        other += other >= prompt.document
        return rng.choice(self._by_document[other]).continuation


def make_pairs(
    documents: Iterable[Document],
    *,
    seed: int = 0,
    flip_rate: float = 0.0,
    per_prompt: int = 1,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Make one or more preference pairs of every paragraph.

    The same arguments give the same pairs in every process. `flip_rate` changes which side is
    called chosen and nothing else.

    Args:
        documents: one side of `split_documents`.
        seed: another seed gives other cuts, corruptions and flips.
        flip_rate: fraction of pairs with a wrong label, in [0, 1]; exactly round(rate · pairs).
        per_prompt: pairs per paragraph, each with another corruption.
        kinds: names in `CORRUPTIONS`.
        limit: number of pairs to keep, drawn evenly over all documents; None keeps all.

    Returns:
        Records with `prompt`, `chosen`, `rejected` (texts), `score_chosen` = 1,
        `score_rejected` = 1 − severity, `corruption` (the kind) and `flipped`. Pairs come in a
        shuffled order. A flipped pair has its texts exchanged and keeps its scores: the annotator
        was wrong about both, and only `flipped` tells.

    Raises:
        ValueError: `flip_rate` is outside [0, 1], or fewer than two documents have a paragraph.
    """
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"flip_rate: got {flip_rate}, wanted a fraction in [0, 1]")
    pool = PromptPool(documents, seed)
    records: list[dict[str, Any]] = [
        {
            PROMPT: prompt.text,
            CHOSEN: prompt.continuation,
            REJECTED: corruption.text,
            SCORE_CHOSEN: 1.0,
            SCORE_REJECTED: 1.0 - corruption.severity,
            CORRUPTION: kind,
            FLIPPED: False,
        }
        for prompt in pool.prompts
        for kind, corruption in pool.corrupted(prompt, per_prompt, kinds)
    ]
    random.Random(f"{seed}/order").shuffle(records)
    records = records[:limit]
    flips = random.Random(f"{seed}/flips").sample(
        range(len(records)), round(flip_rate * len(records))
    )
    for index in flips:
        record = records[index]
        record[CHOSEN], record[REJECTED] = record[REJECTED], record[CHOSEN]
        record[FLIPPED] = True
    return records


def make_points(
    documents: Iterable[Document],
    *,
    seed: int = 0,
    completions: int = 4,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rate the true continuation and some spoilt ones of every paragraph.

    Args:
        documents: one side of `split_documents`.
        seed: another seed gives other cuts and corruptions.
        completions: per prompt, the true one included; now and then one fewer, when two
            corruptions coincide.
        kinds: names in `CORRUPTIONS`.
        limit: number of prompts to keep, drawn evenly over all documents; None keeps all.

    Returns:
        Records with `prompt`, `completion` (texts), `reward` (1 for the true continuation,
        1 − severity for a spoilt one) and `group`, 0, 1, … per prompt. A prompt's completions
        stand together, the true one first; prompts come in a shuffled order.

    Raises:
        ValueError: `completions` is below 1, or fewer than two documents have a paragraph.
    """
    if completions < 1:
        raise ValueError(f"completions: got {completions}, wanted at least 1")
    pool = PromptPool(documents, seed)
    prompts = pool.prompts
    random.Random(f"{seed}/order").shuffle(prompts)
    records = []
    for group, prompt in enumerate(prompts[:limit]):
        rated = [(prompt.continuation, 1.0)] + [
            (corruption.text, 1.0 - corruption.severity)
            for _, corruption in pool.corrupted(prompt, completions - 1, kinds)
        ]
        records += [
            {PROMPT: prompt.text, COMPLETION: text, REWARD: reward, GROUP: group}
            for text, reward in rated
        ]
    return records
