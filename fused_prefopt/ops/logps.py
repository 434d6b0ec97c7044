"""Public ops on one head: log-probs of labels and more, without logits in memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import require_integer, require_shape
from fused_prefopt.ops.autograd import head_logps
from fused_prefopt.ops.cutting import WeightKind
from fused_prefopt.ops.engines import role_engine
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.inputs import (
    Call,
    Layout,
    LogpOptions,
    labelled_rows,
    layout_of,
    read_call,
    traced_and_spread,
)
from fused_prefopt.ops.passes import fold_details
from fused_prefopt.ops.plan import Demand, Room, cost_of, known_cost, make_plan, room_of
from fused_prefopt.ops.precision import fixed_precision
from fused_prefopt.ops.sequence_group import (
    LOGPS,
    TAILS,
    numbers_in_sequences,
    over_group,
    require_positions,
    telling,
)
from fused_prefopt.ops.token_weights import WeightedRows
from fused_prefopt.types import AnyHead, Plan, SequenceLogps, TokenPolicy, TokenStatistics

_NO_ROOM = (
    "path: 'local' does not fit workspace_mb of a rank that has more of the head's rows; needs a"
    " larger one on every rank, or 'auto'"
)


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
    token_weights: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
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
        token_weights: numbers >= 0 in the shape of `labels`, which they belong to (0 counts like no
            label, 2 like the label twice; where there is no label they are not heeded). The sums
            are ``Σ_t w_t log p_t``, the lengths ``Σ_t w_t``. They cost nothing; constants.
        sequence_group: ranks that hold other tokens of the same S sequences (context or sequence
            parallelism), each token on one of them, in any order. Sums and lengths are those of
            the whole sequences, the same bits on each rank, by one all-reduce of 4 KB forward and
            one backward (two of each where 2 S > 510). Every rank must make the call, with S known
            (`num_sequences` where packed), labels shifted before the split (``shift=False``), and
            `num_labels` of its own rows; it may have no label, or no token. The backward sums what
            comes from above over the group: where all its ranks go on to the same loss, the mean
            of the parameters' gradients over all ranks, of all data too, is that of the mean loss,
            as DDP, FSDP and ZeRO take it. No factor belongs anywhere.

    Returns:
        sums (S,) fp32, lengths (S,) int64, means (S,), and the plan that was followed. Float64
        inputs give float64 sums. With weights of tokens the lengths have the dtype of the sums.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; a label is outside the
            vocabulary (a device-side assert on CUDA); the forced path cannot serve this call; or
            ranks of the `sequence_group` disagree on the number of sequences or on the call.
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
        sequence_group=sequence_group,
    )
    with telling(sequence_group, labels.device):
        rows = None if token_weights is None else WeightedRows.of(token_weights, labels, options)
        plan, outputs = _run(hidden, head, labels, options)
        if rows is None:
            own = outputs[1:3]
        else:
            own = rows.sums(outputs[0]), rows.lengths(outputs[0].dtype)
    sums, lengths = over_group(own, sequence_group, LOGPS + (rows is not None))
    return SequenceLogps(sums, lengths, plan)


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
        ValueError: in addition, another path is asked for.
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


@torch.no_grad()
def token_statistics(
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
    engine: str = "auto",
) -> TokenStatistics:
    """Log-prob, entropy, collision, mean logit and correctness of every labelled token.

    Without gradient. The entropy ``−Σ_v p_v log p_v``, the collision ``log Σ_v p_v²`` and the
    others come from the one pass over the logits that the log-probs need. Arguments, layout and
    errors are those of `token_logps`.
    """
    options = LogpOptions(
        shift=shift,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        num_labels=num_labels,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        engine=engine,
    )
    return _statistics(hidden, head, labels, options)


def _statistics(
    hidden: Tensor, head: AnyHead, labels: Tensor, options: LogpOptions
) -> TokenStatistics:
    if traced_and_spread(head):
        return torch.compiler.disable(_statistics)(hidden, head, labels, options)
    call = read_call(hidden, head, labels, options)
    index = labelled_rows(call.layout.targets, options.ignore_index, call.count)
    spec = replace(call.spec("evaluate", call.workspace(False)), entropy=True)
    rows = HeadRows.of(call.tensors, call.layout.targets, index, spec)
    with fixed_precision(hidden, call.math.dtype):
        found = call.checked(fold_details(rows))
    statistics, details = call.shard.merge(found.statistics, found.details)
    assert details is not None

    def dense(values: Tensor) -> Tensor:
        everywhere = values.new_zeros(call.layout.targets.shape)
        everywhere[index] = values
        return _at_labels(everywhere, labels, options.shift)

    return TokenStatistics(
        dense(statistics.logps()),
        dense(details.entropies(statistics)),
        dense(details.squares.log() - 2 * statistics.sum.log()),
        dense(details.logit_sum / call.whole_vocab),
        dense(details.best == call.layout.targets[index]),
    )


def shared_and_tail_logps(
    hidden: Tensor,
    head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    ignore_index: int = -100,
    position_ids: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> tuple[SequenceLogps, SequenceLogps]:
    """`sequence_logps` of the tokens up to the length of the partner, and of those beyond.

    One call of the op at no further cost: the tails are sequences of their own. The first half of
    the sequences is chosen, the second rejected; of a pair with ``n = min(|y_w|, |y_l|)`` labelled
    tokens, the first n of each completion are shared and the others its tail. The two sums and
    lengths add up to those of `sequence_logps`.

    Args:
        hidden, head, labels, shift, sequence_ids, num_sequences, ignore_index: as there.
        position_ids: (S, T) or (N,) place of each row's token in its whole sequence, which a
            `sequence_group` needs: which tokens are beyond, its ranks tell one another.
        sequence_group: as there; an all-reduce of 4 KB more, and a gather of 8 bytes for each label
            of all its ranks.
        **options: the others of `sequence_logps`, but `token_weights`.

    Returns:
        The shared parts and the tails, S sequences each, with one plan.

    Raises:
        ValueError: the number of sequences is odd, tokens have weights, a group has no positions or
            two tokens of a sequence have one, or what `sequence_logps` raises.

    Source: LD-DPO (Liu et al. 2024, arXiv:2409.06411), whose α weighs the tails.
    """
    if options.get("token_weights") is not None:
        raise ValueError(
            "token_weights: got some with ld_alpha, which weighs the tokens by the completions'"
            " lengths; needs one of them"
        )
    where = LogpOptions(
        shift=shift,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        ignore_index=ignore_index,
        sequence_group=sequence_group,
    )
    with telling(sequence_group, labels.device):
        require_integer("labels", labels)
        require_shape("labels", labels, hidden.shape[:-1])
        layout = layout_of(labels, where)
        sequences = layout.num_sequences
        if sequences % 2:
            raise ValueError(
                f"labels: got {sequences} sequences, needs an even number: chosen first, then"
                " rejected"
            )
        places = None if sequence_group is None else require_positions(position_ids, labels)
    if sequence_group is None or places is None:
        beyond = _in_tail(layout, ignore_index)
    else:
        beyond = _in_tail_over_ranks(layout, ignore_index, places, sequence_group)
    out = sequence_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        layout.targets,
        shift=False,
        sequence_ids=layout.ids() + sequences * beyond,
        num_sequences=2 * sequences,
        ignore_index=ignore_index,
        sequence_group=sequence_group,
        **options,
    )
    shared = SequenceLogps(out.sums[:sequences], out.lengths[:sequences], out.plan)
    return shared, SequenceLogps(out.sums[sequences:], out.lengths[sequences:], out.plan)


def _in_tail(layout: Layout, ignore_index: int) -> Tensor:
    """(M,) bool, whether a labelled row is beyond the length of its sequence's partner."""
    ids, order = layout.ids().sort(stable=True)
    counted = (layout.targets != ignore_index)[order]
    lengths = ids.new_zeros(layout.num_sequences).scatter_add(0, ids, counted.long())
    pairs = layout.num_sequences // 2
    shared = lengths[:pairs].minimum(lengths[pairs:]).repeat(2)
    before = lengths.cumsum(0) - lengths
    beyond = counted.cumsum(0) - before[ids] > shared[ids]
    return torch.empty_like(beyond).scatter(0, order, beyond)


def _in_tail_over_ranks(
    layout: Layout, ignore_index: int, position_ids: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """`_in_tail` of a shard, from the places of all ranks' labelled tokens."""
    ids, labelled = layout.ids(), layout.targets != ignore_index
    own = ids.new_zeros(layout.num_sequences).scatter_add(0, ids, labelled.long())
    # First, as it notices ranks that make another call.
    (lengths,) = over_group([own], group, TAILS)
    index, numbers = numbers_in_sequences(labelled, ids, position_ids, group)
    pairs = layout.num_sequences // 2
    shared = lengths[:pairs].minimum(lengths[pairs:]).repeat(2)
    beyond = torch.zeros_like(labelled)
    beyond[index] = numbers >= shared[ids[index]]
    return beyond


def _at_labels(values: Tensor, labels: Tensor, shift: bool) -> Tensor:
    values = values.view(labels.shape)
    # Each row's value goes to the label it predicts; a sequence's last row has none to give.
    return values.roll(1, -1) if shift else values


def _run(
    hidden: Tensor, head: AnyHead, labels: Tensor, options: LogpOptions
) -> tuple[Plan, tuple[Tensor, ...]]:
    if traced_and_spread(head):
        return torch.compiler.disable(_run)(hidden, head, labels, options)
    call = read_call(hidden, head, labels, options)
    plan = _plan(call)
    tensors = call.tensors.detached() if plan.path == "evaluate" else call.tensors
    where = call.layout.targets, call.layout.sequence_ids
    spec = call.spec(plan.path, plan.workspace, plan.kept_rows)
    return plan, call.checked(head_logps(*tensors, *where, *spec.packed()))


def _plan(call: Call) -> Plan:
    options, tensors, math, rows = call.options, call.tensors, call.math, call.rows
    gradients, device = torch.is_grad_enabled(), tensors.hidden.device
    parameters = (tensors.weight, tensors.bias, tensors.low_weight)
    inputs = (tensors.hidden, tensors.low_hidden)
    head_trains = gradients and any(p is not None and p.requires_grad for p in parameters)

    def engine_of(role: str) -> str:
        return role_engine(call.engine, role, device, call.hidden_size, math.bent)

    def engine(path: str, kept: int) -> str:
        if options.entropy:
            roles = ["details", "entropy"]
        elif path in ("evaluate", "stash"):
            roles = ["fold" if path == "evaluate" else "weigh"]
        else:
            roles = (["keep"] if kept > 0 else []) + (["fold", "rebuild"] if kept < rows else [])
        return "+".join(sorted(set(map(engine_of, roles)))) or engine_of("fold")

    def room() -> Room:
        # A compiler would not see the cache, and say so.
        find = cost_of if torch.compiler.is_compiling() else known_cost
        cost = find(((engine_of("rebuild"), "rebuild"),), math, WeightKind.of(tensors.weight))
        sizes = (rows, call.vocab, call.hidden_size)
        return room_of(*sizes, math.kept.itemsize, cost, gpu=call.engine != "torch")

    demand = Demand(
        options.path,
        rows,
        call.vocab,
        call.workspace(head_trains),
        head_trains=head_trains,
        hidden_trains=gradients and any(x is not None and x.requires_grad for x in inputs),
        entropy=options.entropy,
        drop_mass=options.drop_mass,
    )
    if options.path != "local" or not call.shard.group:
        return make_plan(demand, engine, room)
    # A rank with more rows may lack the room that others have: they are refused together.
    everywhere = partial(call.shard.require_everywhere, like=tensors.hidden)
    try:
        plan = make_plan(demand, engine, room)
    except ValueError as error:
        everywhere(False, message=error.__str__)
        raise
    everywhere(True, message=lambda: _NO_ROOM)
    return plan
