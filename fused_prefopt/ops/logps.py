"""The public op: per-sequence and per-token log-probs of labels, without logits in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_prefopt.checks import require_device, require_floating, require_integer, require_shape
from fused_prefopt.ops.engines import choose_engines, load_engine
from fused_prefopt.ops.head_math import HeadMath
from fused_prefopt.ops.layout import packed_layout, padded_layout, require
from fused_prefopt.ops.plan import Plan, make_plan
from fused_prefopt.ops.registered import head_logps
from fused_prefopt.types import LMHead, SequenceLogps


@dataclass(frozen=True)
class LogpOptions:
    """The options of `sequence_logps`, which documents them."""

    shift: bool = True
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    num_labels: int | None = None
    ignore_index: int = -100
    workspace_mb: float = 256
    path: str = "auto"
    engine: str = "auto"


def sequence_logps(
    hidden: Tensor,
    head: LMHead | Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float = 256,
    path: str = "auto",
    engine: str = "auto",
) -> SequenceLogps:
    """Summed log-probabilities of the labelled tokens of each sequence.

    ``sums[s] = Σ_t log softmax(logits(hidden[s, t]))[target[s, t]]`` over the rows that carry a
    label. Only those rows meet the head; no (tokens, vocabulary) tensor is built unless it fits
    the workspace. Differentiable once with respect to hidden, weight and bias.

    Args:
        hidden: (S, T, D) last hidden states, or packed (N, D).
        head: the LM head, or its bare weight (V, D).
        labels: (S, T) or (N,) integer token ids, `ignore_index` where there is no label.
        shift: position t predicts labels[t + 1] (Hugging Face's convention), never across a
            sequence boundary; False: position t predicts labels[t].
        sequence_ids: (N,) sequence of each packed row, in [0, S); needed in the packed layout.
        num_sequences: S of the packed layout. None counts them, which costs CUDA a host sync.
        num_labels: number of labelled rows *after the shift*, if known: it spares CUDA the one
            host sync of counting them. Checked.
        ignore_index: label of rows that take no part.
        workspace_mb: budget in MiB for everything but statistics and gradients.
        path: `auto`, `evaluate`, `stash`, `local` or `recompute` (see `fused_prefopt.ops.plan`).
        engine: `auto`, `torch`, `cublas` (the library's matmuls, Triton kernels for the rest) or
            `triton` (matmuls inside the kernels). The last two take CUDA tensors, or CPU tensors
            under TRITON_INTERPRET=1; without Triton they are `torch`, with a warning.

    Returns:
        sums (S,) fp32, lengths (S,) int64, means (S,), and the plan that was followed. Float64
        inputs give float64 sums.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; a label is outside the
            vocabulary (a device-side assert on CUDA); the forced path cannot serve this call.
    """
    options = LogpOptions(
        shift=shift,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        num_labels=num_labels,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        path=path,
        engine=engine,
    )
    plan, outputs = _run(hidden, head, labels, options)
    return SequenceLogps(outputs[1], outputs[2], plan)


def token_logps(
    hidden: Tensor,
    head: LMHead | Tensor,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float = 256,
    path: str = "auto",
    engine: str = "auto",
) -> Tensor:
    """Log-probability of every labelled token, in the shape of `labels`, in nats.

    Entry t is the log-prob of labels[t]; it is 0 where that is `ignore_index`, and with `shift`
    where a sequence starts, since nothing predicts its first token. Arguments and errors are those
    of `sequence_logps`.
    """
    options = LogpOptions(
        shift=shift,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        num_labels=num_labels,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        path=path,
        engine=engine,
    )
    _, outputs = _run(hidden, head, labels, options)
    logps = outputs[0].view(labels.shape)
    # Each row's log-prob goes to the label it predicts; a sequence's last row has none to give.
    return logps.roll(1, -1) if shift else logps


def _run(
    hidden: Tensor, head: LMHead | Tensor, labels: Tensor, options: LogpOptions
) -> tuple[Plan, tuple[Tensor, ...]]:
    head = head if isinstance(head, LMHead) else LMHead(head)
    _check(hidden, head, labels, options.sequence_ids)
    ignore_index = options.ignore_index
    if hidden.dim() == 3:
        layout = padded_layout(labels, shift=options.shift, ignore_index=ignore_index)
    else:
        assert options.sequence_ids is not None
        layout = packed_layout(
            labels,
            options.sequence_ids,
            options.num_sequences,
            shift=options.shift,
            ignore_index=ignore_index,
        )
    labelled = layout.targets != ignore_index
    in_vocab = (layout.targets >= 0) & (layout.targets < head.vocab)
    require((in_vocab | ~labelled).all(), f"labels: got a label outside [0, {head.vocab})")
    count = _count(labelled, options.num_labels)

    math = HeadMath(head.softcap, head.logit_scale, head.temperature, _compute_dtype(hidden))
    engines = choose_engines(options.engine, hidden.device, math.dtype)
    # What `local` would need: it decides between that path and `recompute`.
    local = load_engine(engines["local"])
    cost = local.cost(math, head.weight, "local", backward=False)
    gradients = torch.is_grad_enabled()
    parameters = (head.weight, head.bias)
    plan = make_plan(
        path=options.path,
        engines=engines,
        rows=labels.numel() if count < 0 else count,
        vocab=head.vocab,
        hidden_size=head.weight.shape[1],
        workspace_mb=options.workspace_mb,
        itemsize=math.kept.itemsize,
        cost=cost,
        head_trains=gradients and any(p is not None and p.requires_grad for p in parameters),
        hidden_trains=gradients and hidden.requires_grad,
    )
    tensors: tuple[Tensor | None, ...]
    tensors = (hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias)
    if plan.path == "evaluate":
        tensors = tuple(None if value is None else value.detach() for value in tensors)
    outputs = head_logps(
        *tensors,
        layout.targets,
        layout.sequence_ids,
        layout.num_sequences,
        layout.sorted,
        ignore_index,
        count,
        head.vocab,
        math.softcap,
        math.logit_scale,
        math.temperature,
        math.dtype,
        plan.path,
        plan.engine,
        plan.workspace,
    )
    return plan, outputs


def _check(hidden: Tensor, head: LMHead, labels: Tensor, sequence_ids: Tensor | None) -> None:
    require_floating("hidden", hidden)
    require_integer("labels", labels)
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


def _count(labelled: Tensor, num_labels: int | None) -> int:
    """Labelled rows, or -1 where a compiler traces and they cannot be counted."""
    if num_labels is not None:
        message = f"num_labels: got {num_labels}, which is not the number of labelled rows"
        require(labelled.sum() == num_labels, message)
        return num_labels
    return -1 if torch.compiler.is_compiling() else int(labelled.sum())


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 is left alone, as autocast does), else hidden's."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
