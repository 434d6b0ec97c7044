"""The loss of reward models: scores of pairs, no log-probs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_prefopt.checks import require_floating, require_shape
from fused_prefopt.losses.metrics import mean


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, margin: float | Tensor = 0
) -> Tensor:
    """Negative log-likelihood of the preferences under the scores.

    ``mean over pairs of −log σ(s_w − s_l − margin)``

    Args:
        chosen_scores: (P,) s_w, of the preferred responses.
        rejected_scores: (P,) s_l.
        margin: by how much s_w is to exceed s_l, one number or (P,).

    Returns:
        0-d loss in nats; 0 without pairs.

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155), eq. 1; the margin after Llama 2
    (Touvron et al. 2023, arXiv:2307.09288), eq. 2.
    """
    require_shape("chosen_scores", chosen_scores, ("P",))
    require_floating("chosen_scores", chosen_scores)
    require_shape("rejected_scores", rejected_scores, chosen_scores.shape)
    if isinstance(margin, torch.Tensor) and margin.dim():
        require_shape("margin", margin, chosen_scores.shape)
    return mean(-logsigmoid(chosen_scores - rejected_scores - margin))
