"""What TRL logs of single tokens: entropy, mean logits, accuracy. Costs an evaluation a step."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.integrations.collated import CollatedRows
from fused_prefopt.ops import token_statistics
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.types import LMHead

Weighed = tuple[dict[str, Tensor], dict[str, Tensor]]


@torch.no_grad()
def token_metrics(
    loss_fn: PreferenceLoss,
    rows: CollatedRows,
    hidden: Tensor,
    head: LMHead,
    desirable: Tensor | None,
) -> Weighed:
    """Means over the completions' tokens, by TRL's names.

    Args:
        loss_fn: whose options the pass takes.
        rows: the batch.
        hidden: its last hidden states.
        head: the head, whole.
        desirable: (S,) bool for single completions; None for pairs, of which the first half is
            chosen.

    Returns:
        Metrics and the numbers of tokens they are means over: `entropy` in nats, `logits/chosen`,
        `logits/rejected` (means over the vocabulary), and for pairs `mean_token_accuracy`, the
        share of the chosen completions' tokens that are the most likely ones.
    """
    options = {name: loss_fn.op_options[name] for name in ("workspace_mb", "engine")}
    tokens = token_statistics(hidden, head, rows.labels, **rows.layout, **options)
    counted = _counted(rows)
    chosen = _of_tokens(rows, desirable)
    means = {
        "entropy": (tokens.entropies, counted),
        "logits/chosen": (tokens.mean_logits, counted & chosen),
        "logits/rejected": (tokens.mean_logits, counted & ~chosen),
    }
    if desirable is None:
        means["mean_token_accuracy"] = (tokens.correct.double(), counted & chosen)
    metrics, weights = {}, {}
    for name, (values, members) in means.items():
        weights[name] = members.sum()
        metrics[name] = values.double().where(members, 0.0).sum() / weights[name].clamp(min=1)
    return metrics, weights


def _counted(rows: CollatedRows) -> Tensor:
    """Which labels are predicted: with `shift` nothing predicts a sequence's first token."""
    counted = rows.labels != -100
    if rows.layout["shift"]:
        ids = rows.layout.get("sequence_ids")
        first = torch.zeros_like(counted)
        first[..., :1].fill_(True)
        if ids is not None:
            first[1:] = ids[1:] != ids[:-1]
        counted = counted & ~first
    return counted


def _of_tokens(rows: CollatedRows, desirable: Tensor | None) -> Tensor:
    """Whether each label's sequence is a chosen one."""
    ids = rows.layout.get("sequence_ids")
    if desirable is None:
        sequences = rows.layout["num_sequences"] if ids is not None else rows.labels.shape[0]
        desirable = torch.arange(sequences, device=rows.labels.device) < sequences // 2
    return desirable[:, None].expand(rows.labels.shape) if ids is None else desirable[ids]
