"""Test on a small model what the papers of α-DPO, γ-PO, DRO and newer losses claim.

A small Llama is trained once for each seed and every preference training starts from it. The
page says for each claim what the paper has, what came out here, and whether they agree.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from paper_claims import alpha_dpo, dro, gamma_po, newer
from paper_claims.findings import Experiment, Finding, interval
from paper_claims.runs import Results, load_results, run_all
from paper_claims.trainings import Settings

from fused_prefopt.cli.console import markdown_table

EXPERIMENTS = (
    *gamma_po.EXPERIMENTS,
    *alpha_dpo.EXPERIMENTS,
    *dro.EXPERIMENTS,
    *newer.EXPERIMENTS,
)
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims" / "cpu.json"
PAGE = ROOT / "docs" / "claims.md"
_SIZES = {
    "steps": "optimizer steps of each preference training",
    "pretraining_steps": "steps of the reference",
    "pairs": "pairs to train on",
    "held_out": "pairs to judge on",
    "hidden_size": "width of the Llama",
}
_VERDICTS = ("yes", "undecided", "no")
_FINDINGS = ("claim", "paper", "here", "agrees?", "counts as met when")
# Metric → what a table calls it, and its digits.
_METRICS = {
    "accuracy": ("accuracy", 3),
    "kl_chosen": ("KL chosen, nats per token", 3),
    "kl_rejected": ("KL rejected, nats per token", 3),
    "shift_chosen": ("Δ_w, nats", 1),
    "shift_rejected": ("Δ_l, nats", 1),
    "gap": ("Δ_w − Δ_l, nats", 1),
}
_OUTLINE = """\
# The papers' claims on a small model

Written by `examples/claims.py` from the results of `make claims`.

**Agrees? {verdicts}.** `undecided` means that the interval holds the limit: these sizes cannot \
tell. Every verdict follows by its rule, the last column, from the numbers beside it.

A Llama with {layers} layers of width {hidden_size} is trained on the standard library's \
documentation for {pretraining_steps} steps: the reference, one for each seed. Every training \
starts from it and takes {steps} steps of {batch_size} pairs out of {pairs}, with AdamW at \
{learning_rate:g} (warm-up over a tenth, then cosine), whatever its loss. A pair is a paragraph's \
true continuation against a spoilt one ({kinds}). It is judged on {held_out} pairs of other \
documents, all of them labelled correctly. Pairs whose sides are the same within {max_length} \
tokens are dropped (DRO, which takes single completions, trains on theirs too). Accuracy, the \
share of pairs whose true side has the higher log-prob per token, stands in for the papers' win \
rates; the reference itself has {reference}. KL is KL(policy ‖ reference) at the positions of the \
held-out completions, Δ = L − L_ref is the log-ratio of a whole completion. The papers' models \
have 7 to 9 billion weights and their judges are models: a disagreement here says something about \
this small setting first.

Brackets are Student's 95 % intervals over {count} seeds ({seeds}); differences are paired: the \
same reference, data and order. They are not corrected for the number of rows; only where one \
success out of several would do is each of them widened for that (Bonferroni)."""


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if not options.report:
        settings = replace(Settings(), **{name: getattr(options, name) for name in _SIZES})
        trainings = [what for experiment in EXPERIMENTS for what in experiment.trainings]
        work = options.work / settings.key
        run_all(settings, trainings, range(options.seeds), work, options.workers).save(
            options.results
        )
        # An interrupted run goes on where it was; the next complete one begins anew.
        shutil.rmtree(work)
    write_page(load_results(options.results), EXPERIMENTS, options.page)
    print(f"{options.page.read_text(encoding='utf-8')}\nresults: {options.results}", flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="how many, from 0")
    add("--workers", type=int, default=2, help="processes, one thread each")
    for name, meaning in _SIZES.items():
        default = getattr(Settings(), name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=meaning)
    add("--work", type=Path, default=Path("runs/claims"), help="where an interrupted run goes on")
    add("--results", type=Path, default=RESULTS, help="JSON file of all numbers")
    add("--page", type=Path, default=PAGE, help="written from it, with a folder of pictures")
    add("--report", action="store_true", help="train nothing: write the page from --results")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds: got {options.seeds}, needs at least 2 for an interval")
    return options


def page_text(results: Results, experiments: Sequence[Experiment], pictures: str) -> str:
    """Markdown.

    Args:
        results: of all trainings of the experiments.
        experiments: in order.
        pictures: folder of `<experiment>.png`, relative to the page.
    """
    findings = [experiment.findings(results) for experiment in experiments]
    lines = [_outline(results, [each for some in findings for each in some])]
    for experiment, found in zip(experiments, findings, strict=True):
        rows = [[each.claim, each.paper, each.here, each.agrees, each.rule] for each in found]
        lines += [
            "",
            f"## {experiment.title}",
            "",
            experiment.text,
            "",
            markdown_table(_FINDINGS, rows),
        ]
        lines += ["", f"![{experiment.title}]({pictures}/{experiment.name}.png)", ""]
        names = ["training", *(_METRICS[metric][0] for metric in experiment.metrics)]
        lines.append(markdown_table(names, _rows(results, experiment)))
    names = [f"{name} {number}" for name, number in results.versions.items()]
    spent = f"{len(results.found)} trainings, {results.cpu_seconds:.0f} CPU seconds in all"
    return "\n".join([*lines, "", f"{spent}; {', '.join(names)}.", ""])


def write_page(results: Results, experiments: Sequence[Experiment], path: Path) -> None:
    """The page, and its pictures in a folder of its name beside it."""
    for experiment in experiments:
        experiment.draw(results, path.with_suffix("") / f"{experiment.name}.png")
    path.write_text(page_text(results, experiments, path.stem), encoding="utf-8")


def _outline(results: Results, findings: Iterable[Finding]) -> str:
    counts = Counter(finding.agrees for finding in findings)
    before = interval(results.values(results.trainings[0], "reference_accuracy"))
    sizes = {name: _count(results, name) for name in ("pairs", "held_out")}
    return _OUTLINE.format(
        **{**vars(results.settings), **sizes, "kinds": ", ".join(results.settings.kinds)},
        verdicts=", ".join(f"{verdict} {counts[verdict]}" for verdict in _VERDICTS),
        reference=before.show(),
        count=len(results.seeds),
        seeds=", ".join(map(str, results.seeds)),
    )


def _count(results: Results, name: str) -> str:
    """How many pairs the seeds had."""
    counts = sorted({round(count) for count in results.values(results.trainings[0], name)})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])


def _rows(results: Results, experiment: Experiment) -> Iterable[list[str]]:
    """Mean and interval of each metric, one row a training."""
    for what in experiment.trainings:
        yield [
            str(what),
            *(
                interval(results.values(what, metric)).show(_METRICS[metric][1])
                for metric in experiment.metrics
            ),
        ]


if __name__ == "__main__":
    main()
