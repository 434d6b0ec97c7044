"""The things that travel through the package, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist
from torch import Tensor

from fused_prefopt.checks import (
    is_on_host,
    require,
    require_count,
    require_device,
    require_floating,
    require_integer,
    require_shape,
)

# Matmuls of forward and backward together, by the op's path; P is the time of one.
COST_IN_P = {"evaluate": 1.0, "stash": 2.0, "local": 3.0, "recompute": 4.0}
# The same of `sequence_kl`: the policy's as by `recompute`, the reference's built as often; and of
# the log-probs beside it, where the divergence has no gradient.
KL_COST_IN_P = COST_IN_P["recompute"] + 2 * COST_IN_P["evaluate"]
BESIDE_KL_COST_IN_P = KL_COST_IN_P - COST_IN_P["evaluate"]


@dataclass(frozen=True)
class LowRank:
    """A low-rank term of a head (LoRA, Hu et al. 2022, eq. 3), trained beside its frozen weight.

    It adds ``scaling * dropout(hidden) @ a.T @ b.T`` to ``hidden @ weight.T``.

    Args:
        a: (r, D) down projection.
        b: (V, r) up projection.
        scaling: factor on the term (alpha / r, or alpha / sqrt(r) with rank stabilisation).
        dropout: probability with which an entry of hidden is dropped before `a`.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_shape("a", self.a, ("r", "D"))
        require_shape("b", self.b, ("V", self.a.shape[0]))
        require_floating("a", self.a)
        require_floating("b", self.b)
        require_device("b", self.b, self.a.device)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, wanted a number in [0, 1)")

    def project(self, hidden: Tensor) -> Tensor:
        """(..., D) → (..., r): what `b` takes, scaled."""
        hidden = torch.nn.functional.dropout(hidden.to(self.a.dtype), self.dropout)
        return self.scaling * torch.nn.functional.linear(hidden, self.a)


@dataclass(frozen=True)
class LMHead:
    """A language-model head: everything between the last hidden state and the log-softmax.

    ``logits = cap(logit_scale * (hidden @ weight.T + bias)) / temperature`` over the first
    `valid_vocab` rows of `weight`, where ``cap(z) = softcap * tanh(z / softcap)``.

    A head whose rows are spread over ranks (tensor parallelism) stays spread, as a `DTensor` that
    is sharded over its rows, or as each rank's rows with their `group`. Every rank passes the same
    hidden states and labels: under Megatron's sequence parallelism, which scatters hidden states
    over the same ranks, they are gathered first. Log-probs, losses and the gradients of hidden and
    of a low-rank term's `a` are those of the whole head, the same bits on every rank: nothing is
    left to sum. See `ops.vocab_shard` for what the ranks exchange.

    Args:
        weight: (V, D) output embedding, whole, or a `DTensor` sharded over its rows; with a `group`
            (V_local, D), this rank's rows.
        bias: (V,) added to the logits, or None. Sharded as the weight is.
        softcap: bound of the logits (Gemma 2's `final_logit_softcapping`), or None.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        temperature: the capped logits are divided by it.
        valid_vocab: rows of `weight` from this index on are padding: they take part in no
            log-softmax and get zero gradient. None means all V rows are real. Of a spread head it
            counts rows of the whole one; every rank must hold some that are real.
        low_rank: terms added to ``hidden @ weight.T``; they meet the op as r more columns. Their
            `b` is sharded as the weight is, their `a` whole on every rank, and their dropout must
            draw the same there.
        group: ranks that share the head, each with rows of its own, as many as it likes, in any
            order; together they are all rows of the vocabulary, each once.
        first_row: vocabulary index of this rank's first row; goes with `group`.

    Raises:
        ValueError: a shape, dtype or number is out of its range; one of `group` and `first_row`
            is missing.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    valid_vocab: int | None = None
    low_rank: tuple[LowRank, ...] = ()
    group: dist.ProcessGroup | None = None
    first_row: int | None = None

    def __post_init__(self) -> None:
        require_shape("weight", self.weight, ("V", "D"))
        require_floating("weight", self.weight)
        if self.bias is not None:
            require_shape("bias", self.bias, (self.weight.shape[0],))
            require_floating("bias", self.bias)
            require_device("bias", self.bias, self.weight.device)
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: got {self.softcap}, wanted None or a number > 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature}, wanted a number > 0")
        rows = self.weight.shape[0]
        if not self.weight.numel():
            raise ValueError(
                f"weight: got shape {tuple(self.weight.shape)}, wanted V > 0 and D > 0"
            )
        self._check_group()
        if self.valid_vocab is not None:
            # The ranks of a group find out together whether they hold as many.
            shared = self.group is not None
            if not 0 < self.valid_vocab or (self.valid_vocab > rows and not shared):
                wanted = "a number > 0" if shared else f"1..{rows}"
                raise ValueError(f"valid_vocab: got {self.valid_vocab}, wanted None or {wanted}")
        for term in self.low_rank:
            require_shape("a", term.a, ("r", self.weight.shape[1]))
            require_shape("b", term.b, (rows, "r"))
            require_device("b", term.b, self.weight.device)

    def _check_group(self) -> None:
        if self.group is None:
            if self.first_row is not None:
                raise ValueError(
                    f"first_row: got {self.first_row} without a group, wanted the `group` whose"
                    " ranks hold the other rows"
                )
            return
        if not isinstance(self.group, dist.ProcessGroup):
            raise ValueError(f"group: got {self.group!r}, wanted a ProcessGroup of this rank")
        if self.first_row is None:
            raise ValueError("first_row: got None with a group, wanted this rank's first row")
        require_count("first_row", self.first_row)
        terms = [value for term in self.low_rank for value in (term.a, term.b)]
        if any(hasattr(value, "device_mesh") for value in (self.weight, self.bias, *terms)):
            raise ValueError(
                "group: got one with a DTensor, which knows the ranks that share it; wanted either"
            )

    @property
    def vocab(self) -> int:
        """Number of vocabulary rows that take part in the log-softmax.

        Raises:
            ValueError: a `group` shares the head, and `valid_vocab` is None.
        """
        if self.valid_vocab is not None:
            return self.valid_vocab
        if self.group is not None:
            raise ValueError(
                f"vocab: got {self.weight.shape[0]} rows of a head that a group shares, wanted"
                " `valid_vocab`: this rank does not know how many the others hold"
            )
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Eager logits (..., vocab) of hidden (..., D): what the op never builds.

        Raises:
            ValueError: a `group` shares the head: its logits are on no rank.
        """
        if self.group is not None:
            raise ValueError(
                f"logits: got {self.weight.shape[0]} rows of a head that a group shares, wanted a"
                " whole head; gather its rows first"
            )
        bias = None if self.bias is None else self.bias[: self.vocab]
        logits = torch.nn.functional.linear(hidden, self.weight[: self.vocab], bias)
        for term in self.low_rank:
            logits = logits + (term.project(hidden) @ term.b[: self.vocab].t()).to(logits.dtype)
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    @classmethod
    def of(cls, model: torch.nn.Module) -> LMHead:
        """The head of any Hugging Face causal language model, PEFT-wrapped ones too, or of a layer.

        Args:
            model: a model with `get_output_embeddings()` and a `config`, or a `torch.nn.Linear`,
                whose weight and bias are all there is to its logits.

        Raises:
            ValueError: the model has no output embedding, one whose values are elsewhere (ZeRO-3,
                FSDP, offloading), or one that a plain ``hidden @ weight.T + bias`` does not
                describe. `models.head_check.check_head` also compares logits.
        """
        if isinstance(model, torch.nn.Linear) and type(model).forward is torch.nn.Linear.forward:
            return cls(model.weight, model.bias)
        from fused_prefopt.models.causal_lm import head_parts

        parts = head_parts(model)
        return cls(
            parts.weight,
            parts.bias,
            parts.softcap,
            parts.logit_scale,
            valid_vocab=parts.valid_vocab,
            low_rank=tuple(LowRank(*term) for term in parts.low_rank),
        )


# What is taken for a head; a bare tensor is its weight.
AnyHead = LMHead | Tensor | torch.nn.Linear


@dataclass(frozen=True)
class Plan:
    """Way in which a batch of log-probs is computed.

    Attributes:
        path: `evaluate`, `stash`, `local` or `recompute`.
        engine: `torch`, `cublas` or `triton`; `cublas+triton` where each does a part.
        workspace: bytes that tiles and kept probabilities may take.
        reason: why this path, in words.
        rows: n, labelled rows (an upper bound where a compiler traces).
        kept_rows: k of them whose probabilities are kept for the backward.
    """

    path: str
    engine: str
    workspace: int
    reason: str
    rows: int = 0
    kept_rows: int = 0

    @property
    def cost(self) -> float:
        """Matmuls of forward and backward together, in P."""
        if self.path != "recompute" or not self.rows:
            return COST_IN_P[self.path]
        return COST_IN_P["recompute"] - self.kept_rows / self.rows


@dataclass(frozen=True)
class SequenceLogps:
    """Per-sequence log-probabilities, as `sequence_logps` returns them.

    Attributes:
        sums: (S,) fp32 (float64 for float64 inputs), in nats, differentiable; 0 for a sequence
            without labels.
        lengths: (S,) int64, number of labelled tokens; with weights of tokens the sum of those, in
            the dtype of `sums`.
        plan: how it was computed: path, engine, workspace.
    """

    sums: Tensor
    lengths: Tensor
    plan: Plan

    @property
    def means(self) -> Tensor:
        """(S,) log-probability per labelled token, in nats; 0 for an empty sequence."""
        return self.sums / divisors(self.lengths)


def divisors(lengths: Tensor) -> Tensor:
    """What sums over tokens are divided by: the lengths, and 1 for an empty sequence.

    Args:
        lengths: (S,) numbers of tokens, or sums of their weights, which may be below 1.
    """
    return lengths.where(lengths > 0, 1)


@dataclass(frozen=True)
class TokenPolicy:
    """A policy at each labelled token: both in the shape of the labels, differentiable.

    Entry t is about the distribution that predicts labels[t]; 0 where there is no label.

    Attributes:
        logps: fp32 log-probability of the label, in nats.
        entropies: fp32 entropy of the distribution, in nats.
    """

    logps: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of a model's distribution at each labelled token, all in the shape of the labels.

    Entry t is about the distribution that predicts labels[t]; 0 where there is no label.

    Attributes:
        logps: fp32 log-probability of the label, in nats.
        entropies: fp32 entropy of the distribution, in nats.
        collisions: fp32 ``log Σ_v p_v²``, in nats: how likely two draws are to be the same token
            (the weights of WPO, Zhou et al. 2024).
        mean_logits: fp32 mean of the logits over the vocabulary.
        correct: bool, whether the label is the most likely token.
    """

    logps: Tensor
    entropies: Tensor
    collisions: Tensor
    mean_logits: Tensor
    correct: Tensor


def require_weights(name: str, weights: Tensor) -> None:
    """Raise ValueError, with the place where that is known, unless all weights are finite and >= 0.

    Args:
        name: of the weights, for the message.
        weights: any shape, floating.

    Raises:
        ValueError: one is not (a device-side assert on CUDA), or their dtype is no floating one.
    """
    require_floating(name, weights)
    fits = weights.isfinite() & (weights >= 0)

    def message() -> str:
        wanted = f"{name}: wanted finite numbers >= 0"
        if not is_on_host(fits):
            return wanted
        place = tuple(fits.logical_not().nonzero()[0].tolist())
        at = place[0] if len(place) == 1 else place
        return f"{wanted}, got {float(weights[place])} in row {at}"

    require(fits.all(), message)


@dataclass(frozen=True)
class LogpBatch:
    """A batch as a loss sees it: per-sequence log-probabilities and what comes with them.

    For pairwise losses the first half of every field is chosen, the second half rejected.

    Args:
        policy: (S,) summed log-probs of the completions under the policy, in nats, differentiable.
        lengths: (S,) labelled tokens of each completion, or the sum of their weights (floating).
        reference: (S,) the same sums under the reference model.
        rewards: (S,) scores of the completions, from any reward model, rule or annotator.
        desirable: (S,) bool, for point-wise losses on binary feedback.
        kl: scalar estimate of KL(policy || reference), in nats.
        prompt: (S,) summed log-probs of the prompt (all tokens but the first) under the policy.
        prompt_reference: (S,) the same under the reference model.
        prompt_lengths: (S,) tokens of the prompt that `prompt` sums.
        groups: (S,) integer, equal for the completions of one prompt. A loss on pairs takes such a
            batch, with `rewards`, as lists; see `losses.pairs_of_lists`.
        completions: (S,) integer, of the pairs of lists: equal where it is one completion.
        sequence_kl: (S,) sum over tokens of KL(reference || policy), in nats.
        extrapolated: (S,) summed log-probs of the completions, in nats, under the softmax of
            ``(1+ε) z − ε z_ref``: logits of the policy and of the reference, and ε of the loss.
        interpolated: (S,) the same of ``(1−ε) z + ε z_ref``.
        collision: (S,) sum over tokens of ``log Σ_v π(v)²`` under the policy, in nats; always
            optional.
        weights: (S,) numbers >= 0, how much each pair (the same in both halves) or completion
            counts in the loss and in the metrics; always optional.
        gold: (S,) summed log-probs under the policy, in nats, differentiable, of a third completion
            of each pair's prompt (the same in both halves): the best one.
        gold_lengths: (S,) labelled tokens of that, as `lengths`.

    Raises:
        ValueError: a field's shape, dtype or device does not fit `policy`, or a weight is negative
            or not finite (a device-side assert on CUDA).
    """

    policy: Tensor
    lengths: Tensor
    reference: Tensor | None = None
    rewards: Tensor | None = None
    desirable: Tensor | None = None
    kl: Tensor | None = None
    prompt: Tensor | None = None
    prompt_reference: Tensor | None = None
    prompt_lengths: Tensor | None = None
    groups: Tensor | None = None
    completions: Tensor | None = None
    sequence_kl: Tensor | None = None
    extrapolated: Tensor | None = None
    interpolated: Tensor | None = None
    collision: Tensor | None = None
    weights: Tensor | None = None
    gold: Tensor | None = None
    gold_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        require_shape("policy", self.policy, ("S",))
        require_floating("policy", self.policy)
        for name in ("lengths", "gold_lengths"):
            lengths = getattr(self, name)
            if lengths is not None and not lengths.is_floating_point():
                require_integer(name, lengths)
        for name in ("groups", "completions", "prompt_lengths"):
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name))
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or item.name == "policy":
                continue
            require_shape(item.name, value, () if item.name == "kl" else self.policy.shape)
            require_device(item.name, value, self.policy.device)
        if self.weights is not None:
            require_weights("weights", self.weights)

    @property
    def size(self) -> int:
        """S, the number of sequences."""
        return self.policy.shape[0]

    @property
    def given(self) -> frozenset[str]:
        """Names of the fields that are not None."""
        return frozenset(item.name for item in fields(self) if getattr(self, item.name) is not None)


@dataclass(frozen=True)
class LossOutput:
    """A loss and what is worth logging about it.

    Attributes:
        loss: scalar, differentiable: the batch loss.
        losses: (P,) per pair, or (S,) per sequence for point-wise losses, before their weights and
            the reduction.
        metrics: name → detached scalar tensor, with TRL's names.
        rewards: (S,) detached implicit rewards of the sequences, of lists (2P,) of their pairs'.
        target_margins: (P,) detached margins γ_i subtracted from the reward margins, or None for
            point-wise losses.
    """

    loss: Tensor
    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None
    target_margins: Tensor | None = None
