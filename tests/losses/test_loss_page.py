"""docs/losses.md says what the registry says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fused_prefopt.cli.losses import (
    COMMAND,
    formula,
    hyperparameters,
    losses_page,
    one_loss,
    with_losses,
    write_losses_page,
)
from fused_prefopt.losses import (
    available_losses,
    find,
    published_settings,
    register,
    registry,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "losses.md"
REGISTERED = available_losses()


def section(name: str) -> str:
    return losses_page().split(f"\n### {name}\n")[1].split("\n### ")[0]


def test_the_page_is_up_to_date():
    message = f"docs/losses.md: out of date, wants `{COMMAND}` to write it again"
    assert PAGE.read_text(encoding="utf-8") == losses_page(), message
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == with_losses(readme), message
    assert all(f"[{name}](docs/losses.md#{name})" in readme for name in REGISTERED)
    with pytest.raises(ValueError, match="wanted both"):
        with_losses("# A page")


def test_the_command_writes_the_page(tmp_path):
    command = [sys.executable, *COMMAND.split()[1:], str(tmp_path / "docs" / "page.md")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    assert (tmp_path / "docs" / "page.md").read_text(encoding="utf-8") == losses_page()


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
    row = next(line for line in losses_page().splitlines() if line.startswith(f"| [{name}]("))
    assert all(alias in row for alias in info.aliases) and info.paper in row


@pytest.mark.parametrize("name", published_settings())
def test_every_published_setting_is_shown_with_its_loss(name):
    setting = published_settings()[name]
    row = next(line for line in section(setting.loss).splitlines() if f"`{name}`" in line)
    for option, value in setting.hyperparameters.items():
        assert f"`{option}={value:g}`" in row
    assert f"{setting.learning_rate:g}" in row


@pytest.fixture
def own_registry(monkeypatch):
    """What is registered here is forgotten."""
    for name in ("_SPECS", "_NAMES"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


@pytest.mark.usefixtures("own_registry")
def test_a_new_loss_appears_on_the_page(tmp_path):
    @register("test-page", paper="Me 2027", aliases=("other",))
    def factory(*, beta: float = 0.1, gamma: float = 0.5):
        """``−log σ(βΔ)``.

        Args:
            beta: β, of |y| tokens
                and more.
        """
        return find("dpo").build(beta=beta)

    @register("test-bare", paper="Me 2027")
    def undocumented(*, beta: float = 0.1):
        return find("dpo").build(beta=beta)

    write_losses_page(tmp_path / "losses.md")
    found = (tmp_path / "losses.md").read_text(encoding="utf-8")
    assert "| [test-page](#test-page) | other | pairs | `reference` |  | Me 2027 |" in found
    # A hyperparameter without a meaning is shown without one, here and in the command line.
    explained = r"| `beta` | `0.1` | β, of \|y\| tokens and more. |"
    assert f"{explained}\n| `gamma` | `0.5` |  |" in section("test-page")
    assert "| `beta` | `0.1` |  |" in section("test-bare")
    rows = [line.split() for line in one_loss("test-page").splitlines()]
    assert ["beta", "0.1", *"β, of |y| tokens and more.".split()] in rows
    assert ["gamma", "0.5"] in rows
    assert ["beta", "0.1"] in [line.split() for line in one_loss("test-bare").splitlines()]
