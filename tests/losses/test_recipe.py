"""README's recipe "How to add a loss", followed to the letter in a copy of the tree."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "my-loss"
# Lists of losses live in these; what is slow among them takes minutes.
WHOLE = [
    "test_loss_registry.py",
    "test_loss_table.py",
    "test_loss_page.py",
    "test_collision.py",
    "test_losses_over_ranks.py",
    "test_statistics_distributed.py",
]
# These have a case for every loss, by its name.
BY_NAME = [
    "test_every_loss.py",
    "test_cli.py",
    "test_loss_fused.py",
    "test_preference.py",
    "test_losses_beside_reference.py",
]
INTERPRETED = "interpreted_losses.py"


@dataclass(frozen=True)
class Recipe:
    """What README's section says to do: paste this code there, then run this."""

    file: str
    code: str
    command: str


def recipe() -> Recipe:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## How to add a loss\n")[1].split("\n## ")[0]
    (file,) = re.findall(r"Register the composition at the end of\s+`([^`]+)`", section)
    (code,) = re.findall(r"(?s)```python\n(.*?)```", section)
    (command,) = re.findall(r"`python (-m [^`]+)`", section)
    return Recipe(file, code, command)


def contents(folder: Path) -> dict[str, str]:
    """Path → hash of every file, caches apart."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def python(folder: Path, *words: str, **environment: str) -> str:
    """Output of a fresh interpreter in the copy, which must end well."""
    given = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | given | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def run_tests(folder: Path, *words: str, **environment: str) -> str:
    return python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, **environment)


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of the tree after the recipe, and nothing but what it names has changed."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    folder = tmp_path_factory.mktemp("recipe") / "source"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    before, steps = contents(folder), recipe()
    with (folder / steps.file).open("a", encoding="utf-8") as file:
        file.write("\n\n" + steps.code)
    python(folder, *steps.command.split())
    after = contents(folder)
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed == {steps.file, "docs/losses.md"}
    return folder


@pytest.mark.slow
def test_the_pasted_loss_is_on_its_page_and_in_the_command_line(followed):
    page = (followed / "docs" / "losses.md").read_text(encoding="utf-8")
    assert f"\n### {NAME}\n\n``−log σ(m − γ)``, ``m = β(Δ_w − Δ_l)``.\n" in page
    assert "| `gamma` | `0.5` | γ, target margin in units of reward. |" in page
    shown = python(followed, "-m", "fused_prefopt", "losses", NAME)
    assert shown.startswith(f"{NAME}\nMe et al. 2027, eq. 1\n")
    assert re.search(r"(?m)^beta +0\.1 +β > 0, reward per nat\.$", shown)
    assert f"\n{NAME} " in python(followed, "-m", "fused_prefopt", "losses")


@pytest.mark.slow
def test_the_pasted_loss_is_linted_like_the_rest(followed):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff")
    file = recipe().file
    python(followed, "-m", "ruff", "check", "--no-cache", file)
    python(followed, "-m", "ruff", "format", "--no-cache", "--check", file)
    run_tests(followed, "tests/test_house.py", "-k", file)


@pytest.mark.slow
def test_every_test_of_the_registry_takes_the_pasted_loss(followed):
    before = contents(followed)
    files = [f"tests/{name}" for name in WHOLE]
    assert " passed" in run_tests(followed, "-m", "not slow", *files)
    files = [f"tests/{name}" for name in BY_NAME]
    assert " passed" in run_tests(followed, "-m", "not slow", "-k", f"{NAME} or is_a_table", *files)
    if importlib.util.find_spec("triton") is not None:
        options = ("-m", "not slow", "-k", NAME, f"tests/{INTERPRETED}")
        assert " passed" in run_tests(followed, *options, TRITON_INTERPRET="1")
    assert contents(followed) == before


@pytest.mark.slow
def test_the_pasted_loss_trains(followed):
    code = f"""
import torch
import fused_prefopt as fp

hidden = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
labels = torch.arange(24).reshape(4, 6) % 7
reference = torch.tensor([-3.0, -4.0, -5.0, -6.0])
results = [
    fp.PreferenceLoss(*name, beta=0.3)(hidden, torch.eye(7, 5), labels, reference=reference)
    for name in (["{NAME}"], ["dpo"])
]
wanted = torch.nn.functional.softplus(0.5 - (results[1].rewards[:2] - results[1].rewards[2:]))
torch.testing.assert_close(results[0].losses, wanted)
results[0].loss.backward()
assert hidden.grad.abs().sum() > 0
"""
    python(followed, "-c", code)
