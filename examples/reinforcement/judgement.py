"""What held-out prompts say of a policy: its rewards, and how far it is from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

import fused_prefopt as fp
from fused_prefopt.data import PointCollator, labels_of
from fused_prefopt.integrations.causal_lm import last_hidden, lm_head_of
from reinforcement.policy_gradient import token_policy_of
from reinforcement.reward_model import RewardModel
from reinforcement.sampling import sample

_ROWS = 64


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
            lm_head_of(reference),
            last_hidden(policy, batch),
            lm_head_of(policy),
            labels_of(batch),
        )
        kls.append(divergence.kl)
        entropies.append(token_policy_of(policy, batch).entropies.sum(1) / divergence.lengths)
    lengths = torch.tensor([len(each["completion_ids"]) for each in samples])
    rewards = {name: model.scores(samples, pad_token_id) for name, model in judges.items()}
    return Judgement(rewards, torch.cat(kls), torch.cat(entropies), lengths)
