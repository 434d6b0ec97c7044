"""Runs all tests of kernels, interpreted and executed, and notes which kernel each has launched.

`make emulate`: `python tests/proofs.py [--quick]` writes `benchmarks/results/proofs/proofs.json`,
of which `docs/kernels.md` shows a table. Compiled code is executed in every dtype, for every target
and with warps in other orders, unless it is to be quick: then in bf16 for every target, in lock
step. It fails where a test fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from compat import EXECUTED, INTERPRETED, KERNELS, MARKERS, ROOT, TESTS, commit_of_this, counts_of

RESULTS = ROOT / "benchmarks" / "results" / "proofs" / "proofs.json"
SETTINGS = {INTERPRETED: {"TRITON_INTERPRET": "1"}}


def run(part: str, settings: dict[str, str]) -> tuple[int, Counter[tuple[str, str, str]]]:
    """Tests that passed, and how often a kernel was launched on a machine in a dtype.

    Raises:
        SystemExit: a test failed, or none ran.
    """
    files = sorted(path for pattern in KERNELS for path in TESTS.rglob(pattern))
    with tempfile.TemporaryDirectory() as folder:
        report, launched = Path(folder, "report.xml"), Path(folder, "launched")
        paths = os.pathsep.join([str(ROOT), str(TESTS / "support")])
        settings = settings | {"LAUNCHED": str(launched), "PYTHONPATH": paths}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "launched", "-m", MARKERS[part]]
        command += ["--numprocesses", "auto", "--dist", "worksteal", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, *files], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | settings
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        counts: Counter[tuple[str, str, str]] = Counter()
        for line in launched.read_text(encoding="utf-8").splitlines():
            for kernel, machine, dtype, count in json.loads(line):
                counts[kernel, machine, dtype] += count
        return counts_of(report)["passed"], counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="bf16, in lock step")
    chosen = parser.parse_args()
    settings = SETTINGS | {EXECUTED: {"EMULATE": "gpus" if chosen.quick else "all"}}
    commit, passed, rows = commit_of_this(), {}, []
    for part in (EXECUTED, INTERPRETED):
        passed[part], counts = run(part, settings[part])
        rows += [
            {"kernel": kernel, "machine": machine, "dtype": dtype, "launches": count}
            for (kernel, machine, dtype), count in sorted(counts.items())
        ]
    content = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "triton": version("triton"),
        "everything": not chosen.quick,
        "passed": passed,
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
