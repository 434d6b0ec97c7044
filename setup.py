"""The long description: README.md, whose links and pictures lead from the package index to here.

The package index knows no folder beside the page. Where `Repository` of `[project.urls]` names the
repository, a relative link leads there, to the tag of this version; without one the words of a
link stay, and pictures are left out. All else is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
LINK = re.compile(r"(?P<picture>!?)\[(?P<words>[^\]]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)")


def long_description(text: str, repository: str | None, version: str) -> str:
    """The page with links that hold everywhere.

    Args:
        text: Markdown, with links relative to the repository's root.
        repository: its address on the web, without a slash at the end; None: it has none.
        version: of the package, whose tag is `v<version>`.
    """

    def absolute(link: re.Match[str]) -> str:
        if repository is None:
            return "" if link["picture"] else link["words"]
        kind = "raw" if link["picture"] else "blob"
        address = f"{repository}/{kind}/v{version}/{link['path']}"
        return f"{link['picture']}[{link['words']}]({address})"

    return LINK.sub(absolute, text)


def repository_of(project: str) -> str | None:
    """`Repository` of `[project.urls]`; with an expression: Python 3.10 reads no TOML."""
    found = re.search(r'^Repository = "([^"]+?)/?"$', project, re.MULTILINE)
    return found[1] if found else None


def version_of(source: str) -> str:
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    return found


def read(path: str) -> str:
    return (HERE / path).read_text(encoding="utf-8")


if __name__ == "__main__":
    setup(
        long_description=long_description(
            read("README.md"),
            repository_of(read("pyproject.toml")),
            version_of(read("fused_prefopt/__init__.py")),
        ),
        long_description_content_type="text/markdown",
    )
