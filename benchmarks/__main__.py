"""Measures, compiles and reports.

`python -m benchmarks cpu` measures the README's candidates, `grid` every peer and labelled share,
`methods` what the losses take of a step, `gpu` everything on a GPU before its deadline.
`python -m benchmarks kernels [--check]` compiles the kernels for GPUs and fails on a spill,
`python -m benchmarks report [--check]` shows all of it, and
`python -m benchmarks compare A.json B.json` fails on what became worse.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from benchmarks.benchmark_pages import PAGE as BENCHMARKS
from benchmarks.benchmark_pages import check_benchmarks, write_benchmarks
from benchmarks.claims import claims_of
from benchmarks.compare import compare_files
from benchmarks.cpu_grid import run_cpu_grid
from benchmarks.gpu import DEADLINE, run_gpu
from benchmarks.kernel_pages import PAGE, check_page, write_page
from benchmarks.kernel_results import KERNELS
from benchmarks.method_cost import run_methods
from benchmarks.report import README, check_report, write_report
from benchmarks.results import RESULTS, load
from benchmarks.suite import run_cpu


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="measure on the CPU, in less than ten minutes on 2 cores")
    cpu.add_argument("--rounds", type=int, default=7, help="rounds of the timings at most")
    kernels = commands.add_parser("kernels", help="compile the kernels for GPUs, without one")
    kernels.add_argument("--check", action="store_true", help="write no results")
    report = commands.add_parser("report", help="write the tables, the kernels' page, the pictures")
    report.add_argument("--check", action="store_true", help="fail where they are out of date")
    report.add_argument("--readme", type=Path, default=README)
    report.add_argument("--page", type=Path, default=PAGE)
    grid = commands.add_parser("grid", help="labelled shares and all peers on the CPU")
    grid.add_argument("--rounds", type=int, default=7, help="rounds of the timings at most")
    methods = commands.add_parser("methods", help="what the losses take of a step on the CPU")
    gpu = commands.add_parser("gpu", help="measure on a GPU, in less than nine minutes")
    gpu.add_argument(
        "--deadline", type=float, default=DEADLINE, help="seconds to begin nothing after"
    )
    gpu.add_argument("--results", type=Path, default=RESULTS / "h200")
    compared = commands.add_parser("compare", help="fail on regressions over the noise")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
    for command in (kernels, report):
        command.add_argument("--kernels", type=Path, default=KERNELS)
    for command in (cpu, grid, methods, report):
        command.add_argument("--results", type=Path, default=RESULTS / "cpu")
    options = parser.parse_args(arguments)

    if options.command == "cpu":
        # What peers warn of (deprecations, compile fallbacks) would bury the progress.
        warnings.simplefilter("ignore")
        run_cpu(options.results, count=options.rounds, say=_say)
        _print_claims(options.results)
        return 0
    if options.command in ("grid", "methods", "gpu"):
        warnings.simplefilter("ignore")
        if options.command == "grid":
            run_cpu_grid(options.results, options.rounds, _say)
        elif options.command == "methods":
            run_methods(options.results, _say)
        else:
            run_gpu(options.results, options.deadline, _say)
        return 0
    if options.command == "compare":
        changes = compare_files(options.before, options.after)
        print("\n".join(map(str, changes)) or "no regression")
        return 1 if changes else 0
    if options.command == "kernels":
        # Only here: the rest does without Triton.
        from benchmarks.kernel_gate import run_gate

        return run_gate(options.kernels, write=not options.check, say=_say)
    if options.check:
        current = {
            "README": check_report(options.readme, options.results),
            options.page.name: check_page(options.page, options.kernels),
            BENCHMARKS.name: check_benchmarks(),
        }
        for name, agrees in current.items():
            print(f"{name} agrees with the results" if agrees else f"{name} is out of date")
        return 0 if all(current.values()) else 1
    write_report(options.readme, options.results)
    write_page(options.page, options.kernels)
    write_benchmarks()
    _print_claims(options.results)
    return 0


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
