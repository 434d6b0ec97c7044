"""Modules that need an extra say which, where it is not installed."""

from __future__ import annotations

import os

import pytest
from command_line_jobs import python

TRAINERS = 'pip install "fused-prefopt[trainers]"'
# (integration, the package that is missing, what installs it)
CASES = (
    ("transformers", "transformers", TRAINERS),
    ("transformers", "accelerate", TRAINERS),
    ("trl", "transformers", TRAINERS),
    ("trl", "trl", f'{TRAINERS} "trl>=1.15"'),
    ("axolotl", "axolotl", 'pip install "axolotl>=0.19"'),
)
# Each import in a process of its own, after torch.
_IMPORTS = f"""
import importlib, os, sys
import fused_prefopt

for module, missing, _ in {CASES!r}:
    child = os.fork()
    if not child:
        sys.modules[missing] = None
        try:
            importlib.import_module(f"fused_prefopt.integrations.{{module}}")
        except ImportError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="wants processes that share what is imported")
def test_an_integration_without_its_packages_names_the_extra():
    for package in ("transformers", "accelerate", "datasets", "trl"):
        pytest.importorskip(package)
    done = python("-c", _IMPORTS)
    assert done.stdout.splitlines() == [
        f"fused_prefopt.integrations.{module} needs {missing}: {command}"
        for module, missing, command in CASES
    ], done.stderr
