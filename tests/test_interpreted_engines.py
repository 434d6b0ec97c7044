"""The engines with Triton kernels, interpreted on CPU; beside `test_kernels`, on another core."""

from __future__ import annotations

import pytest
from interpreter import assert_passes_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["engines", "kept", "sequence_kl"])
def test_in_the_interpreter(name):
    assert_passes_interpreted(f"interpreted_{name}.py")
