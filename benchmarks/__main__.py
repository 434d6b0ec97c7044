"""Measures, compiles and reports.

`python -m benchmarks cpu` measures the README's candidates, `grid` every peer, labelled share,
number of rows and dtype, `methods` what the losses take of a step, `trainer` whole trainer steps,
`kl` what the exact KL divergence takes, `masses` what a bounded-mass backward saves and costs, and
`gpu` all that a GPU tells before a deadline; `profile` shows the kernels of single steps.
`python -m benchmarks replay [--check]` predicts steps with a large head on GPUs, without one, and
`--check` fails where a goal is missed.
`python -m benchmarks kernels [--check]` compiles the kernels for GPUs and fails on a spill,
`python -m benchmarks report [--check]` shows all of it, and
`python -m benchmarks compare A.json B.json` fails on what became worse.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from benchmarks import cpu_grid, gpu, profile_step, suite, trainer_steps
from benchmarks.claims import claims_of
from benchmarks.compare import compare_files
from benchmarks.kernel_pages import PAGE
from benchmarks.kernel_results import KERNELS
from benchmarks.kl_rows import run_kl
from benchmarks.mass_study import MASSES, run_study
from benchmarks.method_cost import run_methods
from benchmarks.replay_pages import REPLAY
from benchmarks.report import README, check_all, write_all
from benchmarks.results import RESULTS, Results, load


def make_parser() -> argparse.ArgumentParser:
    """The command line; the function that runs a command is its `run`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, results: Path | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        if results is not None:
            command.add_argument("--results", type=Path, default=results, help="folder of JSON")
        return command

    cpu = add(
        "cpu", "the README's candidates, in less than ten minutes on 2 cores", RESULTS / "cpu"
    )
    cpu.add_argument("--deadline", type=float, default=suite.DEADLINE, help=_DEADLINE)
    cpu.set_defaults(
        run=lambda o: suite.run_cpu(o.results, count=o.rounds, seconds=o.deadline, say=_say)
    )
    text = "shares, rows, dtypes and all peers, in less than ten minutes on 2 cores"
    grid = add("grid", text, RESULTS / "cpu")
    grid.set_defaults(run=lambda o: cpu_grid.run_cpu_grid(o.results, o.rounds, _say))
    for command in (cpu, grid):
        command.add_argument("--rounds", type=int, default=7, help="rounds of the timings at most")
    methods = add("methods", "what the losses take of a step, in a minute", RESULTS / "cpu")
    methods.set_defaults(run=lambda o: run_methods(o.results, _say))
    text = "whole trainer steps, plain, ours and TRL's, in less than ten minutes on 2 cores"
    trainer = add("trainer", text, RESULTS / "cpu")
    trainer.set_defaults(run=lambda o: trainer_steps.run_trainer(o.results, _say))
    divergence = add("kl", "the exact KL from a reference model, in two minutes", RESULTS / "cpu")
    divergence.set_defaults(run=lambda o: run_kl(o.results, _say))
    masses = add(
        "masses", "the study of `drop_mass`, in about a quarter of an hour on 2 cores", MASSES
    )
    masses.set_defaults(run=lambda o: run_study(o.results, say=_say))
    on_gpu = add("gpu", "all that a GPU tells, in less than eight minutes", RESULTS / "h200")
    on_gpu.add_argument("--deadline", type=float, default=gpu.DEADLINE, help=_DEADLINE)
    on_gpu.add_argument("--again", action="store_true", help="measure anew what is on disk")
    on_gpu.set_defaults(run=lambda o: gpu.run_gpu(o.results, o.deadline, _say, again=o.again))
    profile = add("profile", "what one step's kernels take, and where it waits")
    profile.add_argument("cases", nargs="*", metavar="CASE", help="such as llama-3:recompute")
    profile.set_defaults(run=lambda o: profile_step.run_profile(o.cases, _say))

    replay = add("replay", "predict steps with a large head on GPUs, in about a minute", REPLAY)
    replay.add_argument("--check", action="store_true", help="fail where a goal is missed")
    replay.set_defaults(run=_replay)
    kernels = add("kernels", "compile the kernels for GPUs, without one")
    kernels.add_argument("--check", action="store_true", help="write no results")
    kernels.set_defaults(run=_kernels)
    report = add("report", "write tables, pages and pictures from the results", RESULTS / "cpu")
    report.add_argument("--check", action="store_true", help="fail where they are out of date")
    report.add_argument("--readme", type=Path, default=README)
    report.add_argument("--page", type=Path, default=PAGE, help="of the kernels")
    report.add_argument("--docs", type=Path, default=PAGE.parent, help="folder of the other pages")
    report.add_argument("--masses", type=Path, default=MASSES)
    report.set_defaults(run=_report)
    for command in (kernels, report):
        command.add_argument("--kernels", type=Path, default=KERNELS)
    compared = add("compare", "fail on regressions over the noise")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    compared.set_defaults(run=_compare)
    return parser


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
    from benchmarks.replay_goals import goals_of

    results = Results(options.results / "replay.json", "replay")
    run_replay(results, _say)
    goals = goals_of(results.rows)
    for goal in goals:
        _say(str(goal))
    return int(options.check and not all(goal.holds for goal in goals))


def _kernels(options: argparse.Namespace) -> int:
    # Only here: the rest does without Triton.
    from benchmarks.kernel_gate import run_gate

    return run_gate(options.kernels, write=not options.check, say=_say)


def _report(options: argparse.Namespace) -> int:
    places = {name: getattr(options, name) for name in ("readme", "page", "docs", "kernels")}
    places |= {"results": options.results, "masses": options.masses}
    if options.check:
        return 0 if check_all(**places, say=_say) else 1
    write_all(**places)
    _print_claims(options.results)
    return 0


def _compare(options: argparse.Namespace) -> int:
    changes = compare_files(options.before, options.after)
    print("\n".join(map(str, changes)) or "no regression")
    return 1 if changes else 0


def _print_claims(folder: Path) -> None:
    rows = {
        dtype: {row["candidate"]: row for row in load(folder)[f"head-{dtype}"]["rows"]}
        for dtype in ("fp32", "bf16")
    }
    for claim in claims_of(rows):
        print(claim)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
