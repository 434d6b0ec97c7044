"""Measures, compiles and reports.

`python -m benchmarks cpu` measures the README's candidates, `grid` every peer, labelled share,
number of rows and dtype, `methods` what the losses take of a step, `trainer` whole trainer steps,
`memory` what these hold over the context, `frameworks` trainings by other frameworks' commands,
`kl` what the exact KL divergence takes, `masses` what a bounded-mass backward saves and costs, and
`gpu` all that a GPU tells before a deadline; `profile` shows the kernels of single steps.
`python -m benchmarks replay [--check]` predicts steps with a large head on GPUs, without one, and
`--check` fails where a goal is missed; `scaling` finds what fits from 8B to 405B on 1 to 512 GPUs,
and `fits` shows every layout of some.
`python -m benchmarks kernels [--check]` compiles the kernels for GPUs and fails on a spill,
`python -m benchmarks report [--check]` shows all of it, and
`python -m benchmarks compare A.json B.json` fails on what became worse.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks import cpu_runs, gpu_runs
from benchmarks.compare import claims_of, compare_files, context_claims, goals_of
from benchmarks.device import MACHINES
from benchmarks.frameworks import run_frameworks
from benchmarks.head_points import run_kl
from benchmarks.kernel_page import PAGE, REPLAY
from benchmarks.llama_step import BESIDE, FULL, LLAMAS, LORA
from benchmarks.mass_study import MASSES, run_study
from benchmarks.profile_step import run_profile
from benchmarks.report import README, Places, check_all, write_all
from benchmarks.results import KERNELS, RESULTS, Results, load
from benchmarks.scaling import GPUS, KINDS, SCALING, Heads, load_scaling, run_scaling
from benchmarks.scaling_page import layouts_table
from benchmarks.trainer_steps import run_memory, run_trainer

Add = Callable[..., argparse.ArgumentParser]


def make_parser() -> argparse.ArgumentParser:
    """The command line; the function that runs a command is its `run`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(
        name: str, text: str, run: Callable[[argparse.Namespace], Any], results: Path | None = None
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        if results is not None:
            command.add_argument("--results", type=Path, default=results, help="folder of JSON")
        command.set_defaults(run=run)
        return command

    _add_measuring(add)
    _add_showing(add)
    return parser


def _add_measuring(add: Add) -> None:
    on_cpu, ten = RESULTS / "cpu", "in less than ten minutes on 2 cores"
    cpu = add(
        "cpu",
        f"the README's candidates, {ten}",
        lambda o: cpu_runs.run_cpu(o.results, count=o.rounds, seconds=o.deadline, say=_say),
        on_cpu,
    )
    cpu.add_argument("--deadline", type=float, default=cpu_runs.CPU_DEADLINE, help=_DEADLINE)
    grid = add(
        "grid",
        f"shares, rows, dtypes and all peers, {ten}",
        lambda o: cpu_runs.run_grid(o.results, o.rounds, _say),
        on_cpu,
    )
    for command in (cpu, grid):
        command.add_argument("--rounds", type=int, default=7, help="rounds of the timings at most")
    text = "what the losses take of a step, in a minute"
    add("methods", text, lambda o: cpu_runs.run_methods(o.results, _say), on_cpu)
    text = f"whole trainer steps, plain, ours and TRL's, {ten}"
    add("trainer", text, lambda o: run_trainer(o.results, _say), on_cpu)
    text = "the memory of a trainer's step over its context, in a quarter of an hour"
    add("memory", text, lambda o: run_memory(o.results, _say), on_cpu)
    text = "trainings by other frameworks' own commands, in five minutes"
    add("frameworks", text, lambda o: run_frameworks(o.results, _say), on_cpu)
    text = "the exact KL from a reference model, in two minutes"
    add("kl", text, lambda o: run_kl(o.results, _say), on_cpu)
    text = "the study of `drop_mass`, in about a quarter of an hour on 2 cores"
    add("masses", text, lambda o: run_study(o.results, say=_say), MASSES)
    on_gpu = add(
        "gpu",
        "all that a GPU tells, in less than eight minutes",
        lambda o: gpu_runs.run_gpu(o.results, o.deadline, _say, again=o.again),
        RESULTS / "h200",
    )
    on_gpu.add_argument("--deadline", type=float, default=gpu_runs.DEADLINE, help=_DEADLINE)
    on_gpu.add_argument("--again", action="store_true", help="measure anew what is on disk")
    text = "what one step's kernels take, and where it waits"
    profile = add("profile", text, lambda o: run_profile(o.cases, _say))
    profile.add_argument("cases", nargs="*", metavar="CASE", help="such as llama-3:recompute")


def _add_showing(add: Add) -> None:
    text = "predict steps with a large head on GPUs, in about a minute"
    replay = add("replay", text, _replay, REPLAY)
    replay.add_argument("--check", action="store_true", help="fail where a goal is missed")
    text = "contexts that fit from 8B to 405B on 1 to 512 GPUs, on paper, in three minutes"
    add("scaling", text, lambda o: run_scaling(o.results, _say), SCALING)
    fits = add("fits", "bytes of a GPU in every layout, on paper", _fits, SCALING)
    fits.add_argument("model", choices=[_short(model.name) for model in LLAMAS])
    fits.add_argument("gpus", type=int, choices=GPUS)
    fits.add_argument("--gpu", choices=[machine.name for machine in MACHINES], default="H200")
    fits.add_argument("--training", choices=list(_TRAININGS), default="full")
    kernels = add("kernels", "compile the kernels for GPUs, without one", _kernels)
    kernels.add_argument("--check", action="store_true", help="write no results")
    text = "write tables, pages and pictures from the results"
    report = add("report", text, _report, RESULTS / "cpu")
    report.add_argument("--check", action="store_true", help="fail where they are out of date")
    report.add_argument("--readme", type=Path, default=README)
    report.add_argument("--page", type=Path, default=PAGE, help="of the kernels")
    report.add_argument("--docs", type=Path, default=PAGE.parent, help="folder of the other pages")
    report.add_argument("--masses", type=Path, default=MASSES)
    for command in (kernels, report):
        command.add_argument("--kernels", type=Path, default=KERNELS)
    compared = add("compare", "fail on regressions over the noise", _compare)
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)


_DEADLINE = "seconds to begin nothing after"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = make_parser().parse_args(arguments)
    # What peers warn of (deprecations, compile fallbacks) would bury the progress.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = options.run(options)
    if options.command == "cpu":
        _print_claims(options.results)
    return status or 0


def _replay(options: argparse.Namespace) -> int:
    # Only here: peers and Triton are needed.
    from benchmarks.replay import run_replay

    results = Results(options.results / "replay.json", "replay")
    run_replay(results, _say)
    goals = goals_of(results.rows)
    for goal in goals:
        _say(str(goal))
    return int(options.check and not all(goal.holds for goal in goals))


_TRAININGS = {"full": FULL, "reference": BESIDE, "lora": LORA}


def _fits(options: argparse.Namespace) -> int:
    contents = load_scaling(options.results)
    if "heads" not in contents:
        _say(f"results: got no heads.json in {options.results}")
        _say("make it: python -m benchmarks scaling")
        return 1
    heads = Heads.of(contents["heads"]["rows"])
    model = next(each for each in LLAMAS if _short(each.name) == options.model)
    machine = next(each for each in MACHINES if each.name == options.gpu)
    recipe = _TRAININGS[options.training]
    _say(f"{model.name} on {options.gpus} {machine.name}, {recipe.name}: GB of a GPU by head,")
    _say(f"{' / '.join(kind.name for kind in KINDS)}; **too much**. On paper, not measured.\n")
    _say(layouts_table(heads, model, machine, recipe, options.gpus))
    return 0


def _short(name: str) -> str:
    """`8b` for Llama-3.1-8B."""
    return name.rpartition("-")[2].lower()


def _kernels(options: argparse.Namespace) -> int:
    # Only here: the rest does without Triton.
    from benchmarks.kernel_gate import run_gate

    return run_gate(options.kernels, write=not options.check, say=_say)


def _report(options: argparse.Namespace) -> int:
    places = Places(**{name.name: getattr(options, name.name) for name in fields(Places)})
    if options.check:
        return 0 if check_all(places, _say) else 1
    write_all(places)
    _print_claims(options.results)
    return 0


def _compare(options: argparse.Namespace) -> int:
    changes = compare_files(options.before, options.after)
    print("\n".join(map(str, changes)) or "no regression")
    return 1 if changes else 0


def _print_claims(folder: Path) -> None:
    files = load(folder)
    rows = {
        dtype: {row["candidate"]: row for row in files[f"head-{dtype}"]["rows"]}
        for dtype in ("fp32", "bf16")
    }
    over_context = context_claims(files["memory"]["rows"]) if "memory" in files else []
    for claim in (*claims_of(rows), *over_context):
        print(claim)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
