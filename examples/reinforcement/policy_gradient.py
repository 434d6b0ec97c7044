"""Online training on a reward model's scores: samples, advantages, a clipped policy gradient."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from training_loop import update
from transformers import PreTrainedModel

import fused_prefopt as fp
from fused_prefopt.data import PointCollator, labels_of
from fused_prefopt.integrations.causal_lm import last_hidden, lm_head_of
from reinforcement.reward_model import RewardModel
from reinforcement.sampling import sample


@dataclass(frozen=True)
class Clipping:
    """Hyperparameters of `clipped_loss`.

    Attributes:
        clip: ε; a ratio leaves no gradient once it is 1 ± ε in the direction of its advantage.
        kl_weight: β of the penalty for leaving the reference.
        entropy_weight: of the bonus for the entropy of the next token.
    """

    clip: float = 0.2
    kl_weight: float = 0.05
    entropy_weight: float = 0.0


def clipped_loss(
    policy: fp.TokenPolicy,
    old: Tensor,
    reference: Tensor,
    advantages: Tensor,
    labelled: Tensor,
    settings: Clipping,
) -> Tensor:
    """The negative of GRPO's objective, mean over each completion's tokens and then over them.

    ``min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) − β (e^d − d − 1) + c H`` for each token, with
    ``ρ = exp(log π − log π_old)`` and ``d = log π_ref − log π``.

    Args:
        policy: log-probs and entropies (S, T) of the policy that trains.
        old: (S, T) log-probs of the policy that sampled.
        reference: (S, T) log-probs of the reference.
        advantages: (S,) A.
        labelled: (S, T) bool, the tokens of the completions.
        settings: ε, β, c.

    Source: the clipped objective is PPO's (Schulman et al. 2017, arXiv:1707.06347, eq. 7); its use
    without a critic, and the penalty, GRPO's (Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4).
    """
    ratios = (policy.logps - old).exp()
    bounded = ratios.clamp(1 - settings.clip, 1 + settings.clip)
    gains = torch.minimum(ratios * advantages[:, None], bounded * advantages[:, None])
    drift = reference - policy.logps
    gains = gains - settings.kl_weight * (drift.expm1() - drift)
    gains = gains + settings.entropy_weight * policy.entropies
    tokens = labelled.sum(1).clamp(min=1)
    return -(gains.where(labelled, 0.0).sum(1) / tokens).mean()


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(S,) rewards of consecutive groups → (r − mean) / standard deviation within each group."""
    groups = rewards.view(-1, group_size)
    spread = groups.std(1, keepdim=True) + 1e-6
    return ((groups - groups.mean(1, keepdim=True)) / spread).flatten()


def train_policy(
    reference: PreTrainedModel,
    reward_model: RewardModel,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    rounds: int,
    prompts_per_round: int,
    group_size: int,
    updates: int,
    new_tokens: int,
    learning_rate: float,
    seed: int,
    settings: Clipping,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """GRPO from the reference.

    Args:
        reference: start and anchor.
        reward_model: judge of the samples.
        prompts: token ids.
        pad_token_id: of the tokenizer.
        rounds: of sampling and updating.
        prompts_per_round: drawn in each.
        group_size: completions of a prompt.
        updates: optimizer steps on a round's samples.
        new_tokens: of a completion at most.
        learning_rate: of AdamW.
        seed: of the prompts and samples.
        settings: of the loss.

    Returns:
        The policy and what each round logged.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    collator = PointCollator(pad_token_id)
    log, progress = [], tqdm(range(rounds), desc="grpo")
    for number in progress:
        chosen = draw.sample(range(len(prompts)), min(prompts_per_round, len(prompts)))
        repeated = [prompts[index] for index in chosen for _ in range(group_size)]
        samples = sample(policy, repeated, pad_token_id, new_tokens=new_tokens)
        rewards = reward_model.scores(samples, pad_token_id)
        advantages = group_advantages(rewards, group_size)
        batch = collator(samples)
        with torch.no_grad():
            old, anchor = (token_policy_of(model, batch).logps for model in (policy, reference))
        policy.train()
        for _ in range(updates):
            now, labelled = token_policy_of(policy, batch), labels_of(batch) != -100
            loss = clipped_loss(now, old, anchor, advantages, labelled, settings)
            update(policy, optimizer, loss)
        tokens = labelled.sum()
        log.append(
            {
                "round": number,
                "reward": rewards.mean().item(),
                "kl": ((old - anchor).sum() / tokens).item(),
                "entropy": (now.entropies.sum() / tokens).item(),
                "length": (tokens / len(samples)).item(),
            }
        )
        progress.set_postfix(reward=f"{log[-1]['reward']:.2f}", kl=f"{log[-1]['kl']:.3f}")
    return policy.eval(), log


def token_policy_of(model: nn.Module, batch: dict[str, Any]) -> fp.TokenPolicy:
    """Log-probs and entropies of a collated batch's completions, without logits in memory."""
    return fp.token_policy(last_hidden(model, batch), lm_head_of(model), labels_of(batch))
