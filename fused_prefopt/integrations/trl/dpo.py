"""TRL's trainer on pairs, with a pairwise loss of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from fused_prefopt.data import PairCollator
from fused_prefopt.data.columns import (
    GOLD,
    GOLD_IDS,
    GOLD_LENGTHS,
    PAIR_IDS,
    PAIR_REFERENCES,
    PROMPT,
    PROMPT_IDS,
    PROMPT_LENGTHS,
    REF_CHOSEN_LOGPS,
    REFERENCE,
    REWARDS,
    SCORES,
    WEIGHT,
    WEIGHTS,
    WEIGHTS_OF_IDS,
    has_values,
    is_given,
    stacked,
)
from fused_prefopt.integrations.layouts import PADDING_FREE, SHARED_PROMPT
from fused_prefopt.integrations.options import FusedOptions
from fused_prefopt.integrations.trl.common import FusesLoss
from fused_prefopt.integrations.trl.gold import with_gold_ids
from fused_prefopt.integrations.trl.images import kept_examples
from fused_prefopt.integrations.trl.lists import OF_LISTS, has_lists, lists_by_pairs
from fused_prefopt.integrations.trl.rows import require_sides, require_values
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.preference import PreferenceLoss


@dataclass
class FusedDPOConfig(FusedOptions, DPOConfig):
    """`trl.DPOConfig` with a pairwise loss of this package; see `FusedOptions` for its options.

    TRL's options that choose and shape its loss (`loss_type`, `loss_weights`, `label_smoothing`,
    …) name the same loss here, where `loss` keeps its default; with a `loss` they must keep theirs.
    `ld_alpha` and `use_weighting` go with both.

    Args:
        padding_free: pack all sequences of a batch into one row instead of padding them, for
            models that tell them apart by their `position_ids`. TRL has this option and pads.
        shared_prompt: lay a pair out in one row with its prompt once, which the backbone then
            computes once, for models whose attention is `eager` or `sdpa`; an (L, L) mask a pair is
            built. The two are alternatives. Log-probs, losses and gradients are those of padded
            rows to rounding, cut by `max_length` and `truncation_mode` as these are; `num_tokens`
            counts a shared prompt once. A stream's batches are read by each process for itself.
    """

    shared_prompt: bool = field(
        default=False, metadata={"help": "Whether a pair's prompt is computed once."}
    )

    _VALID_DICT_FIELDS = [*getattr(DPOConfig, "_VALID_DICT_FIELDS", []), "loss_kwargs"]
    _trls_own: ClassVar[tuple[str, ...]] = (
        "loss_type",
        "loss_weights",
        "label_smoothing",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "discopop_tau",
    )


class FusedDPOTrainer(FusesLoss, DPOTrainer):
    """`trl.DPOTrainer` whose loss is one of this package's, computed without logits.

    TRL's datasets (texts or images), collation, reference handling (model, adapter switch,
    precomputed, here of images too), PEFT and logging stay as they are; the reference's log-probs
    come from the same op as the policy's; score columns `score_chosen` and `score_rejected` reach
    the loss as `rewards`, a column `weight` as `weights`, and a loss that needs a third completion
    takes `gold` or, by TRL's name in its `TPOTrainer`, `reference`. Rows of token ids
    (`prompt_ids`, `chosen_ids`, `rejected_ids`) are taken as they are, and then may have
    `gold_ids`, and `chosen_token_weights`, `rejected_token_weights` and `gold_token_weights`. Pairs
    that truncation leaves equal or without a label are dropped, and a log message counts them;
    where rows stream or have images it tells of the first. A loss
    without a reference keeps no reference model. Its metrics are logged instead of TRL's, by TRL's
    names; its statistics are saved with the optimizer. LoRA on the head, which TRL's own trainer
    refuses, trains like any other. A step is the mean over all its pairs, where TRL takes the mean
    of its batches' means.

    Args:
        *args, **kwargs: of `trl.DPOTrainer`, with `args` a `FusedDPOConfig`, None for
            the default one.

    Raises:
        ValueError: `args` is no `FusedDPOConfig`, or names an unknown or point-wise loss; the data
            set lacks what the loss needs, or has a score or log-prob that is not finite;
            there is a `compute_metrics`; a layout (`padding_free`, `shared_prompt`) contradicts
            another option, or the model: its attention does not keep sequences apart, it adds a
            router loss (`shared_prompt`), or its adapter learns a prompt.
    """

    config_type = FusedDPOConfig
    columns = (*SCORES, *PAIR_REFERENCES, WEIGHT)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._has_lists:
            self.data_collator: Any = _WithScores(self.data_collator)

    def _given_to_trl(self, config: Any, loss_fn: PreferenceLoss) -> dict[str, Any]:
        # TRL would say that it pads.
        return super()._given_to_trl(config, loss_fn) | {"padding_free": False}

    def _collator(self, layout: str | None) -> PairCollator:
        if layout == SHARED_PROMPT and self.aux_loss_enabled:
            raise ValueError(
                "shared_prompt: got True with a model that adds a router loss, which counts a"
                " prompt twice; needs False, or router_aux_loss_coef=0.0"
            )
        self.padding_free = layout == PADDING_FREE
        return PairCollator(
            self.data_collator.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            **({} if layout is None else {layout: True}),
        )

    def _of_loss(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = dict(inputs)
        separate = REFERENCE in self.needs and not self.needs & OF_BOTH_HEADS
        if separate and REF_CHOSEN_LOGPS not in batch:
            logps = self.compute_ref_log_probs(self._reference_of(model), inputs)
            batch |= dict(zip(PAIR_REFERENCES, logps, strict=True))
        return batch

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """(B,) chosen and (B,) rejected summed log-probs of the reference, in nats."""
        return self._reference_logps(model, inputs)["completion"].chunk(2)

    def _with_own_references(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._require_own_references(dataset)
        ids = (PROMPT_IDS, *PAIR_IDS)
        used = [*ids, *(WEIGHTS_OF_IDS[each] for each in PAIR_IDS)]
        features = list(dataset.select_columns([n for n in used if n in dataset.column_names]))
        cut = {"max_length": self.args.max_length, "truncation_mode": self.args.truncation_mode}
        collator = PairCollator(self._tokenizer.pad_token_id, **cut)
        rows = self._own_reference_logps(features, collator, name, batch_size)
        columns = {each: [row[each] for row in rows] for each in PAIR_REFERENCES}
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _fields_of_row(self, row: Mapping[str, Any]) -> set[str]:
        given = {REFERENCE, *OF_BOTH_HEADS, PROMPT, PROMPT_LENGTHS}
        given |= {GOLD, GOLD_LENGTHS} if GOLD_IDS in row else set()
        return given | ({REWARDS} if has_values(row, SCORES) else set())

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        def tokenise(rows: Any, uncut: Any) -> Any:
            # TRL's own: nothing is to be dropped before what belongs together is whole.
            return DPOTrainer._prepare_dataset(self, rows, processing_class, uncut, dataset_name)

        first = next(iter(dataset))
        if has_lists(first):
            lists = lists_by_pairs(dataset, dataset_name, args, tokenise)
            return self._kept_lists(lists, dataset_name, args)
        require_values(dataset_name, dataset, self.columns)
        require_sides(dataset_name, first, pairwise=True)
        if GOLD in self.needs:
            dataset = with_gold_ids(dataset, dataset_name, args, tokenise)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = (*self.columns, GOLD_IDS, *WEIGHTS_OF_IDS.values(), *OF_LISTS)
        self._signature_columns += [name for name in extra if name not in self._signature_columns]


@dataclass
class _WithScores:
    """A collator of TRL's that also stacks scores, where all examples have them, and weights.

    It checks the numbers of these and of the reference, which TRL's of images leaves out.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        examples = kept_examples(batch, examples)
        for name in PAIR_REFERENCES:
            if name in examples[0]:
                batch[name] = stacked(examples, name)
        if all(has_values(example, SCORES) for example in examples):
            batch[REWARDS] = torch.cat([stacked(examples, name) for name in SCORES])
        if is_given(examples, WEIGHT):
            batch[WEIGHTS] = stacked(examples, WEIGHT).repeat(2)
        return batch
