"""Modules that need an extra say which, where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
ROOT = Path(__file__).resolve().parent.parent
TRAINERS = 'pip install "fused-prefopt[trainers]"'


@pytest.mark.parametrize(
    ("module", "missing", "command"),
    [
        ("transformers", "transformers", TRAINERS),
        ("transformers", "accelerate", TRAINERS),
        ("trl", "transformers", TRAINERS),
        ("trl", "trl", f'{TRAINERS} "trl>=1.15"'),
    ],
)
def test_an_integration_without_its_packages_names_the_extra(module, missing, command):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nimport fused_prefopt.integrations.{module}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    needs = f"ImportError: fused_prefopt.integrations.{module} needs {missing}: {command}"
    assert done.stderr.splitlines()[-1] == needs
