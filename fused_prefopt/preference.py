"""`PreferenceLoss`: the op, the statistics and a loss, as one module."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_prefopt.checks import is_on_host, require_number
from fused_prefopt.epilogues import run_epilogue
from fused_prefopt.losses import check_needs, find, length_desensitized, preset
from fused_prefopt.losses.metrics import divergence_metrics
from fused_prefopt.losses.whole_batch import whole_batch
from fused_prefopt.ops import sequence_logps, takes_kernels, token_statistics
from fused_prefopt.ops.call import LogpOptions
from fused_prefopt.ops.shared_lengths import shared_and_tail_logps
from fused_prefopt.ops.torch_engine import TorchEngine
from fused_prefopt.reference_rows import MEASURED, policy_beside_reference
from fused_prefopt.statistics.gather import world_size
from fused_prefopt.types import AnyHead, LogpBatch, LossOutput

_EXTRAS = tuple(
    item.name for item in fields(LogpBatch) if item.name not in ("policy", "lengths", "prompt")
)


class PreferenceLoss(nn.Module):
    """A preference loss by name, on hidden states (fused) or on known log-probs.

    Its buffers are the loss's running statistics: put it in the checkpoint, in `train()` mode to
    update them and in `eval()` mode to leave them alone.

    Under torch.distributed the mean over ranks of the loss's gradient, which data parallelism
    takes, is that of one process with all pairs where the ranks hold equally many, and for a
    loss that spans the batch (`available_losses()[name].coupled`) with any numbers: it exchanges
    the pairs' log-probs in `train()` mode. In `eval()` mode nothing is exchanged.

    Args:
        name: of a registered loss, or an alias; see `available_losses()`. "loss/model", such as
            "gamma-simpo/llama-3-8b-instruct", is a published setting; see `published_settings()`.
        workspace_mb: budget of the op in MiB.
        path: of the op; `auto`, `evaluate`, `stash`, `local` or `recompute`.
        engine: of the op; `auto`, `torch`, `cublas` or `triton`. With the last two, which `auto`
            takes on a GPU, the loss is one kernel too, where there is one for its composition.
        drop_mass: of the op; probability that a row's gradient may leave out.
        ld_alpha: LD-DPO's α in [0, 1], for any loss on pairs: weight of the log-probs by which a
            completion is longer than its partner. The `reference` must be weighted alike, as TRL's
            is; see `shared_and_tail_logps`. None weighs all alike.
        **hyperparameters: of the loss; they go before those of a published setting.

    Attributes:
        loss: the pure function of log-probs.
        hyperparameters: all of them, by name.
        statistics: what the loss remembers, or None.

    Raises:
        ValueError: the name is unknown (the message has the closest ones), or a hyperparameter or
            an option of the op is out of its range.
        TypeError: the loss has no such hyperparameter.
    """

    def __init__(
        self,
        name: str,
        *,
        workspace_mb: float = 256,
        path: str = "auto",
        engine: str = "auto",
        drop_mass: float = 0.0,
        ld_alpha: float | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        loss, published = preset(name) if "/" in name else (name, {})
        hyperparameters = {**published, **hyperparameters}
        spec = find(loss)
        self.name = spec.name
        self.loss = spec.build(**hyperparameters)
        self.hyperparameters = {**spec.defaults, **hyperparameters}
        self.statistics = self.loss.statistics()
        if ld_alpha is not None:
            require_number("ld_alpha", ld_alpha, low=0, high=1)
            if not self.loss.pairwise:
                raise ValueError(f"ld_alpha: got {ld_alpha} for {self.name}, needs a loss on pairs")
        self.ld_alpha = ld_alpha
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
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks whose batches are one; None means all of them."""
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
        **extras: Tensor | None,
    ) -> LossOutput:
        """The loss of a batch of hidden states, without logits in memory.

        Args:
            hidden: (S, T, D) last hidden states, or packed (N, D). Pairwise losses: the first half
                of the sequences is chosen, the second half rejected.
            head: the LM head, or its bare weight (V, D).
            labels: (S, T) or (N,), `ignore_index` everywhere but on completion tokens.
            prompt_labels: like `labels`, but on the prompt's tokens: their log-probs become
                `prompt` at forward cost, for losses that need it (DRO).
            prompt: (S,) the same log-probs where they are known.
            ref_hidden, ref_head: last hidden states and head of the reference, constants: they
                stand for `reference` and `sequence_kl` where the loss needs these and they are not
                given (see `ops.sequence_kl`: a loss of both has them from one pass).
            shift, sequence_ids, num_sequences, num_labels, ignore_index: as in `sequence_logps`.
            num_prompt_labels: what `num_labels` is, of `prompt_labels`.
            **extras: the other fields of `LogpBatch`: reference, rewards, desirable, kl,
                prompt_reference, groups, sequence_kl, collision. A loss that wants `collision`
                (WPO) and is not given it computes it: an evaluation more.

        Raises:
            ValueError: the loss needs a field that is missing, or an argument does not fit.
            TypeError: an extra that `LogpBatch` does not have.
        """
        for unknown in extras.keys() - set(_EXTRAS):
            wanted = ", ".join(("prompt_labels", "prompt", *_EXTRAS))
            raise TypeError(f"{unknown}: unknown argument, wanted one of {wanted}")
        given = {key for key, value in extras.items() if value is not None}
        if prompt is not None or prompt_labels is not None:
            given.add("prompt")
        self._check_reference(ref_hidden, ref_head)
        measured = MEASURED if ref_hidden is not None else frozenset()
        check_needs(self.name, self.loss.needs, given | measured)
        options = dict(
            self.op_options,
            shift=shift,
            sequence_ids=sequence_ids,
            num_sequences=num_sequences,
            num_labels=num_labels,
            ignore_index=ignore_index,
        )
        if prompt is None and prompt_labels is not None and "prompt" in self.loss.needs:
            with torch.no_grad():
                counted = {**options, "num_labels": num_prompt_labels}
                prompt = sequence_logps(hidden, head, prompt_labels, **counted).sums
        tail = None
        if ref_hidden is not None and ref_head is not None:
            reference, missing = (ref_hidden, ref_head), self.loss.needs - given
            sums, lengths, found = policy_beside_reference(
                hidden, head, *reference, labels, missing, options
            )
            extras |= found
        elif self.ld_alpha is None:
            out = sequence_logps(hidden, head, labels, **options)
            sums, lengths = out.sums, out.lengths
        else:
            shared, beyond = shared_and_tail_logps(hidden, head, labels, **options)
            tail = beyond.sums
            sums, lengths = shared.sums + tail, shared.lengths + beyond.lengths
        _warn_without_labels(lengths)
        if "collision" in self.loss.wants and "collision" not in given:
            # They have no gradient, so neither a path nor mass to drop.
            del options["path"], options["drop_mass"]
            extras["collision"] = _collisions(hidden, head, labels, sums.shape[0], options)
        batch = LogpBatch(sums, lengths, prompt=prompt, **extras)
        if tail is not None and self.ld_alpha is not None:
            batch = length_desensitized(batch, tail, None, alpha=self.ld_alpha)
        return self.from_logps(batch)

    def _check_reference(self, ref_hidden: Tensor | None, ref_head: AnyHead | None) -> None:
        if (ref_hidden is None) != (ref_head is None):
            missing, there = ("ref_hidden", "ref_head")[:: 1 if ref_hidden is None else -1]
            raise ValueError(f"{missing}: got None with `{there}`, wanted both or neither")
        if ref_hidden is not None and self.ld_alpha is not None:
            raise ValueError("ref_hidden: got one with `ld_alpha`, wanted `reference` instead")

    def from_logps(self, batch: LogpBatch) -> LossOutput:
        """The same loss on known log-probs.

        Args:
            batch: per-sequence log-probs and what comes with them; `ld_alpha` does not reach them
                (see `losses.length_desensitized`).

        Raises:
            ValueError: the loss needs a field that is missing, or the batch does not fit it.
        """
        check_needs(self.name, self.loss.needs, batch.given)
        if not (self.training and self.loss.coupled and world_size(self.process_group) > 1):
            return self._of(batch)
        whole = whole_batch(batch, self.process_group)
        return whole.own(self._of(whole.batch))

    def _of(self, batch: LogpBatch) -> LossOutput:
        result = self._composed(batch)
        exact = divergence_metrics(batch, pairwise=self.loss.pairwise)
        return replace(result, metrics={**result.metrics, **exact})

    def _composed(self, batch: LogpBatch) -> LossOutput:
        if takes_kernels(self.op_options["engine"], batch.policy.device):
            result = run_epilogue(self.loss, self.statistics, batch)
            if result is not None:
                return result
        if self.statistics is None:
            return self.loss(batch)
        observed = self.loss.observe(batch)
        assert observed is not None
        return self.loss(batch, self.statistics(observed))

    def extra_repr(self) -> str:
        values = dict(self.hyperparameters)
        if self.ld_alpha is not None:
            values["ld_alpha"] = self.ld_alpha
        return ", ".join([self.name, *(f"{key}={value!r}" for key, value in values.items())])


def _warn_without_labels(lengths: Tensor) -> None:
    """Warn of a batch without any label, where that is known without waiting for a device."""
    known = is_on_host(lengths) and not torch.compiler.is_compiling()
    if known and lengths.numel() and not lengths.any():
        warnings.warn(
            "labels: got none but `ignore_index`, so the loss has no gradient; are the completions"
            " cut off by a maximum length?",
            stacklevel=3,
        )


def _collisions(
    hidden: Tensor, head: AnyHead, labels: Tensor, sequences: int, options: dict[str, Any]
) -> Tensor:
    """(S,) sums over tokens of ``log Σ_v π(v)²``."""
    compute = token_statistics
    if torch.compiler.is_compiling():
        # It counts the labelled rows. Disabled by a decorator, importing this would import Triton.
        compute = torch.compiler.disable(token_statistics)
    tokens = compute(hidden, head, labels, **options).collisions
    if options["sequence_ids"] is None:
        return tokens.sum(1)
    ids = options["sequence_ids"].long()
    return TorchEngine.sequence_sums(tokens, ids, sequences, False)[0]
