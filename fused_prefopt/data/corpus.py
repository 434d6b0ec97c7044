"""A corpus of real English that needs no download: the standard library's own documentation."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    "__pycache__ config dist-packages encodings ensurepip idlelib lib-dynload lib2to3 pydoc_data "
    "site-packages test tests turtledemo".split()
)
PARAGRAPH_CHARACTERS = (80, 900)
MIN_WORDS = 14
LEAK_WORDS = 8
_COMMON_WORDS = frozenset(
    "a an and are as be by for in is it not of or that the this to with".split()
)
_PROSE = re.compile(r"[A-Za-z ,.;:'\"()-]")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Document:
    """A named text: all docstrings of one module, or one topic of the language reference."""

    name: str
    text: str


@lru_cache(maxsize=1)
def load_documents() -> tuple[Document, ...]:
    """The docstrings of every standard library module and the topics of `pydoc`.

    Sources are parsed, never imported. The text depends on the Python version and on which
    standard library modules the distribution ships.

    Returns:
        Documents with unique names ("json.decoder", "topics/if"), sorted by name.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [Document(f"topics/{name}", text.strip()) for name, text in topics.items()]
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            documents.append(Document(name, _docstrings(path)))
    return tuple(sorted((d for d in documents if d.text), key=lambda document: document.name))


def split_documents(
    documents: Iterable[Document], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split into train and held-out by document, so that no text is in both.

    A document's side is a hash of its name and the seed: it does not depend on the others. A
    paragraph that occurs twice is kept once, and a train paragraph that shares eight consecutive
    words with a held-out one is dropped (the library documents many things in two places).

    Args:
        documents: uniquely named documents.
        held_out: expected fraction of documents that is held out, in [0, 1].
        seed: another seed gives another split.

    Returns:
        (train, held_out) documents, whose text is what is left of their paragraphs.

    Raises:
        ValueError: `held_out` is outside [0, 1].
    """
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out: got {held_out}, wanted a fraction in [0, 1]")
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        digest = hashlib.sha256(f"{seed}:{document.name}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(document)

    seen: set[str] = set()
    held = _drop_repeated(sides[1], seen)
    known = {shingle for d in held for p in paragraphs(d) for shingle in _shingles(p)}
    train = []
    for document in _drop_repeated(sides[0], seen):
        kept = [p for p in paragraphs(document) if known.isdisjoint(_shingles(p))]
        if kept:
            train.append(Document(document.name, "\n\n".join(kept)))
    return train, held


def paragraphs(document: Document) -> list[str]:
    """The English paragraphs of a document, in order, each on one line.

    Signatures, tables, code, doctests and lists of names are left out. A paragraph over 900
    characters is cut after its last whole sentence.

    Args:
        document: a document whose paragraphs are separated by blank lines.
    """
    blocks = re.split(r"\n\s*\n", document.text)
    fitted = (_fit(" ".join(block.split())) for block in blocks)
    return [text for text in fitted if _is_prose(text)]


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # A few shipped files are broken on purpose, as material for the library's own tests.
        return ""
    found = (ast.get_docstring(node, clean=False) for node in _documented(tree))
    return "\n\n".join(inspect.cleandoc(text) for text in found if text).strip()


def _documented(node: ast.AST) -> Iterator[_Documented]:
    """Module, classes and functions in source order."""
    if isinstance(node, _Documented):
        yield node
    for child in ast.iter_child_nodes(node):
        # No definition hides in an expression, and expressions are most of a tree.
        if not isinstance(child, ast.expr):
            yield from _documented(child)


def _fit(text: str) -> str:
    longest = PARAGRAPH_CHARACTERS[1]
    if len(text) <= longest:
        return text
    return text[: text.rfind(". ", 0, longest) + 1]


def _is_prose(text: str) -> bool:
    words = text.split()
    return (
        len(text) >= PARAGRAPH_CHARACTERS[0]
        and len(words) >= MIN_WORDS
        and text[0].isalpha()
        and text[-1] in ".:;!?)"
        and ">>>" not in text
        and sum(word.lower() in _COMMON_WORDS for word in words) >= 0.12 * len(words)
        and len(_PROSE.findall(text)) >= 0.93 * len(text)
    )


def _drop_repeated(documents: Sequence[Document], seen: set[str]) -> list[Document]:
    """Keep the first occurrence of each paragraph, and the documents that have any left."""
    result = []
    for document in documents:
        kept = []
        for text in paragraphs(document):
            key = " ".join(_WORD.findall(text.lower()))
            if key not in seen:
                seen.add(key)
                kept.append(text)
        if kept:
            result.append(Document(document.name, "\n\n".join(kept)))
    return result


def _shingles(text: str) -> set[str]:
    words = _WORD.findall(text.lower())
    return {" ".join(words[i : i + LEAK_WORDS]) for i in range(len(words) - LEAK_WORDS + 1)}
