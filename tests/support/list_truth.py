"""What lists of completions are worth by plain float64: every two of a list as a pair."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import eager_sums
from torch import Tensor

Lists = list[dict[str, Any]]


def points_in(lists: Lists) -> Lists:
    """The completions one after another, each with its list's number."""
    return [
        {"prompt_ids": each["prompt_ids"], "completion_ids": ids, "reward": reward, "group": group}
        for group, each in enumerate(lists)
        for ids, reward in zip(each["completions_ids"], each["rewards"], strict=True)
    ]


def pair_margins(values: Tensor, lists: Lists) -> list[Tensor]:
    """Of each list, better minus worse value of every two completions of different reward."""
    found, start = [], 0
    for each in lists:
        rewards = each["rewards"]
        own = values[start : start + len(rewards)]
        start += len(rewards)
        found.append(
            torch.stack(
                [
                    own[i] - own[j]
                    for i in range(len(rewards))
                    for j in range(len(rewards))
                    if rewards[i] > rewards[j]
                ]
            )
        )
    return found


def dpo_of_lists(model: Any, reference: Any, lists: Lists, beta: float = 0.1) -> Tensor:
    """Mean over lists, weighted, of the mean over their pairs of DPO's loss."""
    points = points_in(lists)
    policy, other = (
        eager_sums(each, points, "completion_ids", "completion") for each in (model, reference)
    )
    margins = pair_margins(beta * (policy - other.detach()), lists)
    losses = torch.stack([torch.nn.functional.softplus(-each).mean() for each in margins])
    weights = torch.tensor([each.get("weight", 1.0) for each in lists]).double()
    return (weights * losses).sum() / len(lists)


def dro_of_lists(
    model: Any, reference: Any, lists: Lists, beta: float = 0.1, log_z0: float = 50.0
) -> Tensor:
    """Mean over lists of the mean over their completions of DRO's loss."""
    points = points_in(lists)
    ratio, of_prompt = (
        eager_sums(model, points, "completion_ids", part)
        - eager_sums(reference, points, "completion_ids", part).detach()
        for part in ("completion", "prompt")
    )
    rewards = torch.tensor([each["reward"] for each in points]).double()
    losses = (rewards - beta * ratio - beta * (of_prompt.detach() + log_z0)).square()
    sizes = [len(each["rewards"]) for each in lists]
    return torch.stack([part.mean() for part in losses.split(sizes)]).mean()
