"""Where each hidden row's target is: the shift, the two layouts, the labelled rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import is_on_host, require_device, require_integer, require_shape

_COMPILED = (
    "fused_prefopt: labels, num_labels or sequence_ids do not fit this call (a label outside the"
    " vocabulary, or another number of labelled rows); call it without torch.compile to be told"
)


@dataclass(frozen=True)
class Layout:
    """Flat view of a batch: M rows of S sequences.

    Attributes:
        targets: (M,) int64, the token each row predicts, or `ignore_index`.
        sequence_ids: (M,) int64 in [0, S), or None where sequences follow each other with M / S
            rows each.
        num_sequences: S.
    """

    targets: Tensor
    sequence_ids: Tensor | None
    num_sequences: int

    def ids(self) -> Tensor:
        """(M,) int64 in [0, S)."""
        rows = torch.arange(self.targets.shape[0], device=self.targets.device)
        return sequences_of(rows, self.sequence_ids, self.num_sequences, self.targets.shape[0])


def sequences_of(index: Tensor, ids: Tensor | None, num_sequences: int, rows: int) -> Tensor:
    """(n,) the sequences of the rows at `index`, of all rows of a layout."""
    if ids is not None:
        return ids[index]
    return index.div(max(1, rows // max(1, num_sequences)), rounding_mode="floor")


def labelled_rows(targets: Tensor, ignore_index: int, num_labels: int) -> Tensor:
    """(n,) int64 indices of the rows that carry a label.

    Args:
        targets: (M,).
        ignore_index: the target of rows without a label.
        num_labels: n, or -1: counting them costs CUDA a host sync.
    """
    labelled = targets != ignore_index
    if num_labels < 0:
        return labelled.nonzero().squeeze(1)
    return labelled.nonzero_static(size=num_labels).squeeze(1)


def padded_layout(labels: Tensor, *, shift: bool, ignore_index: int) -> Layout:
    """Layout of labels (S, T): row t of a sequence predicts label t + 1 if `shift`, else t."""
    targets = labels.long()  # before the shift: an unsigned dtype cannot hold `ignore_index`
    if shift:
        targets = _shift_left(targets, ignore_index)
    return Layout(targets.reshape(-1), None, labels.shape[0])


def packed_layout(
    labels: Tensor,
    sequence_ids: Tensor,
    num_sequences: int | None,
    *,
    shift: bool,
    ignore_index: int,
) -> Layout:
    """Layout of labels (N,) with sequence ids (N,); the shift never crosses a boundary.

    Raises:
        ValueError: `sequence_ids` does not fit `labels`, or holds an id outside [0, S), or S is
            negative.
    """
    require_shape("sequence_ids", sequence_ids, labels.shape)
    require_integer("sequence_ids", sequence_ids)
    require_device("sequence_ids", sequence_ids, labels.device)
    if num_sequences is not None and num_sequences < 0:
        raise ValueError(f"num_sequences: got {num_sequences}, wanted None or a number >= 0")
    sequence_ids = sequence_ids.long()
    if num_sequences is None:
        num_sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    require(
        ((sequence_ids >= 0) & (sequence_ids < num_sequences)).all(),
        lambda: f"sequence_ids: got an id outside [0, {num_sequences})",
    )
    targets = labels.long()
    if shift:
        follows = _shift_left(sequence_ids, -1) == sequence_ids
        targets = _shift_left(targets, ignore_index).where(follows, ignore_index)
    return Layout(targets, sequence_ids, num_sequences)


def require(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise ValueError on CPU, or a device-side assert without a host sync elsewhere.

    Args:
        condition: 0-d bool.
        message: begins with the argument's name. A compiled call does not tell it: with a number
            of the call in it, every call would be compiled anew.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, _COMPILED)
    elif not is_on_host(condition):
        torch._assert_async(condition, message())
    elif not bool(condition):
        raise ValueError(message())


def _shift_left(values: Tensor, fill: int) -> Tensor:
    shifted = torch.full_like(values, fill)
    shifted[..., :-1] = values[..., 1:]
    return shifted
