"""The batch fields a loss needs beyond `policy` and `lengths`, and what to say without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from fused_prefopt.types import LogpBatch

WHAT_IT_IS = {
    "reference": "(S,) summed log-probs of the completions under the reference model",
    "rewards": "(S,) scores of the completions from a reward model, rule or annotator",
    "desirable": "(S,) bool, whether each completion is a desired one",
    "kl": "a scalar estimate of KL(policy || reference)",
    "prompt": "(S,) summed log-probs of the prompts, first token excluded, under the policy",
    "prompt_reference": "(S,) the prompts' summed log-probs under the reference model",
    "groups": "(S,) integers, equal for the completions of one prompt",
    "sequence_kl": "(S,) sums over tokens of KL(reference || policy)",
    "collision": "(S,) sums over tokens of log Σ π(v)²; `PreferenceLoss` computes it if need be",
}


def check_needs(name: str, needs: Iterable[str], given: Collection[str]) -> None:
    """Raise ValueError, naming the loss and the field, unless all of `needs` are `given`.

    Args:
        name: who needs them, for the message.
        needs: `LogpBatch` fields.
        given: the fields that are not None, such as `LogpBatch.given`.

    Raises:
        ValueError: a field is missing.
    """
    for field in sorted(needs):
        if field not in given:
            raise ValueError(f"{name} needs `{field}`: {WHAT_IT_IS[field]}")


def needed(batch: LogpBatch, field: str) -> Tensor:
    """The named field of `batch`; ValueError if the batch comes without it."""
    check_needs("this loss", (field,), batch.given)
    value: Tensor = getattr(batch, field)
    return value


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected half of a pairwise field.

    Args:
        values: (S,), chosen first.

    Returns:
        Two views, (S/2,) each.

    Raises:
        ValueError: S is odd.
    """
    size = values.shape[0]
    if size % 2:
        raise ValueError(
            f"policy: got {size} sequences, wanted an even number: chosen first, then rejected"
        )
    return values[: size // 2], values[size // 2 :]


def per_token(values: Tensor, batch: LogpBatch) -> Tensor:
    """``values / max(1, lengths)``, (S,): an empty completion, of sum 0, has mean 0."""
    return values / batch.lengths.clamp(min=1)
