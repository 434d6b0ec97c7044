"""Collators: token ids of pairs, completions or lists of them as a batch, padded or packed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.checks import require_choice, require_shape, require_tokens
from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    COMPLETION_IDS,
    COMPLETION_MASK,
    GOLD_IDS,
    GROUP,
    INPUT_IDS,
    LABEL_COUNTS,
    NUM_SEQUENCES,
    OF_GOLD,
    PAIR_FIELDS,
    PAIR_IDS,
    PAIR_REFERENCES,
    POINT_FIELDS,
    POSITION_IDS,
    PROMPT_IDS,
    SEQUENCE_IDS,
    TARGET_SEQUENCES,
    TOKEN_WEIGHTS,
    feature_at,
    is_given,
    require_columns,
    stacked,
)
from fused_prefopt.data.labels import count_groups, count_labels
from fused_prefopt.data.list_rows import Member, members_of
from fused_prefopt.data.shared_prompts import shared_layout
from fused_prefopt.data.token_weights import of_targets, spread, token_weights
from fused_prefopt.data.truncation import TRUNCATION_MODES, cut_side

Feature = Mapping[str, Any]


@dataclass
class _Collator:
    """Layout of sequences, padded or packed."""

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    vocab_size: int | None = field(default=None, kw_only=True)
    max_length: int | None = field(default=None, kw_only=True)
    truncation_mode: str = field(default="keep_start", kw_only=True)

    def __post_init__(self) -> None:
        require_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        if self.pad_token_id is None:
            raise ValueError("pad_token_id: got None, wanted an int (the eos token's will do)")
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError("pad_to_multiple_of: got a number with padding_free, wanted None")

    @property
    def has_row_for_each(self) -> bool:
        """Whether each sequence has a row of the batch, so that rows can be dealt out."""
        return not self.padding_free

    def _layout(self, features: Sequence[Feature], completions: Sequence[str]) -> dict[str, Any]:
        """Lay out prompt + completion of every feature, for one completion column after another."""
        sequences = self._sequences(features, completions)
        batch = self._packed(sequences) if self.padding_free else self._padded(sequences)
        batch[LABEL_COUNTS] = count_labels(batch)
        weights = self._token_weights(features, completions)
        if weights is not None:
            batch[TOKEN_WEIGHTS] = spread(weights, batch[COMPLETION_MASK])
        return batch

    def _token_weights(
        self, features: Sequence[Feature], completions: Sequence[str]
    ) -> list[Tensor] | None:
        """Weights of the completions' tokens, cut as these are, or None."""
        return token_weights(features, completions, self.max_length, self.truncation_mode)

    def _sequences(
        self, features: Sequence[Feature], completions: Sequence[str]
    ) -> list[tuple[Tensor, Tensor]]:
        """(prompt, completion) of every feature, cut, for one completion column after another."""
        sequences = []
        for column in completions:
            for index, feature in enumerate(features):
                where = feature_at(index, feature)
                prompt, completion = (
                    _tokens(feature[name], name, where, self.vocab_size)
                    for name in (PROMPT_IDS, column)
                )
                if completion.numel() == 0:
                    raise ValueError(f"{column}: {where} is empty, wanted at least 1 token")
                side = cut_side(prompt, completion, self.max_length, self.truncation_mode)
                # Nothing predicts the first token of what is left.
                labels = side[1].numel() - (side[0].numel() == 0)
                if labels < 1 and sum(map(len, side)) < len(prompt) + len(completion):
                    raise ValueError(
                        f"{column}: {where} has no token to predict within max_length"
                        f" ({self.max_length}), wanted at least 1; drop the row or raise max_length"
                    )
                sequences.append(side)
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
            INPUT_IDS: input_ids,
            ATTENTION_MASK: attention_mask,
            COMPLETION_MASK: completion_mask,
        }

    def _packed(self, sequences: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        parts = [part for sequence in sequences for part in sequence]
        lengths = torch.tensor([len(prompt) + len(end) for prompt, end in sequences])
        is_completion = torch.tensor([0, 1]).repeat(len(sequences))
        return {
            INPUT_IDS: torch.cat(parts)[None],
            POSITION_IDS: torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            COMPLETION_MASK: torch.repeat_interleave(
                is_completion, torch.tensor([len(part) for part in parts])
            )[None],
            SEQUENCE_IDS: torch.repeat_interleave(torch.arange(len(sequences)), lengths)[None],
            NUM_SEQUENCES: len(sequences),
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
        max_length: tokens of prompt and completion together, to which longer ones are cut; None
            cuts nothing.
        truncation_mode: "keep_start" or "keep_end"; which tokens a cut leaves, see `cut_side`.
        shared_prompt: lay a pair out in one row with its prompt once, which the backbone then
            computes once. For models whose attention is `eager` or `sdpa`, under
            `integrations.transformers`; an (L, L) mask a pair is built.

    Raises:
        ValueError: `pad_token_id` is None, `truncation_mode` is unknown, or `padding_free` comes
            with `pad_to_multiple_of` or `shared_prompt`.
    """

    shared_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding_free and self.shared_prompt:
            raise ValueError("shared_prompt: got True with padding_free, wanted one of them")

    @property
    def has_row_for_each(self) -> bool:
        """Whether each sequence has a row of the batch, so that rows can be dealt out."""
        return super().has_row_for_each and not self.shared_prompt

    def _layout(self, features: Sequence[Feature], completions: Sequence[str]) -> dict[str, Any]:
        if not self.shared_prompt:
            return super()._layout(features, completions)
        sequences, pairs = self._sequences(features, completions), len(features)
        halves = zip(sequences[:pairs], sequences[pairs:], strict=True)
        batch = shared_layout(list(halves), self.pad_token_id, self.pad_to_multiple_of or 1)
        weights = self._token_weights(features, completions)
        if weights is not None:
            batch[TOKEN_WEIGHTS] = of_targets(weights, batch[TARGET_SEQUENCES])
        return batch

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Make a batch of B pairs: sequences 0..B−1 are chosen, B..2B−1 rejected.

        Args:
            features: B dicts with `prompt_ids`, `chosen_ids`, `rejected_ids` and optionally
                `score_chosen` with `score_rejected`, `collision_chosen` with
                `collision_rejected`, `ref_chosen_logps`, `ref_rejected_logps`, `weight`,
                `gold_ids`, and `chosen_token_weights` with `rejected_token_weights`, and
                `gold_token_weights`, lists as long as the ids.

        Returns:
            Padded on the right: `input_ids`, `attention_mask`, `completion_mask`, (2B, L) int64.
            Packed: `input_ids`, `position_ids` (restarting at each sequence), `completion_mask`,
            `sequence_ids`, (1, N) int64, and `num_sequences` = 2B, a Python int: device placement
            leaves it alone and reading it never waits for the device.
            Both: `label_counts` (`data.labels.LabelCounts`), which spares CUDA the wait for the
            number of labels; without it, or cut and joined by accelerate, it is counted there.
            Where `completion_mask` changes afterwards, take it out.
            Shared prompts: what `shared_layout` returns.
            If the features have them: `rewards` (where none lacks a score), `collision`, `weights`
            (2B,), `ref_chosen_logps`, `ref_rejected_logps` (B,), and `token_weights`, laid out as
            `completion_mask` or as `targets`, all float32; and the layout of B gold completions
            behind their prompts, its names after `gold_`. Never `labels`: transformers'
            Trainer would rescale the loss by them; see `data.labels_of`.

        Raises:
            ValueError: no feature, a missing column or value, an empty completion, also after the
                cut, a token id outside the vocabulary, a score or log-prob that is no finite
                number, or a weight that is none or negative.
        """
        _require_features(features, (PROMPT_IDS, *PAIR_IDS))
        batch = self._layout(features, PAIR_IDS)
        if is_given(features, GOLD_IDS):
            batch |= self._gold(features)
        sources = PAIR_FIELDS | {name: (name,) for name in PAIR_REFERENCES}
        return batch | _fields(features, sources)

    def _gold(self, features: Sequence[Feature]) -> dict[str, Any]:
        """The gold completions' own layout, in which each has its prompt."""
        _require_features(features, (GOLD_IDS,))
        part = super()._layout(features, (GOLD_IDS,))
        return {OF_GOLD + name: value for name, value in part.items()}


@dataclass
class PointCollator(_Collator):
    """Collate rated or binary-labelled completions, one sequence each.

    Args:
        pad_token_id: fills the padded positions of `input_ids`.
        padding_free: pack all sequences into one row instead of padding them, for models that
            tell them apart by their `position_ids`.
        pad_to_multiple_of: round the padded length up to a multiple, or None.
        vocab_size: rows of the model's input embedding, to check token ids; None does not.
        max_length: tokens of prompt and completion together, to which longer ones are cut; None
            cuts nothing.
        truncation_mode: "keep_start" or "keep_end"; which tokens a cut leaves, see `cut_side`.

    Raises:
        ValueError: `pad_token_id` is None, `truncation_mode` is unknown, or `pad_to_multiple_of`
            comes with `padding_free`.
    """

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Make a batch of S sequences, in the order of the features.

        Args:
            features: S dicts with `prompt_ids`, `completion_ids` and any of `reward`, `group`,
                `desirable`, `reference`, `prompt_reference`, `sequence_kl`, `collision`, `weight`
                and `token_weights`, a list as long as `completion_ids`. The
                completions of one prompt may be spread over several batches.

        Returns:
            The layouts of `PairCollator` with S sequences, and for the columns that the features
            have: `rewards` (where none lacks one), `reference`, `prompt_reference`,
            `sequence_kl`, `collision`, `weights` (S,) float32, `groups` (S,) int64, `desirable`
            (S,) bool, `token_weights` laid out as `completion_mask`.

        Raises:
            ValueError: no feature, a missing column or value, an empty completion, also after the
                cut, a token id outside the vocabulary, a number that is not finite, a weight that
                is negative, a group that is no integer, or a label neither a bool nor 0 or 1.
        """
        _require_features(features, (PROMPT_IDS, COMPLETION_IDS))
        batch = self._layout(features, (COMPLETION_IDS,))
        return count_groups(batch | _fields(features, POINT_FIELDS))


@dataclass
class ListCollator(PointCollator):
    """Collate lists of scored completions, a row of the data set each, so that none is torn apart.

    The batch is that of `PointCollator` on the completions of one list after another, whose place
    among the lists is their group: losses on pairs take every two completions of a list that their
    scores tell apart as a pair (see `LogpBatch`), those on single completions take them as they
    are. To the former a list without two different scores counts 0, though it is one of the B whose
    mean they take; `tokenise_lists` drops it.

    Args:
        pad_token_id, padding_free, pad_to_multiple_of, vocab_size, max_length, truncation_mode: of
            `PointCollator`.
    """

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Make a batch of B lists with S completions in all, list after list.

        Args:
            features: B dicts with `prompt_ids`, `completions_ids` (K lists of token ids), `rewards`
                (K numbers) and optionally `references`, `prompt_references` (K numbers),
                `completions_token_weights` (K lists, as long as the ids), `collisions` (K numbers)
                and `weight`, the list's.
                Pairs, as `PairCollator` takes them, are lists of two: rated by their scores, of
                which the chosen one must be higher, or without them 1 and 0.

        Returns:
            That of `PointCollator`, with `groups` 0..B−1 and `rewards` always.

        Raises:
            ValueError: as `PointCollator` does; a column has not an entry for each completion, or a
                pair's scores do not say that chosen is better.
        """
        if not features:
            raise ValueError("features: got an empty list, wanted at least one feature")
        return super().__call__(
            [
                Member({**member, GROUP: group}, member.place)
                for group, feature in enumerate(features)
                for member in members_of(feature, feature_at(group, feature))
            ]
        )


def _fields(features: Sequence[Feature], sources: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Fields of a batch, each of the columns that it is made of, if the features have them."""
    return {
        name: torch.cat([stacked(features, column) for column in columns])
        for name, columns in sources.items()
        if is_given(features, *columns)
    }


def _tokens(ids: Any, column: str, where: str, vocab_size: int | None) -> Tensor:
    """(n,) int64 token ids of a feature, checked."""
    try:
        tokens = torch.as_tensor(ids, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{column}: {where} is no list of token ids: {error}") from error
    require_shape(f"{column} of {where}", tokens, ("tokens",))
    require_tokens(f"{column} of {where}", tokens, vocab_size)
    return tokens


def _require_features(features: Sequence[Feature], wanted: Sequence[str]) -> None:
    if not features:
        raise ValueError("features: got an empty list, wanted at least one feature")
    for index, feature in enumerate(features):
        require_columns(feature, wanted, feature_at(index, feature))


class GroupBatchSampler:
    """Batches of whole groups, for losses that average over the completions of a prompt.

    Each epoch visits every index once. A group never spans two batches unless it is larger than a
    batch. Pass it to a DataLoader as `batch_sampler`.

    Args:
        groups: one integer per dataset row, equal for the completions of one prompt.
        batch_size: most rows in a batch.
        shuffle: visit the groups in another order each epoch.
        seed: of the order; the same seed and epoch give the same batches in every process.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    drop_last = False

    def __init__(
        self, groups: Sequence[int], batch_size: int, shuffle: bool = True, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, wanted at least 1")
        rows: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(int(group), []).append(row)
        self._rows = list(rows.values())
        self._most = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def batch_size(self) -> int | None:
        """Rows in every batch but the last, or None when they may differ.

        accelerate reads it, and skips batches of any other size when it deals them to processes.
        """
        sizes = {len(rows) for rows in self._rows}
        return self._most if len(sizes) == 1 and self._most % sizes.pop() == 0 else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        order = list(self._rows)
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        batches: list[list[int]] = []
        for rows in order:
            if not batches or len(batches[-1]) + len(rows) > self._most:
                batches += [rows[i : i + self._most] for i in range(0, len(rows), self._most)]
            else:
                batches[-1] = batches[-1] + rows
        return batches
