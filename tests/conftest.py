"""What all tests share."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from interpreter import let_scalars_be_indices

from fused_prefopt.ops import plan

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    let_scalars_be_indices()
if torch.__version__ < "2.10":
    # Later ones unasked let `fullgraph=True` take ops whose sizes depend on values.
    os.environ.setdefault("TORCHDYNAMO_CAPTURE_DYNAMIC_OUTPUT_SHAPE_OPS", "1")


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Let tiles shrink to 3 × 3, so that small cases meet many slabs and many row slices."""
    monkeypatch.setattr(plan, "_SMALLEST_TILE", 3)
