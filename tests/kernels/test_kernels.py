"""The Triton engine without the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")


def test_the_triton_engine_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    from fused_prefopt import sequence_logps

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight = torch.randn(1, 3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="engine: 'triton' takes CPU tensors under"):
        sequence_logps(hidden, weight, torch.zeros(1, 3, dtype=torch.int64), engine="triton")
