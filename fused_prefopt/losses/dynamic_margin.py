"""γ-PO: a budget of target margins, n·γ₀, shared over n pairs by their reward margins.

Both solvers minimise, over the simplex, the strictly convex (eq. 25)

    F(p) = (1/n) Σ_i −log σ(m_i − γ_i) + τ Σ_i p_i log(n p_i),    γ_i = γ₀ n p_i.

They work in float64 on (n,) vectors, take a fixed number of steps and never look at a value from
Python, so that CUDA needs no wait. Non-finite margins take no part: they count neither in n nor
in the budget, and get γ₀.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_prefopt.checks import require_choice, require_count, require_number
from fused_prefopt.losses.protocol import expect
from fused_prefopt.statistics import MarginPool, MarginQueue
from fused_prefopt.types import LogpBatch

EXACT_RATIO = 10.0  # largest γ₀/τ for which `exact_margins` is known to converge
_NEWTON_STEPS = 50
_HALVINGS = 8


@dataclass(frozen=True, kw_only=True)
class DynamicMargin:
    """γ-PO's margin: a budget of mean γ₀, shared over pairs by their reward margins.

    Confident pairs are asked for more, ambiguous ones for less; always detached. Works with any
    reward.

    Args:
        gamma: γ₀ >= 0, the mean target margin, in units of reward.
        tau: τ > 0, pull towards equal margins.
        solver: "mirror", the paper's descent, or "exact", the minimum it descends to, for
            ``γ₀/τ <= 10``.
        steps: mirror-descent updates.
        queue: fill the pool with past margins (Algorithm 2) or use the batch alone (Algorithm 1).
        queue_size: past margins remembered.
        sample_size: the pool is filled up to this size.
        seed: of the sampling.
        centered: the target margins are γ_i − γ₀, of mean 0: the authors' code of γ-DPO.

    Raises:
        ValueError: an option is out of range.

    Source: γ-PO, eq. 9–10 and 22–25, Algorithms 1 and 2.
    """

    gamma: float
    tau: float = 10.0
    solver: str = "mirror"
    steps: int = 20
    queue: bool = True
    queue_size: int = 2048
    sample_size: int = 256
    seed: int = 0
    centered: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("gamma", self.gamma, low=0)
        require_number("tau", self.tau, low=0, above=True)
        require_choice("solver", self.solver, ("mirror", "exact"))
        if self.solver == "exact" and self.gamma > EXACT_RATIO * self.tau:
            raise ValueError(
                f"tau: got {self.tau} with gamma {self.gamma}, wanted at least"
                f" gamma / {EXACT_RATIO:g} for the exact solver"
            )
        require_count("steps", self.steps, low=1)
        require_count("queue_size", self.queue_size, low=1)
        require_count("sample_size", self.sample_size, low=1)
        require_count("seed", self.seed)

    def statistics(self) -> MarginQueue:
        """The queue of past margins; of size 0 with ``queue=False``."""
        return MarginQueue(self.queue_size if self.queue else 0, self.sample_size, self.seed)

    def observe(self, batch: LogpBatch, reward_margins: Tensor) -> Tensor:
        """(P,) the reward margins, detached."""
        return reward_margins.detach()

    def solve(self, margins: Tensor) -> Tensor:
        """(n,) float64 γ_i, of mean γ₀, of a pool of (n,) reward margins."""
        if self.solver == "exact":
            return exact_margins(margins, gamma=self.gamma, tau=self.tau)
        return mirror_margins(margins, gamma=self.gamma, tau=self.tau, steps=self.steps)

    def __call__(
        self, batch: LogpBatch, reward_margins: Tensor, summary: MarginPool | None
    ) -> Tensor:
        """(P,) target margins."""
        pool = expect(summary, MarginPool)
        target_margins = pool.local(self.solve(pool.margins), reward_margins.shape[0])
        if self.centered:
            target_margins = target_margins - self.gamma
        return target_margins.to(reward_margins.dtype)


def mirror_margins(margins: Tensor, *, gamma: float, tau: float, steps: int = 20) -> Tensor:
    """Target margins after a fixed number of mirror-descent steps from the uniform distribution.

    ``grad = τ (1 + log(n (p + 1e-10))) + γ₀ / (1 + exp(m − γ))``,
    ``p ← p exp(−η grad) / Σ p exp(−η grad)``, ``η = min(0.5/τ, 1)``. A contraction while
    ``γ₀ γ_i < 12 τ`` (τ >= 0.5), as in all published settings; far beyond it oscillates.

    Args:
        margins: (n,) reward margins m.
        gamma: γ₀ >= 0, the mean target margin.
        tau: τ > 0, pull towards equal margins.
        steps: number of updates.

    Returns:
        (n,) float64 target margins γ_i, of mean γ₀ over the finite margins.

    Source: γ-PO, eq. 22–24 and Appendix C.
    """
    if margins.numel() == 0:
        return margins.to(torch.float64)
    margins, taking_part, count = _taking_part(margins)
    # In logits of p the update is a sum, and the softmax normalises: terms that all entries share
    # drop out, and nothing underflows.
    rate, pull = min(0.5 / tau, 1.0), min(0.5, tau)
    budget, excess = gamma * count, -margins
    p = taking_part / count
    logits = p.log()
    for _ in range(steps):
        pressure = torch.addcmul(excess, budget, p).sigmoid_()
        logits.add_((p + 1e-10).log_(), alpha=-pull).add_(pressure, alpha=-rate * gamma)
        p = torch.softmax(logits, dim=0)
    return torch.where(taking_part, budget * p, gamma)


def exact_margins(margins: Tensor, *, gamma: float, tau: float) -> Tensor:
    """Target margins at the minimum, by Newton on the optimality conditions.

    With ``t_i = log(n p_i)`` and the budget's multiplier c they read
    ``t_i + (γ₀/τ) σ(γ₀ exp(t_i) − m_i) = c`` and ``log mean_i exp(t_i) = 0``. The Jacobian is
    diagonal plus a border, so a step is a closed form; its length is the power of 1/2 with the
    smallest residual. Converges to rounding for ``γ₀/τ <= 10`` (published settings: at most 1);
    far beyond, the sigmoid becomes a step that Newton may not cross.

    Args:
        margins: (n,) reward margins m.
        gamma: γ₀ >= 0, the mean target margin.
        tau: τ > 0, pull towards equal margins.

    Returns:
        (n,) float64 target margins γ_i, of mean γ₀ over the finite margins.

    Source: γ-PO, eq. 22 and 25.
    """
    if margins.numel() == 0:
        return margins.to(torch.float64)
    margins, taking_part, count = _taking_part(margins)
    slope = gamma / tau
    log_count = count.log()
    outside = taking_part.logical_not()

    def residuals(t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        stationarity = t + slope * torch.sigmoid(gamma * t.exp() - margins) - c.unsqueeze(-1)
        budget = torch.logsumexp(t.masked_fill(outside, -torch.inf), dim=-1) - log_count
        return stationarity.masked_fill(outside, 0.0), budget

    t = torch.zeros_like(margins)
    c = (slope * torch.sigmoid(gamma - margins) * taking_part).sum() / count
    lengths = torch.pow(0.5, torch.arange(_HALVINGS, dtype=t.dtype, device=t.device))
    for _ in range(_NEWTON_STEPS):
        stationarity, budget = residuals(t, c)
        pressure = torch.sigmoid(gamma * t.exp() - margins)
        curvature = 1 + slope * gamma * t.exp() * pressure * (1 - pressure)
        shares = torch.softmax(t.masked_fill(outside, -torch.inf), dim=0) / curvature
        step_c = ((shares * stationarity).sum() - budget) / shares.sum()
        step_t = (step_c - stationarity) / curvature
        trial_t = t + lengths[:, None] * step_t
        trial_c = c + lengths * step_c
        stationarity, budget = residuals(trial_t, trial_c)
        error = stationarity.abs().amax(dim=-1).maximum(budget.abs())
        best = error.nan_to_num(nan=torch.inf).argmin().unsqueeze(0)
        t, c = trial_t.index_select(0, best).squeeze(0), trial_c.index_select(0, best).squeeze(0)
    return torch.where(taking_part, gamma * t.exp(), gamma)


def _taking_part(margins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 margins with 0 for the non-finite, the mask of the finite, and their number n."""
    margins = margins.detach().to(torch.float64)
    finite = margins.isfinite()
    return margins.where(finite, 0.0), finite, finite.sum().clamp(min=1).to(torch.float64)
