"""Collators: token ids of pairs or points become one batch, padded or packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.checks import require_shape, require_tokens
from fused_prefopt.data.columns import SCORES, require_columns
from fused_prefopt.data.feature_columns import is_given, stacked
from fused_prefopt.data.labels import LABEL_COUNTS, count_labels
from fused_prefopt.data.shared_prompt import shared_layout

Feature = Mapping[str, Any]
POINT_COLUMNS = {
    "reward": ("rewards", torch.float32),
    "group": ("groups", torch.int64),
    "desirable": ("desirable", torch.bool),
    "reference": ("reference", torch.float32),
    "prompt_reference": ("prompt_reference", torch.float32),
    "sequence_kl": ("sequence_kl", torch.float32),
    "collision": ("collision", torch.float32),
}
# Columns of a pair's two completions that become one field, chosen first.
PAIR_COLUMNS = {
    "rewards": SCORES,
    "collision": ("collision_chosen", "collision_rejected"),
}


@dataclass
class _Collator:
    """How sequences are laid out, padded or packed."""

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ValueError("pad_token_id: got None, wanted an int (the eos token's will do)")
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError("pad_to_multiple_of: got a number with padding_free, wanted None")

    def _layout(self, features: Sequence[Feature], completions: Sequence[str]) -> dict[str, Any]:
        """Lay out prompt + completion of every feature, for one completion column after another."""
        sequences = self._sequences(features, completions)
        batch = self._packed(sequences) if self.padding_free else self._padded(sequences)
        return {**batch, LABEL_COUNTS: count_labels(batch)}

    def _sequences(
        self, features: Sequence[Feature], completions: Sequence[str]
    ) -> list[tuple[Tensor, Tensor]]:
        """(prompt, completion) of every feature, for one completion column after another."""
        sequences = []
        for column in completions:
            for index, feature in enumerate(features):
                prompt, completion = (
                    _tokens(feature[name], name, index, self.vocab_size)
                    for name in ("prompt_ids", column)
                )
                if completion.numel() == 0:
                    raise ValueError(f"{column}: feature {index} is empty, wanted at least 1 token")
                sequences.append((prompt, completion))
        return sequences

    def _padded(self, sequences: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        multiple = self.pad_to_multiple_of or 1
        longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
        shape = (len(sequences), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        completion_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (prompt, completion) in enumerate(sequences):
            end = len(prompt) + len(completion)
            input_ids[row, :end] = torch.cat((prompt, completion))
            attention_mask[row, :end] = 1
            completion_mask[row, len(prompt) : end] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
        }

    def _packed(self, sequences: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        parts = [part for sequence in sequences for part in sequence]
        lengths = torch.tensor([len(prompt) + len(end) for prompt, end in sequences])
        is_completion = torch.tensor([0, 1]).repeat(len(sequences))
        return {
            "input_ids": torch.cat(parts)[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            "completion_mask": torch.repeat_interleave(
                is_completion, torch.tensor([len(part) for part in parts])
            )[None],
            "sequence_ids": torch.repeat_interleave(torch.arange(len(sequences)), lengths)[None],
            "num_sequences": len(sequences),
        }


@dataclass
class PairCollator(_Collator):
    """Collate preference pairs into TRL's concatenated layout.

    Args:
        pad_token_id: fills the padded positions of `input_ids`.
        padding_free: pack all sequences into one row instead of padding them, for models that
            tell them apart by their `position_ids`.
        pad_to_multiple_of: round the padded length up to a multiple, or None.
        vocab_size: rows of the model's input embedding, to check token ids; None does not.
        shared_prompt: lay a pair out in one row with its prompt once, which the backbone then
            computes once. For models whose attention is `eager` or `sdpa`, under
            `integrations.transformers`; an (L, L) mask a pair is built.

    Raises:
        ValueError: `pad_token_id` is None, or `padding_free` comes with `pad_to_multiple_of` or
            `shared_prompt`.
    """

    shared_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding_free and self.shared_prompt:
            raise ValueError("shared_prompt: got True with padding_free, wanted one of them")

    def _layout(self, features: Sequence[Feature], completions: Sequence[str]) -> dict[str, Any]:
        if not self.shared_prompt:
            return super()._layout(features, completions)
        sequences, pairs = self._sequences(features, completions), len(features)
        triples = [(*sequences[pair], sequences[pairs + pair][1]) for pair in range(pairs)]
        return shared_layout(triples, self.pad_token_id, self.pad_to_multiple_of or 1)

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Make a batch of B pairs: sequences 0..B−1 are chosen, B..2B−1 rejected.

        Args:
            features: B dicts with `prompt_ids`, `chosen_ids`, `rejected_ids` and optionally
                `score_chosen` with `score_rejected`, `collision_chosen` with
                `collision_rejected`, `ref_chosen_logps`, `ref_rejected_logps`.

        Returns:
            Padded on the right: `input_ids`, `attention_mask`, `completion_mask`, (2B, L) int64.
            Packed: `input_ids`, `position_ids` (restarting at each sequence), `completion_mask`,
            `sequence_ids`, (1, N) int64, and `num_sequences` = 2B, a Python int: device placement
            leaves it alone and reading it never waits for the device.
            Both: `label_counts` (`data.labels.LabelCounts`), which spares CUDA the wait for the
            number of labels; without it, or cut and joined by accelerate, it is counted there.
            Where `completion_mask` changes afterwards, take it out.
            Shared prompts: what `data.shared_prompt.shared_layout` returns.
            If the features have them: `rewards` (where none lacks a score), `collision` (2B,) and
            `ref_chosen_logps`, `ref_rejected_logps` (B,), float32. Never `labels`: transformers'
            Trainer would rescale the loss by them; see `data.labels_of`.

        Raises:
            ValueError: no feature, a missing column or value, an empty completion, a token id
                outside the vocabulary, or a score or log-prob that is no finite number.
        """
        _require_features(features, ("prompt_ids", "chosen_ids", "rejected_ids"))
        batch = self._layout(features, ("chosen_ids", "rejected_ids"))
        for joined, names in PAIR_COLUMNS.items():
            if is_given(features, *names):
                columns = [stacked(features, name) for name in names]
                batch[joined] = torch.cat(columns)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if is_given(features, name):
                batch[name] = stacked(features, name)
        return batch


@dataclass
class PointCollator(_Collator):
    """Collate rated or binary-labelled completions, one sequence each.

    Args:
        pad_token_id: fills the padded positions of `input_ids`.
        padding_free: pack all sequences into one row instead of padding them, for models that
            tell them apart by their `position_ids`.
        pad_to_multiple_of: round the padded length up to a multiple, or None.
        vocab_size: rows of the model's input embedding, to check token ids; None does not.

    Raises:
        ValueError: `pad_token_id` is None, or `pad_to_multiple_of` comes with `padding_free`.
    """

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Make a batch of S sequences, in the order of the features.

        Args:
            features: S dicts with `prompt_ids`, `completion_ids` and any of `reward`, `group`,
                `desirable`, `reference`, `prompt_reference`, `sequence_kl`, `collision`. The
                completions of one prompt may be spread over several batches.

        Returns:
            The layouts of `PairCollator` with S sequences, and for the columns that the features
            have: `rewards` (where none lacks one), `reference`, `prompt_reference`,
            `sequence_kl`, `collision` (S,) float32, `groups` (S,) int64, `desirable` (S,) bool.

        Raises:
            ValueError: no feature, a missing column or value, an empty completion, a token id
                outside the vocabulary, a number that is not finite, a group that is no integer, or
                a label neither a bool nor 0 or 1.
        """
        _require_features(features, ("prompt_ids", "completion_ids"))
        batch = self._layout(features, ("completion_ids",))
        for column, (name, dtype) in POINT_COLUMNS.items():
            if is_given(features, column):
                batch[name] = stacked(features, column, dtype)
        return batch


def _tokens(ids: Any, column: str, index: int, vocab_size: int | None) -> Tensor:
    """(n,) int64 token ids of a feature, checked."""
    try:
        tokens = torch.as_tensor(ids, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{column}: feature {index} is no list of token ids: {error}") from error
    require_shape(f"{column} of feature {index}", tokens, ("tokens",))
    require_tokens(f"{column} of feature {index}", tokens, vocab_size)
    return tokens


def _require_features(features: Sequence[Feature], wanted: Sequence[str]) -> None:
    if not features:
        raise ValueError("features: got an empty list, wanted at least one feature")
    for index, feature in enumerate(features):
        require_columns(feature, wanted, f"feature {index}")
