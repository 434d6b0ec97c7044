"""What all tests share."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
from interpreter import mend_older_interpreters
from packaging.version import Version

from fused_prefopt.ops import plan


def is_older(package: str, than: str) -> bool:
    """Whether an installed package is of an earlier release."""
    try:
        return Version(version(package)) < Version(than)
    except PackageNotFoundError:
        return False


if os.environ.get("TRITON_INTERPRET") == "1" and is_older("triton", than="3.7"):
    mend_older_interpreters()
if is_older("torch", than="2.10"):
    # Later ones take ops whose sizes depend on values into a whole graph unasked.
    os.environ.setdefault("TORCHDYNAMO_CAPTURE_DYNAMIC_OUTPUT_SHAPE_OPS", "1")


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Let tiles shrink to 3 × 3, so that small cases meet many slabs and many row slices."""
    monkeypatch.setattr(plan, "_SMALLEST_TILE", 3)
