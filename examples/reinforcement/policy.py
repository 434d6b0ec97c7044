"""A policy: its samples, online training on a reward model's scores (GRPO), and its judgement."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from training_loop import update
from transformers import PreTrainedModel

import fused_prefopt as fp
from fused_prefopt.data import PointCollator, labels_of
from fused_prefopt.data.columns import COMPLETION_IDS, PROMPT_IDS
from fused_prefopt.models.causal_lm import last_hidden
from fused_prefopt.models.model_call import evaluating
from reinforcement.reward_model import RewardModel

_PROMPTS, _ROWS = 128, 64  # of a batch that is sampled, and of one that is judged


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    new_tokens: int,
    name: str = "",
) -> list[dict[str, Any]]:
    """One completion for each prompt, at temperature 1 from the whole distribution.

    Args:
        model: causal language model that knows its end-of-text token.
        prompts: token ids.
        pad_token_id: of the tokenizer.
        new_tokens: of a completion at most.
        name: of a progress bar; none is shown without.

    Returns:
        Features with `prompt_ids` and `completion_ids`; those that ended have the end's token.
    """
    starts = range(0, len(prompts), _PROMPTS)
    features = []
    with evaluating(model):
        for start in tqdm(starts, desc=name) if name else starts:
            chunk = [list(prompt) for prompt in prompts[start : start + _PROMPTS]]
            features += _sample(model, chunk, pad_token_id, new_tokens)
    return features


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
    return fp.token_policy(last_hidden(model, batch), fp.LMHead.of(model), labels_of(batch))


@dataclass(frozen=True)
class Judgement:
    """Of one sample for each held-out prompt, all (n,).

    Attributes:
        rewards: judge → scores.
        kl: KL(policy || reference) summed over the sample's tokens, exact at each, in nats.
        entropies: mean entropy of the next token, in nats.
        lengths: tokens.
    """

    rewards: dict[str, Tensor]
    kl: Tensor
    entropies: Tensor
    lengths: Tensor

    def summary(self) -> dict[str, float]:
        """Mean and standard error of each column, and KL per token."""
        columns = {**self.rewards, "kl": self.kl, "entropy": self.entropies, "length": self.lengths}
        numbers = {}
        for name, values in columns.items():
            values = values.double()
            numbers[name] = values.mean().item()
            numbers[f"{name}_stderr"] = (values.std() / len(values) ** 0.5).item()
        numbers["kl_per_token"] = (self.kl.sum() / self.lengths.sum()).item()
        return numbers


@torch.no_grad()
def judge(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    judges: Mapping[str, RewardModel],
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    new_tokens: int,
    seed: int,
) -> Judgement:
    """Sample from a policy and judge.

    Args:
        policy: to judge.
        reference: what its KL is against.
        judges: name → reward model.
        prompts: token ids.
        pad_token_id: of the tokenizer.
        new_tokens: of a sample at most.
        seed: of the samples.
    """
    torch.manual_seed(seed)
    samples = sample(policy, prompts, pad_token_id, new_tokens=new_tokens)
    collator, kls, entropies = PointCollator(pad_token_id), [], []
    for start in range(0, len(samples), _ROWS):
        batch = collator(samples[start : start + _ROWS])
        # KL(first || second): the policy takes the place that a loss gives the reference.
        divergence = fp.sequence_kl(
            last_hidden(reference, batch),
            fp.LMHead.of(reference),
            last_hidden(policy, batch),
            fp.LMHead.of(policy),
            labels_of(batch),
        )
        kls.append(divergence.kl)
        entropies.append(token_policy_of(policy, batch).entropies.sum(1) / divergence.lengths)
    lengths = torch.tensor([len(each[COMPLETION_IDS]) for each in samples])
    rewards = {name: model.scores(samples, pad_token_id) for name, model in judges.items()}
    return Judgement(rewards, torch.cat(kls), torch.cat(entropies), lengths)


def _sample(
    model: PreTrainedModel, prompts: list[list[int]], pad_token_id: int, new_tokens: int
) -> list[dict[str, Any]]:
    width = max(map(len, prompts))
    # On the left, so that all continue at the same place.
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    drawn = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=new_tokens,
        pad_token_id=pad_token_id,
    )
    end = model.config.eos_token_id
    rows = [_until(row, end) for row in drawn[:, width:].tolist()]
    return [
        {PROMPT_IDS: prompt, COMPLETION_IDS: row} for prompt, row in zip(prompts, rows, strict=True)
    ]


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row
