"""A collated batch on its way from the backbone to the head: padded, packed or shared prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data.labels import counts_of, labels_of, prompt_labels_of
from fused_prefopt.integrations.causal_lm import backbone_outputs, inside_head
from fused_prefopt.integrations.packed import require_separate_sequences
from fused_prefopt.integrations.router_loss import router_loss
from fused_prefopt.integrations.shared_prompt import shared_hidden
from fused_prefopt.integrations.virtual_tokens import PROMPTED, with_prompt
from fused_prefopt.ops import sequence_logps
from fused_prefopt.ops.shared_lengths import shared_and_tail_logps
from fused_prefopt.types import LMHead, LogpBatch

# The op computes the first two; a data set's `prompt` is a text.
_COMPUTED = ("policy", "lengths", "prompt")
FIELDS = tuple(item.name for item in fields(LogpBatch) if item.name not in _COMPUTED)


@dataclass(frozen=True)
class CollatedRows:
    """Last hidden states of a batch and what the op needs beside them.

    Attributes:
        hidden: (S, L, D), or (N, D) where sequences are packed.
        labels: (S, L) or (N,) int64, -100 everywhere but on completion tokens.
        prompt_labels: the same on prompt tokens, or None.
        layout: `shift`, `sequence_ids`, `num_sequences` and `num_labels` of the op.
        router: coefficient and value of the router loss of a mixture of experts, or None.
        num_prompt_labels: `num_labels` of the prompt tokens.
    """

    hidden: Tensor
    labels: Tensor
    prompt_labels: Tensor | None
    layout: dict[str, Any]
    router: tuple[float, Tensor] | None = None
    num_prompt_labels: int | None = None


def collated_rows(
    model: nn.Module, batch: Mapping[str, Any], *, prompt: bool, router: bool = False
) -> CollatedRows:
    """Run the backbone on a batch from `PairCollator`, `PointCollator` or TRL's collators.

    Args:
        model: causal language model with a backbone and an output embedding, in its wrappers.
        batch: `input_ids`, `completion_mask`, `attention_mask` or `position_ids`, and what the
            collators add for their layouts; or one of `past_wrappers.batch_behind`.
        prompt: whether the prompts' log-probs are wanted too.
        router: whether the router loss is wanted too.

    Raises:
        ValueError: prompts or a router loss are wanted of pairs that share a prompt in one row, or
            the model does not fit the layout.
    """
    batch = with_prompt(model, batch)
    if "segments" in batch:
        if prompt:
            raise ValueError("shared_prompt: got a loss that needs the prompt of each sequence")
        if router:
            raise ValueError("shared_prompt: got a model that adds a router loss")
        layout = {
            "shift": False,
            "sequence_ids": batch["target_sequences"],
            "num_sequences": 2 * batch["input_ids"].shape[0],
            "num_labels": batch["targets"].shape[0],
        }
        return CollatedRows(shared_hidden(model, batch), batch["targets"], None, layout)
    if "sequence_ids" in batch:
        require_separate_sequences(model, batch["input_ids"])
    options = {"output_router_logits": True} if router else {}
    outputs = backbone_outputs(model, batch, **options)
    routed = None
    if router:
        routed = router_loss(model, outputs.router_logits, _routed(batch).get("attention_mask"))
    hidden, labels = outputs.last_hidden_state, labels_of(batch)
    prompt_labels = prompt_labels_of(batch) if prompt else None
    count, prompt_count = counts_of(batch)
    layout = {"shift": True, "num_labels": count}
    if "sequence_ids" not in batch:
        return CollatedRows(hidden, labels, prompt_labels, layout, routed, prompt_count)
    layout["sequence_ids"] = batch["sequence_ids"][0]
    layout["num_sequences"] = batch["num_sequences"]
    prompt_labels = None if prompt_labels is None else prompt_labels[0]
    return CollatedRows(hidden[0], labels[0], prompt_labels, layout, routed, prompt_count)


def _routed(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs whose tokens go through the experts: virtual ones, but no keys and values."""
    made: Mapping[str, Any] = batch.get(PROMPTED, {})
    return made if "inputs_embeds" in made else batch


def given_fields(batch: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The fields of `LogpBatch` that a batch carries, TRL's two halves of `reference` joined."""
    given = {name: batch.get(name) for name in FIELDS}
    if "ref_chosen_logps" in batch:
        given["reference"] = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    return given


@torch.no_grad()
def completion_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prompt: bool = False,
    ld_alpha: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """A model's log-probs of a batch, at the cost of a forward pass without logits.

    Args:
        model: causal language model.
        batch: as in `collated_rows`.
        prompt: also those of the prompts (all tokens but the first).
        ld_alpha: of pairs, weight of the tokens by which a completion is longer than its partner.
        **options: of `sequence_logps`, such as `workspace_mb`.

    Returns:
        (S,) sums in nats, fp32: `completion`, and `prompt` where it is wanted.
    """
    rows = collated_rows(model, batch, prompt=prompt)
    sums: dict[str, Tensor] = {}

    def run(hidden: Tensor, head: LMHead) -> Tensor:
        given = {**rows.layout, **options}
        if ld_alpha is not None:
            shared, tail = shared_and_tail_logps(hidden, head, rows.labels, **given)
            sums["completion"] = shared.sums + ld_alpha * tail.sums
        else:
            sums["completion"] = sequence_logps(hidden, head, rows.labels, **given).sums
        if rows.prompt_labels is not None:
            given["num_labels"] = rows.num_prompt_labels
            sums["prompt"] = sequence_logps(hidden, head, rows.prompt_labels, **given).sums
        return sums["completion"]

    # Not what it returns, which FSDP2 casts to the dtype of its units' outputs.
    inside_head(model, rows.hidden, run)
    return sums
