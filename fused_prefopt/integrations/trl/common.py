"""References, steps and logs that the fused trainers on top of TRL's share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch import Tensor
from trl.trainer.utils import get_config_model_id, use_adapter

from fused_prefopt.checks import ON_NONFINITE, require_choice
from fused_prefopt.data.columns import (
    COMPLETION_IDS,
    COMPLETIONS_IDS,
    GOLD,
    LAYOUT,
    TOKEN_WEIGHTS,
    WEIGHTS_OF_IDS,
)
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.integrations.attach import OF_REFERENCE, place
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
    collator_fingerprint,
    has_images,
    images_precomputed,
)
from fused_prefopt.integrations.trl.lists import FIELDS_OF_LISTS, TakesLists, refuse_lists
from fused_prefopt.integrations.trl.rows import (
    Cut,
    KeepsTeachingRows,
    WeightedTokens,
    require_values,
)
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.models.batch import gold_part, logps_through
from fused_prefopt.models.causal_lm import input_vocab
from fused_prefopt.models.head_check import require_causal_checkpoint, require_trained_head
from fused_prefopt.models.model_call import INPUTS, evaluating
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.reference import add_reference_logps

# Names in the modules of TRL's trainers: the class of PEFT's layers, where PEFT is installed, and
# what makes a text of all weights.
_TUNERS, _HASH = "BaseTunerLayer", "hash_module"
# Options that a model's config is read with, of those that the model is loaded with.
_OF_CONFIGS = ("trust_remote_code", "revision", "subfolder", "token", "cache_dir")


class FusesLoss(
    SharesBatches,
    TakesLossAlone,
    KeepsLossState,
    PreparesExactly,
    MindsNonfinite,
    TakesLists,
    KeepsTeachingRows,
):
    """Mixin for a trainer of TRL's with a loss of this package, computed without logits."""

    config_type: ClassVar[type[FusedOptions]]
    # Columns of values that reach the loss.
    columns: ClassVar[tuple[str, ...]]
    # Of TRL's trainers.
    model: Any
    ref_model: Any
    accelerator: Any
    train_dataset: Any
    eval_dataset: Any
    state: Any
    router_aux_loss_coef: float
    aux_loss_enabled: bool
    precompute_ref_logps: bool
    _is_vision_dataset: bool
    _tokenizer: Any
    _metrics: dict[str, Any]
    _total_train_tokens: int
    # Ranks that share a batch; TRL before 1.10 counts its tokens on each of them.
    _tp_size: int = 1
    _name: ClassVar[str]
    # A data set with the columns that TRL's `_precompute_ref_logps` adds.
    _with_own_references: Callable[[Any, str, int], Any]

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
            _given(config, **self._given_to_trl(config, loss_fn)),
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
        if self.model.training:
            gold = gold_part(batch) if GOLD in self.needs else None
            for part in (batch, gold) if gold else (batch,):
                self._new_tokens = self._new_tokens + number_of_tokens(part)
        return batch

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
        self._total_train_tokens += int(sum_over_ranks(new)) // self._tp_size
        self._new_tokens = 0
        if metrics:
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if not self.needs_reference:
            return dataset
        # Here TRL's constructor is not through.
        self._lay_out()
        if self._has_lists:
            return self._with_list_references(dataset, name, batch_size)
        if self.shared.copies > 1:
            # TRL gathers the values of every rank, of which several have one batch.
            return self._with_own_references(dataset, name, batch_size)
        own: tuple[Any, ...]
        own = ("fused_prefopt", self._op_options["ld_alpha"], self.accelerator.mixed_precision)
        # TRL's key has the rows, which its collator cuts afterwards.
        own += astuple(Cut.of(self.args, self.config_type.pairwise))
        if any(column in (dataset.column_names or ()) for column in WEIGHTS_OF_IDS.values()):
            own += (TOKEN_WEIGHTS,)
        collator = self.data_collator
        if self._is_vision_dataset:
            # Of images the data are not yet what the model is given.
            collator = ImageRows.of(collator, self.config_type.pairwise, drops=False)
            own += (collator_fingerprint(collator),)
        with _kept_apart(dataset, own), _given(self, data_collator=collator):
            found = super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        require_values(
            name, found, [each for each in found.column_names if each.startswith("ref_")]
        )
        return found

    def _require_own_references(self, dataset: Any) -> None:
        """Raise ValueError where `_own_reference_logps` does not compute what TRL's loop does."""
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "precompute_ref_log_probs: got True with an iterable data set, needs one with a"
                " length"
            )
        if self._op_options["ld_alpha"] is not None:
            raise ValueError(
                f"precompute_ref_log_probs: got True with ld_alpha={self._op_options['ld_alpha']}"
                " and ranks that share batches, needs False"
            )

    def _own_reference_logps(
        self, features: list[dict[str, Any]], collator: Any, name: str, batch_size: int
    ) -> list[dict[str, Any]]:
        """`add_reference_logps` of the reference, kept in the output's folder."""
        model = self.model if self.ref_model is None else self.ref_model
        if self.shared.attention is not None:
            # The ranks exchange its values, which not every backend does on the CPU.
            place(model, self.accelerator.device)
        with self._as_reference(model), self.accelerator.autocast():
            return add_reference_logps(
                model,
                features,
                collator,
                batch_size=batch_size,
                cache_dir=Path(self.args.output_dir) / "reference_logps",
                progress=not self.args.disable_tqdm,
                description=f"reference log-probs of {name}",
                shared=self.shared,
            )

    def _require_image_values(self) -> None:
        """Raise ValueError, with the row's number, as TRL's data sets of texts do when prepared."""
        sets = self.eval_dataset
        sets = sets if isinstance(sets, Mapping) else {"eval": sets}
        for name, data in ({"train": self.train_dataset} | dict(sets)).items():
            require_values(name, data, self.columns)

    def _reference_of(self, model: Any) -> Any:
        """The model whose log-probs are the reference's, where a batch has none.

        Raises:
            ValueError: they were computed ahead, of the policy, which has since been trained.
        """
        # Not `or`: a compiled model has no truth value.
        if self.ref_model is not None:
            return self.ref_model
        trained = self.state.global_step > 0 and not is_peft_model(self.model)
        if self.precompute_ref_logps and trained:
            raise ValueError(
                "precompute_ref_log_probs: got rows without the reference's log-probs, after"
                " training has changed the model that they are of; give the data set as"
                " `eval_dataset` when the trainer is made, or a ref_model"
            )
        return model

    def _at_every_step(self) -> Any:
        """The reference as `attach` takes it, where a loss wants more than its log-probs."""
        if not self.needs & OF_BOTH_HEADS:
            return "precomputed"
        adapted = is_peft_model(self.model)
        if self.precompute_ref_logps or (adapted and "ref" in self.model.peft_config):
            raise ValueError(
                f"loss: got one that needs {', '.join(sorted(self.needs))}, which neither"
                " precomputed log-probs nor a copy of an adapter give; needs a reference model or a"
                " new adapter"
            )
        return "adapter" if self.ref_model is None else self.ref_model

    def _logps(
        self, model: Any, batch: Mapping[str, Any], *, prompt: bool = False
    ) -> dict[str, Tensor]:
        """`completion_logps` through the model's wrappers."""
        fields = {name: batch[name] for name in (*LAYOUT, *INPUTS) if name in batch}
        with self.accelerator.autocast():
            group = self.shared.sequences
            options = self._op_options | {"prompt": prompt, "sequence_group": group}
            return logps_through(model, fields, **options)

    def _reference_logps(
        self, model: Any, batch: Mapping[str, Any], *, prompt: bool = False
    ) -> dict[str, Tensor]:
        """The same of the reference."""
        with self._as_reference(model):
            return self._logps(model, batch, prompt=prompt)

    @contextmanager
    def _as_reference(self, model: Any) -> Iterator[None]:
        """`model` in eval mode, without the adapters that train where it is the policy."""
        adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            # TRL keeps a copy of a pretrained adapter by this name.
            adapter = use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        with evaluating(model), adapter:
            yield


@contextmanager
def _any_model(trainer: Any) -> Iterator[None]:
    """Let TRL's constructor take an adapter on the head, and weights that ranks share.

    TRL computes its own loss of the weight alone, so it refuses such an adapter; and to name what
    it precomputes, nothing where no reference is wanted, it hashes all weights, but cannot those of
    tensor parallelism. It has no door past: no option, and no method to override after it makes the
    model of its arguments. So names that its module imports for these are others while it runs.
    `tests/integrations/test_doors.py` notices when TRL takes such models.
    """
    kind = next(each for each in type(trainer).__mro__ if each.__module__.startswith("trl."))
    module = sys.modules[kind.__module__]
    names: dict[str, Any] = {_TUNERS: _NoLayer}
    names |= {} if trainer.needs_reference else {_HASH: str}
    with _given(module, **{name: each for name, each in names.items() if hasattr(module, name)}):
        yield


def _of_config(args: Any) -> dict[str, Any]:
    """How to read the config of a model that TRL loads by its name."""
    options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    return {name: value for name, value in options.items() if name in _OF_CONFIGS}


class _NoLayer:
    """A class of which no layer is."""


def _kept_apart(dataset: Any, own: tuple[Any, ...]) -> AbstractContextManager[None]:
    """TRL keeps what it precomputes by the model and by this of the data, its own with it."""
    if isinstance(dataset, IterableDataset):
        return nullcontext()
    return _given(dataset, _fingerprint=Hasher.hash((dataset._fingerprint, *own)))


@contextmanager
def _given(config: Any, **options: Any) -> Iterator[None]:
    """The attributes set inside, as they were afterwards."""
    before = {name: getattr(config, name) for name in options}
    try:
        for name, value in options.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
