"""What held-out prompts say of a policy: its rewards, and how far it is from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def table(judgements: Mapping[str, Judgement]) -> str:
    """A text table, one row a policy."""
    header = (
        f"{'policy':8}{'reward model':>16}{'judge':>16}{'KL, nats':>12}{'KL/token':>10}"
        f"{'entropy':>9}{'tokens':>8}"
    )
    rows = []
    for name, judgement in judgements.items():
        numbers = judgement.summary()
        rewards = (
            f"{numbers[judge]:.3f} ± {numbers[f'{judge}_stderr']:.3f}"
            for judge in judgement.rewards
        )
        rows.append(
            f"{name:8}"
            + "".join(f"{reward:>16}" for reward in rewards)
            + f"{numbers['kl']:>12.2f}{numbers['kl_per_token']:>10.3f}"
            + f"{numbers['entropy']:>9.2f}{numbers['length']:>8.1f}"
        )
    return "\n".join([header, "-" * len(header), *rows])


def picture(
    judgements: Mapping[str, Judgement], log: Sequence[Mapping[str, float]], path: Path
) -> None:
    """Reward against KL of all policies, and GRPO's way there.

    Args:
        judgements: policy → judgement.
        log: of `train_policy`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, judgement in judgements.items():
        numbers = judgement.summary()
        for mark, judge_name in zip("os", judgement.rewards, strict=False):
            left.errorbar(
                numbers["kl_per_token"],
                numbers[judge_name],
                yerr=numbers[f"{judge_name}_stderr"],
                marker=mark,
                color=f"C{list(judgements).index(name)}",
                label=f"{name}, {judge_name}",
            )
    left.set_xlabel("KL(policy || SFT), nats per token")
    left.set_ylabel("held-out reward")
    left.legend(fontsize="x-small")
    rounds = [row["round"] for row in log]
    right.plot(rounds, [row["reward"] for row in log], label="reward")
    right.plot(rounds, [row["entropy"] for row in log], label="entropy, nats")
    right.plot(rounds, [row["kl"] for row in log], label="KL, nats per token")
    right.set_xlabel("GRPO round")
    right.legend()
    figure.savefig(path, dpi=120)
