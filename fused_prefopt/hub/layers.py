"""Heads without a state of their own: forwards that `kernels.kernelize` lends to a model's head.

The adopting module brings `weight` (V, D) and `bias` (V,) or None, as a `torch.nn.Linear` does, and
logits that are ``hidden @ weight.T + bias`` alone. A head with a softcap, a scale or padded rows is
an `LMHead` for the functions.
"""

from __future__ import annotations

from torch import Tensor, nn

from fused_prefopt.ops.logps import sequence_logps, token_logps, token_policy
from fused_prefopt.types import LMHead


class TokenLogpsHead(nn.Module):
    """Log-probability of every labelled token: `token_logps` with the module's weight and bias."""

    weight: Tensor
    bias: Tensor | None
    can_torch_compile: bool = True

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(S, T) fp32 log-probs, in nats; entry t is of labels[t], 0 where that is -100 or t is 0.

        Args:
            hidden: (S, T, D) last hidden states; position t predicts labels[t + 1].
            labels: (S, T) integer token ids, -100 where there is no label.
        """
        return token_logps(hidden, LMHead(self.weight, self.bias), labels)


class SequenceLogpsHead(nn.Module):
    """Summed log-probability of each sequence: `sequence_logps`, weight and bias the module's."""

    weight: Tensor
    bias: Tensor | None
    can_torch_compile: bool = True

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(S,) fp32 sums over the labelled tokens, in nats; 0 for a sequence without labels.

        Args:
            hidden: (S, T, D) last hidden states; position t predicts labels[t + 1].
            labels: (S, T) integer token ids, -100 where there is no label.
        """
        return sequence_logps(hidden, LMHead(self.weight, self.bias), labels).sums


class TokenPolicyHead(nn.Module):
    """Log-probability and entropy of each labelled token: `token_policy`, the head the module's."""

    weight: Tensor
    bias: Tensor | None
    can_torch_compile: bool = True

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, each (S, T) fp32, in nats, 0 where there is no label.

        Args:
            hidden: (S, T, D) last hidden states; position t predicts labels[t + 1].
            labels: (S, T) integer token ids, -100 where there is no label.
        """
        policy = token_policy(hidden, LMHead(self.weight, self.bias), labels)
        return policy.logps, policy.entropies
