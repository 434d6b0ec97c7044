"""ms-swift's trainers of preferences, with losses of this package."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from swift.rlhf_trainers import CPOTrainer, DPOTrainer, KTOTrainer, ORPOTrainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fused_prefopt.data.columns import (
    LABEL,
    MISMATCHED,
    NUM_SEQUENCES,
    POSITION_IDS,
    SEQUENCE_IDS,
)
from fused_prefopt.integrations.attach import OF_REFERENCE
from fused_prefopt.integrations.labelled_batches import (
    CompletionMasks,
    FusesLabelled,
    FusesLabelledPoints,
)
from fused_prefopt.integrations.ms_swift.options import options_of, words_of
from fused_prefopt.integrations.options import KEY, read_mapping
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.models.model_call import evaluating
from fused_prefopt.preference import PreferenceLoss

logger = logging.getLogger(__name__)
# What ms-swift's KTO puts in front of the names of a batch, and what this package does.
_PREFIXES = {"completion_": "", "KL_completion_": MISMATCHED}


class FusesSwift(FusesLabelled):
    """Mixin for a trainer of ms-swift's with a loss of this package.

    Args:
        *args, **kwargs: of the trainer.

    Raises:
        ValueError: as `read_mapping` and `options_of` do; or ms-swift is told to do what the loss
            does not know of.
    """

    kind: ClassVar[str]
    # Whether ms-swift divides a batch's loss itself, by the accumulation steps that were asked for:
    # an epoch's last step may be of fewer.
    divides: ClassVar[bool] = True
    args: Any
    template: Any
    aux_loss_enabled: bool
    aux_loss_coef: float
    ref_adapter_name: str | None
    is_fsdp_enabled: bool
    model_accepts_loss_kwargs: bool
    current_gradient_accumulation_steps: int
    null_ref_context: Callable[[], AbstractContextManager[None]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config, template, model = kwargs["args"], kwargs["template"], kwargs["model"]
        _require_known(config, template, model)
        entry = read_mapping(os.environ.get(KEY.upper()))
        options = options_of(self.kind, config, entry)
        likelihood = getattr(config, "rpo_alpha", None) is not None or "sft" in words_of(config)
        if template.packing and likelihood:
            raise ValueError(
                "packing: got True with ms-swift's 'sft' or rpo_alpha, which it weighs by rows and"
                " not by pairs, needs False"
            )
        loss_fn = options.build_loss()
        # ms-swift weighs packed batches by their pairs itself: see `_share`.
        self.weighs_batches = not template.packing
        super().__init__(*args, **kwargs)
        self._settle_reference(loss_fn)
        collator = _SwiftBatches(self.data_collator, template.padding_free)
        self.fuse(
            loss_fn,
            options,
            collator=CompletionMasks(collator, others=(SEQUENCE_IDS, NUM_SEQUENCES, LABEL)),
            router_coefficient=self.aux_loss_coef if self.aux_loss_enabled else 0.0,
        )
        logger.warning("the loss is %s", " ".join(repr(loss_fn).split()))

    def _settle_reference(self, loss_fn: PreferenceLoss) -> None:
        """Drop a reference that the loss does not use; raise ValueError without one that it does.

        Args:
            loss_fn: the loss.
        """
        needs = loss_fn.loss.needs & OF_REFERENCE
        if needs and self.kind not in ("dpo", "kto"):
            raise ValueError(
                f"rlhf_type: got one that has no reference with {loss_fn.name}, which needs one:"
                " train it with 'dpo'"
            )
        if needs & OF_BOTH_HEADS and self.ref_adapter_name:
            raise ValueError(
                f"ref_adapters: got one with {loss_fn.name}, which needs more of its reference than"
                " the log-probs of whole completions: needs none, or a ref_model"
            )
        if not needs and self.ref_model is not None:
            logger.warning(
                "%s needs no reference; with --rlhf_type cpo none is loaded", loss_fn.name
            )
            self.ref_model = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The fused loss of a batch, weighed in its optimizer step as ms-swift does."""
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        if model.training and self.divides:
            loss = loss * self._share(inputs, kwargs.get("num_items_in_batch"))
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: Mapping[str, Any], pairs: Tensor | None) -> Any:
        """What ms-swift would weigh a batch with, beside what `Trainer` divides it by.

        Args:
            inputs: the batch.
            pairs: 0-d, those of the optimizer step, where pairs are packed.
        """
        steps = self.current_gradient_accumulation_steps
        if self.template.packing:
            # A mean over the step's pairs, as rows hold unlike many; `Trainer` knows that number
            # and leaves the loss as it is, where the model takes it too.
            share = inputs[NUM_SEQUENCES] // 2 / pairs
            return share if self.model_accepts_loss_kwargs else share * steps
        # ms-swift divides by the steps that were asked for, where the model takes that number.
        asked = self.args.gradient_accumulation_steps
        return steps / asked if self.model_accepts_loss_kwargs else 1.0

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss alone, inside what ms-swift's template puts around a call of the model."""
        with self.template.forward_context(self.model, inputs):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _fix_grad_norm_nan(self) -> AbstractContextManager[None]:
        """Nothing, where `on_nonfinite` judges: gradients must still be there by then."""
        if self.on_nonfinite == "ignore" or self.is_fsdp_enabled:
            return super()._fix_grad_norm_nan()  # type: ignore[misc]
        return nullcontext()

    @contextmanager
    def _as_reference(self, source: nn.Module) -> Iterator[None]:
        own = self.null_ref_context() if self.ref_model is None else nullcontext()
        with evaluating(source), own:
            yield


class FusedDPOTrainer(FusesSwift, DPOTrainer):
    """ms-swift's `DPOTrainer` whose loss is one of this package's on pairs."""

    kind = "dpo"


class FusedCPOTrainer(FusesSwift, CPOTrainer):
    """ms-swift's `CPOTrainer` (SimPO too) whose loss is one of this package's on pairs."""

    kind = "cpo"


class FusedORPOTrainer(FusesSwift, ORPOTrainer):
    """ms-swift's `ORPOTrainer` whose loss is one of this package's on pairs."""

    kind = "orpo"


class FusedKTOTrainer(FusesSwift, FusesLabelledPoints, KTOTrainer):
    """ms-swift's `KTOTrainer` whose loss is one of this package's on single completions."""

    kind = "kto"
    divides = False
    judgements = LABEL


@dataclass
class _SwiftBatches:
    """A collator of ms-swift's under this package's names.

    Args:
        collator: ms-swift's.
        packs: whether its batches are one row of sequences that begin at position 0.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    packs: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {}
        for name, value in self.collator(examples).items():
            prefix = next((each for each in _PREFIXES if name.startswith(each)), "")
            batch[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = value
        if LABEL in batch:
            batch[LABEL] = torch.tensor(batch[LABEL])
        for name in [name for name in batch if self.packs and name.endswith(POSITION_IDS)]:
            prefix = name.removesuffix(POSITION_IDS)
            ids = (batch[name] == 0).cumsum(-1) - 1
            batch |= {prefix + SEQUENCE_IDS: ids, prefix + NUM_SEQUENCES: int(ids.max()) + 1}
        return batch


def _require_known(config: Any, template: Any, model: nn.Module) -> None:
    """Raise ValueError where ms-swift would do what the loss does not know of."""
    unknown = {
        "sequence_parallel_size": (template.sequence_parallel_size, 1),
        "use_flash_ckpt": (config.use_flash_ckpt, False),
        "precompute_ref_log_probs": (getattr(config, "precompute_ref_log_probs", False), False),
        "reference_free": (getattr(config, "reference_free", None) or False, False),
        "f_divergence_type": (getattr(config, "f_divergence_type", "reverse_kl"), "reverse_kl"),
        "use_weighting": (getattr(config, "use_weighting", False), False),
        "generate_during_eval": (getattr(config, "generate_during_eval", False), False),
    }
    for name, (value, wanted) in unknown.items():
        if value != wanted:
            raise ValueError(f"{name}: got {value!r} with a fused loss, needs {wanted!r}")
    if not template.loss_scale.is_binary_loss_scale:
        raise ValueError(
            f"loss_scale: got {template._loss_scale!r}, weights of single tokens, needs one that"
            " takes or leaves them, such as 'last_round'"
        )
    if not isinstance(model, PreTrainedModel) and not is_peft_model(model):
        raise ValueError(
            f"tuner_type: got {config.tuner_type!r}, which makes a {type(model).__name__}, needs"
            " 'full' or one of PEFT's"
        )
    about: Any = model.model_meta
    if about.is_multimodal or template.is_encoder_decoder:
        raise ValueError(f"model: got {about.model_type!r}, needs a causal language model of texts")
