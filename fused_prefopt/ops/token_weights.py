"""Weights of tokens: sums over sequences of what each labelled row has, times its label's weight.

The weights meet what a pass over the rows returns, not the pass: its cost, its memory and its
gradient of a row (the upstream one, times the weight) are those of a call without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_prefopt.checks import require_device, require_shape
from fused_prefopt.ops.head_rows import Spec
from fused_prefopt.ops.inputs import Layout, LogpOptions, layout_of, shift_left
from fused_prefopt.types import require_weights


@dataclass(frozen=True)
class WeightedRows:
    """Rows of a call with the weights of the labels that they predict.

    Args:
        layout: of the call.
        weights: (M,) float64, 0 where a row has no label.
    """

    layout: Layout
    weights: Tensor

    @classmethod
    def of(cls, token_weights: Tensor, labels: Tensor, options: LogpOptions) -> WeightedRows:
        """The rows of a call with `token_weights` in the shape of its labels.

        Raises:
            ValueError: a shape, device or dtype does not fit, or a weight is negative or not finite
                (a device-side assert on CUDA).
        """
        require_shape("token_weights", token_weights, labels.shape)
        require_device("token_weights", token_weights, labels.device)
        require_weights("token_weights", token_weights)
        layout = layout_of(labels, options)
        weights = token_weights.detach().double()
        if options.shift:
            weights = shift_left(weights, 0)
        labelled = layout.targets != options.ignore_index
        return cls(layout, weights.reshape(-1).where(labelled, 0.0))

    def sums(self, values: Tensor) -> Tensor:
        """(S,) weighted sums of (M,) values in their dtype, differentiable; taken in float64."""
        return self._added(self.weights * values.double()).to(values.dtype)

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """(S,) sums of the weights."""
        return self._added(self.weights).to(dtype)

    def all_sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """`sums` of each of several (M,) values, and the lengths in their dtype."""
        return [*map(self.sums, values), self.lengths(values[0].dtype)]

    def apart(self, spec: Spec) -> tuple[Tensor, Spec]:
        """(M,) sequence ids, and options, of an op that sums: each row a sequence of its own."""
        size = self.weights.shape[0]
        return torch.arange(size, device=self.weights.device), replace(spec, num_sequences=size)

    def _added(self, values: Tensor) -> Tensor:
        # Into places, not `index_add`, which on CUDA adds floats in another order each time.
        zeros = values.new_zeros(self.layout.num_sequences)
        return zeros.index_put((self.layout.ids(),), values, accumulate=True)
