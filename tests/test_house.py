"""The house rules of a checkout: what imports what, how long files are."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "kernels").is_dir():
    pytest.skip("an archive of the sources is no checkout", allow_module_level=True)
PACKAGE = ROOT / "fused_prefopt"
CODE = ("fused_prefopt", "kernels", "benchmarks", "examples")
# Each part of the package, a folder or a file of it, and the parts that it may import, anywhere in
# its files. The lowest come first: calls go down only. `__init__` is the front and reaches all.
MAY_IMPORT: dict[str, set[str]] = {
    "checks": set(),
    "devices": set(),
    "distributed": set(),
    "kernels": set(),
    "types": {"checks"},
    "data": {"checks"},
    "statistics": {"checks", "distributed"},
    "losses": {"checks", "distributed", "statistics", "types"},
    "ops": {"checks", "devices", "distributed", "kernels", "types"},
    "hub": {"ops", "types"},
    "loss_kernel": {"devices", "kernels", "losses", "statistics", "types"},
    "measured_fields": {"losses", "ops", "types"},
    "preference": {
        "checks",
        "distributed",
        "loss_kernel",
        "losses",
        "measured_fields",
        "ops",
        "types",
    },
    "models": {"checks", "data", "distributed", "ops", "types"},
    "reference_cache": {"checks", "data", "models"},
    "reference": {"checks", "data", "distributed", "models", "reference_cache"},
    "evaluation": {"data", "losses", "models", "ops", "reference", "types"},
    "integrations": {
        "checks",
        "data",
        "distributed",
        "losses",
        "models",
        "ops",
        "preference",
        "reference",
        "reference_cache",
        "types",
    },
    "cli": {
        "checks",
        "data",
        "devices",
        "evaluation",
        "hub",
        "integrations",
        "losses",
        "models",
        "ops",
        "preference",
        "reference",
        "types",
    },
    "__main__": {"cli"},
}
# The one import that climbs, from inside a method: `LMHead.of` builds itself of a model.
CLIMB = ("fused_prefopt.types", "fused_prefopt.models.causal_lm")
# May be imported at the top of a file by these parts only.
OPTIONAL = {
    "transformers": {"integrations"},
    "accelerate": {"integrations"},
    "trl": {"integrations"},
    "axolotl": {"integrations"},
    "pydantic": {"integrations"},
    "llamafactory": {"integrations"},
    "swift": {"integrations"},
    "datasets": {"integrations"},
    "peft": set(),
    "safetensors": set(),
    "omegaconf": set(),
    "yaml": set(),
    "matplotlib": set(),
    "triton": {"kernels"},
}
# A file that is longer says in its docstring why it is one.
LONG, LONGEST = 450, 800
EXPLAINED = "one file"


def sources(*folders: str) -> list[Path]:
    """Python files below the folders, each once (`fused_prefopt/kernels` is a link)."""
    found = {
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if PACKAGE / "kernels" not in path.parents
    }
    return sorted(found)


def part_of(path: Path) -> str:
    """`ops` for fused_prefopt/ops/plan.py, `types` for fused_prefopt/types.py."""
    relative = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path, *, everywhere: bool = True) -> Iterator[str]:
    """Absolute names that a file imports; without `everywhere`, only when it is itself imported."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = resolved(path, child)
                yield from (f"{base}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif everywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def resolved(path: Path, node: ast.ImportFrom) -> str:
    """The module of `from ... import`, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    folders = path.relative_to(ROOT).parts[: -node.level]
    return ".".join((*folders, *([node.module] if node.module else [])))


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a fresh interpreter."""
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_no_package_and_is_linked():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")


@pytest.mark.parametrize("path", sources(*CODE, "tests"), ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_imports_kernels_by_its_bare_name(path):
    assert not [name for name in imports_of(path) if name.split(".")[0] == "kernels"]


def test_a_long_file_says_why_it_is_one():
    long = [
        path
        for path in sources(*CODE, "tests")
        if len(path.read_text(encoding="utf-8").splitlines()) > LONG
    ]
    silent = [
        str(path.relative_to(ROOT))
        for path in long
        if EXPLAINED not in (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").lower()
    ]
    assert not silent
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < LONGEST for path in long)


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", path.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert not [file for file in files if not (path.parent / file).exists()]


def test_tests_are_no_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


def modules() -> dict[str, set[str]]:
    """Each module of the package → the modules of it that it imports, at the top or later."""
    paths = {module_of(path): path for path in sources("fused_prefopt", "kernels")}
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for imported in imports_of(path):
            while imported and imported not in paths:
                imported = imported.rpartition(".")[0]
            # A package's own `__init__` is named by each `from` that reaches into it.
            if imported and imported not in (name, "fused_prefopt"):
                found[name].add(imported)
    return found


def module_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = ("fused_prefopt", *relative.parts) if relative.parts[0] == "kernels" else relative.parts
    return ".".join(parts).removesuffix(".__init__")


def test_every_part_is_listed_and_the_list_has_no_circle():
    parts = {part_of(path) for path in sources("fused_prefopt", "kernels")}
    assert parts - {"__init__"} == set(MAY_IMPORT)
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    assert len(order) == len(MAY_IMPORT)


@pytest.mark.parametrize(
    "path", sources("fused_prefopt", "kernels"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_calls_go_down_only(path):
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports_of(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        climbs = module_of(path) == CLIMB[0] and name.startswith(CLIMB[1])
        if package != "fused_prefopt" or target == part or climbs:
            continue
        is_part = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()
        # The package's front reaches everything: lower parts go to the module itself.
        assert is_part or (part, target) == ("cli", "__version__"), name
        assert not is_part or target in MAY_IMPORT[part], name


def test_no_module_reaches_itself():
    graph = modules()
    assert CLIMB[1] in graph[CLIMB[0]]
    top = set(imports_of(PACKAGE / "types.py", everywhere=False))
    assert not [name for name in top if ".models" in name]
    graph[CLIMB[0]] -= {CLIMB[1]}
    assert CLIMB[0] not in reached_from(CLIMB[1], graph), "the climb would be a circle"
    list(graphlib.TopologicalSorter(graph).static_order())


def reached_from(start: str, graph: dict[str, set[str]]) -> set[str]:
    found, left = set(), [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("path", sources("fused_prefopt"), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_dependencies_are_imported_where_they_are_used(path):
    for name in imports_of(path, everywhere=False):
        parts = OPTIONAL.get(name.split(".")[0])
        assert parts is None or part_of(path) in parts, name


def test_importing_the_package_imports_no_optional_dependency():
    code = """
import sys, torch
before = set(sys.modules)
import fused_prefopt
after = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(after & {"triton", "transformers", "trl", "peft", "datasets", "matplotlib"}))
"""
    assert python(code, PYTHONPATH=str(ROOT)) == "[]"


def test_transformers_is_not_shadowed_at_the_root_of_the_repository():
    pytest.importorskip("transformers")
    code = """
import sys
sys.path.insert(0, "")
from transformers import LlamaForCausalLM
print(LlamaForCausalLM.__name__)
"""
    assert python(code, cwd=ROOT) == "LlamaForCausalLM"
