"""Test on a small model what the papers of α-DPO, γ-PO and DRO claim.

A small Llama is trained once for each seed and every preference training starts from it. The
page says for each claim what the paper has, what came out here, and whether they agree.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from paper_claims import (
    ablation,
    direct_reward,
    displacement,
    divergence,
    label_noise,
    target_margin,
)
from paper_claims.page import write
from paper_claims.results import load_results
from paper_claims.runs import run_all
from paper_claims.settings import Settings

MODULES = (target_margin, label_noise, divergence, ablation, direct_reward, displacement)
EXPERIMENTS = tuple(module.EXPERIMENT for module in MODULES)
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
    write(load_results(options.results), EXPERIMENTS, options.page)
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


if __name__ == "__main__":
    main()
