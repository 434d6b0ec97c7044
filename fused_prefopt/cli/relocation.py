"""Modules that a front needs, taken out of the package: sources whose imports are all relative."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What a module may import beside the others that come along.
ALLOWED = frozenset(sys.stdlib_module_names) | {"torch", "triton"}
_DYNAMIC = {"import_module", "__import__"}


@dataclass(frozen=True)
class Relocation:
    """A package's folder and the front of what is taken out of it.

    Args:
        folder: the package's folder, whose name is the package's.
        front: name inside of it of the package, such as "hub", that becomes the root of what is
            taken out; its modules become the root's.
    """

    folder: Path
    front: str

    def sources(self) -> dict[str, str]:
        """Source of each module that the front reaches by `import` statements, anywhere in a file.

        A folder's own `__init__` comes along where a module takes a name from it, as a line
        elsewhere. Comments, lines and all but the imports stay as they are.

        Returns:
            Path below the new root, with `/`, → source; sorted by the path.

        Raises:
            ValueError: an import cannot be made relative, is one of another package than the
                standard library's, torch and triton, or is not seen before it runs.
        """
        found: dict[str, str] = {}
        left = [self.front]
        while left:
            module = left.pop()
            path = self._path(module)
            place = self._place(module, path)
            if place not in found:
                found[place], reached = self._moved(module, path)
                left += reached
        for place in list(found):
            for parent in Path(place).parents:
                found.setdefault((parent / "__init__.py").as_posix(), "")
        return dict(sorted(found.items()))

    def _path(self, module: str) -> Path:
        path = self.folder.joinpath(*module.split("."))
        file = path.with_suffix(".py")
        return file if file.is_file() else path / "__init__.py"

    def _is_module(self, module: str) -> bool:
        path = self.folder.joinpath(*module.split("."))
        return path.with_suffix(".py").is_file() or path.is_dir()

    def _new_name(self, module: str) -> list[str]:
        """Parts of a module's name below the new root."""
        parts = module.split(".") if module else []
        return parts[1:] if parts[:1] == [self.front] else parts

    def _place(self, module: str, path: Path) -> str:
        parts = self._new_name(module)
        if path.name == "__init__.py":
            return "/".join([*parts, "__init__.py"])
        return "/".join(parts) + ".py"

    def _moved(self, module: str, path: Path) -> tuple[str, list[str]]:
        """A module's source with relative imports, and the modules that they are of."""
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        parts = self._new_name(module)
        package = parts if path.name == "__init__.py" else parts[:-1]
        reached = []
        for node in _imports(ast.parse(source), module, self.folder.name):
            name = node.module or ""
            target = name.removeprefix(self.folder.name).removeprefix(".")
            for item in (alias.name for alias in node.names):
                below = f"{target}.{item}".removeprefix(".")
                whole = below if self._is_module(below) else target
                if not whole:
                    raise ValueError(
                        f"{module}: got an import of {item} from {name} itself, wanted one from the"
                        " module that has it"
                    )
                reached.append(whole)
            moved = _relative(package, self._new_name(target))
            line, start = lines[node.lineno - 1], node.col_offset
            old = f"from {name} import"
            if not line.startswith(old, start):
                raise ValueError(f"{module}: got {line.strip()!r}, wanted {old!r}")
            lines[node.lineno - 1] = f"{line[:start]}from {moved} import{line[start + len(old) :]}"
        return "".join(lines), reached


def _imports(tree: ast.AST, module: str, own: str) -> Iterator[ast.ImportFrom]:
    """The imports from the package `own`, which have to become relative.

    Raises:
        ValueError: there is another import than those and the allowed ones.
    """
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{module}: got a relative import, wanted the module's whole name")
            if (node.module or "").partition(".")[0] == own:
                yield node
            else:
                names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Name | ast.Attribute):
            called = node.id if isinstance(node, ast.Name) else node.attr
            if called in _DYNAMIC:
                raise ValueError(f"{module}: got {called}, wanted imports that can be read")
        for name in names:
            if name.partition(".")[0] not in ALLOWED:
                raise ValueError(
                    f"{module}: got an import of {name}, wanted one of the standard library, torch"
                    " or triton, or `from` a module of the package"
                )


def _relative(package: list[str], target: list[str]) -> str:
    """The target's name as a module of the package writes it: ([a, b], [a, c]) → "..c"."""
    same = 0
    while same < min(len(package), len(target)) and package[same] == target[same]:
        same += 1
    return "." * (len(package) - same + 1) + ".".join(target[same:])
