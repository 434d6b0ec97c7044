"""Rows with weights of their own and of their tokens, and what a model's logits say of them."""

from __future__ import annotations

import random
from typing import Any

import torch

from fused_prefopt.types import LogpBatch

COLUMNS = {
    "chosen_ids": "chosen_token_weights",
    "rejected_ids": "rejected_token_weights",
    "completion_ids": "token_weights",
}


def weighted(features: list[dict[str, Any]], *, tokens: bool = True) -> list[dict[str, Any]]:
    """The features with a weight each, some of them 0, and weights of the completions' tokens."""
    draw = random.Random(5)
    rows = []
    for number, feature in enumerate(features):
        row = feature | {"weight": (0.5, 2.0, 0.0, 1.0, 3.0)[number % 5]}
        for ids, name in COLUMNS.items():
            if tokens and ids in feature:
                row[name] = [draw.choice((0.0, 0.25, 1.0, 2.0)) for _ in feature[ids]]
        rows.append(row)
    return rows


def weighted_sums(
    model: Any, features: list[dict[str, Any]], column: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) float64 weighted log-prob sums and sums of weights, of each feature alone."""
    sums, lengths = [], []
    for feature in features:
        prompt, completion = feature["prompt_ids"], feature[column]
        ids = torch.tensor([prompt + completion])
        logps = model.double()(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = logps.gather(1, ids[0, 1:, None])[:, 0][-len(completion) :]
        weights = feature.get(COLUMNS[column], [1.0] * len(completion))
        weights = torch.tensor(weights, dtype=torch.float64)[-len(picked) :]
        sums.append((picked * weights).sum())
        lengths.append(weights.sum())
    return torch.stack(sums), torch.stack(lengths)


def true_batch(model: Any, reference: Any, features: list[dict[str, Any]]) -> LogpBatch:
    """The batch of these rows as a loss is to see it, in float64."""
    columns = [column for column in COLUMNS if column in features[0]]
    own = [weighted_sums(model, features, column) for column in columns]
    others = [weighted_sums(reference, features, column)[0].detach() for column in columns]
    weights = None
    if "weight" in features[0]:
        weights = torch.tensor([row["weight"] for row in features] * len(columns)).double()
    extras = {}
    if "reward" in features[0]:
        extras = {
            "rewards": torch.tensor([row["reward"] for row in features]).double(),
            "groups": torch.tensor([row["group"] for row in features]),
        }
    if "desirable" in features[0]:
        extras["desirable"] = torch.tensor([row["desirable"] for row in features])
    return LogpBatch(
        torch.cat([sums for sums, _ in own]),
        torch.cat([lengths for _, lengths in own]),
        reference=torch.cat(others),
        weights=weights,
        **extras,
    )
