"""`PreferenceLoss`: the op, the statistics and a loss, as one module."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_prefopt.checks import is_on_host, require_number
from fused_prefopt.distributed import require_other_pairs, world_size
from fused_prefopt.loss_kernel import launch_loss
from fused_prefopt.losses import (
    LossName,
    MarginName,
    OnPolicyWeights,
    WeightedSum,
    check_needs,
    length_desensitized,
    named_loss,
    pairs_of_lists,
    perturbation_of,
)
from fused_prefopt.losses.counts import is_mixed, share_of_rank
from fused_prefopt.losses.lists import require_lists
from fused_prefopt.losses.metrics import LIST_PAIRS, WEIGHTS_MEAN, divergence_metrics
from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.losses.whole_batch import whole_batch
from fused_prefopt.measured_fields import collisions, policy_beside_reference
from fused_prefopt.ops import sequence_logps, takes_kernels
from fused_prefopt.ops.inputs import LogpOptions, read_head
from fused_prefopt.ops.logps import shared_and_tail_logps
from fused_prefopt.ops.sequence_group import COLLISIONS, over_group, telling
from fused_prefopt.ops.vocab_shard import sharing_ranks
from fused_prefopt.types import AnyHead, LogpBatch, LossOutput

_EXTRAS = tuple(
    item.name for item in fields(LogpBatch) if item.name not in ("policy", "lengths", "prompt")
)
# `LogpBatch` fields that a reference's hidden states stand for.
_MEASURED = OF_BOTH_HEADS | {"reference"}


class PreferenceLoss(nn.Module):
    """A preference loss by name, on hidden states (fused) or on known log-probs.

    Its buffers are the loss's running statistics: put it in the checkpoint, in `train()` mode to
    update them and in `eval()` mode to leave them alone.

    Under torch.distributed the mean over ranks of the loss's gradient, which data parallelism
    takes, is that of one process with all pairs, or lists, where the ranks hold equally many, with
    `uneven_ranks` with any numbers, and so for a loss that spans the batch
    (`available_losses()[name].coupled`): it exchanges the pairs' log-probs in `train()` mode. In
    `eval()` mode nothing is exchanged.
    Where ranks share sequences too (`forward`'s `sequence_group`), `process_group` is the ranks
    whose pairs differ, and the mean is that over all ranks of both. It is those ranks as well where
    ranks share the rows of a head (`LMHead`).

    Args:
        name: of a registered loss, or an alias; see `available_losses()`. "loss/model", such as
            "gamma-simpo/llama-3-8b-instruct", is a published setting; see `published_settings()`.
            A sum of losses is "dpo + 0.2 bco-pair + sft", or a list of such texts and of mappings
            with `name`, `weight` and `hyperparameters`; one pass of the head serves all terms.
        workspace_mb: budget of the op in MiB; None: the device's default (`sequence_logps`).
        path: of the op; `auto`, `evaluate`, `stash`, `local` or `recompute`.
        engine: of the op; `auto`, `torch`, `cublas` or `triton`. With the last two, which `auto`
            takes on a GPU, the loss is one kernel too, where there is one for its composition.
        drop_mass: of the op; probability that a row's gradient may leave out.
        ld_alpha: LD-DPO's α in [0, 1], for any loss on pairs: weight of the log-probs by which a
            completion is longer than its partner. The `reference` must be weighted alike, as TRL's
            is, and so must `extrapolated` and `interpolated`; see `shared_and_tail_logps`. None
            weighs all alike.
        use_weighting: WPO's weights, for any loss that is a mean over pairs: how likely the policy
            is to write both completions; see `losses.OnPolicyWeights`.
        margin: a target margin more, for any loss that compares the rewards of a pair, of a sum in
            every such term: γ-PO's ``{"name": "dynamic", "gamma": 0.5}``, α-DPO's
            ``{"name": "adaptive", "alpha": 0.05}``, another of `losses.added_margin`, or a part
            such as `losses.DynamicMargin`. The loss keeps its own; only one of both may keep a
            statistic.
        uneven_ranks: ranks may hold different numbers of pairs, lists or completions, or none: in
            `train()` mode the `loss` of a rank with n of them is its mean times ``n W / Σ n`` over
            the W ranks of `process_group`, so that the mean over ranks is that over all pairs.
            Every rank must make the call: one sum of one number, for which no device is waited.
            False where they cannot differ, and in trainers, which see to it themselves.
        **hyperparameters: of the loss, of a sum of every term that has them: one β for all. They
            go before those of a published setting, and a term's own in the list before them.

    Attributes:
        name: of the loss; of a sum the names of its terms with their weights.
        loss: the pure function of log-probs.
        hyperparameters: all of them, by name; of a sum those of the terms, by the terms' names.
        statistics: what the loss remembers, or None.

    Raises:
        ValueError: a name is unknown (the message has the closest ones), a sum cannot be read, or
            a hyperparameter or an option of the op is out of its range.
        TypeError: the loss, or no term of the sum, has such a hyperparameter.
    """

    def __init__(
        self,
        name: LossName,
        *,
        workspace_mb: float | None = None,
        path: str = "auto",
        engine: str = "auto",
        drop_mass: float = 0.0,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
        margin: MarginName | None = None,
        uneven_ranks: bool = False,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        weighting = OnPolicyWeights() if use_weighting else None
        named = named_loss(name, hyperparameters, weighting, margin)
        self.name = named.name
        self.loss = named.loss
        self.hyperparameters = named.hyperparameters
        self._described = named.described()
        self.statistics = self.loss.statistics()
        self._perturbation = perturbation_of(self.loss)
        if ld_alpha is not None:
            require_number("ld_alpha", ld_alpha, low=0, high=1)
            if not self.loss.pairwise:
                raise ValueError(f"ld_alpha: got {ld_alpha} for {self.name}, needs a loss on pairs")
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self.margin = margin
        if uneven_ranks and is_mixed(self.loss):
            raise ValueError(
                f"uneven_ranks: got True for {self.name}, a sum of means over groups and over"
                " single completions, of which a rank has unlike shares; needs terms of one kind"
            )
        self.uneven_ranks = uneven_ranks
        self._process_group: dist.ProcessGroup | None = None
        if self.statistics is not None:
            # Of a loss that spans the batch `from_logps` has gathered it already.
            self.statistics.sees_all_ranks = self.loss.coupled
        self.op_options: dict[str, Any] = {
            "workspace_mb": workspace_mb,
            "path": path,
            "engine": engine,
            "drop_mass": drop_mass,
        }
        LogpOptions(**self.op_options)  # A bad one is told here, not at the first batch.

    @property
    def evaluation_options(self) -> dict[str, Any]:
        """Options of the op where nothing needs a gradient: neither a path nor mass to drop."""
        return {name: self.op_options[name] for name in ("workspace_mb", "engine")}

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks whose batches are one, each of other pairs; None means all ranks."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._process_group = group
        if self.statistics is not None:
            self.statistics.process_group = group

    def forward(
        self,
        hidden: Tensor,
        head: AnyHead,
        labels: Tensor,
        *,
        prompt_labels: Tensor | None = None,
        prompt: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_head: AnyHead | None = None,
        shift: bool = True,
        sequence_ids: Tensor | None = None,
        num_sequences: int | None = None,
        num_labels: int | None = None,
        num_prompt_labels: int | None = None,
        ignore_index: int = -100,
        token_weights: Tensor | None = None,
        position_ids: Tensor | None = None,
        sequence_group: dist.ProcessGroup | None = None,
        **extras: Tensor | None,
    ) -> LossOutput:
        """The loss of a batch of hidden states, without logits in memory.

        Args:
            hidden: (S, T, D) last hidden states, or packed (N, D). Pairwise losses: the first half
                of the sequences is chosen, the second half rejected; or, with `groups` and
                `rewards`, S completions of prompts, any number of each.
            head: the LM head, or its bare weight (V, D).
            labels: (S, T) or (N,), `ignore_index` everywhere but on completion tokens.
            prompt_labels: like `labels`, but on the prompt's tokens: their log-probs become
                `prompt`, for losses that need it: at forward cost (DRO), or with a gradient for
                those that need `prompt_lengths`, too (ORPO of whole sequences).
            prompt: (S,) the same log-probs where they are known.
            ref_hidden, ref_head: last hidden states and head of the reference, constants: they
                stand for `reference`, `sequence_kl`, `extrapolated` and `interpolated` where the
                loss needs these and they are not given (see `ops.sequence_kl`: a loss of several
                has them from one pass).
            shift, sequence_ids, num_sequences, num_labels, ignore_index: as in `sequence_logps`.
            num_prompt_labels: what `num_labels` is, of `prompt_labels`.
            token_weights: as in `sequence_logps`, of the completions' tokens; prompts count whole.
                A `reference`, `sequence_kl` or `collision` that is given must be weighted alike,
                as must `extrapolated` and `interpolated`.
            position_ids: as in `shared_and_tail_logps`, for `ld_alpha` with a `sequence_group`.
            sequence_group: ranks that hold other tokens of the same sequences, as in
                `sequence_logps`; `ref_hidden`, `prompt_labels` and `token_weights` are of this
                rank's tokens, the extras and the output of whole sequences, on each rank. A loss
                that remembers or spans batches needs a `process_group`, to see each pair once. An
                all-reduce of 4 KB for each pass over a head (policy, prompts, reference,
                collisions, gold), and one in the backward of those that train; for `ld_alpha`
                what `shared_and_tail_logps` says.
            **extras: the other fields of `LogpBatch`: reference, rewards, desirable, kl,
                prompt_reference, groups, sequence_kl, extrapolated, interpolated, collision,
                weights, gold, gold_lengths. A loss that wants `collision` (WPO) and is not given it
                computes it: an evaluation more.

        Raises:
            ValueError: the loss needs a field that is missing, an argument does not fit, tokens
                have weights with `ld_alpha`, or `process_group` has other ranks of the
                `sequence_group` or of those that share the head.
            TypeError: an extra that `LogpBatch` does not have.
        """
        for unknown in extras.keys() - set(_EXTRAS):
            wanted = ", ".join(("prompt_labels", "prompt", *_EXTRAS))
            raise TypeError(f"{unknown}: unknown argument, wanted one of {wanted}")
        given = {key for key, value in extras.items() if value is not None}
        if prompt is not None or prompt_labels is not None:
            given.add("prompt")
        if prompt_labels is not None:
            given.add("prompt_lengths")
        self._check_reference(ref_hidden, ref_head)
        if self.loss.coupled or self.statistics is not None:
            alike = {"sequence_group": sequence_group}
            if self.training:
                alike["head's group"] = sharing_ranks(read_head(head))
            for what, ranks in alike.items():
                require_other_pairs(self.process_group, ranks, what, self.name)
        if "groups" in given:
            self.require_lists()
        measured = _MEASURED if ref_hidden is not None else frozenset()
        check_needs(self.name, self.loss.needs, given | measured)
        if self._takes_as_lists(given):
            require_lists(given)
        options = dict(
            self.op_options,
            shift=shift,
            sequence_ids=sequence_ids,
            num_sequences=num_sequences,
            num_labels=num_labels,
            ignore_index=ignore_index,
            sequence_group=sequence_group,
        )
        if prompt is None and prompt_labels is not None and "prompt" in self.loss.needs:
            counted = {**options, "num_labels": num_prompt_labels}
            trains = "prompt_lengths" in self.loss.needs
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                of_prompts = sequence_logps(hidden, head, prompt_labels, **counted)
            prompt = of_prompts.sums
            if trains:
                extras["prompt_lengths"] = of_prompts.lengths
        tail, weighted = None, {**options, "token_weights": token_weights}
        if ref_hidden is not None and ref_head is not None:
            reference, missing = (ref_hidden, ref_head), self.loss.needs - given
            sums, lengths, found = policy_beside_reference(
                hidden, head, *reference, labels, missing, self._perturbation, weighted
            )
            extras |= found
        elif self.ld_alpha is None:
            out = sequence_logps(hidden, head, labels, **weighted)
            sums, lengths = out.sums, out.lengths
        else:
            weighted["position_ids"] = position_ids
            shared, beyond = shared_and_tail_logps(hidden, head, labels, **weighted)
            tail = beyond.sums
            sums, lengths = shared.sums + tail, shared.lengths + beyond.lengths
        _warn_without_labels(lengths)
        if "collision" in self.loss.wants and "collision" not in given:
            # They have no gradient, so neither a path nor mass to drop.
            del options["path"], options["drop_mass"], options["sequence_group"]
            sizes = sums.shape[0], token_weights
            with telling(sequence_group, labels.device):
                own = collisions(hidden, head, labels, *sizes, options)
            (extras["collision"],) = over_group([own], sequence_group, COLLISIONS)
        batch = LogpBatch(sums, lengths, prompt=prompt, **extras)
        if tail is not None and self.ld_alpha is not None:
            batch = length_desensitized(batch, tail, None, alpha=self.ld_alpha)
        return self.from_logps(batch)

    def require_lists(self) -> None:
        """Raise ValueError if the loss has an option that does not go with lists."""
        if self.ld_alpha is not None:
            raise ValueError(
                f"ld_alpha: got {self.ld_alpha} with lists, needs pairs, or None: in a list a"
                " completion has several partners, which it exceeds by different lengths"
            )

    def _check_reference(self, ref_hidden: Tensor | None, ref_head: AnyHead | None) -> None:
        if (ref_hidden is None) != (ref_head is None):
            missing, there = ("ref_hidden", "ref_head")[:: 1 if ref_hidden is None else -1]
            raise ValueError(f"{missing}: got None with `{there}`, wanted both or neither")
        if ref_hidden is not None and self.ld_alpha is not None:
            raise ValueError("ref_hidden: got one with `ld_alpha`, wanted `reference` instead")

    def from_logps(self, batch: LogpBatch) -> LossOutput:
        """The loss of known log-probs.

        Args:
            batch: per-sequence log-probs and what comes with them; `ld_alpha` does not reach them
                (see `losses.length_desensitized`). With `groups` a loss on pairs takes lists: its
                pairs, P of them, are those of `losses.pairs_of_lists`, which needs `rewards`.

        Raises:
            ValueError: the loss needs a field that is missing, or the batch does not fit it; or
                ranks that exchange their pairs give different fields.
        """
        check_needs(self.name, self.loss.needs, batch.given)
        result = self._of_batch(batch)
        # One that spans the batch is of all ranks already.
        if self.loss.coupled or not (self.uneven_ranks and self.training):
            return result
        share = share_of_rank(self.loss, batch, self.process_group)
        return replace(result, loss=result.loss * share.to(result.loss.dtype))

    def _of_batch(self, batch: LogpBatch) -> LossOutput:
        if not self._takes_as_lists(batch.given):
            return self._of_pairs(batch)
        pairs = pairs_of_lists(batch, self.process_group, all_ranks=self._spans_ranks)
        result = self._of_pairs(pairs.batch)
        metrics = {**result.metrics, LIST_PAIRS: pairs.mean}
        if batch.weights is None:
            metrics.pop(WEIGHTS_MEAN, None)
        return replace(result, metrics=metrics)

    def _takes_as_lists(self, given: Collection[str]) -> bool:
        return self.loss.pairwise and "groups" in given and "completions" not in given

    @property
    def _spans_ranks(self) -> bool:
        return self.training and self.loss.coupled and world_size(self.process_group) > 1

    def _of_pairs(self, batch: LogpBatch) -> LossOutput:
        if not self._spans_ranks:
            return self._of(batch)
        whole = whole_batch(batch, self.process_group)
        return whole.own(self._of(whole.batch))

    def _of(self, batch: LogpBatch) -> LossOutput:
        kernels = takes_kernels(self.op_options["engine"], batch.policy.device)
        result = _loss_of(self.loss, self.statistics, batch, kernels)
        exact = divergence_metrics(batch, pairwise=self.loss.pairwise)
        return replace(result, metrics={**result.metrics, **exact})

    def extra_repr(self) -> str:
        options = {
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting or None,
            "margin": self.margin,
            "uneven_ranks": self.uneven_ranks or None,
        }
        given = (f"{key}={value!r}" for key, value in options.items() if value is not None)
        return ", ".join([self._described, *given])


def _loss_of(loss: Any, statistics: Any, batch: LogpBatch, kernels: bool) -> LossOutput:
    """The loss of a batch and the update of its statistic; by kernels, of a sum term by term."""
    if kernels and isinstance(loss, WeightedSum):
        nothing = nullcontext([None] * len(loss.terms))
        with nothing if statistics is None else statistics.updating() as parts:
            of_terms = zip(loss.terms, parts, strict=True)
            outputs = [_loss_of(term.loss, part, batch, True) for term, part in of_terms]
        return loss.joined(batch, outputs)
    result = launch_loss(loss, statistics, batch) if kernels else None
    if result is None:
        summary = None if statistics is None else statistics(loss.observe(batch))
        result = loss(batch, summary)
    return result


def _warn_without_labels(lengths: Tensor) -> None:
    """Warn of a batch without any label, where that is known without waiting for a device."""
    known = is_on_host(lengths) and not torch.compiler.is_compiling()
    if known and lengths.numel() and not lengths.any():
        warnings.warn(
            "labels: got none but `ignore_index`, or of weight 0, so the loss has no gradient; are"
            " the completions cut off by a maximum length?",
            stacklevel=3,
        )
