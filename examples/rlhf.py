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
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from preference_task import COLLATORS, Features, Method, pretrain, train
from reinforcement.policy import Clipping, Judgement, judge, sample, train_policy
from reinforcement.reward_model import RewardModel, pair_accuracy, train_reward_model
from transformers import PreTrainedModel, set_seed

from fused_prefopt.cli.console import markdown_table
from fused_prefopt.cli.pictures import legends_below
from fused_prefopt.data import (
    load_documents,
    make_pairs,
    paragraphs,
    split_documents,
    tokenise_pairs,
    train_tokenizer,
)
from fused_prefopt.data.columns import (
    CHOSEN_IDS,
    COMPLETION_IDS,
    GROUP,
    PROMPT_IDS,
    REJECTED_IDS,
    REWARD,
    SCORE_CHOSEN,
    SCORE_REJECTED,
)
from fused_prefopt.reference import add_reference_logps

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rlhf" / "cpu.json"
PAGE = ROOT / "docs" / "rlhf.md"
JUDGES = ("reward model", "judge")
_TEXT = """\
# RLHF on a small model

Written by `examples/rlhf.py --publish` from `benchmarks/results/rlhf/cpu.json`; edit nothing here.

A small Llama, pretrained on the standard library's documentation and fine-tuned to continue its
paragraphs (SFT), is the reference. A reward model learns to tell true continuations from spoilt
ones and rates two samples of the reference for each of {limit} prompts. DPO and RPO (reward
distillation) learn from those pairs, DRO from the ratings, {steps} steps each; GRPO samples for
itself in {rounds} rounds. The *judge* is a second reward model, of other documents: what the first
one gains and the judge does not is over-optimisation. Rewards have mean 0 and standard deviation 1
on the reference's samples of the training prompts. KL(policy || SFT) is exact at each sampled
token, by `fp.sequence_kl`.

{judged}

{table}

![Rewards, KL and GRPO's rounds](rlhf.png)

One seed ({seed}), {seconds:.0f} s, threads: {threads}.
"""


# Ratings have mean 0 and standard deviation 1, so a log_z0 of 0 moves no mean log-prob.
METHODS = {
    "DPO": Method("dpo", {"beta": 0.1}, 2e-4),
    "RPO": Method("reward-distillation", {"beta": 0.1}, 2e-4),
    "DRO": Method("dro", {"beta": 0.1, "log_z0": 0.0}, 2e-4),
}
SFT = Method("sft", {}, 3e-4)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
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
    reference = train(options, SFT, base, {"pairs": own}, pad).model.eval()
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

    prompts = [pair[PROMPT_IDS] for pair in own]
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
        policies[name] = train(options, method, reference, rated, pad).model.eval()
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

    judged = [pair[PROMPT_IDS] for pair in unseen]
    judgements = {
        name: judge(policy, reference, models, judged, pad, options.new_tokens, options.seed)
        for name, policy in policies.items()
    }
    write_results(options, accuracies, judgements, log, time.perf_counter() - started)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
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
    return parser.parse_args(arguments)


def rate(samples: Features, model: RewardModel, pad_token_id: int) -> dict[str, Features]:
    """Preference pairs and rated points of samples, of which two and two have the same prompt."""
    scores = model.scores(samples, pad_token_id).tolist()
    points = [
        {**sample, REWARD: score, GROUP: index // 2}
        for index, (sample, score) in enumerate(zip(samples, scores, strict=True))
    ]
    pairs = []
    for two in zip(points[::2], points[1::2], strict=True):
        worse, better = sorted(two, key=lambda point: point[REWARD])
        if better[COMPLETION_IDS] != worse[COMPLETION_IDS]:
            pairs.append(
                {
                    PROMPT_IDS: better[PROMPT_IDS],
                    CHOSEN_IDS: better[COMPLETION_IDS],
                    REJECTED_IDS: worse[COMPLETION_IDS],
                    SCORE_CHOSEN: better[REWARD],
                    SCORE_REJECTED: worse[REWARD],
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


def table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table, one row a policy: rewards with standard errors, KL, entropy, length."""
    heading = ("policy", *JUDGES, "KL, nats", "KL per token", "entropy", "tokens")
    rows = []
    for name, numbers in summaries.items():
        rewards = [f"{numbers[judge]:.3f} ± {numbers[f'{judge}_stderr']:.3f}" for judge in JUDGES]
        others = [
            f"{numbers['kl']:.2f}",
            f"{numbers['kl_per_token']:.3f}",
            f"{numbers['entropy']:.2f}",
            f"{numbers['length']:.1f}",
        ]
        rows.append([name, *rewards, *others])
    return markdown_table(heading, rows, numbers=True)


def judged_text(metrics: Mapping[str, Any]) -> str:
    """On what was judged, and how good the two reward models are."""
    accuracies = metrics["pair_accuracies"]
    shares = " and ".join(f"{accuracies[name]:.3f} ({name})" for name in JUDGES)
    return (
        f"One sample for each of {metrics['options']['held_out_limit']} held-out prompts, mean ±"
        f" standard error. Of their true and spoilt continuations {shares} are in the right order."
    )


def page_text(metrics: Mapping[str, Any]) -> str:
    """The whole page."""
    options = metrics["options"]
    return _TEXT.format(
        limit=options["limit"],
        steps=options["steps"],
        rounds=options["rounds"],
        seed=options["seed"],
        judged=judged_text(metrics),
        table=table(metrics["held_out"]),
        seconds=metrics["seconds"],
        threads=metrics["threads"],
    )


def publish(metrics: Mapping[str, Any]) -> None:
    """Write the committed metrics, the page and its picture."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page_text(metrics), encoding="utf-8")
    picture(metrics["held_out"], metrics["grpo"], PAGE.with_suffix(".png"))


def picture(
    summaries: Mapping[str, Mapping[str, float]], log: Sequence[Mapping[str, float]], path: Path
) -> None:
    """Reward against KL of all policies, and GRPO's way there.

    Args:
        summaries: policy → `Judgement.summary()`.
        log: of `train_policy`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, numbers) in enumerate(summaries.items()):
        for marker, rewards in zip("os", JUDGES, strict=True):
            left.errorbar(
                numbers["kl_per_token"],
                numbers[rewards],
                yerr=numbers[f"{rewards}_stderr"],
                marker=marker,
                color=f"C{place}",
                linestyle="",
                label=f"{name}, {rewards}",
            )
    left.set_xlabel("KL(policy || SFT), nats per token")
    left.set_ylabel("held-out reward")
    rounds = [row["round"] for row in log]
    right.plot(rounds, [row["reward"] for row in log], label="reward")
    right.plot(rounds, [row["entropy"] for row in log], label="entropy, nats")
    right.plot(rounds, [row["kl"] for row in log], label="KL, nats per token")
    right.set_xlabel("GRPO round")
    legends_below(figure)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
