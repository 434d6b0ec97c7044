"""Runs the core of the tests on other versions than those of requirements-dev.txt.

`python tests/compat.py [NAME ...]` makes an environment of each of `tests/versions/NAME.txt` (of
all, without a name) below `.compat`, runs the parts of the tests there, writes what came of them to
`docs/compatibility.json` and shows it in `docs/compatibility.md`. It fails where a test fails.
`--part PART` runs one part alone; what others came to stays, with the commit it was run at.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = PAGE.with_suffix(".json")

INTERPRETED = "kernels, interpreted"
EXECUTED = "kernels, executed"
# Part → the marker of its tests among its files.
MARKERS = {INTERPRETED: "interpreted", EXECUTED: "executed"}
KERNELS = ("kernels/test_*.py", "ops/test_*.py", "losses/test_*.py")
TRL = "TRL's trainers"
ENGINES = "FSDP and DeepSpeed"
HUB = "the kernel hub's library"
# Part → its files.
PARTS = {
    "op": (
        "test_logps.py",
        "test_gradients.py",
        "test_input*.py",
        "test_autograd.py",
        "test_compiled.py",
        "test_plan.py",
        "test_cutting.py",
        "test_kept_probabilities.py",
        "test_batch.py",
        "test_kl.py",
        "test_tokens.py",
    ),
    INTERPRETED: KERNELS,
    EXECUTED: KERNELS,
    "losses": ("test_pairwise.py", "test_golden.py"),
    "transformers' trainers": ("test_attach.py", "test_metrics.py", "test_transformers.py"),
    TRL: ("integrations/test_trl_*.py",),
    "Axolotl": ("frameworks/test_axolotl.py",),
    "LLaMA-Factory": ("frameworks/test_llamafactory.py",),
    "ms-swift": ("frameworks/test_ms_swift.py", "frameworks/test_swift_options.py"),
    ENGINES: ("frameworks/test_deepspeed.py", "integrations/test_sharded_trainers.py"),
    HUB: ("hub/test_hub_*.py",),
}
# What needs no framework but transformers.
CORE = ("op", INTERPRETED, "losses", "transformers' trainers")
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "datasets",
    "trl",
    "axolotl",
    "llamafactory",
    "ms-swift",
    "deepspeed",
    "kernels",
)
HEAD = f"""# Compatibility

Written by `make compat` from `{RESULTS.name}`; edit nothing here.

What came of the tests on other versions than those of `requirements-dev.txt`, on which `make test`
runs: each column in an environment of its own, on a CPU. Kernels run in Triton's interpreter there,
and what that Triton compiles of them for an A100 and an H100 is executed by the tests' emulator.
Before Triton 3.7 that does not run on numpy 2.4 and later; the tests mend it for themselves
(`tests/support/interpreter.py`), and a GPU does not need it. Before torch 2.10 `torch.compile`
breaks its graph around the ops; with `fullgraph=True` it wants
`torch._dynamo.config.capture_dynamic_output_shape_ops = True`, which the tests set there.
"""
VERSIONS_OF = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Environment:
    """Packages of given versions, and what is run on them.

    Args:
        name: of its file in `tests/versions`.
        python: what it is made with, where that is installed.
        parts: of `PARTS`.
        apart: those that are run only where `--part` asks for them, as `make emulate` does.
        interpreted: Triton's interpreter is on in every part.
        base: name of another, whose packages it has wherever it has none of its own.
    """

    name: str
    python: str
    parts: tuple[str, ...]
    apart: tuple[str, ...] = ()
    interpreted: bool = False
    base: str | None = None

    @property
    def requirements(self) -> Path:
        return TESTS / "versions" / f"{self.name}.txt"

    @property
    def alone(self) -> Path:
        """What is installed after them without what it asks for, where there is such a file."""
        return TESTS / "versions" / f"{self.name}.alone.txt"

    @property
    def about(self) -> str:
        """The first line of its requirements."""
        return self.requirements.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")

    @property
    def folder(self) -> Path:
        return ROOT / ".compat" / self.name

    @property
    def interpreter(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Where its packages are; it has been made."""
        command = [self.interpreter, "-c", "import sysconfig as s; print(s.get_path('purelib'))"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return Path(done.stdout.strip()).resolve()

    def made_of(self) -> str:
        """All that decides what it holds."""
        files = [path for path in (self.requirements, self.alone) if path.is_file()]
        below = "" if self.base is None else environment_of(self.base).made_of()
        return below + "".join(map(_with_included, files))

    def make(self) -> None:
        """Install the packages, unless what is there was made of these requirements."""
        base = None if self.base is None else environment_of(self.base)
        if base is not None:
            base.make()
        made_of = self.folder / self.requirements.name
        wanted = self.made_of()
        if made_of.is_file() and made_of.read_text(encoding="utf-8") == wanted:
            return
        python = python_of(self.python)
        subprocess.run([python, "-m", "venv", "--clear", self.folder], check=True)
        pip = [self.interpreter, "-m", "pip", "install", "--quiet"]
        if base is not None:
            # Behind its own on the path.
            (self.packages / "base.pth").write_text(f"{base.packages}\n", encoding="utf-8")
            pip.append("--no-deps")
        subprocess.run([*pip, "--requirement", self.requirements], check=True)
        if self.alone.is_file():
            subprocess.run([*pip, "--no-deps", "--requirement", self.alone], check=True)
        made_of.write_text(wanted, encoding="utf-8")

    def versions(self) -> dict[str, str]:
        """Python's and the packages'; without those that are not installed."""
        command = [self.interpreter, "-c", VERSIONS_OF, *PACKAGES]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def run(self, part: str) -> dict[str, Any]:
        """Counts of the part's tests, names of those that failed, and why others were skipped."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        files = sorted(path for pattern in PARTS[part] for path in TESTS.rglob(pattern))
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        chosen = ["-m", MARKERS[part]] if part in MARKERS else []
        if self.interpreted or part == INTERPRETED:
            settings["TRITON_INTERPRET"] = "1"
        done = subprocess.run(
            [
                self.interpreter,
                "-m",
                "pytest",
                "-q",
                "--numprocesses",
                "auto",
                "--dist",
                # What a file's tests share there, trainings of two processes, is made once.
                "loadfile" if part == ENGINES else "worksteal",
            ]
            + ["-p", "no:cacheprovider", f"--junitxml={report}", *chosen, *files],
            env=os.environ | settings,
            cwd=ROOT,
        )
        counts = counts_of(report) if report.is_file() else {"failed": []}
        return {"exit": done.returncode, **counts}


ENVIRONMENTS = (
    Environment("gpu", "3.12", (*CORE, TRL), apart=(EXECUTED,)),
    Environment("oldest", "3.10", CORE, apart=(EXECUTED,)),
    # TRL 1.15 launches its own kernels on a CPU, too.
    Environment("trl-1.9", "3.11", (TRL,)),
    Environment("trl-1.10", "3.11", (TRL,), base="trl-1.13"),
    Environment("trl-1.11", "3.11", (TRL,), base="trl-1.13"),
    Environment("trl-1.12", "3.11", (TRL,), base="trl-1.13"),
    Environment("trl-1.13", "3.11", (TRL,)),
    Environment("trl-1.14", "3.11", (TRL,), base="trl-1.13"),
    Environment("trl-1.15", "3.11", (TRL,), base="trl-1.13", interpreted=True),
    Environment("trl-1.16", "3.11", (TRL,), base="trl-1.13"),
    Environment("axolotl", "3.11", ("Axolotl",)),
    Environment("llamafactory", "3.11", ("LLaMA-Factory",)),
    Environment("ms-swift", "3.11", ("ms-swift",)),
    Environment("distributed", "3.11", (ENGINES,)),
    Environment("kernel-hub", "3.11", (HUB,)),
)


def _with_included(path: Path) -> str:
    """A file of requirements, and those that it includes."""
    text = path.read_text(encoding="utf-8")
    lines = (line.split() for line in text.splitlines())
    included = [path.parent / words[1] for words in lines if words[:1] == ["--requirement"]]
    return text + "".join(map(_with_included, included))


def environment_of(name: str) -> Environment:
    (environment,) = (each for each in ENVIRONMENTS if each.name == name)
    return environment


def python_of(version: str) -> str:
    """The Python of that version, or this one, which the page then names."""
    try:
        name = f"python{version}"
        subprocess.run([name, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return sys.executable
    return name


def counts_of(report: Path) -> dict[str, Any]:
    """What pytest's JUnit report says."""
    passed, failed, skipped = 0, [], {}
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            reason = skip.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def went_well(result: dict[str, Any]) -> bool:
    return result["exit"] == 0 and not result["failed"] and result.get("passed", 0) > 0


def page_of(results: dict[str, Any]) -> str:
    """The page that shows the results."""

    def rows() -> Iterator[list[str]]:
        yield ["", *results]
        yield ["---"] * (1 + len(results))
        for package in ("python", *PACKAGES):
            yield [package, *(r["versions"].get(package, "none") for r in results.values())]
        for part in PARTS:
            yield [f"**{part}**", *(cell(r["parts"].get(part)) for r in results.values())]
        yield ["commit", *(f"{r['commit']}, {r['date']}" for r in results.values())]

    def cell(result: dict[str, Any] | None) -> str:
        if result is None:
            return "not run"
        if "passed" not in result:
            return f"nothing ran (exit {result['exit']})"
        skipped = sum(result["skipped"].values())
        text = f"{result['passed']} passed, {len(result['failed'])} failed, {skipped} skipped"
        text = text if went_well(result) else f"{text} (exit {result['exit']})"
        return f"{text}, at {result['commit']}, {result['date']}" if "commit" in result else text

    table = "\n".join(f"| {' | '.join(row)} |" for row in rows())
    about = "\n".join(f"- **{e.name}**: {e.about}" for e in ENVIRONMENTS if e.name in results)
    reasons = sorted(
        f"- {name}, {part}: {count} × {reason}"
        for name, result in results.items()
        for part, counts in result["parts"].items()
        for reason, count in counts.get("skipped", {}).items()
    )
    skips = "\n".join(["## Skipped", "", *reasons]) if reasons else ""
    return "\n\n".join(filter(None, [HEAD.strip(), about, table, skips])) + "\n"


def commit_of_this() -> str:
    """The commit that is tested, marked where files differ from it but for the results."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout

    written = [":(exclude)docs", ":(exclude)benchmarks/results"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return git("describe", "--always").strip() + ("-dirty" if changed else "")


def run(environment: Environment, commit: str, part: str | None = None) -> dict[str, Any]:
    """All that the results say of an environment, or of one part of it."""
    environment.make()
    parts = environment.parts if part is None else (part,)
    return {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "versions": environment.versions(),
        "parts": {part: environment.run(part) for part in parts},
    }


def merged(
    environment: Environment, before: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """What has been run now, beside what was run before on the same versions.

    A part that was run alone has its own commit, whatever that of the others.

    Raises:
        SystemExit: one part was run, on other versions than the others.
    """
    same, now = before["versions"] == result["versions"], result["parts"]
    if set(environment.parts) <= now.keys():
        kept = environment.apart if same else ()
        parts = {part: before["parts"][part] for part in kept if part in before["parts"]} | now
        whole = result
    elif same:
        origin = {"commit": result["commit"], "date": result["date"]}
        parts = before["parts"] | {part: each | origin for part, each in now.items()}
        whole = before
    else:
        raise SystemExit(f"{environment.name}: its versions have changed, run all of its parts")
    order = (*environment.parts, *environment.apart)
    return whole | {"parts": {part: parts[part] for part in order if part in parts}}


def store(environment: Environment, result: dict[str, Any]) -> None:
    """Put an environment's result among the others', and show them."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    if environment.name in results:
        result = merged(environment, results[environment.name], result)
    results[environment.name] = result
    results = {one.name: results[one.name] for one in ENVIRONMENTS if one.name in results}
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page_of(results), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--part", choices=PARTS, help="only this one of an environment's parts")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - set(names):
        parser.error(f"NAME: got {sorted(unknown)}, needs some of {names}")
    good, commit = True, commit_of_this()
    for environment in ENVIRONMENTS:
        asked = not chosen.names or environment.name in chosen.names
        has = chosen.part in (None, *environment.parts, *environment.apart)
        if asked and has:
            result = run(environment, commit, chosen.part)
            good = good and all(map(went_well, result["parts"].values()))
            store(environment, result)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
