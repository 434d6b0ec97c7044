"""The archives of a release: what they hold, that they are the same each time, and that they work.

`make dist` (`tests/dist.py`) tries them where only torch is installed, on the oldest and the newest
Python; here it is what needs neither a network nor another Python.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import dist
import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fused_prefopt as fp

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "kernels").is_dir():
    pytest.skip("a release is built from a checkout", allow_module_level=True)
pytest.importorskip("build")
tomllib = pytest.importorskip("tomllib")
pytestmark = pytest.mark.slow
# Integrations of frameworks that are in none of the extras.
OF_FRAMEWORKS = tuple(f"fused_prefopt.integrations.{n}" for n in ("axolotl", "llamafactory", "ms_"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
# What stands in archives for the time: early on the last day of 2026.
SECONDS = 1_798_675_200
PAGE = "[a](docs/a.md#x) ![p](b/p.png) [w](https://x.org/) [here](#top)\n"


def files_here() -> list[str]:
    """Files of the checkout and the link to the kernels, as git lists them where there is one."""
    link = ROOT / "fused_prefopt" / "kernels"
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for top in ("benchmarks", "docs", "examples", "fused_prefopt", "kernels", "tests"):
        found += (path for path in (ROOT / top).rglob("*") if link not in path.parents)
    names = (path.relative_to(ROOT) for path in found if path.is_file() or path.is_symlink())
    hidden = ("__pycache__", ".")
    return [str(name) for name in names if not any(p.startswith(hidden) for p in name.parts)]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dist.Archives:
    return dist.build(tmp_path_factory.mktemp("built"), files_here(), SECONDS)


@pytest.fixture(scope="module")
def metadata(archives) -> Metadata:
    with zipfile.ZipFile(archives.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return Metadata.from_email(wheel.read(name), validate=True)


def test_the_archives_hold_all_that_they_should_and_no_more(archives):
    assert dist.faults_of(archives) == []
    with zipfile.ZipFile(archives.wheel) as wheel:
        held = {name for name in wheel.namelist() if name.startswith("fused_prefopt/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_prefopt").rglob("*.py")}
    modules |= {f"fused_prefopt/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*.py")}
    assert held == modules | {"fused_prefopt/py.typed"}


def test_git_lists_what_a_release_is_built_from():
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list")
    listed = set(dist.known_files())
    assert listed >= {name for name in files_here() if name.startswith("fused_prefopt/")}
    assert listed >= {"setup.py", "MANIFEST.in", "kernels/tiles.py", *dist.UNPACKED} - {
        "fused_prefopt/kernels/tiles.py"
    }
    assert not [name for name in listed if name.startswith(".") or "__pycache__" in name]
    assert dist.epoch() > 1_700_000_000


@pytest.mark.parametrize(
    ("added", "left_out", "fault"),
    [
        ("tests/test_x.py", "", "the wheel holds tests/test_x.py"),
        ("kernels/tiles.py", "", "the wheel holds kernels/tiles.py"),
        ("", "fused_prefopt/py.typed", "the wheel lacks fused_prefopt/py.typed"),
        ("", "fused_prefopt/kernels/kl.py", "the wheel lacks fused_prefopt/kernels/kl.py"),
        ("page", "", "the long description leads to docs/a.md, which the index lacks"),
    ],
)
def test_a_fault_of_the_wheel_is_found(archives, tmp_path, added, left_out, fault):
    broken = tmp_path / archives.wheel.name
    with zipfile.ZipFile(archives.wheel) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            page = b"[a](docs/a.md)\n" if added == "page" and name.endswith("METADATA") else b""
            if name != left_out:
                new.writestr(name, old.read(name) + page)
        if "/" in added:
            new.writestr(added, "")
    assert dist.faults_of(dataclasses.replace(archives, wheel=broken)) == [fault]


def test_a_file_that_the_sources_lack_is_found(archives, tmp_path):
    for name in {*dist.UNPACKED} - {"tests/conftest.py"}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = dist.faults_of(dataclasses.replace(archives, unpacked=tmp_path))
    assert "the sources lack tests/conftest.py" in found
    assert sum(fault.startswith("the sources") for fault in found) == 1


def test_two_builds_are_the_same_to_the_byte(archives, tmp_path):
    again = dist.build(tmp_path, files_here(), SECONDS)
    assert again.wheel.read_bytes() == archives.wheel.read_bytes()
    assert again.sources.read_bytes() == archives.sources.read_bytes()


def test_the_wheel_works_where_it_is_installed(archives, tmp_path):
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--target", site]
    subprocess.run([sys.executable, *install, archives.wheel], check=True, capture_output=True)
    probe = [sys.executable, "-I", dist.PROBE, site]
    done = subprocess.run(probe, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["imported"] > 100
    assert not [name for name in found["refused"] if not name.startswith(OF_FRAMEWORKS)]


def test_the_metadata_are_valid_and_those_of_the_project(metadata):
    assert (metadata.name, str(metadata.version)) == (PROJECT["name"], fp.__version__)
    assert metadata.requires_python == SpecifierSet(PROJECT["requires-python"])
    assert metadata.provides_extra == [*PROJECT["optional-dependencies"]]
    assert metadata.license_expression == PROJECT["license"]
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description.startswith("# fused_prefopt\n")
    own = [Requirement(text) for text in PROJECT["dependencies"]]
    assert metadata.requires_dist[: len(own)] == own


def test_the_pythons_are_the_oldest_and_the_newest_that_are_promised():
    minors = re.findall(r"Python :: 3\.(\d+)", "\n".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert dist.PYTHONS == (f"3.{minors[0]}", f"3.{minors[-1]}")
    assert all((ROOT / f"tests/versions/dist-{each}.txt").is_file() for each in dist.PYTHONS)


@pytest.mark.parametrize(
    ("repository", "page"),
    [
        (None, "a  [w](https://x.org/) [here](#top)\n"),
        (
            "https://h.org/o/r",
            "[a](https://h.org/o/r/blob/v1.2.3/docs/a.md#x)"
            " ![p](https://h.org/o/r/raw/v1.2.3/b/p.png)"
            " [w](https://x.org/) [here](#top)\n",
        ),
    ],
)
def test_links_of_the_page_lead_to_the_repository_or_nowhere(repository, page):
    assert SETUP["long_description"](PAGE, repository, "1.2.3") == page


def test_what_the_page_is_made_of_is_read_from_the_project():
    assert SETUP["version_of"](SETUP["read"]("fused_prefopt/__init__.py")) == fp.__version__
    found = SETUP["repository_of"](SETUP["read"]("pyproject.toml"))
    assert found == PROJECT.get("urls", {}).get("Repository")
    urls = '[project.urls]\nRepository = "https://h.org/o/r/"\n'
    assert SETUP["repository_of"](urls) == "https://h.org/o/r"


def test_a_release_wants_its_tag_its_changelog_and_its_address(archives, tmp_path):
    version = fp.__version__
    (tmp_path / "CHANGELOG.md").write_text(f"## [{version}] - 2027-01-31\n")
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://h.org/o/r"\n')
    good = dataclasses.replace(archives, unpacked=tmp_path)
    assert dist.faults_of_tag(f"v{version}", good) == []
    assert dist.faults_of_tag("v9.9", good) == [f"tag: got v9.9, wanted v{version}"]
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    (tmp_path / "pyproject.toml").write_text("")
    assert dist.faults_of_tag(f"v{version}", good) == [
        f"CHANGELOG.md: wanted a section [{version}] with its date",
        "pyproject.toml: wanted Repository in [project.urls], for the page's links",
    ]
