"""LLaMA-Factory's trainers of preferences, with losses of this package."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.kto.trainer import CustomKTOTrainer

from fused_prefopt.integrations.labelled_batches import (
    CompletionMasks,
    FusesLabelled,
    FusesLabelledPoints,
)
from fused_prefopt.integrations.llamafactory.arguments import FusedFinetuningArguments
from fused_prefopt.models.causal_lm import wants_router_loss

# Of the batches of the second: prefix of the mismatched completions, and the judgements.
_MISMATCHED, _JUDGEMENTS = "kl_", "kto_tags"
logger = logging.getLogger(__name__)


class _Fused(FusesLabelled):
    """What both trainers add to LLaMA-Factory's."""

    finetuning_args: FusedFinetuningArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # It silences all warnings from then on, for those of a reference in training mode, which
        # this one is not; a checkpoint's statistics that are not there must be heard of.
        with warnings.catch_warnings():
            super().__init__(*args, **kwargs)
        given = self.finetuning_args
        layerwise = ("galore_layerwise", "apollo_layerwise")
        self.steps_in_backward = "".join(name for name in layerwise if getattr(given, name))
        if wants_router_loss(self.model):
            logger.warning(
                "output_router_logits: the router's loss is left out, as in LLaMA-Factory's own"
                " trainers of preferences"
            )
        self.fuse(
            given.build_loss(),
            given.loss_options,
            collator=self._collator(self.data_collator),
            router_coefficient=0.0,
        )

    def _collator(self, own: Any) -> CompletionMasks:
        return CompletionMasks(own)


class FusedDPOTrainer(_Fused, CustomDPOTrainer):
    """LLaMA-Factory's trainer on pairs, whose loss is one of this package's.

    Args:
        model, ref_model, finetuning_args, processor, **kwargs: of `CustomDPOTrainer`, with
            `finetuning_args` those of `FusedFinetuningArguments`.

    Raises:
        ValueError: as in `FusesLabelled.fuse`.
    """


class FusedKTOTrainer(FusesLabelledPoints, _Fused, CustomKTOTrainer):
    """LLaMA-Factory's trainer on single completions, whose loss is one of this package's.

    Args:
        model, ref_model, finetuning_args, processor, **kwargs: of `CustomKTOTrainer`, with
            `finetuning_args` those of `FusedFinetuningArguments`.

    Raises:
        ValueError: as in `FusesLabelled.fuse`.
    """

    judgements = _JUDGEMENTS

    def _collator(self, own: Any) -> CompletionMasks:
        return CompletionMasks(own, others=(_JUDGEMENTS,), mismatched=_MISMATCHED)
