"""Inputs of a call of the op: arguments checked, rows laid out, the engine chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from fused_prefopt.checks import (
    is_on_host,
    require,
    require_choice,
    require_device,
    require_floating,
    require_integer,
    require_number,
    require_shape,
)
from fused_prefopt.ops.engines import ENGINES, choose_engine, device_memory
from fused_prefopt.ops.head_rows import HeadTensors, Spec
from fused_prefopt.ops.plan import MIB, PATHS, default_workspace
from fused_prefopt.ops.precision import HeadMath
from fused_prefopt.ops.sequence_group import require_group
from fused_prefopt.ops.vocab_shard import VocabShard, local_part, same_rows, sharing_ranks
from fused_prefopt.types import AnyHead, LMHead

Outputs = TypeVar("Outputs")


@dataclass(frozen=True)
class LogpOptions:
    """The options of `sequence_logps`, which documents them.

    Raises:
        ValueError: a path or engine that there is not, or a number out of its range.
    """

    shift: bool = True
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    num_labels: int | None = None
    ignore_index: int = -100
    workspace_mb: float | None = None
    path: str = "auto"
    engine: str = "auto"
    drop_mass: float = 0.0
    entropy: bool = False
    sequence_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        require_group(self.sequence_group, shift=self.shift)
        if self.workspace_mb is not None:
            require_number("workspace_mb", self.workspace_mb, low=0, above=True)
        require_choice("path", self.path, ("auto", *PATHS))
        require_choice("engine", self.engine, ("auto", *ENGINES))
        require_number("drop_mass", self.drop_mass, low=0, high=1, below=True)


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


@dataclass(frozen=True)
class Call:
    """One call of an op, its arguments checked and laid out.

    Attributes:
        options: as given.
        tensors: of the head, on this rank.
        vocab: rows of them that are no padding.
        whole_vocab: the same of the whole head; 0-d where its rows are spread over ranks.
        shard: where they stand in the vocabulary.
        layout: where each row's target is.
        count: labelled rows, or -1 where a compiler traces and they cannot be counted.
        math: the head's scalars and the dtype to compute in.
        engine: of `choose_engine`.
        pending: what is still to be checked, or None: see `checked`.
    """

    options: LogpOptions
    tensors: HeadTensors
    vocab: int
    whole_vocab: int | Tensor
    shard: VocabShard
    layout: Layout
    count: int
    math: HeadMath
    engine: str
    pending: Callable[[], None] | None = None

    def checked(self, outputs: Outputs) -> Outputs:
        """The outputs of an op; a GPU checks the labels only now that it has other work."""
        if self.pending is not None:
            self.pending()
        return outputs

    @property
    def hidden_size(self) -> int:
        """D + r, what the products are summed over."""
        # Not `tensors.hidden_size`: torch 2.8's compiler reads no property of a named tuple.
        low = self.tensors.low_weight
        return self.tensors.weight.shape[1] + (0 if low is None else low.shape[1])

    @property
    def rows(self) -> int:
        """Labelled rows, or all rows where those cannot be counted."""
        return self.layout.targets.shape[0] if self.count < 0 else self.count

    def workspace(self, head_trains: bool) -> int:
        """Bytes of the workspace that is asked for, or of the device's default."""
        megabytes = self.options.workspace_mb
        if megabytes is not None:
            return int(megabytes * MIB)
        memory = device_memory(self.tensors.hidden.device)
        weight = (self.vocab, self.hidden_size)
        return default_workspace(memory, self.rows, weight, self.math.dtype.itemsize, head_trains)

    def spec(
        self,
        path: str,
        workspace: int,
        kept_rows: int = 0,
        reference: HeadMath | None = None,
        perturbation: float = 0.0,
    ) -> Spec:
        """The options of the registered ops.

        Args:
            path, workspace, kept_rows: of the plan.
            reference: of the second head of `sequence_kl`.
            perturbation: of the mixtures of both heads' logits.
        """
        options = self.options
        return Spec(
            num_sequences=self.layout.num_sequences,
            num_labels=self.count,
            ignore_index=options.ignore_index,
            vocab=self.vocab,
            workspace=workspace,
            math=self.math,
            path=path,
            engine=self.engine,
            kept_rows=kept_rows,
            first=self.shard.first,
            entropy=options.entropy,
            drop_mass=options.drop_mass if path in ("local", "recompute") else 0.0,
            group=self.shard.group,
            reference=reference,
            perturbation=perturbation,
        )


def read_call(hidden: Tensor, head: AnyHead, labels: Tensor, options: LogpOptions) -> Call:
    """Check the arguments and lay out the rows; raises what `sequence_logps` documents."""
    given, hidden = read_head(head), same_rows("hidden", hidden)
    head, shard = local_part(given)
    _check(hidden, head, labels, options.sequence_ids)
    ignore_index = options.ignore_index
    layout = layout_of(labels, options)
    vocab = shard.whole_vocab(given, head.weight.shape[0], layout.targets)
    check = partial(_check_labels, layout.targets, ignore_index, options.num_labels, vocab)
    at_once = is_on_host(hidden) or torch.compiler.is_compiling()
    if at_once:
        check()
    count = -1 if options.num_labels is None else options.num_labels
    if count < 0 and not torch.compiler.is_compiling():
        count = int((layout.targets != ignore_index).sum())
    math = HeadMath.of(head, _compute_dtype(hidden))
    engine = choose_engine(options.engine, hidden.device, math.dtype)
    tensors = head_tensors(hidden, head)
    refuse_forward_mode(tensors)
    pending = None if at_once else check
    return Call(options, tensors, head.vocab, vocab, shard, layout, count, math, engine, pending)


def traced_and_spread(head: AnyHead) -> bool:
    """Whether a compiler traces a call of a head that is spread over ranks: see `vocab_shard`."""
    return torch.compiler.is_compiling() and sharing_ranks(read_head(head)) is not None


def read_head(value: AnyHead, name: str = "head") -> LMHead:
    """Head that a caller gave in any form; TypeError, by the argument's name, if it is none."""
    if isinstance(value, LMHead):
        return value
    if isinstance(value, Tensor):
        return LMHead(value)
    # A layer with a forward of its own may do more than its weight and bias say.
    if isinstance(value, nn.Linear) and type(value).forward is nn.Linear.forward:
        return LMHead.of(value)
    raise TypeError(
        f"{name}: got a {type(value).__name__}, wanted an LMHead, its weight, a tensor (V, D), or"
        " an nn.Linear; `LMHead.of(model)` reads the head of a model"
    )


def head_tensors(hidden: Tensor, head: LMHead) -> HeadTensors:
    rows = hidden.reshape(-1, hidden.shape[-1])
    if not head.low_rank:
        return HeadTensors(rows, head.weight, head.bias)
    # Before rows are flattened and chosen: dropout draws as it would without this package.
    low = [term.project(hidden).flatten(0, -2) for term in head.low_rank]
    weights = [term.b for term in head.low_rank]
    if len(low) > 1:
        low, weights = [torch.cat(low, 1)], [torch.cat(weights, 1)]
    return HeadTensors(rows, head.weight, head.bias, low[0], weights[0])


def refuse_forward_mode(tensors: HeadTensors) -> None:
    """Raise RuntimeError where forward-mode differentiation is at work: it would see zeros."""
    if any(each is not None and unpack_dual(each).tangent is not None for each in tensors):
        raise RuntimeError(
            "fused_prefopt has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd): it"
            " computes gradients without logits. Use torch.autograd.grad, or eager log-softmax."
        )


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


def layout_of(labels: Tensor, options: LogpOptions) -> Layout:
    """The layout of labels (S, T), or with sequence ids (N,); raises what `packed_layout` does.

    Row t of a sequence predicts label t + 1 with the shift, else t.
    """
    if options.sequence_ids is not None:
        return packed_layout(labels, options.sequence_ids, options)
    targets = labels.long()  # before the shift: an unsigned dtype cannot hold `ignore_index`
    if options.shift:
        targets = shift_left(targets, options.ignore_index)
    return Layout(targets.reshape(-1), None, labels.shape[0])


def packed_layout(labels: Tensor, sequence_ids: Tensor, options: LogpOptions) -> Layout:
    """Layout of labels (N,) with sequence ids (N,); the shift never crosses a boundary.

    Raises:
        ValueError: `sequence_ids` does not fit `labels`, or holds an id outside [0, S), or S is
            negative.
    """
    require_shape("sequence_ids", sequence_ids, labels.shape)
    require_integer("sequence_ids", sequence_ids)
    require_device("sequence_ids", sequence_ids, labels.device)
    num_sequences = options.num_sequences
    if num_sequences is not None and num_sequences < 0:
        raise ValueError(f"num_sequences: got {num_sequences}, wanted None or a number >= 0")
    sequence_ids = sequence_ids.long()
    if num_sequences is None and options.sequence_group is not None:
        raise ValueError(
            "num_sequences: got None with a sequence_group, wanted S: this rank may have no token"
            " of some sequences"
        )
    if num_sequences is None:
        num_sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    require(
        ((sequence_ids >= 0) & (sequence_ids < num_sequences)).all(),
        lambda: f"sequence_ids: got an id outside [0, {num_sequences})",
    )
    targets = labels.long()
    if options.shift:
        follows = shift_left(sequence_ids, -1) == sequence_ids
        targets = shift_left(targets, options.ignore_index).where(follows, options.ignore_index)
    return Layout(targets, sequence_ids, num_sequences)


def shift_left(values: Tensor, fill: int) -> Tensor:
    """The values one place earlier in their last dimension, its last place filled."""
    shifted = torch.full_like(values, fill)
    shifted[..., :-1] = values[..., 1:]
    return shifted


def _check_labels(
    targets: Tensor, ignore_index: int, num_labels: int | None, vocab: int | Tensor
) -> None:
    """Raise ValueError, with the label where it can be read without waiting for a device.

    Elsewhere the device asserts, without a wait.

    Args:
        targets: (M,).
        ignore_index: label of rows that take no part.
        num_labels: what a caller says is their number, or None.
        vocab: labels are below.
    """
    labelled = targets != ignore_index
    # A label that there is none of implies nothing.
    fits = labelled <= (targets.remainder(vocab) == targets)

    def message() -> str:
        if not is_on_host(fits):
            bound = f"[0, {vocab})" if isinstance(vocab, int) else "the vocabulary"
            return f"labels: got a label outside {bound}"
        outside = f"labels: got a label outside [0, {int(vocab)})"
        first = int(targets[~fits][0])
        return f"{outside}: {first}; is the tokenizer another model's, or `ignore_index` another?"

    require(fits.all(), message)
    if num_labels is not None:
        require(
            labelled.sum() == num_labels,
            lambda: f"num_labels: got {num_labels}, which is not the number of labelled rows",
        )


def _check(hidden: Tensor, head: LMHead, labels: Tensor, sequence_ids: Tensor | None) -> None:
    require_floating("hidden", hidden)
    require_integer("labels", labels)
    if hidden.device.type == "meta":
        raise ValueError("hidden: got a tensor on the meta device, wanted one that has values")
    hidden_size = head.weight.shape[1]
    if hidden.dim() == 3:
        require_shape("hidden", hidden, ("S", "T", hidden_size))
        if sequence_ids is not None:
            raise ValueError("sequence_ids: only the packed layout, hidden (N, D), takes them")
    else:
        require_shape("hidden", hidden, ("N", hidden_size))
        if sequence_ids is None:
            raise ValueError("sequence_ids: got None, wanted (N,) with packed hidden (N, D)")
    require_shape("labels", labels, hidden.shape[:-1])
    require_device("labels", labels, hidden.device)
    require_device("weight", head.weight, hidden.device)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 is left alone, as autocast does), else hidden's."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
