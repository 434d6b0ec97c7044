"""Modules that need an extra say which, where it is not installed."""

from __future__ import annotations

import os

import pytest
from command_line_jobs import python

from fused_prefopt import checks

TRAINERS = 'pip install "fused-prefopt[trainers]"'
# (integration, the package that is missing, what installs it)
CASES = (
    ("axolotl", "axolotl", 'pip install "axolotl>=0.19"'),
    ("transformers", "transformers", TRAINERS),
    ("transformers", "accelerate", TRAINERS),
    ("trl", "transformers", TRAINERS),
    ("ms_swift", "swift", 'pip install "ms-swift>=4.6"'),
    ("trl", "trl", f'{TRAINERS} "trl>=1.9"'),
)
# (integration, as what it is installed, its version, the oldest that will do, what installs that)
TOO_OLD = (
    *(("trl", "trl", number, "1.9", CASES[-1][-1]) for number in ("0.24.0", "1.8.0", "1.9.0.dev0")),
    ("axolotl", "axolotl", "0.18.1", "0.19", CASES[0][-1]),
    ("ms_swift", "ms-swift", "3.12.0", "4.6", CASES[4][-1]),
    ("llamafactory", "llamafactory", "0.9.4", "0.9.5", "pip install llamafactory==0.9.5"),
)
# Each import in a process of its own, after torch.
_IMPORTS = f"""
import importlib, os, sys
import importlib.metadata as metadata
import fused_prefopt
from fused_prefopt import checks

def without(package):
    sys.modules[package] = None

def with_version(installed):
    there = dict([installed])
    checks.version = lambda name: there.get(name) or metadata.version(name)
    checks.find_spec = lambda name: name  # it is installed, and too old

cases = [(module, without, missing) for module, missing, _ in {CASES!r}]
cases += [(module, with_version, (name, number)) for module, name, number, *_ in {TOO_OLD!r}]
for module, change, value in cases:
    child = os.fork()
    if not child:
        change(value)
        try:
            importlib.import_module(f"fused_prefopt.integrations.{{module}}")
        except ImportError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="wants processes that share what is imported")
def test_an_integration_names_the_extra_or_the_versions_that_it_lacks():
    for package in ("transformers", "accelerate", "datasets", "trl"):
        pytest.importorskip(package)
    done = python("-c", _IMPORTS)
    wanted = [
        f"fused_prefopt.integrations.{module} needs {missing}: {command}"
        for module, missing, command in CASES
    ]
    wanted += [
        f"{'swift' if module == 'ms_swift' else module}: got {number}, wanted {oldest} or newer:"
        f" {command}"
        for module, _, number, oldest, command in TOO_OLD
    ]
    assert done.stdout.splitlines() == wanted, done.stderr


@pytest.mark.parametrize("number", ["1.9.0", "1.9.0.post1", "1.16.0", "1.17.0.dev0", "2.3", "10.0"])
def test_newer_versions_than_the_oldest_are_taken(number, monkeypatch):
    monkeypatch.setattr(checks, "version", {"trl": number}.__getitem__)
    checks.require_version("trl")
