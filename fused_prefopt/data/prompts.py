"""Paragraphs cut into a prompt and its true continuation, and ways to spoil the continuation."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fused_prefopt.data.corruptions import CORRUPTIONS, Corruption, corrupt
from fused_prefopt.data.docstrings import Document, paragraphs

PROMPT_FRACTION = (0.3, 0.5)
STRENGTH = (0.2, 1.0)


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
