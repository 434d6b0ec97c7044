"""The sizes that all trainings of the experiments share."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes of data, model and training; results of other settings are kept apart.

    Attributes:
        pairs: to train on.
        held_out: pairs to judge on, never with a wrong label.
        kinds: how rejected continuations were spoilt (`fused_prefopt.data.corruptions`); those
            that keep a text's length, lest every shift of log-probs per token look like a gap.
        vocabulary: entries of the tokenizer.
        hidden_size: of the Llama.
        layers: of the Llama.
        max_length: tokens of prompt and completion.
        pretraining_steps: of the reference, each of `2 * batch_size` blocks.
        steps: of each preference training.
        batch_size: pairs of a step, each with two completions.
        learning_rate: of each preference training, at its highest.
    """

    pairs: int = 1600
    held_out: int = 500
    kinds: tuple[str, ...] = ("foreign", "repeat", "shuffle")
    vocabulary: int = 1024
    hidden_size: int = 64
    layers: int = 2
    max_length: int = 96
    pretraining_steps: int = 300
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 5e-4

    @property
    def key(self) -> str:
        """Names the settings in paths."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]
