"""What the tests of the losses share: random batches and one training step."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_prefopt.losses import ConstantMargin, PairwiseLoss, available_losses, find
from fused_prefopt.types import LogpBatch, LossOutput

# Options that only mean something, or differ, with one another.
TOGETHER: list[tuple[str, dict]] = [
    ("alpha-dpo", {"normalize": False, "length_normalized": False, "beta": 0.1}),
    ("alpha-dpo", {"normalize": False, "stop_gradient": False}),
    ("alpha-dpo", {"statistics": "dataset", "mean": 0.1, "std": 2.0}),
    ("gamma-dpo", {"centered": True, "label_smoothing": 0.2}),
    ("gamma-simpo", {"queue_size": 8, "sample_size": 6, "steps": 5}),
    ("robust-simpo", {"unbiased": True, "gamma": 0.5}),
    ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    ("beta-dpo", {"statistics": "reference", "level": "batch", "gamma": 0.3}),
    ("beta-simpo", {"statistics": "reference", "beta": 2.5}),
    ("alpha-po", {"alpha": -0.5}),
    ("tpo", {"link": "logistic", "label_smoothing": 0.2, "nll": "sequence_mean"}),
    ("bpo", {"power": 0.0, "smallest_ratio": 0.0, "largest_ratio": 3.0}),
    ("bpo", {"power": 1.2}),
    ("chi-po", {"r_max": 5.0, "power": 1.25, "kl_weight": 0.1}),
    ("focal-po", {"focus": 1.0}),
    ("f-dpo", {"link": "exact", "label_smoothing": 0.1, "length_normalized": True}),
    ("f-dpo", {"link": "robust", "label_smoothing": 0.1, "divergence": "forward_kl"}),
]


def others(name: str, option: str, default: Any) -> list[Any]:
    """Values of an option beside its default: the other choices, or 0.2 where it is off at 0."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, str):
        with pytest.raises(ValueError, match="wanted one of") as refused:
            find(name).build(**{option: "?"})
        choices = re.findall(r"'([^']+)'", str(refused.value).partition("wanted one of")[2])
        return [choice for choice in choices if choice != default]
    return [0.2] if default == 0 and isinstance(default, float) else []


def variants() -> Iterator[tuple[str, dict]]:
    """Every registered loss with its defaults, with each other choice of an option, and more."""
    for name, info in available_losses().items():
        yield name, {}
        for option, default in info.defaults.items():
            for value in others(name, option, default):
                try:
                    find(name).build(**{option: value})
                except ValueError:
                    found = [options.get(option) for other, options in TOGETHER if other == name]
                    assert value in found, f"{name}: what goes with {option}={value!r}?"
                else:
                    yield name, {option: value}
    yield from TOGETHER


VARIANTS = list(variants())


def parts(kind: str) -> list[Any]:
    """One of each kind of part, such as "margin", of all registered losses of pairs.

    Two parts are of a kind if they differ by positive numbers alone.
    """
    found: dict[Any, Any] = {}
    for name, options in VARIANTS:
        loss = find(name).build(**options)
        if isinstance(loss, PairwiseLoss):
            part = getattr(loss, kind)
            for each in part if isinstance(part, tuple) else (part,):
                found.setdefault(_kind(each), each)
    return list(found.values())


def _kind(part: Any) -> Any:
    if dataclasses.is_dataclass(part):
        values = (getattr(part, field.name) for field in dataclasses.fields(part))
        return type(part), *(_kind(value) for value in values)
    return part > 0 if isinstance(part, int | float) and not isinstance(part, bool) else part


def label(value: Any) -> str:
    """Test id of a part of a loss."""
    return type(value).__name__


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_batch(size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> LogpBatch:
    """A batch with every field; pairs that are lists of two, chosen half first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    policy = -draw(20).abs() - 1
    return LogpBatch(
        policy=policy.requires_grad_(),
        lengths=torch.randint(1, 30, (size,), generator=generator),
        reference=policy.detach() + draw(3),
        rewards=draw(2),
        desirable=draw(1) > 0,
        kl=draw(1).abs().mean(),
        prompt=-draw(10).abs(),
        prompt_reference=-draw(10).abs(),
        prompt_lengths=torch.arange(size) % 5,
        groups=torch.arange(size) % max(1, size // 2),
        completions=torch.arange(size),
        sequence_kl=draw(2).abs(),
        extrapolated=policy.detach() + draw(1),
        interpolated=policy.detach() - draw(1),
        collision=-draw(10).abs(),
        gold=-draw(20).abs() - 1,
        gold_lengths=torch.arange(size) % 7 + 1,
    )


def compute(loss, batch: LogpBatch, statistics=None) -> LossOutput:
    """One training step of a loss, with a fresh statistic unless one is given."""
    if statistics is None:
        statistics = loss.statistics()
    return loss(batch, None if statistics is None else statistics(loss.observe(batch)))


@dataclasses.dataclass(frozen=True)
class GivenMargin:
    """Target margins from outside: what a stopped gradient sees."""

    values: torch.Tensor
    needs: frozenset[str] = frozenset()

    def __call__(self, batch, reward_margins, summary=None):
        return self.values

    def statistics(self):
        return None

    def observe(self, batch, reward_margins):
        return reward_margins


@dataclasses.dataclass(frozen=True)
class GivenFactors:
    """Scales or weights from outside, as `GivenMargin`."""

    values: torch.Tensor
    needs: frozenset[str] = frozenset()

    def __call__(self, *_):
        return self.values


def held(loss, batch: LogpBatch, summary=None):
    """The loss with its stopped parts as constants: what finite differences should see."""
    if not isinstance(loss, PairwiseLoss):
        return loss
    margins, scale, weighting = loss.margin, loss.scale, loss.weighting
    joint = summary if isinstance(summary, tuple) else (summary, None)
    chosen, rejected = loss.reward(batch).detach().chunk(2)
    targets = margins(batch, chosen - rejected, joint[0])
    if not targets.requires_grad and not isinstance(margins, ConstantMargin):
        margins = GivenMargin(targets)
    if scale is not None:
        scale = GivenFactors(scale(batch, chosen - rejected, joint[1]))
    if weighting is not None and not (factors := weighting(batch)).requires_grad:
        weighting = GivenFactors(factors)
    return dataclasses.replace(loss, margin=margins, scale=scale, weighting=weighting)


VOCABULARY = 29


def hidden_batch() -> dict[str, torch.Tensor]:
    """Hidden states, head, labels of completions and of prompts, and what losses need."""
    sequences, places, width = 6, 8, 5
    generator = torch.Generator().manual_seed(2)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, VOCABULARY, (sequences, places), generator=generator)
    prompt_labels = labels.clone()
    labels[:, :3], prompt_labels[:, 3:] = -100, -100
    labels[1, 5:], labels[4] = -100, -100
    return {
        "hidden": draw(sequences, places, width),
        "weight": draw(VOCABULARY, width),
        "labels": labels,
        "prompt_labels": prompt_labels,
        "reference": -draw(sequences).abs() * 15,
        "rewards": draw(sequences),
        "desirable": torch.tensor([True, True, False, True, False, False]),
        "prompt_reference": -draw(sequences).abs() * 9,
        "groups": torch.arange(sequences) % (sequences // 2),
        "completions": torch.arange(sequences),
        "sequence_kl": draw(sequences).abs(),
        "extrapolated": -draw(sequences).abs() * 15,
        "interpolated": -draw(sequences).abs() * 15,
        "collision": -draw(sequences).abs() * 9,
        "gold": -draw(sequences).abs() * 12,
        "gold_lengths": torch.arange(sequences) + 1,
    }


def extras_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fields of `LogpBatch` in a `hidden_batch`."""
    return dict(list(batch.items())[4:])


def single(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch in float32."""
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}


def eager_logps(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) sums of the labels' log-probs, and how many labels each sequence has."""
    logps = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (targets >= 0)).sum(1), (targets >= 0).sum(1)
