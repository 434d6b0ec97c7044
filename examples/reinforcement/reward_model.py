"""A reward model: a language model's backbone and a linear score of the last token."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from training_loop import Batch, optimise, shuffled_batches
from transformers import PreTrainedModel

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.data.columns import ATTENTION_MASK, COMPLETION_IDS, PAIR_IDS, PROMPT_IDS
from fused_prefopt.models.causal_lm import last_hidden

Features = Sequence[dict[str, Any]]
_LEARNING_RATE = 3e-4
_ROWS = 64


class RewardModel(nn.Module):
    """Scores completions, as DRO's Section 4.3 builds and trains its reward model (eq. 2).

    Args:
        language_model: fine-tuned causal language model; it is copied.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = copy.deepcopy(language_model)
        self.score = nn.Linear(language_model.config.hidden_size, 1, bias=False)
        # Of raw scores; `standardise` sets them when training has ended.
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """(S,) scores of a collated batch of S sequences."""
        hidden = last_hidden(self.language_model, batch)
        last = batch[ATTENTION_MASK].sum(1) - 1
        scores = self.score(hidden[torch.arange(len(last)), last]).squeeze(1)
        return (scores - self.mean) / self.spread

    def scores(self, points: Features, pad_token_id: int) -> Tensor:
        """(n,) scores of completions: dicts with `prompt_ids` and `completion_ids`."""
        collator = PointCollator(pad_token_id)
        self.eval()
        with torch.no_grad():
            parts = [
                self(collator(points[start : start + _ROWS]))
                for start in range(0, len(points), _ROWS)
            ]
        return torch.cat(parts)

    def standardise(self, points: Features, pad_token_id: int) -> None:
        """Shift and scale the scores: mean 0 and standard deviation 1 on these completions."""
        scores = self.scores(points, pad_token_id)
        self.mean.add_(scores.mean() * self.spread)
        self.spread.mul_(scores.std())


def train_reward_model(
    language_model: PreTrainedModel,
    pairs: Features,
    pad_token_id: int,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    name: str,
) -> RewardModel:
    """A reward model of preference pairs (Bradley–Terry likelihood).

    Args:
        language_model: it starts from.
        pairs: from `tokenise_pairs`.
        pad_token_id: of the tokenizer.
        steps: optimizer steps.
        batch_size: pairs of a step.
        seed: of the order and of the score's initial weights.
        name: for the progress bar.
    """
    torch.manual_seed(seed)
    model = RewardModel(language_model)
    progress = tqdm(total=steps, desc=name)

    def loss_of(batch: Batch) -> Tensor:
        chosen, rejected = model(batch).chunk(2)
        loss = fp.bradley_terry_loss(chosen, rejected)
        accuracy = (chosen > rejected).float().mean().item()
        progress.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
        progress.update()
        return loss

    groups, collator = range(len(pairs)), PairCollator(pad_token_id)
    order = shuffled_batches(pairs, groups, collator, batch_size, seed)
    optimise(model, itertools.islice(order, steps), steps, _LEARNING_RATE, loss_of)
    progress.close()
    return model.requires_grad_(False)


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: Features, pad_token_id: int) -> float:
    """Share of pairs whose chosen completion scores higher."""
    sides = [
        [{PROMPT_IDS: pair[PROMPT_IDS], COMPLETION_IDS: pair[side]} for pair in pairs]
        for side in PAIR_IDS
    ]
    chosen, rejected = (model.scores(side, pad_token_id) for side in sides)
    return (chosen > rejected).float().mean().item()
