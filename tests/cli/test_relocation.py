"""Sources taken out of a package: what comes along, and what cannot."""

from __future__ import annotations

import pytest

from fused_prefopt.cli.relocation import Relocation


def package(folder, files: dict[str, str]) -> Relocation:
    for name, text in files.items():
        path = folder / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Relocation(folder / "own", "front")


def test_what_is_reached_comes_along_and_nothing_else(tmp_path):
    files = {
        "__init__.py": "raise RuntimeError\n",
        "front/__init__.py": "from own.front import layers\nfrom own.deep.more import a  # why\n",
        "front/layers.py": "import torch\nfrom own.deep.more import (\n    a,\n    b,\n)\n",
        "deep/__init__.py": "from own.left import out\n",
        "deep/more/__init__.py": "from own.deep.more import late\na = b = late\n",
        "deep/more/late.py": "if 1:\n    from own.base import x\n    from own.deep import side\n",
        "deep/side.py": "from own import base\n",
        "base.py": "x = 'own.base'\n",
        "left.py": "out = 1\n",
    }
    assert package(tmp_path, files).sources() == {
        "__init__.py": "from . import layers\nfrom .deep.more import a  # why\n",
        "base.py": "x = 'own.base'\n",
        "deep/__init__.py": "",
        "deep/more/__init__.py": "from . import late\na = b = late\n",
        "deep/more/late.py": "if 1:\n    from ...base import x\n    from .. import side\n",
        "deep/side.py": "from .. import base\n",
        "layers.py": "import torch\nfrom .deep.more import (\n    a,\n    b,\n)\n",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    (
        ("import own.base", "got an import of own.base"),
        ("import numpy as np", "got an import of numpy"),
        ("def f():\n    from packaging.version import Version", "an import of packaging.version"),
        ("from . import base", "got a relative import"),
        ("from own import version", "got an import of version from own itself"),
        ("import importlib\nimportlib.import_module('own.base')", "got import_module"),
        ("from  own.base import y", "wanted 'from own.base import'"),
    ),
)
def test_what_cannot_come_along_is_said(tmp_path, line, message):
    files = {"front/__init__.py": f"{line}\n", "base.py": "y = 1\n"}
    with pytest.raises(ValueError, match=f"^front: .*{message}"):
        package(tmp_path, files).sources()
