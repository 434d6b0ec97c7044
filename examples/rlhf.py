"""RLHF from text to table: fine-tuning, a reward model, then DPO, RPO, DRO and GRPO against it.

Everything is made here, in six minutes on two CPU cores: a small Llama is trained on the standard
library's documentation, fine-tuned to continue its paragraphs (SFT), and a reward model on pairs of
true and spoilt continuations (Bradley–Terry). The reward model rates two samples of the SFT model
for each prompt. DPO and RPO (reward distillation) learn from those pairs, DRO from the ratings, and
GRPO samples for itself: PPO's clipped objective, with the mean of a prompt's samples where PPO has
a critic. All are judged on held-out prompts, by the reward model that they were trained with and
by a second one that never met their prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from preference_task import pretrain, training_arguments
from reinforcement.judgement import Judgement, judge
from reinforcement.page import judged_text, picture, publish, table
from reinforcement.policy_gradient import Clipping, train_policy
from reinforcement.reward_model import RewardModel, pair_accuracy, train_reward_model
from reinforcement.sampling import sample
from transformers import PreTrainedModel, set_seed

import fused_prefopt as fp
from fused_prefopt.data import (
    PairCollator,
    PointCollator,
    load_documents,
    make_pairs,
    paragraphs,
    split_documents,
    tokenise_pairs,
    train_tokenizer,
)
from fused_prefopt.integrations.transformers import PreferenceTrainer
from fused_prefopt.reference import add_reference_logps

Features = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A loss, its hyperparameters, and how fast to train with it."""

    loss: str
    hyperparameters: dict[str, Any]
    learning_rate: float


# Ratings have mean 0 and standard deviation 1, so a log_z0 of 0 moves no mean log-prob.
METHODS = {
    "DPO": Method("dpo", {"beta": 0.1}, 2e-4),
    "RPO": Method("reward-distillation", {"beta": 0.1}, 2e-4),
    "DRO": Method("dro", {"beta": 0.1, "log_z0": 0.0}, 2e-4),
}
COLLATORS = {"pairs": PairCollator, "points": PointCollator}
SFT = Method("sft", {}, 3e-4)


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)

    documents, held_out = split_documents(load_documents(), seed=options.seed)
    texts = [text for document in documents for text in paragraphs(document)]
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    pad = tokenizer.pad_token_id

    def pairs_of(part: Any, limit: int) -> Features:
        records = make_pairs(part, seed=options.seed, limit=limit)
        return tokenise_pairs(records, tokenizer, options.max_length, options.max_length // 2)

    # The judge and the policies share no document.
    own, judges = pairs_of(documents[::2], options.limit), pairs_of(documents[1::2], options.limit)
    unseen = pairs_of(held_out, options.held_out_limit)

    base = pretrain(options, tokenizer, texts)
    reference = offline(options, SFT, base, {"pairs": own}, pad)
    models = {}
    for name, pairs in (("reward model", own), ("judge", judges)):
        models[name] = train_reward_model(
            reference,
            pairs,
            pad,
            steps=options.reward_steps,
            batch_size=options.batch_size,
            seed=options.seed,
            name=name,
        )
    accuracies = {name: pair_accuracy(model, unseen, pad) for name, model in models.items()}

    prompts = [pair["prompt_ids"] for pair in own]
    samples = sample(
        reference,
        [prompt for prompt in prompts for _ in range(2)],
        pad,
        new_tokens=options.new_tokens,
        name="two samples of each prompt",
    )
    for model in models.values():
        model.standardise(samples, pad)
    rated = {
        kind: add_reference_logps(reference, features, COLLATORS[kind](pad))
        for kind, features in rate(samples, models["reward model"], pad).items()
    }

    policies: dict[str, PreTrainedModel] = {"SFT": reference}
    for name, method in METHODS.items():
        policies[name] = offline(options, method, reference, rated, pad)
    policies["GRPO"], log = train_policy(
        reference,
        models["reward model"],
        prompts,
        pad,
        rounds=options.rounds,
        prompts_per_round=options.batch_size,
        group_size=options.group_size,
        updates=2,
        new_tokens=options.new_tokens,
        learning_rate=2e-4,
        seed=options.seed,
        settings=Clipping(entropy_weight=options.entropy_weight),
    )

    judged = [pair["prompt_ids"] for pair in unseen]
    judgements = {
        name: judge(policy, reference, models, judged, pad, options.new_tokens, options.seed)
        for name, policy in policies.items()
    }
    write_results(options, accuracies, judgements, log, time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    """Command line of the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/rlhf"), help="folder of everything made")
    add("--seed", type=int, default=0, help="of data, initialisation, order and samples")
    add("--limit", type=int, default=800, help="prompts of the policies, pairs of the judge")
    add("--held-out-limit", type=int, default=250, help="prompts to judge on")
    add("--max-length", type=int, default=96, help="tokens of prompt and completion")
    add("--new-tokens", type=int, default=48, help="tokens of a sampled completion at most")
    add("--pretraining-steps", type=int, default=200, help="steps of the small Llama")
    add("--reward-steps", type=int, default=150, help="steps of each reward model")
    add("--steps", type=int, default=100, help="steps of SFT and of each offline method")
    add("--rounds", type=int, default=60, help="of sampling and updating in GRPO")
    add("--group-size", type=int, default=4, help="samples of a prompt in GRPO")
    add("--entropy-weight", type=float, default=0.001, help="of the entropy bonus in GRPO")
    add("--batch-size", type=int, default=16, help="pairs, half the points, or prompts of a step")
    add("--accumulation", type=int, default=1, help="forward passes that share a step's batch")
    add("--publish", action="store_true", help="write docs/rlhf.md and its committed results too")
    return parser.parse_args()


def offline(
    options: argparse.Namespace,
    method: Method,
    start: PreTrainedModel,
    features: dict[str, Features],
    pad_token_id: int,
) -> PreTrainedModel:
    """A copy of the starting model after some steps with a loss of this package."""
    print(f"\n{method.loss}: {method.hyperparameters}", flush=True)
    set_seed(options.seed)
    loss_fn = fp.PreferenceLoss(method.loss, **method.hyperparameters)
    kind, sequences = ("pairs", 1) if loss_fn.loss.pairwise else ("points", 2)
    trainer = PreferenceTrainer(
        copy.deepcopy(start),
        training_arguments(options, method.loss, options.steps, method.learning_rate, sequences),
        train_dataset=features[kind],
        data_collator=COLLATORS[kind](pad_token_id),
        loss_fn=loss_fn,
    )
    trainer.train()
    trainer.attachment.detach()
    return trainer.model.eval()


def rate(samples: Features, model: RewardModel, pad_token_id: int) -> dict[str, Features]:
    """Preference pairs and rated points of samples, of which two and two have the same prompt."""
    scores = model.scores(samples, pad_token_id).tolist()
    points = [
        {**sample, "reward": score, "group": index // 2}
        for index, (sample, score) in enumerate(zip(samples, scores, strict=True))
    ]
    pairs = []
    for two in zip(points[::2], points[1::2], strict=True):
        worse, better = sorted(two, key=lambda point: point["reward"])
        if better["completion_ids"] != worse["completion_ids"]:
            pairs.append(
                {
                    "prompt_ids": better["prompt_ids"],
                    "chosen_ids": better["completion_ids"],
                    "rejected_ids": worse["completion_ids"],
                    "score_chosen": better["reward"],
                    "score_rejected": worse["reward"],
                }
            )
    return {"pairs": pairs, "points": points}


def write_results(
    options: argparse.Namespace,
    accuracies: dict[str, float],
    judgements: dict[str, Judgement],
    log: list[dict[str, float]],
    seconds: float,
) -> None:
    """Table, metrics.json and picture."""
    metrics: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "pair_accuracies": accuracies,
        "held_out": {name: judgement.summary() for name, judgement in judgements.items()},
        "grpo": log,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    print(f"\n{judged_text(metrics)}\n\n{table(metrics['held_out'])}", flush=True)
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    picture(metrics["held_out"], log, options.output / "rewards.png")
    if options.publish:
        publish(metrics)
    print(f"\n{seconds:.0f} s; metrics and pictures are in {options.output}", flush=True)


if __name__ == "__main__":
    main()
