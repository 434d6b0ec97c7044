"""The Triton kernels: interpreted on CPU, and compiled ahead of time for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    tests = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests / "interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=tests.parent,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_the_triton_engine_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    from fused_prefopt import sequence_logps

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight = torch.randn(1, 3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match="engine: 'triton' takes CPU tensors under"):
        sequence_logps(hidden, weight, torch.zeros(1, 3, dtype=torch.int64), engine="triton")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["fold", "fold and keep", "residual", "residual with softcap"])
def test_kernels_compile_for_gpus_without_spills(name, capability):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fused_prefopt.kernels import logits_gradient, row_statistics

    vector = dict.fromkeys(["maximum", "total", "target_logit", "factor"], "*fp32")
    sizes = {"row_stride": "i32", "width": "i32"}
    if name.startswith("fold"):
        kernel = row_statistics._fold_rows_kernel
        signature = {"tile": "*fp32", "targets": "*i64", **vector, **sizes}
        constants = {"KEEP": name != "fold", "DTYPE": tl.float32, "BLOCK": 4096}
        warps = 8
    else:
        kernel = logits_gradient._residual_rows_kernel
        signature = {"tile": "*fp32", "targets": "*i64", "logsumexps": "*fp32"}
        signature |= {"target_residuals": "*fp32", **sizes}
        signature["inverse_cap"] = "fp32"
        constants = {"HAS_CAP": name != "residual", "BLOCK": 2048}
        warps = 4
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    assert compiled.metadata.shared <= (163 if capability == 80 else 227) * 1024
    assert ".local" not in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0
