"""Train three preference methods on real text and compare them.

Without --model and --dataset everything is made here, in four minutes on two CPU cores: the text
is the standard library's documentation, the tokenizer and a small Llama are trained on it, and that
model is the reference. α-DPO, γ-SimPO and DRO then start from it, through transformers' Trainer,
DRO on rated completions, the others on pairs of which a fifth have the wrong label. Both of these
give each pair a target margin of its own, and `target_margins.png` tells them apart: γ-SimPO's are
a curve over the reward margin, α-DPO's a line over the gap between policy and reference.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from preference_task import COLLATORS, Method, embedded_task, hub_task, train
from torch import Tensor
from transformers import set_seed

import fused_prefopt as fp
from fused_prefopt.cli.pictures import plot_margins, plot_rewards, plot_target_margins
from fused_prefopt.cli.report import comparison_table
from fused_prefopt.data import PairCollator
from fused_prefopt.evaluation import PairScores, score_pairs
from fused_prefopt.losses.adaptive_margin import gap_of
from fused_prefopt.reference import add_reference_logps

METHODS = (
    # The largest α that the paper tries: what tells it from γ-PO shows in a hundred steps.
    Method("alpha-dpo", {"beta": 5.0, "gamma": 2.0, "alpha": 0.2}, 3e-4),
    Method("gamma-simpo", {"beta": 5.0, "gamma": 2.0, "tau": 10.0}, 3e-4),
    # β log Z₀ = 0.9: only the true continuation, rated 1, is to become more likely.
    Method("dro", {"beta": 0.005, "log_z0": 180.0}, 1e-3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    started = time.perf_counter()
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    task = hub_task(options) if options.model or options.dataset else embedded_task(options)

    cache = options.output / "cache"
    pad = task.tokenizer.pad_token_id
    collator = PairCollator(pad)
    features = {
        kind: add_reference_logps(task.reference, rows, COLLATORS[kind](pad), cache_dir=cache)
        for kind, rows in (("pairs", task.pairs), ("points", task.points))
    }
    held_out = add_reference_logps(task.reference, task.held_out, collator, cache_dir=cache)

    before = score_pairs(task.reference, task.reference, held_out, collator)
    scores, histories, losses = {}, {}, {}
    for method in METHODS:
        if method.loss not in options.methods:
            continue
        if options.learning_rate:
            method = replace(method, learning_rate=options.learning_rate)
        trainer = train(options, method, task.reference, features, pad)
        folder = str(options.output / method.loss)
        trainer.save_model(folder)
        task.tokenizer.save_pretrained(folder)
        model = trainer.model.eval()
        scores[method.loss] = score_pairs(model, task.reference, held_out, collator)
        histories[method.loss] = trainer.state.log_history
        losses[method.loss] = trainer.attachment.loss_fn

    write_results(options, before, scores, histories, losses, time.perf_counter() - started)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known = [method.loss for method in METHODS]
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/quickstart"), help="folder of everything made")
    add("--methods", nargs="+", choices=known, default=known, help="losses to train with")
    add("--seed", type=int, default=0, help="of data, initialisation and order")
    add("--model", help="hub name or folder of a causal LM to start from (default: train one)")
    add("--dataset", help="hub name or folder of preference data (default: embedded text)")
    add("--split", default="train", help="split of --dataset to train on")
    add("--held-out-split", default="test", help="split of --dataset to judge on")
    add("--limit", type=int, default=1600, help="pairs or prompts to train on at most")
    add("--held-out-limit", type=int, default=388, help="pairs to judge on at most")
    add("--flip-rate", type=float, default=0.2, help="share of wrong labels in the embedded pairs")
    add("--max-length", type=int, default=128, help="tokens of prompt and completion")
    add("--steps", type=int, default=100, help="optimizer steps of each method")
    add("--batch-size", type=int, default=16, help="pairs, or half the points, of a step")
    add("--accumulation", type=int, default=1, help="forward passes that share a step's batch")
    add("--learning-rate", type=float, help="instead of each method's own")
    add("--pretraining-steps", type=int, default=200, help="steps of the small Llama")
    return parser.parse_args(arguments)


def write_results(
    options: argparse.Namespace,
    before: PairScores,
    after: dict[str, PairScores],
    histories: dict[str, list[dict[str, float]]],
    losses: dict[str, fp.PreferenceLoss],
    seconds: float,
) -> None:
    """Table, metrics.json and pictures."""
    summaries = {"reference": before.summary()}
    for name, scores in after.items():
        summaries[name] = scores.summary(losses[name].loss.reward)
    table = comparison_table(summaries)
    print(f"\nheld-out pairs: {before.margins.numel()}\n\n{table}\n", flush=True)
    metrics = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "held_out": summaries,
        "history": histories,
        "seconds": seconds,
    }
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    margins = {name: scores.margins for name, scores in after.items()}
    plot_margins(before.margins, margins, options.output / "margins.png")
    plot_rewards(histories, options.output / "rewards.png")
    targets, gaps = target_margins_of(losses, after)
    if targets:
        plot_target_margins(targets, gaps, options.output / "target_margins.png")
    print(f"{seconds:.0f} s; models, metrics and pictures are in {options.output}", flush=True)


def target_margins_of(
    losses: Mapping[str, fp.PreferenceLoss], scores: Mapping[str, PairScores]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Held-out target margins of the methods that have them, and the two gaps they may follow."""
    targets: dict[str, Tensor] = {}
    rewards: dict[str, Tensor] = {}
    distances: dict[str, Tensor] = {}
    of_policy_and_reference = gap_of("ratio", length_normalized=True)
    for name, loss_fn in losses.items():
        if not loss_fn.loss.pairwise:
            continue
        batch = scores[name].batch
        output = loss_fn.eval().from_logps(batch)
        assert output.rewards is not None and output.target_margins is not None
        chosen, rejected = output.rewards.chunk(2)
        targets[name] = output.target_margins
        rewards[name] = chosen - rejected
        distances[name] = of_policy_and_reference(batch)
    gaps = {
        "reward margin r_w − r_l": rewards,
        "gap between policy and reference, nats per token": distances,
    }
    return targets, gaps


if __name__ == "__main__":
    main()
