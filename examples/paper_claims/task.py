"""What one seed's trainings share: a reference model and pairs with its log-probs."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from preference_task import small_llama, token_blocks
from training_loop import Batch, optimise
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
from fused_prefopt.reference import add_reference_logps
from paper_claims.settings import Settings

Record = dict[str, Any]
Features = list[Record]
FLIP_RATES = (0.0, 0.1, 0.2)
_HELD_OUT_SHARE = 0.2
_SIDES = (("chosen_ids", "rejected_ids"), ("ref_chosen_logps", "ref_rejected_logps"))
_PRETRAINING_RATE = 3e-3


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
