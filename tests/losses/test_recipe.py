"""The recipes for a loss, followed to the letter in a copy of the tree.

README adds one of known parts, CONTRIBUTING one with a margin of its own.
"""

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
PAGE = "docs/losses.md"
# New losses and registered ones that judge and need the same: what meets these meets those.
TWINS = {"my-loss": "ipo", "my-margin-loss": "odpo"}
# Beside the cases of both by name: the page, and the new part with all others.
SELECTED = f"{' or '.join((*TWINS, *TWINS.values()))} or up_to_date or (whole_space and LogRatio)"
# What the registered losses are called, need and default to, a second time: no row for a new one.
WRITTEN_DOWN = {
    f"tests/losses/test_registry.py::{test}"
    for test in (
        "test_names_needs_and_defaults_are_the_tables",
        "test_the_losses_of_trl_go_by_its_names",
    )
}
WHERE = r"(?:at\s+the\s+end\s+of|to\s+the\s+end\s+of)\s+`([^`]+)`"
LOSSES = """
from fused_prefopt.cli.main import main
for words in (["losses"], ["losses", "my-loss"], ["losses", "my-margin-loss"]):
    assert main(words) == 0

import torch
import fused_prefopt as fp

reference, rewards = torch.tensor([-3.0, -4.0, -5.0, -6.0]), torch.tensor([2.0, 0.0, 1.0, 3.0])
batch = fp.LogpBatch(-torch.arange(4.0), torch.ones(4).long(), reference, rewards=rewards)
margins = 0.3 * (batch.policy - reference)
margins = margins[:2] - margins[2:]
for name, targets in (("my-loss", [0.5, 0.5]), ("my-margin-loss", [0.5, 0.0])):
    wanted = torch.nn.functional.softplus(torch.tensor(targets) - margins)
    torch.testing.assert_close(fp.PreferenceLoss(name, beta=0.3).from_logps(batch).losses, wanted)
"""


@dataclass(frozen=True)
class Recipe:
    """A section of a document: paste its blocks at the ends of the files it names, run this."""

    document: str
    heading: str
    name: str

    def text(self) -> str:
        document = (ROOT / self.document).read_text(encoding="utf-8")
        return document.split(f"\n## {self.heading}\n")[1].split("\n## ")[0]

    def blocks(self) -> dict[str, str]:
        """File → code for its end."""
        blocks = dict(re.findall(rf"(?s){WHERE}:\n\n```python\n(.*?)```", self.text()))
        assert len(blocks) == self.text().count("```python")
        return blocks

    def command(self) -> list[str]:
        (command,) = re.findall(r"`python (-m [^`]+)`", self.text())
        return command.split()


RECIPES = [
    Recipe("CONTRIBUTING.md", "A loss of known parts", "my-loss"),
    Recipe("CONTRIBUTING.md", "A loss with a new margin", "my-margin-loss"),
]


def contents(folder: Path) -> dict[str, str]:
    """Path → hash of every file, caches apart."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def python(folder: Path, *words: str, **environment: str) -> str:
    """Output of a fresh interpreter in the copy, which must end well."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    given = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | given | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def met(output: str, name: str) -> set[str]:
    """Tests that a loss with its defaults has passed."""
    return set(re.findall(rf"(?m)^PASSED (\S+?)\[{name}(?:\]|-\{{\}})", output))


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of the tree after both recipes; nothing but what they name has changed."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    folder = tmp_path_factory.mktemp("recipe") / "source"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    for number, recipe in enumerate(RECIPES, 1):
        before, blocks = contents(folder), recipe.blocks()
        for file, code in blocks.items():
            with (folder / file).open("a", encoding="utf-8") as end:
                end.write("\n\n" + code)
        python(folder, *recipe.command())
        after = contents(folder)
        assert before.keys() == after.keys() and len(blocks) == number
        changed = {name for name, value in after.items() if value != before[name]}
        assert changed == {*blocks, PAGE, "README.md"}
    return folder


@pytest.mark.slow
def test_the_new_losses_are_on_their_page_and_linted_like_the_rest(followed):
    page = (followed / PAGE).read_text(encoding="utf-8")
    assert "\n### my-loss\n\n``−log σ(m − γ)``, ``m = β(Δ_w − Δ_l)``.\n" in page
    assert "\n### my-margin-loss\n\n``−log σ(m − α max(0, s_w − s_l))``" in page
    assert "| `gamma` | `0.5` | γ, target margin in units of reward. |" in page
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff")
    files = sorted({file for recipe in RECIPES for file in recipe.blocks()})
    python(followed, "-m", "ruff", "check", "--no-cache", *files)
    python(followed, "-m", "ruff", "format", "--no-cache", "--check", *files)


@pytest.mark.slow
def test_the_command_line_shows_them_and_they_are_what_they_say(followed):
    shown = python(followed, "-c", LOSSES)
    assert all(f"\n{recipe.name} " in shown for recipe in RECIPES)
    assert "\nmy-loss\nMe et al. 2027, eq. 1\n" in shown
    assert re.search(r"(?m)^beta +0\.1 +β > 0, reward per nat\.$", shown)


@pytest.mark.slow
def test_every_test_of_the_registry_takes_the_new_losses(followed):
    before = contents(followed)
    # Whatever goes over the registered losses, their options or their parts.
    going_over = re.compile(r"\b(VARIANTS|REGISTERED)\b|\bparts\(|available_losses\(\)")
    files = [
        str(path.relative_to(followed))
        for path in (followed / "tests" / "losses").glob("test_*.py")
        if path.name != Path(__file__).name and going_over.search(path.read_text("utf-8"))
    ]
    # The interpreter is on from the start or not at all.
    for marker, environment in (("not slow", {}), ("interpreted", {"TRITON_INTERPRET": "1"})):
        if environment and importlib.util.find_spec("triton") is None:
            continue
        options = ("-q", "-rp", "-p", "no:cacheprovider", "-k", SELECTED, "-m", marker)
        output = python(followed, "-m", "pytest", *options, *files, **environment)
        for new, known in TWINS.items():
            assert met(output, new) == met(output, known) - WRITTEN_DOWN, new
            assert len(met(output, new)) >= (1 if environment else 15), new
    assert contents(followed) == before
