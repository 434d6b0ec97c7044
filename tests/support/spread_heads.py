"""Heads whose rows are spread over ranks, as `DTensor` and as rows of a process group, and whole.

What is computed of a head is one function of a `Spread`: `WHOLE` for the truth on one process, and
one of a rank's for its part of the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from divergences import Two
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from truth import SMALLEST, TRANSFORMS, Case, make_case, true_logits

import fused_prefopt as fp
from fused_prefopt.integrations.metrics import token_metrics
from fused_prefopt.models.batch import CollatedRows

# Not a multiple of the ranks: the last part of a DTensor has fewer rows.
VOCAB = 31
# (first row, rows) by rank, for each number of ranks: unequal, and not in the ranks' order.
ROWS = {1: [(0, 31)], 2: [(12, 19), (0, 12)], 3: [(8, 4), (12, 19), (0, 8)]}


@dataclass(frozen=True)
class Spread:
    """Way in which a head's rows are held.

    Attributes:
        kind: `whole`, `dtensor` or `group`.
        mesh: the ranks that share the head; None for a whole one.
        alone: a group of this rank, the data-parallel ranks of losses; None for a whole one.
        dtype: of the numbers.
        engine: that computes.
    """

    kind: str = "whole"
    mesh: DeviceMesh | None = None
    alone: dist.ProcessGroup | None = None
    dtype: torch.dtype = torch.float64
    engine: str = "auto"

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def rows(self) -> tuple[int, int]:
        """First row and number of rows of this rank in its group."""
        return ROWS[self.mesh.size()][self.mesh.get_local_rank()]

    def part(self, value: Tensor, whole: bool = False) -> Tensor:
        """What this rank holds of a tensor by rows; of one that is `whole` everywhere all."""
        if self.kind == "dtensor":
            return distribute_tensor(value, self.mesh, [Replicate() if whole else Shard(0)])
        if self.kind == "group" and not whole:
            first, rows = self.rows
            return value[first : first + rows].clone()
        return value.clone()

    def full(self, value: Tensor, whole: bool = False) -> Tensor:
        """The reverse of `part`."""
        if self.kind == "dtensor":
            return value.full_tensor()
        if self.kind == "whole" or whole:
            return value
        parts: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(parts, (self.rows[0], value), group=self.group)
        return torch.cat([part for _, part in sorted(parts, key=lambda each: each[0])])

    def head(self, tensors: dict[str, Tensor], **options: Any) -> fp.LMHead:
        """The head of these parts."""
        if self.kind == "group":
            options |= {"group": self.group, "first_row": self.rows[0]}
        terms = (fp.LowRank(tensors["a"], tensors["b"], 0.5),) if "a" in tensors else ()
        return fp.LMHead(tensors["weight"], tensors.get("bias"), **options, low_rank=terms)


WHOLE = Spread()


@dataclass(frozen=True)
class Parts:
    """A case's head in a way of holding it: leaves, and their whole gradients."""

    spread: Spread
    tensors: dict[str, Tensor]
    head: fp.LMHead

    @classmethod
    def of(cls, spread: Spread, case: Case, low_rank: bool, trains: bool = True) -> Parts:
        whole = {"weight": case.weight}
        if case.bias is not None:
            whole["bias"] = case.bias
        if low_rank:
            generator = torch.Generator().manual_seed(1)
            whole["a"] = torch.randn(3, case.weight.shape[1], generator=generator)
            whole["b"] = torch.randn(case.weight.shape[0], 3, generator=generator) / 3
        tensors = {
            name: spread.part(value.to(case.weight.dtype), name == "a").requires_grad_(
                trains or name == "a"
            )
            for name, value in whole.items()
        }
        return cls(spread, tensors, spread.head(tensors, **case.options))

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: self.spread.full(value.grad, name == "a")
            for name, value in self.tensors.items()
            if value.grad is not None
        }


def case_of(transform: str, dtype: torch.dtype = torch.float64) -> Case:
    return make_case(4, 9, 12, VOCAB, dtype=dtype, largest=12.0, **TRANSFORMS[transform])


def two_of(transform: str, other: str, dtype: torch.dtype = torch.float64) -> Two:
    """A policy and its reference of another hidden size, padded alike."""
    policy = case_of(transform, dtype)
    changed = dict(TRANSFORMS[other], padding=TRANSFORMS[transform].get("padding", 0))
    reference = make_case(4, 9, 14, VOCAB, dtype=dtype, largest=12.0, seed=7, **changed)
    return Two(policy, replace(reference, labels=policy.labels))


def of_log_probs(
    spread: Spread,
    transform: str,
    low_rank: bool,
    path: str,
    workspace_mb: float | None = None,
) -> dict[str, Tensor]:
    """SimPO's loss, sums of log-probs, and all gradients."""
    case = case_of(transform, spread.dtype)
    parts = Parts.of(spread, case, low_rank, trains=path != "stash")
    hidden = case.hidden.clone().requires_grad_()
    options = {"engine": spread.engine, "workspace_mb": workspace_mb}
    loss_fn = fp.PreferenceLoss("simpo", path=path, **options)
    out = loss_fn(hidden, parts.head, case.labels)
    out.loss.backward()
    sums = fp.sequence_logps(hidden.detach(), parts.head, case.labels, **options).sums
    found = {"loss": out.loss.detach(), "sums": sums.detach(), "hidden": hidden.grad}
    return found | parts.gradients()


def of_sums(spread: Spread, drop_mass: float = 0.0, labelled: bool = True) -> dict[str, Tensor]:
    """Sums of log-probs in the smallest tiles, and the gradients of their sum."""
    case = case_of("plain", spread.dtype)
    labels = case.labels if labelled else torch.full_like(case.labels, -100)
    parts, hidden = Parts.of(spread, case, False), case.hidden.clone().requires_grad_()
    options = {"path": "recompute", "workspace_mb": SMALLEST, "drop_mass": drop_mass}
    sums = fp.sequence_logps(hidden, parts.head, labels, **options).sums
    sums.sum().backward()
    return {"sums": sums.detach(), "hidden": hidden.grad} | parts.gradients()


def of_replicated(spread: Spread) -> dict[str, Tensor]:
    """Log-probs and a divergence of hidden states that are a `DTensor` where the head is one."""
    policy, reference = two_of("all", "bias")
    parts = Parts.of(spread, policy, False)
    ref_head = Parts.of(spread, reference, False, trains=False).head
    hidden, others = policy.hidden.clone().requires_grad_(), reference.hidden
    given = [hidden, others]
    if spread.kind == "dtensor":
        given = [DTensor.from_local(each, spread.mesh, [Replicate()]) for each in given]
    sums = fp.sequence_logps(given[0], parts.head, policy.labels).sums
    kl = fp.sequence_kl(given[0], parts.head, given[1], ref_head, policy.labels).kl
    logps = fp.token_statistics(given[0], parts.head, policy.labels).logps
    (sums.sum() + kl.sum()).backward()
    found = {"sums": sums.detach(), "kl": kl.detach(), "logps": logps, "hidden": hidden.grad}
    return found | parts.gradients()


def of_tokens(
    spread: Spread, transform: str, low_rank: bool, workspace_mb: float | None = None
) -> dict[str, Tensor]:
    """Log-probs and entropies with their gradients, and all statistics of tokens."""
    case = case_of(transform, spread.dtype)
    # Some labels are the most likely token.
    likely = true_logits(case)[:, :3].argmax(-1)
    case.labels[:, 1:4] = likely.where(case.labels[:, 1:4] != -100, -100)
    parts = Parts.of(spread, case, low_rank)
    hidden = case.hidden.clone().requires_grad_()
    given = parts.head, case.labels
    options = {"engine": spread.engine, "workspace_mb": workspace_mb}
    policy = fp.token_policy(hidden, *given, **options)
    weights = torch.linspace(-1, 1, case.labels.numel()).view(4, 9).to(spread.dtype)
    (policy.logps * weights + policy.entropies * weights.cos()).sum().backward()
    statistics = fp.token_statistics(hidden.detach(), *given, **options)
    found = {"logps": policy.logps.detach(), "entropies": policy.entropies.detach()}
    found |= {f"statistics/{name}": value for name, value in vars(statistics).items()}
    return found | {"hidden": hidden.grad} | parts.gradients()


def of_divergence(
    spread: Spread,
    transform: str,
    other: str,
    low_rank: bool,
    perturbation: float | None,
    workspace_mb: float | None = None,
) -> dict[str, Tensor]:
    """`sequence_kl` and all gradients through both of its differentiable results."""
    policy, reference = two_of(transform, other, spread.dtype)
    parts = Parts.of(spread, policy, low_rank)
    ref_head = Parts.of(spread, reference, low_rank, trains=False).head
    hidden = policy.hidden.clone().requires_grad_()
    out = fp.sequence_kl(
        hidden,
        parts.head,
        reference.hidden,
        ref_head,
        policy.labels,
        perturbation=perturbation,
        workspace_mb=workspace_mb,
        engine=spread.engine,
    )
    weights = torch.linspace(0.3, 1.2, 4).to(spread.dtype)
    (out.kl * weights + out.policy * weights.sin()).sum().backward()
    found = {k: v.detach() for k, v in vars(out).items() if v is not None}
    return found | {"hidden": hidden.grad} | parts.gradients()


def of_loss(spread: Spread, name: str, use_weighting: bool = False) -> dict[str, Tensor]:
    """A loss by name beside its reference's hidden states: losses, metrics and gradients."""
    policy, reference = two_of("all", "bias", spread.dtype)
    parts = Parts.of(spread, policy, False)
    ref_head = Parts.of(spread, reference, False, trains=False).head
    hidden = policy.hidden.clone().requires_grad_()
    loss_fn = fp.PreferenceLoss(name, use_weighting=use_weighting, engine=spread.engine)
    # The ranks of a mesh hold the same pairs: a statistic sees each once.
    loss_fn.process_group = spread.alone
    out = loss_fn(hidden, parts.head, policy.labels, ref_hidden=reference.hidden, ref_head=ref_head)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "losses": out.losses.detach(), "hidden": hidden.grad}
    extras = dict.fromkeys(("groups", "rewards", "weights", "desirable"))
    rows = CollatedRows(hidden.detach(), policy.labels, None, {"shift": True})
    tokens, _ = token_metrics(loss_fn, rows, hidden.detach(), parts.head, extras)
    return found | out.metrics | tokens | parts.gradients()


def of_spread_tokens(
    spread: Spread, name: str, tokens: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """`of_loss` of tokens that are spread over another group; all gradients are the whole's.

    Args:
        name: of the loss.
        tokens: its two ranks hold the first 4 of 9 tokens of all sequences, and the others.
    """
    policy, reference = two_of("all", "bias")
    parts = Parts.of(spread, policy, True)
    ref_head = Parts.of(spread, reference, False, trains=False).head
    labels = torch.cat((policy.labels[:, 1:], torch.full_like(policy.labels[:, :1], -100)), 1)
    own = slice(None) if tokens is None else (slice(4), slice(4, None))[dist.get_rank(tokens)]
    hidden = policy.hidden[:, own].clone().requires_grad_()
    loss_fn = fp.PreferenceLoss(name, workspace_mb=SMALLEST)
    loss_fn.process_group = spread.alone
    out = loss_fn(
        hidden,
        parts.head,
        labels[:, own],
        ref_hidden=reference.hidden[:, own],
        ref_head=ref_head,
        shift=False,
        sequence_group=tokens,
    )
    out.loss.backward()
    found = {"loss": out.loss.detach(), "losses": out.losses.detach()} | out.metrics
    gradients = parts.gradients()
    if tokens is None:
        return found | gradients | {"hidden": hidden.grad}
    # The mean over the ranks is what data parallelism takes; a row of hidden is on one of them.
    for value in gradients.values():
        dist.all_reduce(value, group=tokens)
        value /= 2
    rows: list[Any] = [None, None]
    dist.all_gather_object(rows, hidden.grad / 2, group=tokens)
    return found | gradients | {"hidden": torch.cat(rows, 1)}


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes) of each collective that is started, and ("wait", 0) of those waited for."""
    calls: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    class Waited:
        def __init__(self, work: Any) -> None:
            self._work = work

        def wait(self) -> None:
            calls.append(("wait", 0))
            self._work.wait()

    def all_gather(parts: list[Tensor], own: Tensor, **options: Any) -> None:
        calls.append(("all_gather", own.numel() * own.itemsize))
        gather(parts, own, **options)

    def all_reduce(values: Tensor, **options: Any) -> Any:
        calls.append(("all_reduce", values.numel() * values.itemsize))
        work = reduce(values, **options)
        return None if work is None else Waited(work)

    with mock.patch.object(dist, "all_gather", all_gather):
        with mock.patch.object(dist, "all_reduce", all_reduce):
            yield calls
