"""Train three preference methods on real text and compare them.

Without --model and --dataset everything is made here, in four minutes on two CPU cores: the text
is the standard library's documentation, the tokenizer and a small Llama are trained on it, and that
model is the reference. α-DPO, γ-SimPO and DRO then start from it, through transformers' Trainer.
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
from preference_task import Features, Task, embedded_task, hub_task, training_arguments
from transformers import set_seed

import fused_prefopt as fp
from fused_prefopt import report
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.evaluation import PairScores, score_pairs
from fused_prefopt.integrations.transformers import PreferenceTrainer
from fused_prefopt.reference import add_reference_logps


@dataclass(frozen=True)
class Method:
    """A loss, its hyperparameters, and how fast to train with it.

    Small models want larger steps than the papers' 7–9B ones, and margins of a nat or so.
    """

    loss: str
    hyperparameters: dict[str, Any]
    learning_rate: float


METHODS = (
    Method("alpha-dpo", {"beta": 5.0, "gamma": 2.0, "alpha": 0.1}, 3e-4),
    Method("gamma-simpo", {"beta": 5.0, "gamma": 2.0, "tau": 10.0}, 3e-4),
    # β log Z₀ = 0.9: only the true continuation, rated 1, is to become more likely.
    Method("dro", {"beta": 0.005, "log_z0": 180.0}, 1e-3),
)


def main() -> None:
    options = parse_arguments()
    started = time.perf_counter()
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    task = hub_task(options) if options.model or options.dataset else embedded_task(options)

    cache = options.output / "cache"
    pair_collator = PairCollator(task.tokenizer.pad_token_id)
    point_collator = PointCollator(task.tokenizer.pad_token_id)
    pairs = add_reference_logps(task.reference, task.pairs, pair_collator, cache_dir=cache)
    points = add_reference_logps(task.reference, task.points, point_collator, cache_dir=cache)
    held_out = add_reference_logps(task.reference, task.held_out, pair_collator, cache_dir=cache)

    before = score_pairs(task.reference, task.reference, held_out, pair_collator)
    scores, histories, losses = {}, {}, {}
    for method in METHODS:
        if method.loss not in options.methods:
            continue
        print(f"\n{method.loss}: {method.hyperparameters}", flush=True)
        loss_fn = fp.PreferenceLoss(method.loss, **method.hyperparameters)
        is_pairs = loss_fn.loss.pairwise
        model, history = train(
            options,
            method,
            loss_fn,
            task,
            pairs if is_pairs else points,
            pair_collator if is_pairs else point_collator,
        )
        scores[method.loss] = score_pairs(model, task.reference, held_out, pair_collator)
        histories[method.loss], losses[method.loss] = history, loss_fn

    write_results(options, before, scores, histories, losses, time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
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
    add("--flip-rate", type=float, default=0.0, help="share of wrong labels in the embedded data")
    add("--max-length", type=int, default=128, help="tokens of prompt and completion")
    add("--steps", type=int, default=100, help="optimizer steps of each method")
    add("--batch-size", type=int, default=16, help="pairs, or half the points, of a step")
    add("--accumulation", type=int, default=1, help="forward passes that share a step's batch")
    add("--learning-rate", type=float, help="instead of each method's own")
    add("--pretraining-steps", type=int, default=200, help="steps of the small Llama")
    return parser.parse_args()


def train(
    options: argparse.Namespace,
    method: Method,
    loss_fn: fp.PreferenceLoss,
    task: Task,
    features: Features,
    collator: PairCollator | PointCollator,
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The reference model after some steps with a preference loss, and the log of the steps."""
    set_seed(options.seed)
    model = copy.deepcopy(task.reference)
    sequences = 1 if loss_fn.loss.pairwise else 2
    trainer = PreferenceTrainer(
        model,
        training_arguments(
            options,
            method.loss,
            options.steps,
            options.learning_rate or method.learning_rate,
            sequences,
        ),
        train_dataset=features,
        data_collator=collator,
        loss_fn=loss_fn,
    )
    trainer.train()
    trainer.attachment.detach()
    trainer.save_model(str(options.output / method.loss))
    task.tokenizer.save_pretrained(options.output / method.loss)
    return model.eval(), trainer.state.log_history


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
    table = report.comparison_table(summaries)
    print(f"\nheld-out pairs: {before.margins.numel()}\n\n{table}\n", flush=True)
    metrics = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "held_out": summaries,
        "history": histories,
        "seconds": seconds,
    }
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    margins = {name: scores.margins for name, scores in after.items()}
    report.plot_margins(before.margins, margins, options.output / "margins.png")
    report.plot_rewards(histories, options.output / "rewards.png")
    for name, loss_fn in losses.items():
        if name.startswith("gamma-"):
            output = loss_fn.eval().from_logps(after[name].batch)
            assert output.rewards is not None and output.target_margins is not None
            chosen, rejected = output.rewards.chunk(2)
            report.plot_target_margins(
                chosen - rejected,
                output.target_margins,
                loss_fn.hyperparameters["gamma"],
                options.output / "target_margins.png",
            )
    print(f"{seconds:.0f} s; models, metrics and pictures are in {options.output}", flush=True)


if __name__ == "__main__":
    main()
