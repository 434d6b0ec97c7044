"""Arguments of an engine: a tile of a head, the rows' numbers, and where its results go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Rows × a vocabulary slab, before their product.

    Attributes:
        hidden: (c, D) in the operand dtype.
        weight: (v, D) in the operand dtype.
        bias: (v,) or None.
        targets: (c,) int64 vocabulary index of the targets, anywhere.
        first: vocabulary index of the slab's first entry.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    first: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(c, v)."""
        return self.targets.shape[0], self.weight.shape[0]


@dataclass(frozen=True)
class KeptTile:
    """Rows × a vocabulary slab of what `fold_and_keep` has left.

    Attributes:
        values: (c, v) exp(logit − maximum) in `HeadMath.kept`.
        maxima: (parts, c) that they refer to, of the whole vocabulary.
        part_width: entries of a part.
        targets: (c,) int64 vocabulary index of the targets, anywhere.
        first: vocabulary index of the slab's first entry.
    """

    values: Tensor
    maxima: Tensor
    part_width: int
    targets: Tensor
    first: int = 0


@dataclass(frozen=True)
class RowStatistics:
    """Running maximum, Σ exp(logit − maximum) and target logit of each row, all (n,)."""

    maximum: Tensor
    sum: Tensor
    target: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> RowStatistics:
        # The lowest finite number, not -inf: a slab whose logits are all -inf then gives zeros.
        lowest = torch.finfo(dtype).min
        maximum, total, target = torch.zeros(3, rows, dtype=dtype, device=device)
        return cls(maximum.fill_(lowest), total, target)

    def __getitem__(self, rows: slice) -> RowStatistics:
        if rows.stop - rows.start == self.maximum.shape[0]:
            return self
        return RowStatistics(self.maximum[rows], self.sum[rows], self.target[rows])

    def merge(self, other: RowStatistics) -> None:
        """Add the statistics of other entries, in place; one of the two targets is 0."""
        maximum = torch.maximum(self.maximum, other.maximum)
        self.sum.mul_((self.maximum - maximum).exp_())
        self.sum.add_(other.sum * (other.maximum - maximum).exp_())
        self.maximum.copy_(maximum)
        self.target.add_(other.target)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets, and log-sum-exps."""
        log_sum = self.sum.log()
        return (self.target - self.maximum) - log_sum, self.maximum + log_sum

    def logps(self) -> Tensor:
        return self.finish()[0]

    def logsumexps(self) -> Tensor:
        return self.maximum + self.sum.log()


@dataclass(frozen=True)
class WeighedRows:
    """Running Σ exp(logit − reference) · slope · W of each row, and the slab that is being added.

    Without the target's own: its share comes in fp32, from its log-prob, since beside a target that
    is nearly certain nothing would be left of it.

    The reference is the row's first maximum. It moves only where a logit exceeds it by more than
    the operand dtype can bear: nearly always the sums stay as they are.

    Attributes:
        reference: (c,).
        weights: (c, ≥ done + v) operand of the slab's product.
        done: columns of `weights` that refer to the reference already.
        sums: (c, D) of the slabs before, or None at the first.
    """

    reference: Tensor
    weights: Tensor
    done: int
    sums: Tensor | None

    def at(self, columns: slice) -> Tensor:
        """(c, v) the columns that are to be filled."""
        return self.weights[:, columns]


@dataclass(frozen=True)
class Details:
    """Further statistics of each row's logits, all (n,).

    Attributes:
        weighted: running Σ (logit − maximum) exp(logit − maximum).
        squares: running Σ exp(logit − maximum)².
        logit_sum: running Σ logit.
        best: int32 vocabulary index of the largest logit, the first of several.
    """

    weighted: Tensor
    squares: Tensor
    logit_sum: Tensor
    best: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> Details:
        weighted = torch.zeros(rows, dtype=dtype, device=device)
        best = torch.zeros(rows, dtype=torch.int32, device=device)
        return cls(weighted, torch.zeros_like(weighted), torch.zeros_like(weighted), best)

    def __getitem__(self, rows: slice) -> Details:
        return Details(
            self.weighted[rows], self.squares[rows], self.logit_sum[rows], self.best[rows]
        )

    def entropies(self, statistics: RowStatistics) -> Tensor:
        """(n,) −Σ p log p, in nats."""
        return statistics.sum.log() - self.weighted / statistics.sum


@dataclass(frozen=True)
class EntropyGradients:
    """Share of the entropies in each row's gradient, all (n,).

    Attributes:
        entropies: H of the whole rows.
        scale: factor on the row's p · (log p + H).
    """

    entropies: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice | Tensor) -> EntropyGradients:
        return EntropyGradients(self.entropies[rows], self.scale[rows])


@dataclass(frozen=True)
class RowGradients:
    """Numbers that each row's gradient is made of, all (n,).

    Attributes:
        logsumexps: of the whole rows.
        residuals: (p − 1) · slope of the targets.
        scale: factor on the row's softmax − one-hot.
        entropy: what entropies add, or None.
    """

    logsumexps: Tensor
    residuals: Tensor
    scale: Tensor
    entropy: EntropyGradients | None = None

    def __getitem__(self, rows: slice | Tensor) -> RowGradients:
        entropy = None if self.entropy is None else self.entropy[rows]
        return RowGradients(self.logsumexps[rows], self.residuals[rows], self.scale[rows], entropy)


@dataclass(frozen=True)
class MixtureStatistics:
    """Running statistics of each row under two mixtures of a policy's and a reference's logits.

    Attributes:
        perturbation: ε.
        extrapolated: of ``z + ε (z − r)`` with policy logits z and reference logits r.
        interpolated: of ``z − ε (z − r)``.
    """

    perturbation: float
    extrapolated: RowStatistics
    interpolated: RowStatistics

    def __getitem__(self, rows: slice) -> MixtureStatistics:
        parts = self.extrapolated[rows], self.interpolated[rows]
        return MixtureStatistics(self.perturbation, *parts)


@dataclass(frozen=True)
class KlStatistics:
    """Running statistics of each row where a policy's logits meet a reference's.

    Attributes:
        policy, reference: maximum, Σ exp(logit − maximum) and target logit, each (n,).
        weighted: (n,) running Σ exp(r − max r) (r − z) of policy logits z, reference logits r.
        mixtures: of both heads' logits, or None where none are wanted.
    """

    policy: RowStatistics
    reference: RowStatistics
    weighted: Tensor
    mixtures: MixtureStatistics | None = None

    @classmethod
    def empty(
        cls, rows: int, dtype: torch.dtype, device: torch.device, perturbation: float = 0.0
    ) -> KlStatistics:
        """Of rows that have met no logit yet; a perturbation of 0 is no mixtures."""
        policy, reference, *two = (
            RowStatistics.empty(rows, dtype, device) for _ in range(4 if perturbation else 2)
        )
        mixtures = MixtureStatistics(perturbation, *two) if two else None
        return cls(policy, reference, torch.zeros_like(policy.sum), mixtures)

    def __getitem__(self, rows: slice) -> KlStatistics:
        mixtures = None if self.mixtures is None else self.mixtures[rows]
        return KlStatistics(self.policy[rows], self.reference[rows], self.weighted[rows], mixtures)

    def kls(self) -> Tensor:
        """(n,) ``KL(reference || policy) = E[r − z] − lse r + lse z``, the mean over the reference.

        Terms cancel where the two distributions are close: they are added in float64, and what
        rounding has left below 0 becomes 0.
        """
        mean = self.weighted.double() / self.reference.sum.double()
        maxima = self.policy.maximum.double() - self.reference.maximum.double()
        sums = self.policy.sum.double().log() - self.reference.sum.double().log()
        return (mean + (maxima + sums)).clamp_(min=0).to(self.weighted.dtype)


@dataclass(frozen=True)
class KlGradients:
    """Numbers that the gradient of a policy's logits beside a reference's is made of, all (n,).

    Attributes:
        logsumexps: of the policy's whole rows.
        reference_logsumexps: of the reference's.
        scale: factor on the policy's probabilities.
        reference_scale: factor on the reference's.
        targets: the whole gradient of the target's logit.
    """

    logsumexps: Tensor
    reference_logsumexps: Tensor
    scale: Tensor
    reference_scale: Tensor
    targets: Tensor

    def __getitem__(self, rows: slice) -> KlGradients:
        return KlGradients(
            self.logsumexps[rows],
            self.reference_logsumexps[rows],
            self.scale[rows],
            self.reference_scale[rows],
            self.targets[rows],
        )
