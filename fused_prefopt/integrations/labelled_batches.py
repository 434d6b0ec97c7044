"""Trainers of older TRL on batches with −100-masked labels, with an attached loss.

Frameworks that pin TRL below 1.0 subclass its trainers and give them batches of their own:
`input_ids`, `attention_mask`, and `labels` that are −100 everywhere but on completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_prefopt.data.columns import (
    COMPLETION_MASK,
    DESIRABLE,
    INPUT_IDS,
    KL,
    MADE_UP_REWARDS,
    MISMATCHED,
    PROMPT,
    PROMPT_REFERENCE,
    REFERENCE,
    REWARDS,
    SPENT,
)
from fused_prefopt.distributed import sum_over_ranks
from fused_prefopt.integrations.attach import OF_REFERENCE
from fused_prefopt.integrations.nonfinite import mind_nonfinite
from fused_prefopt.integrations.options import FusedOptions
from fused_prefopt.integrations.sequence_parallel import share_batches
from fused_prefopt.integrations.trainer_checks import (
    CheckedTokens,
    CountedLabels,
    leave_out_ligers_loss,
    require_trainer,
)
from fused_prefopt.integrations.trainer_mixins import TakesLossAlone
from fused_prefopt.integrations.transformers import LogsPreferences, attach
from fused_prefopt.losses import check_needs
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.models.batch import logps_through
from fused_prefopt.models.causal_lm import input_vocab
from fused_prefopt.models.head_check import require_trained_head
from fused_prefopt.models.model_call import (
    IMAGES,
    INPUTS,
    evaluating,
)
from fused_prefopt.preference import PreferenceLoss

# Hugging Face's name, and the label of a token that is not one of a completion.
LABELS, IGNORED = "labels", -100


@dataclass
class CompletionMasks:
    """A collator of −100-masked labels whose batches have `completion_mask` in their place.

    Args:
        collator: of batches with `labels`, in the shape of `input_ids`.
        others: names of entries that the trainer itself reads.
        mismatched: prefix of the layout of mismatched completions (KTO's), which becomes TRL's;
            "" where there are none.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    others: tuple[str, ...] = ()
    mismatched: str = ""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch, with masks.

        Raises:
            ValueError: a label is neither −100 nor its own token, or the batch has an entry that
                no model would be given.
        """
        found, batch = self.collator(examples), {}
        for name, value in found.items():
            if self.mismatched and name.startswith(self.mismatched):
                name = MISMATCHED + name.removeprefix(self.mismatched)
            batch[name] = value
        for name in [name for name in batch if name in (LABELS, MISMATCHED + LABELS)]:
            prefix, labels = name.removesuffix(LABELS), batch.pop(name)
            batch[prefix + COMPLETION_MASK] = _mask(name, labels, batch[prefix + INPUT_IDS])
        known = (*INPUTS, COMPLETION_MASK, *self.others)
        unknown = [name for name in batch if name.removeprefix(MISMATCHED) not in known]
        if unknown:
            raise ValueError(
                f"data_collator: got a batch with {', '.join(map(repr, unknown))}, which the fused"
                f" loss does not give to the model; needs no more than {', '.join(known)}"
            )
        return batch


def _mask(name: str, labels: Tensor, ids: Tensor) -> Tensor:
    """(S, L) int64, 1 on labelled tokens."""
    if labels.shape != ids.shape:
        raise ValueError(
            f"{name}: got shape {tuple(labels.shape)}, wanted that of the token ids,"
            f" {tuple(ids.shape)}"
        )
    labelled = labels != IGNORED
    other = labelled & (labels != ids)
    if other.any():
        row, column = other.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: got {int(labels[row, column])} on token {int(ids[row, column])} (row {row},"
            f" column {column}), needs the token itself or {IGNORED}"
        )
    return labelled.long()


class FusesLabelled(TakesLossAlone, LogsPreferences):
    """Mixin for a subclass of a trainer of TRL's before 1.0: its loss is one of this package's.

    `fuse` at the end of the constructor attaches the loss to the model; from then on nothing of the
    trainer's own loss is called, and no logits are built. Reference, optimizer, sampler and logs
    stay the trainer's.
    """

    accelerator: Any
    model: Any
    ref_model: Any
    label_names: Any
    data_collator: Any
    # Fields that the loss can get, beside those of a reference.
    gives: ClassVar[frozenset[str]] = frozenset({PROMPT})

    def fuse(
        self,
        loss_fn: PreferenceLoss,
        options: FusedOptions,
        *,
        collator: CompletionMasks,
        router_coefficient: float | None,
    ) -> None:
        """Attach the loss, and let the batches carry what it needs.

        Args:
            loss_fn: the loss.
            options: `log_tokens` and `on_nonfinite` count.
            collator: of the trainer's batches.
            router_coefficient: as in `attach`.

        Raises:
            ValueError: the loss needs a field that the batches do not have, or what `attach` and
                `mind_nonfinite` raise.
        """
        self.label_names = [COMPLETION_MASK]
        require_trainer(self)
        self._require_whole_batches()
        self.needs = loss_fn.loss.needs
        check_needs(loss_fn.name, self.needs, self.gives | OF_REFERENCE)
        # Not `ld_alpha`: TRL before 1.0, and what subclasses it, weighs the policy's tails alone.
        self._op_options = loss_fn.evaluation_options
        policy = self.accelerator.unwrap_model(self.model)
        if self.needs & OF_REFERENCE and self.ref_model not in (None, self.model):
            require_trained_head(self.accelerator.unwrap_model(self.ref_model), "ref_model")
        self.data_collator = CountedLabels(CheckedTokens(collator, input_vocab(policy)))
        leave_out_ligers_loss(self.args)
        self.attachment = attach(
            policy,
            loss_fn,
            reference=self._at_every_step(),
            log_tokens=options.log_tokens,
            router_coefficient=router_coefficient,
        )
        mind_nonfinite(self, options.on_nonfinite)

    def _require_whole_batches(self) -> None:
        """Raise ValueError where the ranks are to share batches, which these trainers do not."""
        copies = share_batches(self).copies
        if copies > 1:
            raise ValueError(
                f"parallelism_config: got {copies} ranks that share each batch, needs 1 (cp_size,"
                " sp_size, tp_size) with this framework's trainers; `integrations.trl` and"
                " `integrations.transformers` have trainers that share them"
            )

    def of_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the loss takes it, with what the reference gives.

        Args:
            model: the policy, in its wrappers.
            inputs: of the collator, where they are to be.
        """
        batch = {name: inputs[name] for name in inputs if not name.startswith(MISMATCHED)}
        if not self.needs & OF_REFERENCE or self.needs & OF_BOTH_HEADS:
            return batch
        names = {"completion": REFERENCE, "prompt": PROMPT_REFERENCE}
        found = self.reference_logps(model, batch, prompt=PROMPT_REFERENCE in self.needs)
        return batch | {names[part]: values for part, values in found.items()}

    def logps(
        self, model: nn.Module, batch: Mapping[str, Any], *, prompt: bool = False
    ) -> dict[str, Tensor]:
        """`completion_logps` through the model's wrappers."""
        with self.accelerator.autocast():
            return logps_through(model, batch, prompt=prompt, **self._op_options)

    def reference_logps(
        self, model: nn.Module, batch: Mapping[str, Any], *, prompt: bool = False
    ) -> dict[str, Tensor]:
        """The same of the reference: the trainer's `ref_model`, or the policy without its adapter.

        Raises:
            ValueError: there is neither.
        """
        source = model if self.ref_model is None else self.ref_model
        with self._as_reference(source):
            return self.logps(source, batch, prompt=prompt)

    @contextmanager
    def _as_reference(self, source: nn.Module) -> Iterator[None]:
        adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None:
            policy = self.accelerator.unwrap_model(source)
            if not hasattr(policy, "disable_adapter"):
                raise ValueError(
                    f"ref_model: got none with a {type(policy).__name__}, needs a model, or a PEFT"
                    " adapter that is left out for it"
                )
            adapter = policy.disable_adapter()
        with evaluating(source), adapter:
            yield

    def _at_every_step(self) -> Any:
        """The reference as `attach` takes it, where a loss wants more than its log-probs."""
        if not self.needs & OF_BOTH_HEADS:
            return "precomputed"
        return "adapter" if self.ref_model is None else self.ref_model


class FusesLabelledPoints(FusesLabelled):
    """`FusesLabelled` with a loss on single completions: KTO, DRO and their like.

    KTO's `kl` is the mean log-ratio of the batch's mismatched completions on all ranks, at least 0.
    A loss that needs `rewards` gets 1 for a desirable completion and -1 for another.
    """

    gives = FusesLabelled.gives | {DESIRABLE, REWARDS}
    # Name of the batches' entry that tells the desirable completions.
    judgements: ClassVar[str]

    def of_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the loss takes it, with what the reference gives."""
        batch = super().of_loss(model, inputs)
        desirable = batch.pop(self.judgements).bool()
        batch[DESIRABLE] = desirable
        if REWARDS in self.needs:
            batch |= {REWARDS: 2.0 * desirable.float() - 1.0, MADE_UP_REWARDS: True}
        if KL in self.attachment.loss_fn.loss.wants:
            is_spent = bool(inputs.get(SPENT))
            batch[KL] = self._kl(model, _mismatched(inputs), is_spent)
            mode = "train" if model.training else "eval"
            every = torch.full_like(batch[KL], 0 if is_spent else desirable.shape[0])
            self.attachment.add_metrics(mode, {KL: batch[KL]}, {KL: every})
        return batch

    @torch.no_grad()
    def _kl(self, model: nn.Module, batch: Mapping[str, Any], is_spent: bool) -> Tensor:
        """0-d, in nats, the same on all ranks; a rank whose data have ended has no part in it."""
        policy = self.logps(model, batch)["completion"]
        difference = policy - self.reference_logps(model, batch)["completion"]
        if is_spent:
            difference = difference[:0]
        total = sum_over_ranks(torch.stack([difference.sum(), torch.ones_like(difference).sum()]))
        return (total[0] / total[1]).clamp(min=0)


def _mismatched(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of the mismatched completions, with the images of the prompts."""
    shared = {name: inputs[name] for name in IMAGES if name in inputs}
    return shared | {
        name.removeprefix(MISMATCHED): inputs[name]
        for name in inputs
        if name.startswith(MISMATCHED)
    }
