"""The reference of TRL's trainers: at every step, or computed ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple
from typing import Any, ClassVar

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl.trainer.utils import use_adapter

from fused_prefopt.data.columns import LAYOUT, TOKEN_WEIGHTS, WEIGHTS_OF_IDS
from fused_prefopt.integrations.attach import place
from fused_prefopt.integrations.sequence_parallel import SharedBatches
from fused_prefopt.integrations.trl.images import ImageRows, collator_fingerprint
from fused_prefopt.integrations.trl.kept_references import folder_of, handed_over, kept_apart
from fused_prefopt.integrations.trl.rows import Cut, require_values
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.models.batch import logps_through
from fused_prefopt.models.model_call import INPUTS, evaluating
from fused_prefopt.reference import add_reference_logps


class HasReference:
    """Mixin for a trainer of TRL's: what its batches are given of the reference."""

    needs: frozenset[str]
    # Whether the loss compares with a reference.
    needs_reference: bool
    shared: SharedBatches
    # A data set with the columns that TRL's `_precompute_ref_logps` adds; of lists the second.
    _with_own_references: Callable[[Any, str, int], Any]
    _with_list_references: Callable[[Any, str, int], Any]
    _has_lists: bool
    # Puts the collator in its place, once.
    _lay_out: Callable[[], None]
    _op_options: dict[str, Any]
    # Of TRL's trainers.
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    state: Any
    data_collator: Any
    config_type: ClassVar[Any]
    precompute_ref_logps: bool
    _is_vision_dataset: bool

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
        self._require_even_rows(dataset, name, batch_size)
        precompute = super()._precompute_ref_logps  # type: ignore[misc]
        with (
            kept_apart(dataset, own, folder_of(self.args)),
            with_attributes(self, data_collator=collator),
        ):
            found = handed_over(lambda: precompute(dataset, name, batch_size), dataset)
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

    def _require_even_rows(self, dataset: Any, name: str, batch_size: int) -> None:
        """Raise ValueError where TRL would gather other numbers of rows of each rank."""
        of_step = batch_size * self.accelerator.num_processes
        if self.accelerator.num_processes == 1 or self.accelerator.even_batches:
            return
        if not isinstance(dataset, IterableDataset) and len(dataset) % of_step:
            raise ValueError(
                "accelerator_config: got even_batches=False with precompute_ref_log_probs=True and"
                f" {len(dataset)} rows of {name}, which TRL gathers by {of_step}; needs"
                " even_batches=True, or a multiple of that number"
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
                cache_dir=folder_of(self.args),
                progress=not self.args.disable_tqdm,
                description=f"reference log-probs of {name}",
                shared=self.shared,
            )

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
def with_attributes(config: Any, **options: Any) -> Iterator[None]:
    """The attributes set inside, as they were afterwards."""
    before = {name: getattr(config, name) for name in options}
    try:
        for name, value in options.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
