"""One preference training from a seed's reference, and what is measured of it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from training_loop import Batch, optimise, shuffled_batches
from transformers import LlamaForCausalLM

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.evaluation import score_pairs
from fused_prefopt.integrations.transformers import preference_outputs
from paper_claims.settings import Settings
from paper_claims.task import Task


@dataclass(frozen=True)
class Training:
    """A loss with its hyperparameters on data with some share of wrong labels.

    Attributes:
        loss: name of a registered loss.
        hyperparameters: name → value, as sorted pairs; see `training`.
        flip_rate: one of `task.FLIP_RATES`.
    """

    loss: str
    hyperparameters: tuple[tuple[str, Any], ...]
    flip_rate: float = 0.0

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.hyperparameters)
        flips = f", flips={self.flip_rate}" if self.flip_rate else ""
        return f"{self.loss}({values}{flips})"

    @property
    def record(self) -> dict[str, Any]:
        """What `training` takes to make it again."""
        return {"loss": self.loss, "flip_rate": self.flip_rate, **dict(self.hyperparameters)}


def training(loss: str, flip_rate: float = 0.0, **hyperparameters: Any) -> Training:
    """A `Training` by keywords."""
    return Training(loss, tuple(sorted(hyperparameters.items())), flip_rate)


@dataclass
class _Margins:
    """(reward margin, γ_i) of the pairs that the last quarter of the steps saw."""

    from_step: int
    step: int = 0
    gaps: list[float] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)

    def add(self, output: fp.LossOutput) -> None:
        self.step += 1
        if self.step > self.from_step and output.target_margins is not None:
            assert output.rewards is not None
            chosen, rejected = output.rewards.chunk(2)
            self.gaps += (chosen - rejected).tolist()
            self.targets += output.target_margins.tolist()


def execute(settings: Settings, task: Task, what: Training, seed: int) -> dict[str, Any]:
    """Train and judge.

    Returns:
        On the held-out pairs: `accuracy`, share with the higher mean log-prob on the chosen side;
        `kl_chosen`, `kl_rejected`, KL(policy || reference) in nats per token, exact over the
        vocabulary; `shift_chosen`, `shift_rejected`, mean of Δ = L − L_ref in nats, `shift_mean`
        of both, and `gap`, mean of Δ_w − Δ_l; `reference_accuracy`, of the reference. γ-PO on
        correct labels adds `reward_margins` and `target_margins` of training pairs.
        `cpu_seconds` is what all of it took.
    """
    started = time.process_time()
    loss_fn = fp.PreferenceLoss(what.loss, **dict(what.hyperparameters))
    policy = copy.deepcopy(task.reference)
    margins = _Margins(from_step=settings.steps * 3 // 4)

    def loss_of(batch: Batch) -> Tensor:
        output = preference_outputs(policy, loss_fn, batch)
        margins.add(output)
        return output.loss

    batches = _batches(settings, task, what, seed, pairwise=loss_fn.loss.pairwise)
    steps = itertools.islice(batches, settings.steps)
    optimise(policy, steps, settings.steps, settings.learning_rate, loss_of)

    result: dict[str, Any] = _judge(policy, task)
    if what.loss.startswith("gamma-") and not what.flip_rate:
        result |= {"reward_margins": margins.gaps, "target_margins": margins.targets}
    return result | {"cpu_seconds": time.process_time() - started}


def _judge(policy: LlamaForCausalLM, task: Task) -> dict[str, float]:
    collator = PairCollator(task.pad_token_id)
    scores = score_pairs(policy, task.reference, task.held_out, collator, progress=False)
    before = scores.batch.reference
    assert before is not None
    shifts = (scores.batch.policy - before).chunk(2)
    chosen, rejected = (shift.mean().item() for shift in shifts)
    untrained = replace(scores, batch=replace(scores.batch, policy=before))
    return {
        "accuracy": scores.summary()["accuracy"],
        "reference_accuracy": untrained.summary()["accuracy"],
        "kl_chosen": scores.kl,
        "kl_rejected": scores.kl_rejected,
        "shift_chosen": chosen,
        "shift_rejected": rejected,
        "shift_mean": (chosen + rejected) / 2,
        "gap": chosen - rejected,
    }


def _batches(
    settings: Settings, task: Task, what: Training, seed: int, *, pairwise: bool
) -> Iterator[Batch]:
    """Shuffled batches of `batch_size` pairs, or of their points, epoch after epoch."""
    features = task.pairs[what.flip_rate] if pairwise else task.points
    collator = (PairCollator if pairwise else PointCollator)(task.pad_token_id)
    groups = range(len(features)) if pairwise else [feature["group"] for feature in features]
    size = settings.batch_size if pairwise else 2 * settings.batch_size
    return shuffled_batches(features, groups, collator, size, seed)
