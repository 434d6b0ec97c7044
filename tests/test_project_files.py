"""Files for others' tools: the citation, the public checks, and what pre-commit runs."""

from __future__ import annotations

import re
import shlex
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from compat import ENVIRONMENTS
from dist import PYTHONS

import fused_prefopt as fp
from fused_prefopt.losses.registry import find

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / ".github").is_dir():
    pytest.skip("an archive of the sources is no checkout", allow_module_level=True)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# Loss → what its registration and the citation both say of its paper.
PAPERS = {
    "alpha-dpo": "arXiv:2410.10148",
    "gamma-dpo": "arXiv:2506.03690",
    "gamma-simpo": "arXiv:2506.03690",
    "dro": "Direct Reward Optimization",
}


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    return read("CITATION.cff")


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return read(".github/workflows/ci.yml")["jobs"]


def test_the_citation_has_what_its_format_wants(citation):
    assert citation["cff-version"] == "1.2.0"
    assert citation.keys() >= {"message", "title", "authors", "version", "date-released"}
    for work in (citation, *citation["references"]):
        assert work["title"] and work["type"]
        assert all(
            "name" in one or {"family-names", "given-names"} <= one.keys()
            for one in work["authors"]
        )
    assert all(len(work.get("authors", [])) > 0 for work in citation["references"])


def test_the_citation_is_of_this_version(citation):
    assert citation["version"] == fp.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (day,) = re.findall(rf"^## \[{re.escape(fp.__version__)}\] - (\S+)$", changes, re.MULTILINE)
    assert date.fromisoformat(citation["date-released"]) == date.fromisoformat(day)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{citation["license"]}"' in project
    assert all(f'"{word}"' in project for word in citation["keywords"])


@pytest.mark.parametrize("loss", PAPERS)
def test_the_paper_of_a_loss_is_cited(citation, loss):
    assert PAPERS[loss] in find(loss).paper
    works = [work for work in citation["references"] if PAPERS[loss] in str(work)]
    assert len(works) == 1
    assert loss in works[0]["notes"]
    number = PAPERS[loss].removeprefix("arXiv:")
    address = works[0]["url"]
    assert address.endswith(f"/abs/{number}") or "openreview" in address


def made_by(job: dict[str, Any]) -> list[str]:
    """Targets of `make` that a job runs."""
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    assert all(line.startswith("make ") for line in lines)
    return [line.split()[1] for line in lines]


def test_the_public_checks_run_the_targets_of_make(jobs):
    run = {target for job in jobs.values() for target in made_by(job)}
    assert run == {"test", "docs", "dist", "distributed", "compat"}
    assert run <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


def test_the_public_checks_have_every_environment_with_its_python(jobs):
    matrix = jobs["compat"]["strategy"]["matrix"]["include"]
    wanted = {each.name: each.python for each in ENVIRONMENTS if each.name != "distributed"}
    assert {entry["name"]: entry["python"] for entry in matrix} == wanted
    (setup,) = [s["with"] for s in jobs["dist"]["steps"] if "setup-python" in s.get("uses", "")]
    assert set(setup["python-version"].split()) >= {*PYTHONS}


def test_only_the_job_that_publishes_may_and_after_all_others(jobs):
    workflow = read(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in jobs.items() if "permissions" in job}
    assert granted == {"publish": {"id-token": "write"}}
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"publish", "compat"}
    assert jobs["publish"]["if"] == "github.ref_type == 'tag'"
    assert all(job["timeout-minutes"] for job in jobs.values())


def test_pre_commit_runs_the_commands_of_make_lint_on_the_pinned_tools():
    config = read(".pre-commit-config.yaml")
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    linted = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]
    commands = [shlex.split(line.replace("$(RUN) -m ", "")) for line in linted.splitlines()]
    assert set(hooks) == {"-".join(words[: 2 if words[0] == "ruff" else 1]) for words in commands}
    for name, hook in hooks.items():
        entry = hook["entry"].split()
        assert entry[:3] == [".venv/bin/python", "-m", name.split("-")[0]]
        assert hook["language"] == "system"
    pins = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    for tool in ("ruff", "mypy"):
        assert f"{tool}=={version(tool)}\n" in pins
