"""Everything that shows results: the tables between the markers of a README, pages and pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.benchmark_pages import check_benchmarks, write_benchmarks
from benchmarks.kernel_pages import check_page, write_page
from benchmarks.mass_page import NAME, check_mass_page, load_masses, write_mass_page
from benchmarks.results import RESULTS, ROOT, load
from benchmarks.tables import head_table, origin

README = ROOT.parent / "README.md"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


def write_all(
    *, readme: Path, page: Path, docs: Path, results: Path, kernels: Path, masses: Path
) -> None:
    """Write every page and picture.

    Args:
        readme: gets the tables of `results`.
        page: of the kernels.
        docs: folder of benchmarks.md and drop_mass.md.
        results: folder of the CPU's results; those of GPUs lie beside it.
        kernels: folder of what the compiled kernels take.
        masses: folder of the study of `drop_mass`.
    """
    write_report(readme, results)
    write_page(page, kernels, results.parent)
    write_benchmarks(docs / "benchmarks.md", results.parent)
    write_mass_page(docs / NAME, masses)


def check_all(
    *,
    readme: Path,
    page: Path,
    docs: Path,
    results: Path,
    kernels: Path,
    masses: Path,
    say: Callable[[str], None] = print,
) -> bool:
    """Whether every page shows exactly what the results say; the arguments are `write_all`'s."""
    current = {
        "README": check_report(readme, results),
        page.name: check_page(page, kernels, results.parent),
        "benchmarks.md": check_benchmarks(docs / "benchmarks.md", results.parent),
        NAME: check_mass_page(docs / NAME, masses),
    }
    for name, agrees in current.items():
        if name == NAME and agrees and load_masses(masses) is None:
            say(f"{name} does not exist: `python -m benchmarks masses` has not been run")
        else:
            say(f"{name} agrees with the results" if agrees else f"{name} is out of date")
    return all(current.values())


def write_report(readme: Path = README, folder: Path = RESULTS / "cpu") -> None:
    """Fill the README's block and draw the pictures beside the results."""
    from benchmarks.pictures import draw_all

    results = load(folder)
    text = filled(readme.read_text(encoding="utf-8"), results, _relative(folder, readme))
    draw_all(results, folder)
    readme.write_text(text, encoding="utf-8")


def check_report(readme: Path = README, folder: Path = RESULTS / "cpu") -> bool:
    """Whether the README shows exactly what the results say, and its pictures exist."""
    text = readme.read_text(encoding="utf-8")
    wanted = filled(text, load(folder), _relative(folder, readme))
    pictures = ("time.png", "error.png", "sweep.png")
    return text == wanted and all((folder / name).exists() for name in pictures)


def filled(text: str, results: Mapping[str, Any], folder: str) -> str:
    """`text` with the block between the markers replaced.

    Raises:
        ValueError: the markers are missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README: wanted the markers {START} and {END}")
    return f"{before}{START}\n{block(results, folder)}\n{END}{after}"


def block(results: Mapping[str, Any], folder: str) -> str:
    """The tables and links to the pictures.

    Args:
        results: name → content of a results file.
        folder: where the pictures are, as seen from the README.
    """
    parts = []
    for name in ("head-fp32", "head-bf16"):
        rows = results[name]["rows"]
        parts += [f"**{_title(rows[0])}**", head_table(rows)]
    parts.append(f"![Time in P]({folder}/time.png)\n![Error against float64]({folder}/error.png)")
    sweep = results["sweep"]["rows"]
    size = f"{sweep[0]['dtype']}, D {sweep[0]['hidden_size']}, half of the tokens labelled"
    parts += [
        f"Extra peak memory, beyond the inputs and the two gradients ({size}):",
        f"![Extra peak memory]({folder}/sweep.png)",
        "Measured on " + origin(results["head-fp32"]),
    ]
    return "\n\n".join(parts)


def _title(row: Mapping[str, Any]) -> str:
    return (
        f"{row['dtype']}: {row['sequences']} × {row['length']} tokens,"
        f" {row['labelled_rows']} labelled, V {row['vocab']}, D {row['hidden_size']}"
    )


def _relative(folder: Path, readme: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), readme.resolve().parent)).as_posix()
