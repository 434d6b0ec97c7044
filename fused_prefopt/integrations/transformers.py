"""transformers: compute the loss inside `model.forward`, log it with `Trainer`'s own log.

Inside `forward` the hooks of DDP, FSDP and DeepSpeed are alive, gradient accumulation stays
exact, and no logits are built: the head meets the labelled rows only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from fused_prefopt.checks import require_packages

try:
    from transformers import Trainer, TrainingArguments
except (ImportError, RuntimeError):  # of a lazy module, which tells less than what follows
    require_packages(__name__, "transformers", "accelerate")
    raise

from fused_prefopt.data.columns import COMPLETION_MASK, SHIFT_LABELS
from fused_prefopt.integrations.attach import (
    OF_REFERENCE,
    Attachment,
    Reference,
    place,
    preference_outputs,
)
from fused_prefopt.integrations.layouts import keep_batches_whole
from fused_prefopt.integrations.nonfinite import MindsNonfinite, mind_nonfinite
from fused_prefopt.integrations.sequence_parallel import (
    SharedBatches,
    SharesBatches,
    require_transformers_loss,
    share_batches,
)
from fused_prefopt.integrations.trainer_checks import (
    collator_for,
    leave_out_ligers_loss,
    let_collator_check,
    require_collated_rows,
    require_trainer,
    require_whole_lists,
)
from fused_prefopt.integrations.trainer_mixins import KeepsLossState, PreparesExactly
from fused_prefopt.integrations.uneven_ranks import WeighsBatches
from fused_prefopt.integrations.zero3 import runnable, running
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.models.causal_lm import backbone_of, readable_head
from fused_prefopt.models.head_check import require_trained_head
from fused_prefopt.models.model_call import exact_loss, past_wrappers
from fused_prefopt.preference import PreferenceLoss

__all__ = ["Attachment", "PreferenceTrainer", "attach", "past_wrappers", "preference_outputs"]


def attach(
    model: nn.Module | Trainer,
    loss_fn: PreferenceLoss,
    *,
    reference: nn.Module | str = "precomputed",
    reference_cache: str | os.PathLike[str] | None = None,
    log_tokens: bool = False,
    router_coefficient: float | None = None,
    on_nonfinite: str = "stop",
) -> Attachment:
    """Let `model.forward` return the preference loss of batches that carry `completion_mask`.

    Use it with ``TrainingArguments(remove_unused_columns=False, label_names=["completion_mask"])``
    and a collator of `fused_prefopt.data`; other batches go the model's own way. Given a trainer
    it also logs the loss's metrics, in evaluation with its prefix, keeps the loss's statistics in
    the checkpoints, and cuts batches where accelerate's `ParallelismConfig` lets ranks share
    sequences (`cp_size`, `sp_size`; see `integrations.sequence_parallel`). In a loop of your own
    under FSDP call ``model(**past_wrappers(batch))``: it rounds what it sees.

    Args:
        model: any Hugging Face causal language model, PEFT-wrapped ones too, or the
            `transformers.Trainer` that holds one.
        loss_fn: the loss; it goes where the hidden states are. Not MPS, which has no float64.
        reference: where reference log-probs come from that a batch does not carry: "precomputed"
            (it must carry them), "adapter" (the model without its PEFT adapters) or a model, kept
            whole on each rank, but partitioned where ZeRO-3 loaded it so (then with a trainer); on
            the CPU it is moved to its first batch's device.
        reference_cache: folder. The trainer's data sets then get the reference log-probs as
            columns before training, computed once for each content of model and data; training
            needs no second model. Data given later, to `evaluate` or `predict`, must bring them.
        log_tokens: also log `entropy`, `logits/chosen`, `logits/rejected` and, of pairs,
            `mean_token_accuracy`; one more evaluation of the head a step.
        router_coefficient: of a mixture of experts' load-balancing loss, 0 for none; None adds it
            as the model does, where ``config.output_router_logits``.
        on_nonfinite: what a trainer does where a step's loss or gradient is NaN or infinite, before
            it moves a weight. "stop": logs the loss and raises `FloatingPointError`. "skip": leaves
            the optimizer's step out, though not the learning rate schedule's, and logs
            `skipped_steps` so far and the mean of the finite losses. "ignore": takes the step. In
            fp16 the loss alone is judged, as the scaler skips infinite gradients itself; so it is
            where the optimizer steps inside the backward pass (DeepSpeed), which cannot skip.

    Raises:
        ValueError: the model's head or backbone cannot be told apart or read, or its checkpoint had
            no head; the trainer's `args` would drop or mistake the batch's columns or split it over
            GPUs, it makes its models itself or has a function of logits (`compute_metrics`), the
            first row of a data set lacks what the loss needs, ranks share sequences of a layout or
            a model that cannot be cut, batches would tear apart the single completions of a prompt
            for a loss on pairs, or the reference does not fit.
    """
    trainer, shared = model if isinstance(model, Trainer) else None, SharedBatches()
    if trainer is not None:
        require_trainer(trainer)
        shared = share_batches(trainer)
        require_transformers_loss(trainer)
    elif on_nonfinite != "stop":
        raise ValueError(
            f"on_nonfinite: got {on_nonfinite!r} with a model, needs the trainer that holds it"
        )
    policy: nn.Module = model.model if isinstance(model, Trainer) else model
    # Their weights may be partitioned here.
    readable_head(policy), backbone_of(policy)
    require_trained_head(policy)
    if reference is policy and reference_cache is None:
        raise ValueError("reference: got the model that trains, needs a reference_cache with it")
    if isinstance(reference, nn.Module):
        require_trained_head(reference, "reference")
        if trainer is not None and reference_cache is None:
            reference = runnable(reference, trainer.accelerator)
    shared.take(policy, reference if isinstance(reference, nn.Module) else None)
    source = None
    needs = loss_fn.loss.needs & OF_REFERENCE
    if loss_fn.ld_alpha is not None and needs & OF_BOTH_HEADS:
        raise ValueError(f"ld_alpha: got {loss_fn.ld_alpha} with {loss_fn.name}, needs None")
    if reference != "precomputed" and needs:
        options = loss_fn.evaluation_options
        source = Reference(policy, reference, ld_alpha=loss_fn.ld_alpha, **options)
    if reference_cache is not None:
        if trainer is None:
            raise ValueError("reference_cache: got a model, needs the trainer with its data sets")
        if reference == "precomputed":
            raise ValueError(
                "reference_cache: got one with reference='precomputed', needs 'adapter' or a model"
                " to compute what it keeps"
            )
        if loss_fn.ld_alpha is not None or needs & OF_BOTH_HEADS:
            raise ValueError(
                f"reference_cache: got one with {loss_fn}, which wants more of the reference than"
                " the log-probs of whole completions; needs a reference without a cache"
            )
        if source is not None:
            _add_reference_logps(trainer, source, reference_cache)
        source = None
    if trainer is not None:
        require_collated_rows(trainer, loss_fn, source is not None)
        require_whole_lists(trainer, loss_fn)
    attachment = Attachment(policy, loss_fn, source, log_tokens, router_coefficient)
    if trainer is not None:
        shared.tell(attachment)
        leave_out_ligers_loss(trainer.args)
        let_collator_check(trainer)
        keep_batches_whole(trainer, pairwise=loss_fn.loss.pairwise)
        _log_in(trainer, attachment)
        mind_nonfinite(trainer, on_nonfinite)
    return attachment


class LogsPreferences(
    SharesBatches, WeighsBatches, KeepsLossState, PreparesExactly, MindsNonfinite
):
    """Mixin for a `transformers.Trainer` with an `attachment`: logs the loss's metrics."""

    compute_loss_func: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The trainer's own, of fields that the model's wrappers do not round."""
        if COMPLETION_MASK not in inputs or self.compute_loss_func is not None:
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
            self.judge_before_backward(model, found[0] if return_outputs else found)
            return found
        is_shard, inputs = SHIFT_LABELS in inputs, past_wrappers(inputs)
        if is_shard and self.shared.by_deepspeed:
            # The trainer's own would be the cross-entropy of these labels.
            outputs = model(**inputs)
            loss = outputs["loss"]
        else:
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)  # type: ignore[misc]
        if loss is outputs["loss"]:
            loss = exact_loss(loss, inputs)
        self.shared.before_backward(loss)
        loss = self.weighed(loss)
        self.judge_before_backward(model, loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics of training since the last log to a log of training steps."""
        if "loss" in logs or "train_runtime" in logs:
            logs.update(self.attachment.pop_metrics("train"))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Add the metrics of the evaluated data set, with its prefix.

        There are no logits, so what it returns, and `predict` with it, has no predictions.
        """
        self.attachment.forget_metrics("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self.attachment.pop_metrics("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": metrics[name] for name in metrics})
        return output


class PreferenceTrainer(LogsPreferences, Trainer):
    """`transformers.Trainer` with a preference loss attached to its model.

    It logs the loss's metrics by TRL's names and saves the loss's statistics beside the
    optimizer's state. Rows are pairs, single completions, or lists of completions (see
    `data.ListCollator`), of which a batch counts the lists. A step of the optimizer is the mean
    over all its pairs, however many of them a rank or an accumulated batch holds.

    Args:
        model, train_dataset, eval_dataset, processing_class, *more, **kwargs: of
            `transformers.Trainer`.
        args: the same; ``remove_unused_columns=False`` is set, and
            ``label_names=["completion_mask"]`` where none are.
        data_collator: None takes the padding collator of `fused_prefopt.data` that fits the
            columns of the data.
        loss_fn: the loss.
        reference, reference_cache, log_tokens, on_nonfinite: as in `attach`.

    Raises:
        ValueError: as in `attach`; or there is no collator and the data are no token ids.
        FloatingPointError: training meets a loss or gradient that is not finite, with
            ``on_nonfinite="stop"``.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *more: Any,
        loss_fn: PreferenceLoss,
        reference: nn.Module | str = "precomputed",
        reference_cache: str | os.PathLike[str] | None = None,
        log_tokens: bool = False,
        on_nonfinite: str = "stop",
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        args.remove_unused_columns = False
        if args.label_names is None:
            args.label_names = [COMPLETION_MASK]
        if data_collator is None:
            data_collator = collator_for(train_dataset, eval_dataset, processing_class, model)
        given = (data_collator, train_dataset, eval_dataset, processing_class, *more)
        super().__init__(model, args, *given, **kwargs)
        attach(
            self,
            loss_fn,
            reference=reference,
            reference_cache=reference_cache,
            log_tokens=log_tokens,
            on_nonfinite=on_nonfinite,
        )


def _log_in(trainer: Trainer, attachment: Attachment) -> None:
    """Give the trainer the methods of `LogsPreferences`, in front of its class's own.

    By another class, as `transformers` has no public door for them: a callback cannot add to the
    log that a trainer keeps, nor to the metrics that `evaluate` returns, and none is told of a
    batch before it is prepared, of its loss before the backward pass, or of a checkpoint that is
    loaded. `tests/integrations/test_doors.py` notices one that opens.
    """
    trainer.attachment = attachment
    kind = type(trainer)
    if not issubclass(kind, LogsPreferences):
        trainer.__class__ = type(f"Preference{kind.__name__}", (LogsPreferences, kind), {})


def _add_reference_logps(
    trainer: Trainer, source: Reference, folder: str | os.PathLike[str]
) -> None:
    """Give the trainer's data sets the reference's columns, in the precision of its training."""

    tokenizer = trainer.processing_class
    source.place(trainer.args.device)
    shared: SharedBatches = trainer.shared
    if shared.attention is not None:
        # The ranks exchange its values, which not every backend does on the CPU.
        place(source.model, trainer.args.device)

    def with_columns(data: Any) -> Any:
        if data is None:
            return None
        if not hasattr(data, "__len__"):
            raise ValueError("reference_cache: got an iterable data set, needs one with a length")
        with trainer.accelerator.autocast():
            return source.add_logps(
                data,
                trainer.data_collator,
                tokenizer=tokenizer if hasattr(tokenizer, "get_vocab") else None,
                batch_size=trainer.args.per_device_eval_batch_size,
                cache_dir=folder,
                progress=not trainer.args.disable_tqdm,
                shared=shared,
            )

    with running(source.model, trainer.accelerator) as source.model:
        trainer.train_dataset = with_columns(trainer.train_dataset)
        evaluated = trainer.eval_dataset
        trainer.eval_dataset = (
            {name: with_columns(data) for name, data in evaluated.items()}
            if isinstance(evaluated, Mapping)
            else with_columns(evaluated)
        )
