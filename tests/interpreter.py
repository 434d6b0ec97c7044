"""Runs a file of tests with Triton's interpreter, which must be on before Triton is imported."""

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
