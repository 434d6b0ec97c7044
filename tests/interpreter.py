"""Triton's interpreter, which must be on before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def assert_passes_interpreted(file: str, *options: str) -> None:
    """Every test of the file passes, and none is skipped.

    Args:
        file: of this folder.
        options: of pytest.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(TESTS / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def let_scalars_be_indices() -> None:
    """Let the interpreter of Triton before 3.7 run on numpy 2.4 and later.

    It holds a kernel's scalars as arrays of one element and hands them to `range` by `int(array)`,
    which numpy takes of arrays without dimensions only since 2.4. Triton 3.7 squeezes them first.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_and_mend
