"""What the site adds to the pages: root files, pictures, linked sources, and links to the API.

Pages are written to be read in the repository; their links out of `docs/` work on the site, too:
`../CONTRIBUTING.md` and `../CHANGELOG.md` are pages, pictures are copied, and any other file that a
page links to gets a page with its text. Names of the API in code spans lead to their entries.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = (".png", ".svg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".txt": "text"}
TITLED = re.compile(r"\[([\w-]+\.md)\](?=\(\1)")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
# An object's entry: see docs/api.
ENTRY = re.compile(r"(?m)^::: ([\w.]+)$")
# Nothing within these becomes a link.
KEPT = re.compile(
    r"(?s)<(a|h\d|pre)\b.*?</\1>|<code>(fp\.|losses\.|data\.)?(\w+)(?:\([^<]*\))?</code>"
)
# Beside names in capitals or of several words, which are no words of the text.
PLAIN = {"attach"}
# Numbers and words of a table that are read in one line.
SHORT = re.compile(r"<td([^>]*)>([^<]{1,24})</td>")
IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*)" ?/?>')


def entries() -> dict[str, tuple[str, str]]:
    """Name → page of the API and anchor, of every documented object."""
    return {
        path.rpartition(".")[2]: (f"api/{page.stem}.html", path)
        for page in sorted((DOCS / "api").glob("*.md"))
        for path in ENTRY.findall(page.read_text(encoding="utf-8"))
    }


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of root files and everything outside `docs/` that a page links to."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    pages = [(ROOT / name, DOCS) for name in ROOT_PAGES]
    pages += [(path, path.parent) for path in DOCS.rglob("*.md")]
    for path, folder in pages:
        base = ROOT if path.parent == ROOT else folder
        for target, _ in LINK.findall(path.read_text(encoding="utf-8")):
            source = (base / target).resolve()
            if DOCS in source.parents or not source.is_file() or source.name in ROOT_PAGES:
                continue
            place = of_outside(source)
            if place is None or files.get_file_from_path(place):
                continue
            if source.suffix in PICTURES:
                files.append(File.generated(config, place, abs_src_path=str(source)))
            else:
                files.append(File.generated(config, place, content=source_page(source)))
    return files


def of_outside(source: Path) -> str | None:
    """Where a file outside `docs/` is on the site."""
    if ROOT not in source.parents or source.name == "README.md":
        return None
    name = source.relative_to(ROOT).as_posix()
    return f"source/{name}" if source.suffix in PICTURES else f"source/{name}.md"


def source_page(source: Path) -> str:
    """A page with a file's text."""
    text, language = source.read_text(encoding="utf-8"), LANGUAGES.get(source.suffix, "text")
    name = source.relative_to(ROOT).as_posix()
    head = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
    return f"{head}\n# {name}\n\n````{language}\n{text}````\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links out of `docs/` lead to what `on_files` has added."""
    here = page.file.src_uri
    of_root = {page: name for name, page in ROOT_PAGES.items()}
    base = ROOT if here in of_root else (DOCS / here).parent

    def moved(match: re.Match[str]) -> str:
        source, anchor = (base / match[1]).resolve(), match[2] or ""
        if source.name in ROOT_PAGES and source.parent == ROOT:
            place = ROOT_PAGES[source.name]
        elif source.name == "README.md" and source.parent == ROOT:
            place, anchor = "index.md", ""
        elif DOCS in source.parents:
            place = source.relative_to(DOCS).as_posix()
        else:
            place = of_outside(source) or match[1]
        return posixpath.relpath(place, posixpath.dirname(here) or ".") + anchor

    def titled(match: re.Match[str]) -> str:
        first = (base / match[1]).read_text(encoding="utf-8").splitlines()[0]
        return f"[{first.removeprefix('# ')}]"

    # Code is no place for links.
    parts = re.split(r"(?ms)(^```.*?^```)", markdown)
    return "".join(
        part if i % 2 else LINK.sub(moved, TITLED.sub(titled, part)) for i, part in enumerate(parts)
    )


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Link names of the API to their entries and pictures to themselves; mark short cells."""
    known, here = entries(), page.file.dest_uri

    def linked(match: re.Match[str]) -> str:
        _, module, name = match.groups()
        is_name = name and (module or name in PLAIN or re.search(r"[A-Z]|\w_\w", name))
        if not is_name or name not in known:
            return match[0]
        place = posixpath.relpath(known[name][0], posixpath.dirname(here) or ".")
        return f'<a href="{place}#{known[name][1]}">{match[0]}</a>'

    def framed(match: re.Match[str]) -> str:
        words, source = match.groups()
        kind = "" if source.endswith(".svg") else ' class="wide"'
        return f'<a class="picture" href="{source}"><img alt="{words}" src="{source}"{kind}></a>'

    html = SHORT.sub(r'<td class="short"\1>\2</td>', html)
    return IMAGE.sub(framed, KEPT.sub(linked, html))
