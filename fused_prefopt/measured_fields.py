"""Fields of a `LogpBatch` that a loss wants and that are measured of hidden states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.losses.protocol import OF_BOTH_HEADS
from fused_prefopt.ops import sequence_kl, sequence_logps, token_statistics
from fused_prefopt.ops.torch_engine import TorchEngine
from fused_prefopt.types import AnyHead


def policy_beside_reference(
    hidden: Tensor,
    head: AnyHead,
    ref_hidden: Tensor,
    ref_head: AnyHead,
    labels: Tensor,
    missing: Collection[str],
    perturbation: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs of the policy, and of the `missing` fields those that the reference stands for.

    A loss that needs a field of both heads' logits gets everything from one pass over them.

    Args:
        hidden, head, labels: of the policy.
        ref_hidden, ref_head: of the reference, on the same labels; constants.
        missing: fields that the loss needs and nobody has given.
        perturbation: ε of the mixtures of logits that it needs, or None.
        options: of `sequence_logps`.

    Returns:
        sums (S,), differentiable; lengths (S,); name → (S,), of which `sequence_kl` is
        differentiable.

    Raises:
        ValueError: what `sequence_kl` and `sequence_logps` raise; or the loss needs a field of both
            heads, and the options ask for another path than `recompute` or drop mass.
    """
    if OF_BOTH_HEADS & set(missing):
        if options["path"] not in ("auto", "recompute") or options["drop_mass"]:
            raise ValueError(
                f"path: got {options['path']!r} with drop_mass {options['drop_mass']:g}, but a loss"
                " of the policy's logits beside the reference's needs 'recompute' and all mass"
            )
        kept = {key: value for key, value in options.items() if key not in ("path", "drop_mass")}
        out = sequence_kl(
            hidden, head, ref_hidden, ref_head, labels, perturbation=perturbation, **kept
        )
        fields = {
            "sequence_kl": out.kl,
            "reference": out.reference,
            "extrapolated": out.extrapolated,
            "interpolated": out.interpolated,
        }
        found = {key: each for key, each in fields.items() if key in missing and each is not None}
        return out.policy, out.lengths, found
    policy = sequence_logps(hidden, head, labels, **options)
    if "reference" not in missing:
        return policy.sums, policy.lengths, {}
    with torch.no_grad():
        reference = sequence_logps(ref_hidden, ref_head, labels, **{**options, "path": "auto"})
    return policy.sums, policy.lengths, {"reference": reference.sums}


def collisions(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    sequences: int,
    token_weights: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """(S,) sums over tokens of ``log Σ_v π(v)²``."""
    compute = token_statistics
    if torch.compiler.is_compiling():
        # It counts the labelled rows. Disabled by a decorator, importing this would import Triton.
        compute = torch.compiler.disable(token_statistics)
    tokens = compute(hidden, head, labels, **options).collisions
    if token_weights is not None:
        tokens = tokens * token_weights.to(tokens.dtype)
    if options["sequence_ids"] is None:
        return tokens.sum(1)
    ids = options["sequence_ids"].long()
    return TorchEngine.sequence_sums(tokens, ids, sequences, False)[0]
