"""What a loss needs of a reference model, from that model's hidden states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fused_prefopt.ops import sequence_kl, sequence_logps
from fused_prefopt.types import AnyHead

# `LogpBatch` fields that a reference's hidden states stand for.
MEASURED = frozenset({"reference", "sequence_kl"})


def policy_beside_reference(
    hidden: Tensor,
    head: AnyHead,
    ref_hidden: Tensor,
    ref_head: AnyHead,
    labels: Tensor,
    missing: Collection[str],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs of the policy, and the `missing` fields of `LogpBatch` that `MEASURED` has.

    A loss that needs `sequence_kl` gets everything from one pass over both heads.

    Args:
        hidden, head, labels: of the policy.
        ref_hidden, ref_head: of the reference, on the same labels; constants.
        missing: fields that the loss needs and nobody has given.
        options: of `sequence_logps`.

    Returns:
        sums (S,), differentiable; lengths (S,); name → (S,), of which `sequence_kl` is
        differentiable.

    Raises:
        ValueError: what `sequence_kl` and `sequence_logps` raise; or the loss needs `sequence_kl`,
            and the options ask for another path than `recompute` or drop mass.
    """
    if "sequence_kl" in missing:
        if options["path"] not in ("auto", "recompute") or options["drop_mass"]:
            raise ValueError(
                f"path: got {options['path']!r} with drop_mass {options['drop_mass']:g}, but the KL"
                " divergence from a reference needs 'recompute' and all mass"
            )
        kept = {key: value for key, value in options.items() if key not in ("path", "drop_mass")}
        out = sequence_kl(hidden, head, ref_hidden, ref_head, labels, **kept)
        fields = {"sequence_kl": out.kl, "reference": out.reference}
        return out.policy, out.lengths, {key: fields[key] for key in MEASURED & set(missing)}
    policy = sequence_logps(hidden, head, labels, **options)
    if "reference" not in missing:
        return policy.sums, policy.lengths, {}
    with torch.no_grad():
        reference = sequence_logps(ref_hidden, ref_head, labels, **{**options, "path": "auto"})
    return policy.sums, policy.lengths, {"reference": reference.sums}
