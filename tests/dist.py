"""Builds the wheel and the archive of the sources, and checks each where only torch is installed.

`python tests/dist.py [--tag TAG] [PYTHON ...]` builds both from the files that git knows, the wheel
out of the archive, and installs either alone in an environment of each PYTHON (of all of
`tests/versions/dist-*.txt`, without one) below `.compat`. What passes is put into `dist/`. With the
tag of a release it also wants the tag, the changelog and the pages' links to be of this version.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from typing import Any

from compat import ROOT, TESTS, Environment, python_of
from packaging.requirements import Requirement

# Also of a checkout that belongs to another user, as a container's does.
GIT = ("git", "-c", "safe.directory=*")
PYTHONS = ("3.10", "3.13")
# It renders the page of the package index as that does.
TWINE = Environment("dist", f"{sys.version_info.major}.{sys.version_info.minor}", ())
PROBE = TESTS / "support" / "installed_package.py"
# Run from the unpacked archive; all others are only collected.
TRIED = ("losses/test_pairwise.py", "losses/test_golden.py", "ops/test_logps.py", "test_house.py")
# In a wheel there are these alone, in the archive at least those below.
PACKAGED = (".py", "py.typed")
UNPACKED = (
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "benchmarks/__main__.py",
    "docs/losses.md",
    "examples/quickstart.py",
    "fused_prefopt/kernels/tiles.py",
    "fused_prefopt/py.typed",
    "pyproject.toml",
    "requirements-dev.txt",
    "setup.py",
    "tests/conftest.py",
    "tests/support/truth.py",
    "tests/versions/oldest.txt",
)
# What a module says that needs more: how to get it, or, of those that only others of them import,
# which of `[trainers]` it lacks.
REFUSALS = ("pip install", "No module named 'transformers'", "No module named 'accelerate'")
# `mypy` of an environment that has the package: types that it sees, and an error that it must find.
TYPED = """
import torch
import fused_prefopt as fp

hidden, weight = torch.zeros(2, 3, 4), torch.zeros(5, 4)
labels = torch.zeros(2, 3, dtype=torch.long)
reveal_type(fp.sequence_logps(hidden, weight, labels))
reveal_type(fp.PreferenceLoss("dpo").from_logps)
fp.sequence_logps("hidden", weight, labels)
"""
REVEALED = (
    "fused_prefopt.types.SequenceLogps",
    "fused_prefopt.types.LossOutput",
    'Argument 1 to "sequence_logps" has incompatible type "str"',
)


class Fault(Exception):
    """What is wrong with an archive, or with what a check needs."""


@dataclass(frozen=True)
class Archives:
    """What a release consists of.

    Args:
        wheel: `fused_prefopt-<version>-py3-none-any.whl`.
        sources: `fused_prefopt-<version>.tar.gz`.
        unpacked: the folder that the sources hold, from which the wheel was built.
    """

    wheel: Path
    sources: Path
    unpacked: Path


def build(folder: Path, files: list[str], seconds: int) -> Archives:
    """Build the archive of the sources, and out of it the wheel, always of the same bytes.

    Args:
        folder: an empty one, for both and what they are built from.
        files: of the checkout, relative to its root.
        seconds: the time that stands in both, since 1970.
    """
    source = folder / "source"
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    sources = _built("--sdist", source, folder, seconds)
    settle(sources, seconds)
    with tarfile.open(sources) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Archives(_built("--wheel", unpacked, folder, seconds), sources, unpacked)


def known_files() -> list[str]:
    """Files of the checkout that git tracks or would add, without hidden ones: none is packed."""
    command = [*GIT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    command += ["--", ".", ":(exclude).*"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = sorted(filter(None, set(listed.split("\0"))))
    # Git lists what has just been deleted, too.
    return [name for name in files if os.path.lexists(ROOT / name)]


def epoch() -> int:
    """Seconds that stand in the archives for the time: `SOURCE_DATE_EPOCH`, or the commit's."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = [*GIT, "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout)


def _built(kind: str, source: Path, folder: Path, seconds: int) -> Path:
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", folder, source]
    _run(command, cwd=folder, SOURCE_DATE_EPOCH=str(seconds))
    (built,) = set(folder.iterdir()) - before
    return built


def settle(archive: Path, seconds: int) -> None:
    """Write a tar.gz anew without what differs from one building of it to the next."""
    with tarfile.open(archive) as old:
        held = {item.name: (item, old.extractfile(item)) for item in old.getmembers()}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
            for name in sorted(held):
                item, content = held[name]
                item.mtime, item.uid, item.gid, item.uname, item.gname = seconds, 0, 0, "", ""
                item.mode = 0o755 if item.isdir() or item.mode & 0o100 else 0o644
                item.pax_headers = {}
                new.addfile(item, content)
    with archive.open("wb") as file:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=seconds) as squeezed:
            squeezed.write(packed.getvalue())


def faults_of(archives: Archives) -> list[str]:
    """What the archives hold and should not, or lack."""
    found = []
    with zipfile.ZipFile(archives.wheel) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        described = f"{'-'.join(archives.wheel.name.split('-')[:2])}.dist-info/"
        metadata = message_from_bytes(wheel.read(f"{described}METADATA"))
        links = [i.filename for i in wheel.infolist() if (i.external_attr >> 28) == 0o12]
    inside = {name for name in names if not name.startswith(described)}
    wanted = {
        str(path.relative_to(archives.unpacked))
        for path in (archives.unpacked / "fused_prefopt").rglob("*")
        if path.name.endswith(PACKAGED)
    }
    found += [f"the wheel holds {name}" for name in sorted(inside - wanted)]
    found += [f"the wheel lacks {name}" for name in sorted(wanted - inside)]
    found += [f"the wheel holds the link {name}" for name in links]
    found += [
        f"the sources lack {name}" for name in UNPACKED if not (archives.unpacked / name).is_file()
    ]
    hidden = [path.name for path in archives.unpacked.iterdir() if path.name.startswith(".")]
    found += [f"the sources hold {name}" for name in hidden]
    page = str(metadata.get_payload())
    relative = re.findall(r"\]\((?![a-z]+:|#)([^)\s]+)\)", page)
    found += [f"the long description leads to {link}, which the index lacks" for link in relative]
    return found


def faults_of_tag(tag: str, archives: Archives) -> list[str]:
    """What a release of that tag lacks."""
    version = archives.wheel.name.split("-")[1]
    found = [] if tag == f"v{version}" else [f"tag: got {tag}, wanted v{version}"]
    changes = (archives.unpacked / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        found.append(f"CHANGELOG.md: wanted a section [{version}] with its date")
    project = (archives.unpacked / "pyproject.toml").read_text(encoding="utf-8")
    if not re.search(r'^Repository = "https://', project, re.MULTILINE):
        found.append("pyproject.toml: wanted Repository in [project.urls], for the page's links")
    return found


def check_page(archives: Archives) -> None:
    """The long description is rendered as the package index renders it."""
    TWINE.make()
    check = [TWINE.interpreter, "-m", "twine", "check", "--strict"]
    _run([*check, archives.wheel, archives.sources], cwd=archives.unpacked)


def check_sources(archives: Archives) -> None:
    """The unpacked sources are all that their tests need."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    settings = {"PYTHONPATH": str(archives.unpacked), "OMP_NUM_THREADS": "1"}
    _run([*pytest, "--collect-only", "tests"], cwd=archives.unpacked, **settings)
    tried = [f"tests/{name}" for name in TRIED]
    print(_run([*pytest, *tried], cwd=archives.unpacked, **settings).splitlines()[-1])


def clean_environment(version: str) -> Environment:
    """An environment of that Python with torch, and nothing else; it is made.

    Raises:
        Fault: there is no such Python: another would prove nothing.
    """
    found = python_of(version)
    say = "import sys; print('%d.%d' % sys.version_info[:2])"
    if (got := _run([found, "-c", say], cwd=ROOT).strip()) != version:
        raise Fault(f"python{version}: got {got}, wanted it on the PATH")
    environment = Environment(f"dist-{version}", version, ())
    environment.make()
    return environment


def check_installed(archive: Path, environment: Environment, folder: Path) -> None:
    """Install an archive alone, use it as a stranger would, and take it away again."""
    pip = [environment.interpreter, "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", "--force-reinstall", "--no-deps", archive], cwd=folder)
    try:
        _run([*pip, "check"], cwd=folder)
        check_use(environment, folder)
        check_types(environment, folder)
        # What each extra asks for is to be had on this Python.
        needed = [*pip, "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        _run([*needed, *required_by_extras(environment)], cwd=folder)
    finally:
        _run([*pip, "uninstall", "--quiet", "--yes", "fused-prefopt"], cwd=folder)


def required_by_extras(environment: Environment) -> list[str]:
    """Requirements that the extras of the installed package add on the environment's Python."""
    say = "import importlib.metadata as m, json; print(json.dumps(m.requires('fused-prefopt')))"
    lines = json.loads(_run([environment.interpreter, "-I", "-c", say], cwd=ROOT))
    found = set()
    for requirement in map(Requirement, lines):
        (extra,) = re.findall(r'extra == "([^"]+)"', str(requirement.marker)) or [""]
        here = {"extra": extra, "python_version": environment.python}
        if extra and requirement.name != "fused-prefopt" and requirement.marker.evaluate(here):
            found.add(f"{requirement.name}{requirement.specifier}")
    return sorted(found)


def check_use(environment: Environment, folder: Path) -> None:
    """Every module, a loss and the command, in an environment without any extra."""
    site = environment.packages
    found: dict[str, Any] = json.loads(
        _run([environment.interpreter, "-I", PROBE, site], cwd=folder).splitlines()[-1]
    )
    for name, message in found["refused"].items():
        known = any(text in message for text in REFUSALS)
        if not known or not name.startswith("fused_prefopt.integrations."):
            raise Fault(f"{name}: {message}")
    command = environment.folder / "bin" / "fused-prefopt"
    said = _run([command, "--version"], cwd=folder).strip()
    if said != (wanted := _version(environment)):
        raise Fault(f"fused-prefopt --version: got {said}, wanted {wanted}")
    losses = _run([command, "losses"], cwd=folder)
    missing = [name for name in ("alpha-dpo", "gamma-simpo", "dro") if name not in losses]
    if missing:
        raise Fault(f"fused-prefopt losses: {missing} are not among them")
    health = _run([command, "doctor", "--device", "cpu"], cwd=folder)
    if "check torch, recompute" not in health:
        raise Fault(f"fused-prefopt doctor checked no path of the torch engine: {health}")
    print(f"  {found['imported']} modules, {len(found['refused'])} that name an extra")


def _version(environment: Environment) -> str:
    say = "from importlib.metadata import version; print(version('fused-prefopt'))"
    return _run([environment.interpreter, "-I", "-c", say], cwd=ROOT).strip()


def check_types(environment: Environment, folder: Path) -> None:
    """A type checker reads the package's annotations where it is installed."""
    program = folder / "uses.py"
    program.write_text(TYPED, encoding="utf-8")
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent"]
    mypy += ["--cache-dir", environment.folder / "mypy", "--python-executable"]
    told = _run([*mypy, environment.interpreter, program.name], cwd=folder, wanted=1)
    missing = [text for text in REVEALED if text not in told]
    if missing or "Found 1 error" not in told:
        raise Fault(f"mypy: wanted {missing or 'one error'} in\n{told}")


def _run(command: list[Any], *, cwd: Path, wanted: int = 0, **environment: str) -> str:
    """Output of a command, which must end with that status."""
    free = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=free | environment, capture_output=True, text=True)
    if done.returncode != wanted:
        words = " ".join(map(str, command))
        raise Fault(f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", help="of a release, such as v0.2.0")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help=", ".join(PYTHONS))
    chosen = parser.parse_args()
    if unknown := set(chosen.pythons) - set(PYTHONS):
        parser.error(f"PYTHON: got {sorted(unknown)}, needs some of {PYTHONS}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "built").mkdir()
        (folder / "elsewhere").mkdir()
        try:
            archives = build(folder / "built", known_files(), epoch())
            found = faults_of(archives)
            found += faults_of_tag(chosen.tag, archives) if chosen.tag else []
            if found:
                raise Fault("\n".join(found))
            check_page(archives)
            check_sources(archives)
            for version in chosen.pythons or PYTHONS:
                environment = clean_environment(version)
                for archive in (archives.wheel, archives.sources):
                    print(f"Python {version}: {archive.name}", flush=True)
                    check_installed(archive, environment, folder / "elsewhere")
        except Fault as fault:
            print(fault, file=sys.stderr)
            return 1
        (ROOT / "dist").mkdir(exist_ok=True)
        for archive in (archives.wheel, archives.sources):
            shutil.copy(archive, ROOT / "dist")
            print(ROOT / "dist" / archive.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
