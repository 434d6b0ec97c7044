"""Steps and logs that the fused trainers on top of TRL's share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, ClassVar

import torch
from torch.distributed.tensor import DTensor
from trl.trainer.utils import get_config_model_id

from fused_prefopt.checks import ON_NONFINITE, require_choice
from fused_prefopt.data.columns import (
    COMPLETION_IDS,
    COMPLETIONS_IDS,
    GOLD,
    GROUPS,
    SPENT,
)
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.integrations.attach import OF_REFERENCE
from fused_prefopt.integrations.layouts import (
    keep_batches_whole,
    layout_of,
    number_of_tokens,
    require_layout,
)
from fused_prefopt.integrations.nonfinite import MindsNonfinite, mind_nonfinite
from fused_prefopt.integrations.options import FusedOptions
from fused_prefopt.integrations.sequence_parallel import SharesBatches, share_batches
from fused_prefopt.integrations.trainer_checks import (
    CheckedTokens,
    CountedLabels,
    leave_out_ligers_loss,
    refuse_functions_of_logits,
    require_rows,
)
from fused_prefopt.integrations.trainer_mixins import (
    KeepsLossState,
    PreparesExactly,
    TakesLossAlone,
)
from fused_prefopt.integrations.transformers import attach
from fused_prefopt.integrations.trl.images import (
    ImageRows,
    has_images,
    images_precomputed,
)
from fused_prefopt.integrations.trl.lists import FIELDS_OF_LISTS, TakesLists, refuse_lists
from fused_prefopt.integrations.trl.references import HasReference, with_attributes
from fused_prefopt.integrations.trl.rows import (
    Cut,
    KeepsTeachingRows,
    WeightedTokens,
    require_values,
)
from fused_prefopt.integrations.uneven_ranks import WeighsBatches
from fused_prefopt.losses.counts import counts_groups
from fused_prefopt.models.batch import gold_part
from fused_prefopt.models.causal_lm import input_vocab
from fused_prefopt.models.head_check import require_causal_checkpoint, require_trained_head
from fused_prefopt.preference import PreferenceLoss

# Names in the modules of TRL's trainers: the class of PEFT's layers, where PEFT is installed, and
# what tells weights apart.
_TUNERS, _HASH = "BaseTunerLayer", "hash_module"
# Options that a model's config is read with, of those that the model is loaded with.
_OF_CONFIGS = ("trust_remote_code", "revision", "subfolder", "token", "cache_dir")


class FusesLoss(
    SharesBatches,
    TakesLossAlone,
    WeighsBatches,
    KeepsLossState,
    PreparesExactly,
    MindsNonfinite,
    HasReference,
    TakesLists,
    KeepsTeachingRows,
):
    """Mixin for a trainer of TRL's with a loss of this package, computed without logits."""

    config_type: ClassVar[type[FusedOptions]]
    # Columns of values that reach the loss.
    columns: ClassVar[tuple[str, ...]]
    # Of TRL's trainers, beside those of the mixins.
    train_dataset: Any
    eval_dataset: Any
    router_aux_loss_coef: float
    aux_loss_enabled: bool
    _tokenizer: Any
    _metrics: dict[str, Any]
    _total_train_tokens: int
    _name: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = signature(super().__init__).bind(*args, **kwargs)
        config = given.arguments.get("args")
        if config is None:
            config = given.arguments["args"] = self._default_config(given.arguments["model"])
        if not isinstance(config, self.config_type):
            raise ValueError(
                f"args: got {type(config).__name__}, wanted a {self.config_type.__name__}"
            )
        refuse_functions_of_logits(given.arguments)
        if isinstance(given.arguments["model"], str):
            require_causal_checkpoint(given.arguments["model"], **_of_config(config))
        loss_fn = config.build_loss()
        require_choice("on_nonfinite", config.on_nonfinite, ON_NONFINITE)
        self.needs = loss_fn.loss.needs
        self.needs_reference = bool(self.needs & OF_REFERENCE)
        self._makes_lists = loss_fn.loss.pairwise and not config.pairwise
        self._op_options = loss_fn.evaluation_options | {"ld_alpha": loss_fn.ld_alpha}
        self._new_tokens: Any = 0
        own_collator = given.arguments.get("data_collator")
        self._is_own_collator = own_collator is not None
        self._layout = layout_of(config, own_collator)
        self._is_laid_out = False
        if not self.needs_reference and getattr(config, "sync_ref_model", False):
            raise ValueError(
                f"sync_ref_model: got True with {loss_fn.name}, needs a loss with a reference"
            )
        if has_images(given.arguments.get("train_dataset")):
            sets = (given.arguments.get(f"{each}_dataset") for each in ("train", "eval"))
            refuse_lists("images: got some", *sets)
        with (
            with_attributes(config, **self._given_to_trl(config, loss_fn)),
            images_precomputed(self, given.arguments),
            _any_model(self),
        ):
            super().__init__(*given.args, **given.kwargs)
        if not self.needs_reference:
            self.precompute_ref_logps, self.ref_model = False, None
        if self.ref_model is not None:
            require_trained_head(self.accelerator.unwrap_model(self.ref_model), "ref_model")
        if self._is_vision_dataset:
            self._require_image_values()
        if self._has_lists:
            loss_fn.require_lists()
        if self._makes_lists and not self._has_lists:
            raise ValueError(
                f"loss: {loss_fn.name!r} is pairwise, wanted one on points: of rows with images no"
                " lists are made"
            )
        require_rows(self, loss_fn, self._fields_of, streams=True)
        self._lay_out()
        leave_out_ligers_loss(self.args)
        policy = self.accelerator.unwrap_model(self.model)
        cutting = ImageRows.of(self.data_collator, self.config_type.pairwise)
        checked = CheckedTokens(cutting, input_vocab(policy))
        self.data_collator: Any = CountedLabels(checked)
        self.attachment = attach(
            policy,
            loss_fn,
            reference=self._at_every_step(),
            log_tokens=config.log_tokens,
            router_coefficient=self.router_aux_loss_coef if self.aux_loss_enabled else 0.0,
        )
        self.shared.tell(self.attachment)
        mind_nonfinite(self, config.on_nonfinite)

    def _default_config(self, model: Any) -> FusedOptions:
        """The configuration that TRL makes where it is given none."""
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        folder = f"{name.split('/')[-1]}-{self._name}"
        return self.config_type(output_dir=folder)  # type: ignore[call-arg]

    def _given_to_trl(self, config: Any, loss_fn: PreferenceLoss) -> dict[str, Any]:
        """Options as TRL's own constructor must see them."""
        # Told so, TRL keeps no reference model (FSDP's it loads and drops), and
        # `_precompute_ref_logps` computes nothing.
        return {} if self.needs_reference else {"precompute_ref_log_probs": True}

    def _lay_out(self) -> None:
        """Put a collator of this package in the place of TRL's, where a layout wants one, once."""
        if self._is_laid_out:
            return
        self._is_laid_out = True
        if self._has_lists:
            own = self.data_collator if self._is_own_collator else self._list_collator()
            self.data_collator = self._lays_out_lists = own
        elif self._layout is not None or self._lays_out_gold:
            if self._is_vision_dataset:
                raise ValueError(
                    f"{self._layout}: got True with images, needs False: their rows are padded"
                )
            self.data_collator = self._collator(self._layout)
        keep_batches_whole(self, pairwise=self.config_type.pairwise)
        shared = share_batches(self)
        models = [self.model]
        if self.needs_reference and self.ref_model is not None:
            models.append(self.ref_model)
        models = [*map(self.accelerator.unwrap_model, models)]
        require_layout(self, *models)
        shared.take(*models)
        if not self._is_vision_dataset:
            cut = Cut.of(self.args, self.config_type.pairwise)
            self.data_collator = WeightedTokens(self.data_collator, cut)

    @property
    def _lays_out_gold(self) -> bool:
        """Whether the loss wants gold completions, which TRL's collator of pairs leaves out."""
        texts = not self._is_vision_dataset
        return GOLD in self.needs and texts and not self._is_own_collator

    def _collator(self, layout: str | None) -> Any:
        """The collator of a layout, None for padded rows, with the cut and the padding of TRL's."""
        raise NotImplementedError

    def _fields_of(self, row: Mapping[str, Any]) -> set[str]:
        """`LogpBatch` fields that the loss can get with such rows."""
        if COMPLETIONS_IDS in row:
            return FIELDS_OF_LISTS
        if self._has_lists and COMPLETION_IDS in row:
            raise ValueError(
                "got rows of single completions, beside rows of lists in another data set; needs"
                " one kind in all of them"
            )
        return self._fields_of_row(row)

    def _fields_of_row(self, row: Mapping[str, Any]) -> set[str]:
        """The same of a pair or a completion."""
        raise NotImplementedError

    def _of_loss(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of TRL's collator as the loss takes it, with what the reference gives."""
        raise NotImplementedError

    def of_loss(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch; its tokens are counted where it trains.

        Args:
            model: the policy, in its wrappers.
            inputs: of TRL's collator.
        """
        batch = (self._of_lists if self._has_lists else self._of_loss)(model, inputs)
        if self.model.training and not batch.get(SPENT):
            gold = gold_part(batch) if GOLD in self.needs else None
            for part in (batch, gold) if gold else (batch,):
                self._new_tokens = self._new_tokens + number_of_tokens(part)
        return batch

    def rows_are_counted(self) -> bool:
        """Whether each row of a data set is one of what the loss is a mean over."""
        if self._is_vision_dataset or self._is_own_collator:
            return False
        loss = self.attachment.loss_fn.loss
        return self._has_lists == counts_groups(loss, {GROUPS}) or loss.pairwise

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; the metrics of a `predict` before it are not its."""
        self.attachment.forget_metrics("eval")
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's metrics since the last log, means over steps and ranks."""
        mode = "train" if self.model.training else "eval"
        metrics = self.attachment.pop_metrics(mode)
        for name, value in metrics.items():
            self._metrics[mode][name] = [value]
        new = torch.as_tensor(self._new_tokens, device=self.accelerator.device)
        self._total_train_tokens += int(sum_over_ranks(new)) // self.shared.repeats
        self._new_tokens = 0
        if metrics:
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _require_image_values(self) -> None:
        """Raise ValueError, with the row's number, as TRL's data sets of texts do when prepared."""
        sets = self.eval_dataset
        sets = sets if isinstance(sets, Mapping) else {"eval": sets}
        for name, data in ({"train": self.train_dataset} | dict(sets)).items():
            require_values(name, data, self.columns)


@contextmanager
def _any_model(trainer: Any) -> Iterator[None]:
    """Let TRL's constructor take an adapter on the head, and weights that ranks share.

    TRL computes its own loss of the weight alone, so it refuses such an adapter; and it names what
    it precomputes, which without a reference is nothing and where ranks share batches this package
    does, by a hash of all weights, which it cannot take of tensor parallelism's. It has no door
    past: no option, and no method to override after it makes the model of its arguments. So names
    that its module imports for these are others while it runs. `tests/integrations/test_doors.py`
    notices when TRL takes such models.
    """
    kind = next(each for each in type(trainer).__mro__ if each.__module__.startswith("trl."))
    module = sys.modules[kind.__module__]
    own = getattr(module, _HASH, None)

    def hashed(model: Any) -> str:
        spread = any(isinstance(each, DTensor) for each in model.parameters())
        return "" if own is None or spread or not trainer.needs_reference else own(model)

    names = {_TUNERS: _NoLayer, _HASH: hashed}
    with with_attributes(module, **{name: names[name] for name in names.keys() & vars(module)}):
        yield


def _of_config(args: Any) -> dict[str, Any]:
    """How to read the config of a model that TRL loads by its name."""
    options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    return {name: value for name, value in options.items() if name in _OF_CONFIGS}


class _NoLayer:
    """A class of which no layer is."""
