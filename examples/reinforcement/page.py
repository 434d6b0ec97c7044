"""What `rlhf.py` shows of its metrics: a table, a picture and, from the committed ones, a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_prefopt.report import legends_below

ROOT = Path(__file__).resolve().parents[2]
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


def table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table, one row a policy: rewards with standard errors, KL, entropy, length."""
    lines = [
        f"| policy | {' | '.join(JUDGES)} | KL, nats | KL per token | entropy | tokens |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, numbers in summaries.items():
        rewards = [f"{numbers[judge]:.3f} ± {numbers[f'{judge}_stderr']:.3f}" for judge in JUDGES]
        others = [
            f"{numbers['kl']:.2f}",
            f"{numbers['kl_per_token']:.3f}",
            f"{numbers['entropy']:.2f}",
            f"{numbers['length']:.1f}",
        ]
        lines.append(f"| {' | '.join([name, *rewards, *others])} |")
    return "\n".join(lines)


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
        for marker, judge in zip("os", JUDGES, strict=True):
            left.errorbar(
                numbers["kl_per_token"],
                numbers[judge],
                yerr=numbers[f"{judge}_stderr"],
                marker=marker,
                color=f"C{place}",
                linestyle="",
                label=f"{name}, {judge}",
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
