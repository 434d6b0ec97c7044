"""KL divergence of a policy from its reference: the public op, the registered one and its loops.

One file of more than 450 lines: all of it is one pass over two heads, and its backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import (
    require_device,
    require_floating,
    require_number,
    require_shape,
)
from fused_prefopt.ops.autograd import (
    fake_gradients,
    refuse_double_backward,
    returned,
    save,
    without_none,
)
from fused_prefopt.ops.cutting import WeightKind
from fused_prefopt.ops.engines import load_engine, role_engine
from fused_prefopt.ops.gradients import Gradients, GradientSums, Wanted, row_factors
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors, Spec
from fused_prefopt.ops.inputs import (
    Call,
    LogpOptions,
    head_tensors,
    labelled_rows,
    read_call,
    read_head,
    refuse_forward_mode,
    sequences_of,
    traced_and_spread,
)
from fused_prefopt.ops.passes import Kept, Upstream
from fused_prefopt.ops.passes import backward as gradients_of_logps
from fused_prefopt.ops.plan import PassSize, beside_statistics, cut
from fused_prefopt.ops.precision import HeadMath, fixed_precision
from fused_prefopt.ops.sequence_group import KL, over_group, telling
from fused_prefopt.ops.tile import KlGradients, KlStatistics, Tile
from fused_prefopt.ops.token_weights import WeightedRows
from fused_prefopt.ops.torch_engine import TorchEngine
from fused_prefopt.ops.vocab_shard import local_part, same_rows
from fused_prefopt.types import AnyHead, LMHead


@dataclass(frozen=True)
class SequenceKl:
    """Distance of a policy from its reference on each sequence, as `sequence_kl` returns it.

    Attributes:
        kl: (S,) fp32 (float64 for float64 inputs) ``Σ_t KL(reference || policy)`` over the labelled
            tokens, in nats, differentiable; 0 for a sequence without labels.
        policy: (S,) summed log-probs of the labels under the policy, in nats, differentiable.
        reference: (S,) the same under the reference, a constant.
        lengths: (S,) int64, number of labelled tokens; with weights of tokens the sum of those.
        extrapolated: (S,) summed log-probs of the labels under ``softmax(z + ε(z − z_ref))``, a
            constant; None without a perturbation ε.
        interpolated: (S,) the same under ``softmax(z − ε(z − z_ref))``.
    """

    kl: Tensor
    policy: Tensor
    reference: Tensor
    lengths: Tensor
    extrapolated: Tensor | None = None
    interpolated: Tensor | None = None


def sequence_kl(
    hidden: Tensor,
    head: AnyHead,
    ref_hidden: Tensor,
    ref_head: AnyHead,
    labels: Tensor,
    *,
    shift: bool = True,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_labels: int | None = None,
    ignore_index: int = -100,
    workspace_mb: float | None = None,
    engine: str = "auto",
    token_weights: Tensor | None = None,
    perturbation: float | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> SequenceKl:
    """KL divergence of a policy from its reference over the labelled tokens of each sequence.

    ``kl[s] = Σ_t Σ_v q_tv (log q_tv − log p_tv)`` with the reference's probabilities q and the
    policy's p at the rows that carry a label. Both heads' logits are built tile by tile and never
    kept: no (tokens, vocabulary) tensor, two matmuls forward, and four backward, whatever the
    workspace. Differentiable once with respect to the policy's hidden, weight and bias, through
    `kl` and through `policy`; the reference is a constant.

    Both heads compute in the dtype of `hidden`, or autocast's; they may differ in hidden size,
    bias, softcap, scale, temperature and low-rank terms, not in vocabulary. Heads whose rows are
    spread over ranks are both, over the same ranks and in the same rows.

    Args:
        hidden: (S, T, D) last hidden states of the policy, or packed (N, D).
        head: the policy's LM head, or its bare weight (V, D).
        ref_hidden: (S, T, D') or (N, D') of the reference.
        ref_head: the reference's LM head, or its bare weight (V, D').
        labels: (S, T) or (N,) integer token ids, `ignore_index` where there is no label.
        shift, sequence_ids, num_sequences, num_labels, ignore_index: as in `sequence_logps`.
        workspace_mb: budget in MiB for everything but statistics and gradients.
        engine: `auto`, `torch`, `cublas` or `triton`, as in `sequence_logps`; the last two are one
            here: the library's matmuls, and one Triton kernel for each pass over both logits.
        token_weights: as in `sequence_logps`; of all sums.
        perturbation: 0 < ε < 1: also the labels' log-probs under two mixtures of the logits z of
            both heads, which cost no matmul more. Where a token's logits are the same, they are the
            mixtures' to the last bit. What the policy may not say (a bias of −inf), no mixture may;
            what the reference alone may not say makes `extrapolated` NaN, as ∞ is no logit.
        sequence_group: as in `sequence_logps`; one all-reduce for all sums, and one backward.

    Returns:
        kl, policy, reference and lengths, each (S,), and with a perturbation the two mixtures'.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; the two vocabularies
            differ; only one head is spread over ranks, or both in different rows; a label is
            outside the vocabulary (a device-side assert on CUDA); ranks of the `sequence_group`
            disagree on the number of sequences or on the call.

    Source: TDPO (Zeng et al. 2024, arXiv:2404.11999), eq. 12; the mixtures ε-DPO (Lee et al. 2025,
    arXiv:2502.13177), eq. 3 and 4.
    """
    options = LogpOptions(
        shift=shift,
        sequence_ids=sequence_ids,
        num_sequences=num_sequences,
        num_labels=num_labels,
        ignore_index=ignore_index,
        workspace_mb=workspace_mb,
        engine=engine,
        sequence_group=sequence_group,
    )
    with telling(sequence_group, labels.device):
        if perturbation is not None:
            require_number("perturbation", perturbation, low=0, high=1, above=True, below=True)
        rows = None if token_weights is None else WeightedRows.of(token_weights, labels, options)
        sums = _run(hidden, head, ref_hidden, ref_head, labels, options, perturbation or 0.0, rows)
        kls, logps, references, lengths, mixtures = sums[:5]
        if rows is not None:
            kls, logps, references, lengths = rows.all_sums((kls, logps, references))
        of_mixtures = mixtures.unbind() if rows is None else map(rows.sums, mixtures.unbind())
        own = kls, logps, references, lengths, *of_mixtures
    return SequenceKl(*over_group(own, sequence_group, KL + (rows is not None)))


def _run(
    hidden: Tensor,
    head: AnyHead,
    ref_hidden: Tensor,
    ref_head: AnyHead,
    labels: Tensor,
    options: LogpOptions,
    perturbation: float,
    rows: WeightedRows | None,
) -> tuple[Tensor, ...]:
    """What `head_kl` returns for a call; of rows apart where tokens have weights."""
    if traced_and_spread(head):
        given = hidden, head, ref_hidden, ref_head, labels, options, perturbation, rows
        return torch.compiler.disable(_run)(*given)
    call, ref_hidden = read_call(hidden, head, labels, options), same_rows("ref_hidden", ref_hidden)
    reference = _reference(hidden, ref_hidden, ref_head, call)
    with torch.no_grad():
        others = head_tensors(ref_hidden, reference)
        refuse_forward_mode(others)
        others = others.detached()
    math = HeadMath.of(reference, call.math.dtype)
    spec = call.spec("recompute", call.workspace(False), reference=math, perturbation=perturbation)
    ids, spec = (call.layout.sequence_ids, spec) if rows is None else rows.apart(spec)
    where = call.layout.targets, ids
    return call.checked(head_kl(*call.tensors, *others, *where, *spec.packed()))


def _reference(hidden: Tensor, ref_hidden: Tensor, ref_head: AnyHead, call: Call) -> LMHead:
    """The reference's head on this rank, checked against the policy's."""
    head, shard = local_part(read_head(ref_head, "ref_head"))
    call.shard.require_alike(shard, call.vocab, head.vocab, hidden)
    if head.vocab != call.vocab:
        raise ValueError(
            f"ref_head: got {head.vocab} vocabulary entries, wanted the {call.vocab} of `head`"
        )
    require_floating("ref_hidden", ref_hidden)
    require_shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], head.weight.shape[1]))
    require_device("ref_hidden", ref_hidden, hidden.device)
    require_device("ref_head", head.weight, hidden.device)
    return head


@torch.library.custom_op("fused_prefopt::head_kl", mutates_args=())
def head_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    sizes: Sequence[int],
    scalars: Sequence[float],
    names: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over sequences of KL(reference || policy) and of the log-probs.

    Args:
        hidden, weight, bias, low_hidden, low_weight: (M, D), (V, D), (V,), (M, r), (V, r) of the
            policy's head, the last three or None.
        ref_hidden, …, ref_low_weight: the same of the reference's, constants.
        targets: (M,) int64, `ignore_index` where a row has no label.
        sequence_ids: (M,) int64 in [0, S), or None for M / S rows each, in order.
        sizes, scalars, names: a `Spec`, packed.

    Returns:
        kl (S,), policy (S,), reference (S,), lengths (S,) int64, mixtures (2, S), or (0, S) without
        a perturbation; and what is kept for the backward: index (n,) of the labelled rows, logps
        (n,), reference logps (n,), logsumexps (n,) and reference logsumexps (n,).
    """
    spec = Spec.unpacked(sizes, scalars, names)
    index = labelled_rows(targets, spec.ignore_index, spec.num_labels)
    policy = HeadTensors(hidden, weight, bias, low_hidden, low_weight)
    reference = HeadTensors(ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight)
    head = KlRows.of(policy, reference, targets, index, spec)
    ids = sequences_of(index, sequence_ids, spec.num_sequences, targets.shape[0])
    add = head.policy.build_engine("kl").sequence_sums
    with fixed_precision(hidden, spec.math.dtype):
        found = forward(head)
        kls, lengths = add(found.kls, ids, spec.num_sequences, sequence_ids is None)
        logps, _ = add(found.logps, ids, spec.num_sequences, sequence_ids is None)
        others, _ = add(found.reference_logps, ids, spec.num_sequences, sequence_ids is None)
        mixtures = logps.new_empty(len(found.mixture_logps), spec.num_sequences)
        for each, out in zip(found.mixture_logps, mixtures, strict=True):
            out.copy_(add(each, ids, spec.num_sequences, sequence_ids is None)[0])
    kept = found.logps, found.reference_logps, found.logsumexps, found.reference_logsumexps
    return kls, logps, others, lengths, mixtures, index, *kept


@head_kl.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, targets, _, sizes, scalars, names = rest
    spec = Spec.unpacked(sizes, scalars, names)
    unknown = spec.num_labels < 0
    rows = torch.library.get_ctx().new_dynamic_size() if unknown else spec.num_labels

    def empty(size: Any) -> Tensor:
        return hidden.new_empty(size, dtype=spec.math.accumulator)

    sums = [empty(spec.num_sequences) for _ in range(3)]
    lengths, index = targets.new_empty(spec.num_sequences), targets.new_empty(rows)
    mixtures = empty((2 if spec.perturbation else 0, spec.num_sequences))
    return (*sums, lengths, mixtures, index, *(empty(rows) for _ in range(4)))


@torch.library.custom_op("fused_prefopt::head_kl_backward", mutates_args=())
def head_kl_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_hidden: Tensor | None,
    low_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    ref_low_hidden: Tensor | None,
    ref_low_weight: Tensor | None,
    targets: Tensor,
    sequence_ids: Tensor | None,
    index: Tensor,
    logps: Tensor,
    reference_logps: Tensor,
    logsumexps: Tensor,
    reference_logsumexps: Tensor,
    grad_kl: Tensor | None,
    grad_policy: Tensor | None,
    sizes: Sequence[int],
    scalars: Sequence[float],
    names: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to the policy's tensors; empty where none is wanted.

    Args:
        grad_kl: (S,) d loss / d kl, None for zeros.
        grad_policy: (S,) d loss / d policy, None for zeros.
        wanted: which gradients of the five tensors of `HeadTensors`.

    The others are the inputs and outputs of `head_kl`.
    """
    spec = Spec.unpacked(sizes, scalars, names)
    policy = HeadTensors(hidden, weight, bias, low_hidden, low_weight)
    reference = HeadTensors(ref_hidden, ref_weight, ref_bias, ref_low_hidden, ref_low_weight)
    head = KlRows.of(policy, reference, targets, index, spec, backward=True)

    def of_rows(grad: Tensor) -> Tensor:
        return grad[sequences_of(index, sequence_ids, spec.num_sequences, targets.shape[0])]

    by_kls = None if grad_kl is None else of_rows(grad_kl)
    by_logps = torch.zeros_like(logps) if grad_policy is None else of_rows(grad_policy)
    found = KlResult(logps, logps, reference_logps, logsumexps, reference_logsumexps)
    with fixed_precision(hidden, spec.math.dtype):
        grads = backward(head, found, by_kls, by_logps, weight.shape[0], Wanted(*wanted))
    return without_none(grads, hidden)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, others, lengths, mixtures, *kept = output
    ctx.mark_non_differentiable(others, lengths, mixtures, *kept)
    save(ctx, inputs, *kept)


def _backward(
    ctx: Any, grad_kl: Tensor | None, grad_policy: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    return returned(ctx, head_kl_backward, grad_kl, grad_policy)


head_kl.register_autograd(_backward, setup_context=_setup_context)
head_kl_backward.register_fake(fake_gradients)
refuse_double_backward(head_kl_backward, "sequence_kl")


@dataclass(frozen=True)
class KlRows:
    """Everything one pass over both heads needs: the same rows before each, cut alike."""

    policy: HeadRows
    reference: HeadRows

    @classmethod
    def of(
        cls,
        policy: HeadTensors,
        reference: HeadTensors,
        targets: Tensor,
        index: Tensor,
        spec: Spec,
        *,
        backward: bool = False,
    ) -> KlRows:
        """The rows at `index` (n,) of targets (M,), before the first rows of both heads."""
        rows, math, other = index.shape[0], spec.math, spec.reference
        assert other is not None
        if index.device.type != "cpu":
            spec = replace(spec, workspace=beside_statistics(spec.workspace, rows))
        hidden_size = policy.hidden_size + reference.hidden_size
        either = other if other.bent else math
        name = role_engine(spec.engine, "kl", index.device, hidden_size, either.bent)
        weights = WeightKind.of(policy.weight), WeightKind.of(reference.weight)
        tiles = cut(
            PassSize(
                rows,
                spec.vocab,
                hidden_size,
                spec.workspace,
                load_engine(name).kl_cost(either, *weights, backward, spec.perturbation > 0),
                either,
                index.device,
                backward=backward,
                low_rank=policy.rank + reference.rank > 0,
            )
        )
        spec = replace(spec, reference=None)
        one = HeadRows.of(policy, targets, index, spec, backward=backward, given=tiles)
        beside = replace(one, tensors=reference.first(spec.vocab), spec=replace(spec, math=other))
        return cls(one, beside)

    @property
    def rows(self) -> int:
        return self.policy.rows

    def build_engines(self) -> tuple[TorchEngine, TorchEngine]:
        """The engine of the policy's tiles and that of the reference's."""
        return self.policy.build_engine("kl"), self.reference.build_engine("kl")

    def slabs(self) -> Iterator[tuple[slice, Iterator[tuple[slice, Tile, Tile]]]]:
        """Columns of each slab of the vocabulary, and its tiles.

        Of each tile: the row slice, the policy's part and the reference's.
        """
        hidden, others = self.policy.hidden_rows(), self.reference.hidden_rows()

        def tiles(
            first: int, weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None]
        ) -> Iterator[tuple[slice, Tile, Tile]]:
            for rows in self.policy.row_slices():
                where = self.policy.targets[rows], first
                policy = Tile(hidden[rows], weights[0], biases[0], *where)
                yield rows, policy, Tile(others[rows], weights[1], biases[1], *where)

        for own, other in zip(self.policy.slabs(), self.reference.slabs(), strict=True):
            yield own[0], tiles(own[0].start, (own[1], other[1]), (own[2], other[2]))


@dataclass(frozen=True)
class KlResult:
    """Results of a forward for each labelled row, all (n,).

    Attributes:
        kls: KL(reference || policy), in nats.
        logps, reference_logps: of the labels.
        logsumexps, reference_logsumexps: of the logits.
        mixture_logps: of the labels under the two mixtures, or nothing.
    """

    kls: Tensor
    logps: Tensor
    reference_logps: Tensor
    logsumexps: Tensor
    reference_logsumexps: Tensor
    mixture_logps: tuple[Tensor, ...] = ()


def forward(head: KlRows) -> KlResult:
    """One pass over both heads: two matmuls."""
    engine, other = head.build_engines()
    math, device = head.policy.math, head.policy.device
    perturbation = head.policy.spec.perturbation
    statistics = KlStatistics.empty(head.rows, math.accumulator, device, perturbation)
    for _, tiles in head.slabs():
        for rows, policy, reference in tiles:
            engine.fold_both(policy, reference, other, statistics[rows])
    statistics = head.policy.shard.merge_kl(statistics)
    mixtures = statistics.mixtures
    return KlResult(
        statistics.kls(),
        statistics.policy.logps(),
        statistics.reference.logps(),
        statistics.policy.logsumexps(),
        statistics.reference.logsumexps(),
        () if mixtures is None else (mixtures.extrapolated.logps(), mixtures.interpolated.logps()),
    )


def backward(
    head: KlRows,
    found: KlResult,
    by_kls: Tensor | None,
    by_logps: Tensor,
    padded: int,
    wanted: Wanted,
) -> Gradients:
    """Gradients of ``(by_kls * kls + by_logps * logps).sum()`` by the policy's tensors.

    ``d logits = by_kls (p − q) + by_logps (one-hot − p)`` with p of the policy, q of the reference,
    from logits that are built again: two matmuls, and one for each of hidden and weight. Without
    `by_kls` (a loss that takes the divergence as a constant) the reference's are not built.

    Args:
        found: what `forward` has returned; its `kls` are not used.
        by_kls: (n,), or None for zeros.
        by_logps: (n,).
        padded: rows of the policy's weight with its padding.
        wanted: the gradients to form.
    """
    if by_kls is None:
        nothing, ticket = head.policy.new(0), torch.zeros(1, dtype=torch.int64)
        kept = Kept(found.logsumexps, nothing, nothing, ticket, nothing)
        upstream = Upstream(found.logps, by_logps)
        return gradients_of_logps(head.policy, kept, upstream, padded, wanted)
    if not head.rows:
        return GradientSums(head.policy, padded, wanted).gradients()
    numbers, unit = _row_gradients(head, found, by_kls, by_logps)
    sums = GradientSums(head.policy, padded, wanted, unit)
    (engine, other), buffer = head.build_engines(), head.policy.slab_buffer()
    for columns, tiles in head.slabs():
        sums.begin(columns)
        for rows, policy, reference in tiles:
            size, width = policy.shape
            out = buffer[:size, :width]
            both = policy, reference, other
            by_bias = engine.kl_gradient(*both, numbers[rows], out, sums.wants_bias)
            sums.add_bias(by_bias, slice(0, width))
            sums.add(out, rows, policy.hidden, policy.weight)
        sums.finish()
    return sums.gradients()


def _row_gradients(
    head: KlRows, found: KlResult, by_kls: Tensor, by_logps: Tensor
) -> tuple[KlGradients, Tensor | None]:
    """Numbers that the rows' gradients are made of, and their unit (None for 1)."""
    math = head.policy.math
    (by_kls, by_logps), unit = row_factors([by_kls, by_logps], head.policy.operand)
    scale, reference_scale = (by_kls - by_logps) * math.slope, -by_kls * math.slope
    # p − 1 is exact near 1, where the difference of two exponentials would not be.
    targets = scale * found.logps.expm1() + reference_scale * found.reference_logps.expm1()
    if math.softcap is not None:
        targets = targets * math.cap_slope(found.logps + found.logsumexps)
    numbers = KlGradients(
        found.logsumexps, found.reference_logsumexps, scale, reference_scale, targets
    )
    return numbers, unit
