"""One seed's task, which its trainings share, and a preference training on it with its measures."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from preference_task import small_llama, token_blocks
from torch import Tensor
from training_loop import Batch, optimise, shuffled_batches
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import fused_prefopt as fp
from fused_prefopt.data import (
    Document,
    PairCollator,
    PointCollator,
    load_documents,
    make_pairs,
    paragraphs,
    points_of_pairs,
    split_documents,
    tokenise_pairs,
    tokenise_points,
    train_tokenizer,
)
from fused_prefopt.data.columns import GROUP, PAIR_IDS, PAIR_REFERENCES
from fused_prefopt.evaluation import score_pairs
from fused_prefopt.integrations.transformers import preference_outputs
from fused_prefopt.reference import add_reference_logps

Record = dict[str, Any]
Features = list[Record]
FLIP_RATES = (0.0, 0.1, 0.2)
_HELD_OUT_SHARE = 0.2
_SIDES = (PAIR_IDS, PAIR_REFERENCES)
_PRETRAINING_RATE = 3e-3


@dataclass(frozen=True)
class Settings:
    """Sizes of data, model and training; results of other settings are kept apart.

    Attributes:
        pairs: to train on, before those are dropped that `max_length` makes equal on both sides.
        held_out: pairs to judge on, never with a wrong label; dropped likewise.
        kinds: how rejected continuations were spoilt (`fused_prefopt.data.corrupted`); those
            that keep a text's length, lest every shift of log-probs per token look like a gap.
        vocabulary: entries of the tokenizer.
        hidden_size: of the Llama.
        layers: of the Llama.
        max_length: tokens of prompt and completion.
        pretraining_steps: of the reference, each of `2 * batch_size` blocks.
        steps: of each preference training.
        batch_size: pairs of a step, each with two completions.
        learning_rate: of each preference training, at its highest.
    """

    pairs: int = 1600
    held_out: int = 500
    kinds: tuple[str, ...] = ("foreign", "repeat", "shuffle")
    vocabulary: int = 1024
    hidden_size: int = 64
    layers: int = 2
    max_length: int = 96
    pretraining_steps: int = 300
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 5e-4

    @property
    def key(self) -> str:
        """Names the settings in paths."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """One seed's data and reference.

    Attributes:
        reference: the small Llama that every training starts from.
        pad_token_id: of its tokenizer.
        pairs: share of wrong labels → pairs to train on.
        points: the two completions of each correct pair, rated.
        held_out: correct pairs of other documents.
    """

    reference: LlamaForCausalLM
    pad_token_id: int
    pairs: dict[float, Features]
    points: Features
    held_out: Features


def prepare(settings: Settings, seed: int, folder: Path) -> None:
    """Make a seed's task and leave it in `folder`, unless it is there already."""
    if (folder / "features.pt").is_file():
        return
    train, other = split_documents(load_documents(), held_out=_HELD_OUT_SHARE, seed=seed)
    texts = [text for document in train for text in paragraphs(document)]
    tokenizer = train_tokenizer(texts, vocab_size=settings.vocabulary)
    model = _pretrain(settings, seed, tokenizer, texts)
    pad = tokenizer.pad_token_id

    def pairs_of(documents: list[Document], limit: int) -> tuple[list[Record], Features]:
        records = make_pairs(documents, seed=seed, kinds=settings.kinds, limit=limit)
        features = tokenise_pairs(records, *lengths)
        return records, add_reference_logps(model, features, PairCollator(pad), progress=False)

    lengths = (tokenizer, settings.max_length, settings.max_length // 2)
    records, pairs = pairs_of(train, settings.pairs)
    rated = tokenise_points(points_of_pairs(records), *lengths)
    features = {
        "pairs": {rate: with_flips(pairs, rate, seed) for rate in FLIP_RATES},
        "points": add_reference_logps(model, rated, PointCollator(pad), progress=False),
        "held_out": pairs_of(other, settings.held_out)[1],
        "pad_token_id": pad,
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "reference")
    # Last and by renaming: where it is, everything is.
    partial = folder / f"features.{os.getpid()}.tmp"
    torch.save(features, partial)
    partial.replace(folder / "features.pt")


def with_flips(pairs: Features, rate: float, seed: int) -> Features:
    """The pairs, with the sides of `round(rate * len(pairs))` of them exchanged.

    A higher rate exchanges what a lower one does, and more.
    """
    order = random.Random(f"{seed}/flips").sample(range(len(pairs)), len(pairs))
    flipped = set(order[: round(rate * len(pairs))])
    exchanged = dict([*_SIDES, *(side[::-1] for side in _SIDES)])
    return [
        {exchanged.get(name, name): value for name, value in pair.items()}
        if index in flipped
        else pair
        for index, pair in enumerate(pairs)
    ]


@lru_cache(maxsize=1)
def load(folder: Path) -> Task:
    """The task that `prepare` left in `folder`."""
    features = torch.load(folder / "features.pt", weights_only=True)
    return Task(LlamaForCausalLM.from_pretrained(folder / "reference").eval(), **features)


@dataclass(frozen=True)
class Training:
    """A loss with its hyperparameters on data with some share of wrong labels.

    Attributes:
        loss: name of a registered loss.
        hyperparameters: name → value, as sorted pairs; see `training`.
        flip_rate: one of `FLIP_RATES`.
    """

    loss: str
    hyperparameters: tuple[tuple[str, Any], ...]
    flip_rate: float = 0.0

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.hyperparameters]
        if self.flip_rate:
            shown.append(f"flips={self.flip_rate}")
        return f"{self.loss}({', '.join(shown)})"

    @property
    def record(self) -> dict[str, Any]:
        """What `training` takes to make it again."""
        return {"loss": self.loss, "flip_rate": self.flip_rate, **dict(self.hyperparameters)}


def training(loss: str, flip_rate: float = 0.0, **hyperparameters: Any) -> Training:
    """A `Training` by keywords."""
    return Training(loss, tuple(sorted(hyperparameters.items())), flip_rate)


def execute(settings: Settings, task: Task, what: Training, seed: int) -> dict[str, Any]:
    """Train and judge.

    Returns:
        On the held-out pairs: `accuracy`, share with the higher mean log-prob on the chosen side;
        `kl_chosen`, `kl_rejected`, KL(policy || reference) in nats per token, exact over the
        vocabulary; `shift_chosen`, `shift_rejected`, mean of Δ = L − L_ref in nats, `shift_mean`
        of both, and `gap`, mean of Δ_w − Δ_l; `reference_accuracy`, of the reference. γ-PO on
        correct labels adds `reward_margins` and `target_margins` of training pairs.
        `pairs` and `held_out` are how many there were; `cpu_seconds` is what all of it took.
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
    counts = {"pairs": len(task.pairs[what.flip_rate]), "held_out": len(task.held_out)}
    return result | counts | {"cpu_seconds": time.process_time() - started}


def _pretrain(
    settings: Settings, seed: int, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = small_llama(tokenizer, settings.max_length, settings.hidden_size, settings.layers)
    blocks = torch.tensor(token_blocks(tokenizer, texts, settings.max_length))
    draw = random.Random(seed)

    def batches() -> Iterator[Batch]:
        while True:
            ids = blocks[draw.sample(range(len(blocks)), 2 * settings.batch_size)]
            yield {"input_ids": ids, "labels": ids}

    steps = itertools.islice(batches(), settings.pretraining_steps)
    optimise(model, steps, settings.pretraining_steps, _PRETRAINING_RATE, lambda b: model(**b).loss)
    return model


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
    groups = range(len(features)) if pairwise else [feature[GROUP] for feature in features]
    size = settings.batch_size if pairwise else 2 * settings.batch_size
    return shuffled_batches(features, groups, collator, size, seed)
