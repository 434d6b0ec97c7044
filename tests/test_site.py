"""The site has every page and every public name; its picture is what its script draws.

`make docs` builds it, strictly, in an environment of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import fused_prefopt as fp
from fused_prefopt import data, losses, ops, statistics

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
ENTRIES = re.findall(
    r"(?m)^::: ([\w.]+)$",
    "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))),
)
# A module beside the names of its parts.
NO_ENTRY = {"presets"}
MODULES = (fp, ops, losses, data, statistics)


def tool(name: str):
    """A script of the site; it is no module of the package."""
    path = DOCS / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def pages_of(nav: list) -> list[str]:
    values = [value for each in nav for value in each.values()]
    return [p for v in values for p in (pages_of(v) if isinstance(v, list) else [v])]


def test_every_page_is_in_the_navigation_once():
    own = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    listed = pages_of(CONFIG["nav"])
    assert len(listed) == len(set(listed))
    assert set(listed) == own | {"contributing.md", "changelog.md"}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_an_entry(module):
    documented = {entry.rpartition(".")[2] for entry in ENTRIES}
    assert set(module.__all__) - NO_ENTRY <= documented


def test_the_trainers_have_entries():
    names = {"FusedDPOConfig", "FusedDPOTrainer", "FusedKTOConfig", "FusedKTOTrainer"}
    names |= {"PreferenceTrainer", "attach", "Attachment", "past_wrappers", "preference_outputs"}
    assert names <= {entry.rpartition(".")[2] for entry in ENTRIES}


def test_entries_are_there_once_and_documented():
    assert len(ENTRIES) == len(set(ENTRIES)) > 150
    for entry in ENTRIES:
        module, _, name = entry.rpartition(".")
        if module.startswith("fused_prefopt.integrations"):
            continue  # frameworks that are not here; mkdocstrings fails on what is missing
        found = getattr(importlib.import_module(module), name)
        said = getattr(found, "__doc__", None) or ""
        # What a dataclass says by itself is its signature.
        assert said and not said.startswith(f"{name}("), entry


def test_nothing_is_loaded_from_elsewhere():
    assert CONFIG["theme"]["font"] is False and CONFIG["strict"] is True
    whole = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    styles = (DOCS / "assets" / "site.css").read_text(encoding="utf-8")
    assert "//" not in whole and "//" not in styles


def test_the_check_of_the_built_site_sees_faults(tmp_path):
    faults = tool("check_site").faults
    (tmp_path / "other.html").write_text('<h2 id="here">Here</h2>')
    good = '<a href="other.html#here">x</a><a href="https://a.example">y</a>'
    (tmp_path / "page.html").write_text(good)
    assert faults(tmp_path) == []
    for bad in (
        '<script src="https://cdn.example/x.js"></script>',
        '<a href="missing.html">x</a>',
        '<a href="other.html#there">x</a>',
        '<img src="none.png">',
    ):
        (tmp_path / "page.html").write_text(good + bad)
        assert len(faults(tmp_path)) == 1, bad
    (tmp_path / "page.html").write_text(good)
    (tmp_path / "site.css").write_text("@import url(https://fonts.example/x.css);")
    assert len(faults(tmp_path)) == 1


def test_the_picture_is_what_its_script_draws():
    drawn = tool("draw_flow").picture()
    assert (DOCS / "flow.svg").read_text(encoding="utf-8") == drawn
