"""Weights of pairs and completions: what a batch loss is, and what its metrics are means over.

The batch loss is ``Σ w_i ℓ_i / n``, divided by the number n of pairs and not by ``Σ w_i``, so that
a micro-batch of one pair heeds its weight, and the mean over ranks or micro-batches of one size is
that of all pairs. A pair of weight 0 has no gradient but is one of the n. Metrics are
``Σ w_i m_i / Σ w_i``: there it is invisible. Statistics (moments, queues, KTO's z) see all pairs
alike, whatever their weights: they tell what the pairs are like, not how much each is to teach.
"""

from __future__ import annotations

from torch import Tensor

from fused_prefopt.checks import require
from fused_prefopt.losses.protocol import halves
from fused_prefopt.types import LogpBatch


def weights_of(batch: LogpBatch, *, pairwise: bool) -> Tensor | None:
    """Weights of a batch in the dtype of its log-probs, (P,) or for completions (S,); None: all 1.

    Args:
        batch: pairs or completions.
        pairwise: which of them.

    Raises:
        ValueError: the two completions of a pair have different ones (a device-side assert on
            CUDA).
    """
    if batch.weights is None:
        return None
    weights = batch.weights.to(batch.policy.dtype)
    if not pairwise:
        return weights
    chosen, rejected = halves(weights)
    require(
        (chosen == rejected).all(),
        lambda: (
            "weights: got other ones in the rejected half than in the chosen, wanted one a pair"
            " in both; weigh single tokens by `token_weights`"
        ),
    )
    return chosen


def refuse_weights(batch: LogpBatch, what: str) -> None:
    """Raise ValueError if a batch has weights.

    Args:
        batch: of a loss in which a pair alone has no place.
        what: the loss does, for the message.
    """
    if batch.weights is not None:
        raise ValueError(
            f"weights: got some with a loss that {what}, in which no pair stands alone to be"
            " weighted; needs a batch without, nor lists, which give their pairs weights"
        )
