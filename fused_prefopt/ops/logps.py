"""The public op: per-sequence and per-token log-probs of labels, without logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_prefopt.ops.call import Call, LogpOptions, read_call
from fused_prefopt.ops.cutting import WeightKind
from fused_prefopt.ops.engines import role_engine
from fused_prefopt.ops.head_rows import cost_of, known_cost
from fused_prefopt.ops.plan import Plan, Room, make_plan, room_of
from fused_prefopt.ops.registered import head_logps
from fused_prefopt.types import AnyHead, SequenceLogps, TokenPolicy


def sequence_logps(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    path: str = "auto",
    engine: str = "auto",
    drop_mass: float = 0.0,
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
        workspace_mb: budget in MiB for everything but statistics, gradients and the fp32 sums of
            d hidden. None: 256 on a CPU; on a GPU the labelled rows beside them or, where the head
            trains and that is more, what an fp32 sum of its gradient would take, a 32nd of the
            GPU's memory at most (`ops.plan.default_workspace`).
        path: `auto`, `evaluate`, `stash`, `local` or `recompute` (see `fused_prefopt.ops.plan`).
        engine: `auto`, `torch`, `cublas` (the library's matmuls, Triton kernels for the rest) or
            `triton` (matmuls inside the kernels). The last two take CUDA tensors, or CPU tensors
            under TRITON_INTERPRET=1; without Triton they are `torch`, with a warning.
        drop_mass: ε, probability in [0, 1) that the gradient of a row may leave out. The backward
            skips the least likely parts of the vocabulary up to it and renormalises the rest, so
            ``‖Δ d logits‖₁ <= 2ε |d loss / d logp|`` in every row (see `ops.dropped_mass`). The
            log-probs stay exact, and so does the gradient with 0 and on the path `stash`, which
            `auto` takes for a frozen head. The backward then waits for CUDA once, and the forward
            keeps one more number a row for every 512 vocabulary entries.

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
        drop_mass=drop_mass,
    )
    plan, outputs = _run(hidden, head, labels, options)
    return SequenceLogps(outputs[1], outputs[2], plan)


def token_logps(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    path: str = "auto",
    engine: str = "auto",
    drop_mass: float = 0.0,
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
        drop_mass=drop_mass,
    )
    _, outputs = _run(hidden, head, labels, options)
    return _at_labels(outputs[0], labels, shift)


def token_policy(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    path: str = "auto",
    engine: str = "auto",
) -> TokenPolicy:
    """Log-probability of every labelled token and entropy of what predicts it, both differentiable.

    What policy-gradient objectives are made of: ratios from the log-probs, an entropy bonus from
    the entropies ``H = −Σ_v p_v log p_v`` (``dH / dz_v = −p_v (log p_v + H)``). A sampling
    temperature is the head's (`LMHead`); weights of tokens multiply what is returned, at no cost.
    The forward takes 1P, the backward 3P, in tiles of the workspace (path `recompute`).

    Arguments, layout and errors are those of `token_logps`.

    Raises:
        ValueError: in addition, the head is sharded over ranks, or another path is asked for.
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
        entropy=True,
    )
    _, outputs = _run(hidden, head, labels, options)
    return TokenPolicy(_at_labels(outputs[0], labels, shift), _at_labels(outputs[3], labels, shift))


def _at_labels(values: Tensor, labels: Tensor, shift: bool) -> Tensor:
    values = values.view(labels.shape)
    # Each row's value goes to the label it predicts; a sequence's last row has none to give.
    return values.roll(1, -1) if shift else values


def _run(
    hidden: Tensor, head: AnyHead, labels: Tensor, options: LogpOptions
) -> tuple[Plan, tuple[Tensor, ...]]:
    call = read_call(hidden, head, labels, options)
    plan = _plan(call, labels.numel() if call.count < 0 else call.count, options)
    tensors, math, layout = call.tensors, call.math, call.layout
    if plan.path == "evaluate":
        tensors = tensors.detached()
    outputs = call.checked(
        head_logps(
            *tensors,
            layout.targets,
            layout.sequence_ids,
            layout.num_sequences,
            options.ignore_index,
            call.count,
            call.vocab,
            math.softcap,
            math.logit_scale,
            math.temperature,
            math.dtype,
            plan.path,
            call.engine,
            plan.workspace,
            plan.kept_rows,
            call.shard.group,
            call.shard.first,
            options.drop_mass if plan.path in ("local", "recompute") else 0.0,
            options.entropy,
        )
    )
    return plan, outputs


def _plan(call: Call, rows: int, options: LogpOptions) -> Plan:
    tensors, math, device = call.tensors, call.math, call.tensors.hidden.device
    gradients = torch.is_grad_enabled()
    parameters = (tensors.weight, tensors.bias, tensors.low_weight)
    inputs = (tensors.hidden, tensors.low_hidden)
    head_trains = gradients and any(p is not None and p.requires_grad for p in parameters)

    def engine_of(role: str) -> str:
        bent = math.softcap is not None
        return role_engine(call.engine, role, device, call.hidden_size, bent)

    def engine(path: str, kept: int) -> str:
        if options.entropy:
            roles = ["details", "entropy"]
        elif path in ("evaluate", "stash"):
            roles = ["fold" if path == "evaluate" else "weigh"]
        else:
            roles = ["keep"] * (kept > 0) + ["fold", "rebuild"] * (kept < rows)
        return "+".join(sorted(set(map(engine_of, roles)))) or engine_of("fold")

    def room() -> Room:
        # A compiler would not see the cache, and say so.
        find = cost_of if torch.compiler.is_compiling() else known_cost
        cost = find(((engine_of("rebuild"), "rebuild"),), math, WeightKind.of(tensors.weight))
        sizes = (rows, call.vocab, call.hidden_size)
        return room_of(*sizes, math.kept.itemsize, cost, gpu=call.engine != "torch")

    return make_plan(
        path=options.path,
        engine=engine,
        rows=rows,
        vocab=call.vocab,
        workspace=call.workspace(options.workspace_mb, rows, head_trains),
        room=room,
        head_trains=head_trains,
        hidden_trains=gradients and any(x is not None and x.requires_grad for x in inputs),
        entropy=options.entropy,
        drop_mass=options.drop_mass,
    )
