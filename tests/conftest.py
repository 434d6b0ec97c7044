"""What all tests share."""

from __future__ import annotations

import pytest

from fused_prefopt.ops import cutting


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Let tiles shrink to 3 × 3, so that small cases meet many slabs and many row slices."""
    monkeypatch.setattr(cutting, "_SMALLEST_TILE", 3)
