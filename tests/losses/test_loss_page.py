"""docs/losses.md says what the registry says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_prefopt.command_line.losses import one_loss
from fused_prefopt.loss_page import COMMAND, formula, hyperparameters, text, write
from fused_prefopt.losses import available_losses, find, published_settings
from fused_prefopt.losses.registry import _NAMES, _SPECS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "losses.md"
REGISTERED = available_losses()


def section(name: str) -> str:
    return text().split(f"\n### {name}\n")[1].split("\n### ")[0]


def test_the_page_is_up_to_date():
    message = f"docs/losses.md: out of date, wants `{COMMAND}` to write it again"
    assert PAGE.read_text(encoding="utf-8") == text(), message


def test_the_command_writes_the_page(tmp_path):
    command = [sys.executable, *COMMAND.split()[1:], str(tmp_path / "docs" / "page.md")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    assert (tmp_path / "docs" / "page.md").read_text(encoding="utf-8") == text()


@pytest.mark.parametrize("name", REGISTERED)
def test_every_loss_has_its_formula_options_needs_and_paper(name):
    info, factory, found = REGISTERED[name], find(name).factory, section(name)
    assert formula(factory) in found and info.paper in found
    # First what the loss is, in the page's own notation.
    assert re.search(r"[LΔσ]|\bm\b", formula(factory).split("``")[1])
    assert list(hyperparameters(factory)) == list(info.defaults)
    for option, default in info.defaults.items():
        meaning = hyperparameters(factory)[option].replace("|", r"\|")
        assert f"| `{option}` | `{default!r}` | {meaning} |" in found
    assert all(f"`{field}`" in found for field in info.needs)
    assert ("- Statistic:" in found) is info.stateful
    assert ("- Spans the batch:" in found) is info.coupled
    row = next(line for line in text().splitlines() if line.startswith(f"| [{name}]("))
    assert all(alias in row for alias in info.aliases) and info.paper in row


@pytest.mark.parametrize("name", published_settings())
def test_every_published_setting_is_shown_with_its_loss(name):
    setting = published_settings()[name]
    row = next(line for line in section(setting.loss).splitlines() if f"`{name}`" in line)
    for option, value in setting.hyperparameters.items():
        assert f"`{option}={value:g}`" in row
    assert f"{setting.learning_rate:g}" in row


def test_a_new_loss_appears_on_the_page(tmp_path):
    def factory(*, beta: float = 0.1):
        """``−log σ(βΔ)``.

        Args:
            beta: β, of |y| tokens
                and more.
        """
        return find("dpo").build(beta=beta)

    _SPECS["test-page"] = type(find("dpo"))("test-page", factory, ("other",), "Me 2027")
    _NAMES["test-page"] = "test-page"
    try:
        write(tmp_path / "losses.md")
        found = (tmp_path / "losses.md").read_text(encoding="utf-8")
    finally:
        del _SPECS["test-page"], _NAMES["test-page"]
    assert "| [test-page](#test-page) | other | pairs | `reference` |  | Me 2027 |" in found
    assert r"| `beta` | `0.1` | β, of \|y\| tokens and more. |" in found
    assert found != text()


def test_a_hyperparameter_without_a_meaning_is_shown_without_one():
    def factory(*, beta: float = 0.1, gamma: float = 0.5):
        """``−log σ(βΔ)``.

        Args:
            beta: β.
        """
        return find("dpo").build(beta=beta)

    def undocumented(*, beta: float = 0.1):
        return find("dpo").build(beta=beta)

    for number, each in enumerate((factory, undocumented)):
        name = f"test-meaning-{number}"
        _SPECS[name] = type(find("dpo"))(name, each, (), "Me 2027")
        _NAMES[name] = name
    try:
        partly, bare = section("test-meaning-0"), section("test-meaning-1")
        shown = [one_loss(f"test-meaning-{number}") for number in range(2)]
    finally:
        for name in ("test-meaning-0", "test-meaning-1"):
            del _SPECS[name], _NAMES[name]
    assert "| `beta` | `0.1` | β. |\n| `gamma` | `0.5` |  |" in partly
    assert "| `beta` | `0.1` |  |" in bare
    rows = [[line.split() for line in each.splitlines()] for each in shown]
    assert ["beta", "0.1", "β."] in rows[0] and ["gamma", "0.5"] in rows[0]
    assert ["beta", "0.1"] in rows[1]
