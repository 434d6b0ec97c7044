"""Runs TRL's own tests of its DPO and KTO trainers with ours in their place.

`python tests/trls_own_tests.py CHECKOUT` takes a checkout of TRL: its tests are in no package. What
they load from a hub is made in a folder (`tests/support/trl_stand_ins.py`). They run with TRL's own
classes and then with ours; what came of them is written to `docs/trl-tests.json` and shown in
`docs/trl-tests.md`. It fails where a test that passes with TRL's classes fails with ours for a
reason that is not among `EXPECTED`, and where one of those passes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from compat import PACKAGES, ROOT, TESTS, VERSIONS_OF, commit_of_this

PAGE = ROOT / "docs" / "trl-tests.md"
RESULTS = PAGE.with_suffix(".json")
FILES = ("test_dpo_trainer.py", "test_kto_trainer.py")
# Name of a test → why it fails with our classes, as it must.
EXPECTED = {
    "*compute_metrics": "`compute_metrics` takes logits, which ours never makes (TRL recomputes"
    " them with another forward pass, and says that it will stop); ours refuses it by name",
    "*test_train_model_dtype": "float16 weights grow to 2e4 in AdamW's second step, whose ε is 0"
    " there, and the backbone's hidden states become NaN, at which ours stops (`on_nonfinite`)",
    "test_dpo*precompute_ref_log_probs_raises_for_vision": "asserts that images with precomputed"
    " references are refused; ours takes them",
    "test_kto*precompute_ref_log_probs_raises_for_vision": "asserts TRL's words; ours takes images"
    " with precomputed references, refuses those of a loss with `kl`, and says so",
}
STAND_INS = """
import sys
from pathlib import Path
import trl_image_stand_ins, trl_stand_ins
for each in (trl_stand_ins, trl_image_stand_ins):
    each.make(Path(sys.argv[1]))
"""
HEAD = f"""# TRL's own tests

Written by `tests/trls_own_tests.py` from `{RESULTS.name}`; edit nothing here.

TRL's tests of its trainers (`{"`, `".join(FILES)}`), once with TRL's classes and once with
`FusedDPOTrainer`, `FusedKTOTrainer` and their configurations under TRL's names. Models and data are
stand-ins of their size and form, on a CPU. What TRL's own classes fail says nothing about ours: the
tests are of another version, or want a package or a model that is not here.
"""
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


def environment(work: Path) -> dict[str, str]:
    """No hub, one core, our package and the support of its tests."""
    path = os.pathsep.join(map(str, (ROOT, TESTS / "support")))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | own | quiet | {"HF_HOME": str(work / "cache")}


def run(work: Path, ours: bool, chosen: list[str]) -> dict[str, dict[str, str]]:
    """Test → its outcome and why, with our classes or TRL's.

    Args:
        work: has TRL's `tests`, and its models and data in `hub`.
        chosen: more words for pytest.
    """
    report = work / "report.xml"
    report.unlink(missing_ok=True)
    plugins = ["trls_helpers", *(["trls_classes"] if ours else [])]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, f"--rootdir={work}", f"--junitxml={report}"]
    command += [word for each in plugins for word in ("-p", each)] + chosen
    command += [str(work / "tests" / name) for name in FILES]
    # Their names are looked for from here.
    subprocess.run(command, cwd=work / "hub", env=environment(work), stdout=sys.stderr)
    return outcomes_of(report)


def outcomes_of(report: Path) -> dict[str, dict[str, str]]:
    """What pytest's JUnit report says of each test."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        outcome = PASSED if bad is None and skip is None else FAILED if skip is None else SKIPPED
        said = "" if outcome == PASSED else (skip if bad is None else bad).get("message", "")
        name = f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"
        lines = [line.strip() for line in said.splitlines() if line.strip()] or [""]
        found[name] = {"outcome": outcome, "why": lines[0][:200]}
    return found


def expectation(name: str) -> str | None:
    """Why a test is expected to fail with ours."""
    plain = name.partition("[")[0]
    return next((why for each, why in EXPECTED.items() if fnmatch(plain, each)), None)


def compared(own: dict[str, Any], ours: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Kind of result → test → why; no test is in two kinds."""
    kinds: dict[str, dict[str, str]] = {
        "passed": {},
        "expected to fail": {},
        "unexpectedly failing": {},
        "no longer failing": {},
        "failing with TRL's own, too": {},
        "skipped": {},
    }
    for name in sorted(own.keys() | ours.keys()):
        theirs, found = own.get(name), ours.get(name)
        why = expectation(name)
        if theirs is None or found is None:
            kinds["unexpectedly failing"][name] = "was not run with both"
        elif theirs["outcome"] == SKIPPED:
            kinds["skipped"][name] = theirs["why"]
        elif theirs["outcome"] == FAILED:
            kinds["failing with TRL's own, too"][name] = theirs["why"]
        elif found["outcome"] == PASSED:
            kinds["passed" if why is None else "no longer failing"][name] = ""
        elif why is None:
            kinds["unexpectedly failing"][name] = found["why"]
        else:
            kinds["expected to fail"][name] = why
    return kinds


def went_well(result: dict[str, Any]) -> bool:
    kinds = result["tests"]
    return (
        bool(kinds["passed"])
        and not kinds["unexpectedly failing"]
        and not kinds["no longer failing"]
    )


def page_of(result: dict[str, Any]) -> str:
    """The page that shows the result."""
    kinds, versions = result["tests"], result["versions"]
    stack = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = [HEAD, f"Tests of TRL {result['tests of']}; {stack}; commit {result['commit']},"]
    lines += [f"{result['date']}.", "", "| | tests |", "|---|---|"]
    lines += [f"| {kind} | {len(tests)} |" for kind, tests in kinds.items()]
    for kind, tests in kinds.items():
        if kind != "passed" and tests:
            lines += ["", f"## {kind[0].upper()}{kind[1:]}", ""]
            lines += [f"- `{name}`: {_plain(why)}" for name, why in tests.items()]
    return "\n".join(lines) + "\n"


def _plain(why: str) -> str:
    return why.replace("<", "&lt;").replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder with TRL's `tests` and `VERSION`")
    parser.add_argument("-k", default="", help="only these tests; nothing is written then")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # Not its package, which would be imported instead of the one that is installed.
        shutil.copytree(chosen.checkout / "tests", work / "tests")
        command = [sys.executable, "-c", STAND_INS, str(work / "hub")]
        subprocess.run(command, env=environment(work), check=True)
        words = ["-k", chosen.k] if chosen.k else []
        own, ours = (run(work, ours, words) for ours in (False, True))
    versions = [sys.executable, "-c", VERSIONS_OF, *PACKAGES]
    result = {
        "tests of": (chosen.checkout / "VERSION").read_text(encoding="utf-8").strip(),
        "commit": commit_of_this(),
        "date": datetime.date.today().isoformat(),
        "versions": json.loads(subprocess.run(versions, capture_output=True, check=True).stdout),
        "tests": compared(own, ours),
    }
    if not chosen.k:
        text = json.dumps(result, indent=1, ensure_ascii=False)
        RESULTS.write_text(f"{text}\n", encoding="utf-8")
        PAGE.write_text(page_of(result), encoding="utf-8")
    print(page_of(result))
    return 0 if went_well(result) else 1


if __name__ == "__main__":
    sys.exit(main())
