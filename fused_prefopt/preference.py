"""`PreferenceLoss`: the op, the statistics and a loss, as one module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.epilogues import run_epilogue
from fused_prefopt.losses import check_needs, find
from fused_prefopt.ops import sequence_logps, takes_kernels
from fused_prefopt.types import LMHead, LogpBatch, LossOutput

_EXTRAS = tuple(
    item.name for item in fields(LogpBatch) if item.name not in ("policy", "lengths", "prompt")
)


class PreferenceLoss(nn.Module):
    """A preference loss by name, on hidden states (fused) or on known log-probs.

    Its buffers are the loss's running statistics: put it in the checkpoint, in `train()` mode to
    update them and in `eval()` mode to leave them alone.

    Args:
        name: of a registered loss, or an alias; see `available_losses()`.
        workspace_mb: budget of the op in MiB.
        path: of the op; `auto`, `evaluate`, `stash`, `local` or `recompute`.
        engine: of the op; `auto`, `torch`, `cublas` or `triton`. With the last two, which `auto`
            takes on a GPU, the loss is one kernel too, where there is one for its composition.
        drop_mass: of the op; probability that a row's gradient may leave out.
        **hyperparameters: of the loss.

    Raises:
        ValueError: the name is unknown, or a hyperparameter is out of its range.
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
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        spec = find(name)
        self.name = spec.name
        self.loss = spec.build(**hyperparameters)
        self.hyperparameters = {**spec.defaults, **hyperparameters}
        self.statistics = self.loss.statistics()
        self.op_options: dict[str, Any] = {
            "workspace_mb": workspace_mb,
            "path": path,
            "engine": engine,
            "drop_mass": drop_mass,
        }

    def forward(
        self,
        hidden: Tensor,
        head: LMHead | Tensor,
        labels: Tensor,
        *,
        prompt_labels: Tensor | None = None,
        prompt: Tensor | None = None,
        shift: bool = True,
        sequence_ids: Tensor | None = None,
        num_sequences: int | None = None,
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
            shift, sequence_ids, num_sequences, ignore_index: as in `sequence_logps`.
            **extras: the other fields of `LogpBatch`: reference, rewards, desirable, kl,
                prompt_reference, groups, sequence_kl.

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
        check_needs(self.name, self.loss.needs, given)
        options = dict(
            self.op_options,
            shift=shift,
            sequence_ids=sequence_ids,
            num_sequences=num_sequences,
            ignore_index=ignore_index,
        )
        if prompt is None and prompt_labels is not None and "prompt" in self.loss.needs:
            with torch.no_grad():
                prompt = sequence_logps(hidden, head, prompt_labels, **options).sums
        out = sequence_logps(hidden, head, labels, **options)
        return self.from_logps(LogpBatch(out.sums, out.lengths, prompt=prompt, **extras))

    def from_logps(self, batch: LogpBatch) -> LossOutput:
        """The same loss on known log-probs.

        Args:
            batch: per-sequence log-probs and what comes with them.

        Raises:
            ValueError: the loss needs a field that is missing, or the batch does not fit it.
        """
        check_needs(self.name, self.loss.needs, batch.given)
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
        return ", ".join([self.name, *(f"{k}={v!r}" for k, v in self.hyperparameters.items())])
