"""TRL's trainer on single completions, with a point-wise loss of this package (KTO, DRO, …)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import has_length
from trl import KTOConfig, KTOTrainer, extract_prompt

from fused_prefopt.data import PointCollator
from fused_prefopt.data.columns import (
    CHOSEN,
    COMPLETION,
    COMPLETION_IDS,
    DESIRABLE,
    GROUP,
    GROUPS,
    KL,
    LABEL,
    LABEL_REWARDS,
    LAYOUT,
    MADE_UP_REWARDS,
    MISMATCHED,
    PAIR,
    PROMPT,
    PROMPT_IDS,
    PROMPT_REFERENCE,
    RATINGS,
    REF_KL_LOGPS,
    REF_LOGPS,
    REF_PROMPT_LOGPS,
    REFERENCE,
    REJECTED,
    REWARD,
    REWARDS,
    SCORE_CHOSEN,
    SCORE_REJECTED,
    SCORES,
    SPENT,
    TOKEN_WEIGHTS,
    TRL_REFERENCES,
    WEIGHT,
    WEIGHTS,
    WEIGHTS_OF_IDS,
    feature_at,
    finite_number,
    has_values,
    is_given,
    judgement,
    row_at,
    stacked,
)
from fused_prefopt.data.labels import count_groups
from fused_prefopt.data.truncation import cut_side
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.integrations.options import FusedOptions
from fused_prefopt.integrations.trl.common import FusesLoss
from fused_prefopt.integrations.trl.images import kept_examples
from fused_prefopt.integrations.trl.lists import OF_LISTS, has_lists, lists_of_rows, points_of
from fused_prefopt.integrations.trl.rows import Cut, require_sides, require_values
from fused_prefopt.models.model_call import IMAGES, TOKENWISE
from fused_prefopt.preference import PreferenceLoss

# Columns of values that reach the loss.
_VALUES = (LABEL, *RATINGS, *SCORES, *TRL_REFERENCES, WEIGHT)


@dataclass
class FusedKTOConfig(FusedOptions, KTOConfig):
    """`trl.KTOConfig` with a loss of this package; see `FusedOptions` for its options.

    The loss is one on single completions, or one on pairs where the rows make lists.

    `desirable_weight` and `undesirable_weight` are hyperparameters of the loss, as `beta` is;
    `loss_type` names the same loss as in TRL, where `loss` keeps its default.

    Args:
        padding_free: pack the completions of a batch into one row instead of padding them, and the
            mismatched ones into another; as in `FusedDPOConfig`.
    """

    loss: list[Any] | str | None = field(
        default="kto", metadata={"help": "Name of a loss, or a sum of several."}
    )
    padding_free: bool = field(
        default=False, metadata={"help": "Whether a batch is packed into one row, not padded."}
    )

    pairwise: ClassVar[bool] = False
    makes_lists: ClassVar[bool] = True
    _VALID_DICT_FIELDS = [*getattr(KTOConfig, "_VALID_DICT_FIELDS", []), "loss_kwargs"]
    _trls_own: ClassVar[tuple[str, ...]] = ("loss_type",)
    _shared: ClassVar[tuple[str, ...]] = ("beta", "desirable_weight", "undesirable_weight")


class FusedKTOTrainer(FusesLoss, KTOTrainer):
    """`trl.KTOTrainer` whose loss is one of this package's, computed without logits.

    Rows are `prompt`, `completion` and `label` (desirable or not), a `reward`, `score` or `rating`
    (without one DRO's is ±1 by the label, which no log shows), or both, and a `group` (DRO's mean
    over the completions of a prompt); pairs become two rows, with their scores and a group (for a
    loss on pairs without scores rated 1 and 0). TRL's
    tokenisation, reference handling (model, adapter switch, precomputed) and logging stay as they
    are; rows that truncation leaves without a label are dropped, and a log message counts them.
    Rows of lists (`prompt`, `completions`, `rewards`, `scores` or `ratings`; see `FusedDPOTrainer`)
    are for losses on ratings, whose groups then stay whole. A loss on pairs takes lists too, and
    rows of single completions with a rating and a `group`: after tokenisation those of one group
    are put together to a list, in order of first appearance, so that a batch, an epoch and
    `per_device_train_batch_size` count prompts.
    Rows may have images: with a label, and references computed ahead for losses without `kl` and
    the prompts' reference alone.
    KTO's `kl` is estimated as TRL does, from completions set behind another prompt of their batch;
    a loss without it skips those two passes and takes any order of the rows and any batch size.
    The statistics of the loss are saved with the optimizer. LoRA on the head trains like any other.

    Beside TRL's KTO: a NaN loss stays one (TRL takes the mean over the others), the mean of `kl` is
    over all ranks' completions also in an evaluation's last batch, a step is the mean over all its
    completions and not of its batches' means, and log-probs have fp32 logits. Still TRL's: the
    data set's last row, where it is alone in its batch, is its own neighbour, which makes `kl` its
    log-ratio.

    Args:
        *args, **kwargs: of `trl.KTOTrainer`, with `args` a `FusedKTOConfig`, None for
            the default one.

    Raises:
        ValueError: `args` is no `FusedKTOConfig`, or names an unknown loss; the data set lacks what
            the loss needs (one on pairs: groups and ratings), has lists for a loss that needs
            labels, or in a stream, a score or log-prob that is not finite, or a
            label that is no bool, 0 or 1; there is a `compute_metrics`; with `padding_free` the
            model's attention lets packed sequences see one another.
    """

    config_type = FusedKTOConfig
    columns = _VALUES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._has_lists:
            self.data_collator: Any = _PointFields(self.data_collator, REWARDS in self.needs)

    def _of_loss(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = {
            name: value
            for name, value in inputs.items()
            if not name.startswith(MISMATCHED) and name not in _VALUES
        }
        batch[DESIRABLE] = inputs[LABEL].bool()
        if LABEL_REWARDS in inputs:
            batch |= {REWARDS: inputs[LABEL_REWARDS], MADE_UP_REWARDS: True}
        reference = self._reference_fields(model, inputs)
        reference_kl = reference.pop(KL, None)
        if reference_kl is not None:
            policy = self._logps(model, _mismatched(inputs))["completion"]
            # A rank whose data have ended has none.
            difference = (policy - reference_kl)[: 0 if inputs.get(SPENT) else None]
            count = torch.full_like(difference, 1.0)
            total = sum_over_ranks(torch.stack([difference.sum(), count.sum()]))
            batch[KL] = (total[0] / total[1]).clamp(min=0)
        return batch | reference

    def compute_ref_log_probs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """(B,) summed log-probs of the reference, in nats: completions, and mismatched ones."""
        own = self._reference_logps(model, inputs)["completion"]
        if not self.calculate_KL:
            return own, None
        return own, self._reference_logps(model, _mismatched(inputs))["completion"]

    def _reference_fields(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """`reference`, `prompt_reference` and the reference's part of `kl`, where they are used."""
        if not self.needs_reference:
            return {}
        if PROMPT_REFERENCE in self.needs:
            if REF_PROMPT_LOGPS in inputs:
                own, prompt = inputs[REF_LOGPS], inputs[REF_PROMPT_LOGPS]
            else:
                found = self._reference_logps(self._reference_of(model), inputs, prompt=True)
                own, prompt = found["completion"], found["prompt"]
            return {REFERENCE: own, PROMPT_REFERENCE: prompt}
        if REF_LOGPS in inputs:
            own, mismatched = inputs[REF_LOGPS], inputs.get(REF_KL_LOGPS)
        else:
            own, mismatched = self.compute_ref_log_probs(self._reference_of(model), inputs)
        fields = {REFERENCE: own}
        return fields if mismatched is None else fields | {KL: mismatched}

    def _collator(self, layout: str | None) -> _Packed:
        pad = self.data_collator.pad_token_id
        return _Packed(PointCollator(pad, padding_free=True, max_length=self.args.max_length))

    def _given_to_trl(self, config: Any, loss_fn: PreferenceLoss) -> dict[str, Any]:
        # By this name TRL decides whether to make mismatched completions.
        kind = "kto" if KL in loss_fn.loss.wants else "apo_zero_unpaired"
        # TRL compares these with the numbers of desirable and other rows.
        weights = {
            name: loss_fn.hyperparameters[name]
            for name in ("desirable_weight", "undesirable_weight")
            if name in loss_fn.hyperparameters
        }
        return super()._given_to_trl(config, loss_fn) | weights | {"loss_type": kind}

    def _fields_of_row(self, row: Mapping[str, Any]) -> set[str]:
        if LABEL not in row:
            raise ValueError(f"got {', '.join(row)}, needs a column 'label'")
        given = {REFERENCE, DESIRABLE, REWARDS, PROMPT, PROMPT_REFERENCE}
        return given | ({GROUPS} if GROUP in row else set())

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        require_values(dataset_name, dataset, self.columns)
        row = next(iter(dataset))
        of_lists = has_lists(row)
        if of_lists:
            self._refuse_labels(dataset_name)
            dataset = points_of(dataset, dataset_name)
            row = next(iter(dataset))
        require_sides(dataset_name, row, pairwise=False)
        valued = all(name in row for name in SCORES) or WEIGHT in row
        if (valued or self._makes_lists) and all(name in row for name in PAIR):
            if PROMPT not in row:
                dataset = dataset.map(extract_prompt)
            dataset = dataset.map(
                partial(_unpaired, ranked=self._makes_lists),
                batched=True,
                with_indices=True,
                remove_columns=list(next(iter(dataset))),
            )
            row = next(iter(dataset))
        if LABEL not in row and CHOSEN not in row:
            column = next((name for name in RATINGS if name in row), None)
            if DESIRABLE in self.needs or column is None:
                raise ValueError(f"train_dataset: got {', '.join(row)}, needs a column 'label'")
            dataset = dataset.map(partial(_label_of, column), with_indices=True)
        # In the data set named "train" TRL compares the labels' numbers with KTO's weights.
        name = dataset_name if DESIRABLE in self.needs else f"{dataset_name} (scored)"
        prepared = super()._prepare_dataset(dataset, processing_class, args, name)
        if not (of_lists or self._makes_lists):
            return prepared
        self._take_lists(dataset_name)
        lists = lists_of_rows(prepared, dataset_name)
        return self._kept_lists(lists, dataset_name, args) if self._makes_lists else lists

    def _refuse_labels(self, name: str) -> None:
        """Raise ValueError where the loss wants labels, which lists do not have."""
        if DESIRABLE in self.needs:
            raise ValueError(
                f"{name}_dataset: got rows of lists, which have ratings and no label, for a loss"
                f" that needs `{DESIRABLE}`; needs rows of `completion` and `label`, or a loss on"
                " ratings or pairs"
            )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self._is_vision_dataset and self.needs_reference:
            # TRL's neighbours of images are those of a batch of its collator, no part of the data.
            refused = {KL: self.calculate_KL, PROMPT_REFERENCE: PROMPT_REFERENCE in self.needs}
            for field, wanted in refused.items():
                if wanted:
                    raise ValueError(
                        f"precompute_ref_log_probs: got True with images and a loss that wants"
                        f" `{field}`, which is not computed ahead of images; needs False"
                    )
        if PROMPT_REFERENCE not in self.needs:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self._has_lists:
            return self._with_list_references(dataset, name, batch_size)
        return self._with_own_references(dataset, name, batch_size)

    def _with_own_references(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._require_own_references(dataset)
        rows = self._references_of(dataset, "", name, batch_size)
        columns = {REF_LOGPS: [row[REFERENCE] for row in rows]}
        if PROMPT_REFERENCE in self.needs:
            columns[REF_PROMPT_LOGPS] = [row[PROMPT_REFERENCE] for row in rows]
        elif self.calculate_KL:
            rows = self._references_of(dataset, MISMATCHED, name, batch_size)
            columns[REF_KL_LOGPS] = [row[REFERENCE] for row in rows]
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _references_of(
        self, dataset: Any, prefix: str, name: str, batch_size: int
    ) -> list[dict[str, Any]]:
        """`_own_reference_logps` of the completions in the columns with a prefix."""
        cut = Cut.of(self.args, pairwise=False)
        tokenwise = [
            each
            for each in (COMPLETION_IDS, TOKEN_WEIGHTS)
            if prefix + each in dataset.column_names
        ]
        features = [
            {PROMPT_IDS: row[PROMPT_IDS]}
            | {
                each: cut_side(row[PROMPT_IDS], row[prefix + each], cut.max_length, cut.mode)[1]
                for each in tokenwise
            }
            for row in dataset
        ]
        collator = PointCollator(self._tokenizer.pad_token_id)
        return self._own_reference_logps(features, collator, name, batch_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The rows in order where the configuration says so, which old transformers do not read."""
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "sequential" and has_length(data):
            return SequentialSampler(data)
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = (*RATINGS, GROUP, REF_PROMPT_LOGPS, WEIGHT, *WEIGHTS_OF_IDS.values(), *OF_LISTS)
        self._signature_columns += [name for name in extra if name not in self._signature_columns]


def _mismatched(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of mismatched completions, behind the prompts and the images of the others."""
    batch = {name: inputs[name] for name in IMAGES if name in inputs}
    return batch | {
        name: inputs[f"{MISMATCHED}{name}"]
        for name in (*LAYOUT, *TOKENWISE)
        if f"{MISMATCHED}{name}" in inputs
    }


def _label_of(column: str, row: Mapping[str, Any], index: int) -> dict[str, bool]:
    return {LABEL: finite_number(column, row[column], row_at(index)) > 0}


def _unpaired(
    rows: dict[str, list[Any]], indices: list[int], *, ranked: bool
) -> dict[str, list[Any]]:
    """Two rows of each pair, chosen first, with its scores, or `ranked` without, and its weight."""
    points = {
        PROMPT: [prompt for prompt in rows[PROMPT] for _ in PAIR],
        COMPLETION: _interleaved(rows[CHOSEN], rows[REJECTED]),
        LABEL: [label for _ in indices for label in (True, False)],
    }
    scored = all(name in rows for name in SCORES)
    if scored:
        points[REWARD] = _interleaved(rows[SCORE_CHOSEN], rows[SCORE_REJECTED])
    elif ranked:
        points[REWARD] = [reward for _ in indices for reward in (1.0, 0.0)]
    if scored or ranked:
        points[GROUP] = [index for index in indices for _ in PAIR]
    if WEIGHT in rows:
        points[WEIGHT] = _interleaved(rows[WEIGHT], rows[WEIGHT])
    return points


def _interleaved(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    return [value for pair in zip(chosen, rejected, strict=True) for value in pair]


@dataclass
class _Packed:
    """TRL's rows, packed: the completions in one row, the mismatched ones in another."""

    points: PointCollator
    has_row_for_each: ClassVar[bool] = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {LABEL: stacked(examples, LABEL)}
        for prefix in ("", MISMATCHED):
            column = f"{prefix}{COMPLETION_IDS}"
            if column in examples[0]:
                rows = [
                    {PROMPT_IDS: each[PROMPT_IDS], COMPLETION_IDS: each[column]}
                    for each in examples
                ]
                batch |= {f"{prefix}{name}": value for name, value in self.points(rows).items()}
        return batch


@dataclass
class _PointFields:
    """A collator of TRL's that also stacks whole score columns, groups, weights and references.

    Without scores, and where the loss needs some, a desirable completion is rated 1, another −1.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    needs_rewards: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for index, example in enumerate(examples):
            judgement(LABEL, example[LABEL], feature_at(index))
        batch = self.collator(examples)
        examples = kept_examples(batch, examples)
        first = examples[0]
        column = next((name for name in RATINGS if name in first), None)
        if column is None:
            if self.needs_rewards:
                batch[LABEL_REWARDS] = 2.0 * batch[LABEL].float() - 1.0
        elif all(has_values(example, (column,)) for example in examples):
            batch[REWARDS] = stacked(examples, column)
        if GROUP in first:
            batch[GROUPS] = stacked(examples, GROUP)
        if is_given(examples, WEIGHT):
            batch[WEIGHTS] = stacked(examples, WEIGHT)
        for name in TRL_REFERENCES:
            if name in first:
                batch[name] = stacked(examples, name)
        return count_groups(batch)
