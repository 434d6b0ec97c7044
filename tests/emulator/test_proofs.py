"""What docs/kernels.md says is proven of each kernel: noted by a plugin, shown, and complete."""

from __future__ import annotations

import json
from collections import Counter

import launched
import pytest

pytest.importorskip("triton")

from launched import INTERPRETER  # noqa: E402

from benchmarks.kernel_proofs import PROOFS, proofs_section  # noqa: E402
from benchmarks.results import load_kernels  # noqa: E402

USAGE = {
    "sm_80": {"rows": [{"kernel": "_a", "status": "ok"}, {"kernel": "_b", "status": "ok"}]},
    "gfx942": {"rows": [{"kernel": "_a", "status": "ok"}, {"kernel": "_b", "status": "spills"}]},
}


def test_every_kernel_was_interpreted_and_executed_for_both_gpus():
    if not PROOFS.exists():
        pytest.skip("`make emulate` has not been run")
    rows = json.loads(PROOFS.read_text(encoding="utf-8"))["rows"]
    for content in load_kernels().values():
        for kernel in {row["kernel"] for row in content["rows"]}:
            machines = {row["machine"].partition("-")[0] for row in rows if row["kernel"] == kernel}
            assert machines >= {INTERPRETER, "sm_80", "sm_90"}, kernel


def test_the_table_shows_what_was_noted(tmp_path):
    rows = [("_a", "interpreter", "fp16"), ("_a", "sm_80", "bf16"), ("_a", "sm_80-up", "fp16")]
    content = {
        "commit": "abc",
        "date": "2026-01-01",
        "triton": "3.9.0",
        "everything": False,
        "passed": {"kernels, executed": 7},
        "rows": [dict(zip(("kernel", "machine", "dtype"), row, strict=True)) for row in rows],
    }
    path = tmp_path / "proofs.json"
    path.write_text(json.dumps(content))
    text = proofs_section(path, USAGE, measured=False)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert lines == [
        "| `_a` | fp16 | bf16, fp16 (lock step, up) | no | sm_80, gfx942 |",
        "| `_b` | no | no | no | sm_80 |",
    ]
    assert "Measured** on a GPU: nothing yet." in text and "kernels, executed: 7 passed" in text
    text = proofs_section(tmp_path / "none.json", USAGE, measured=True)
    assert "| `_b` | not noted | not noted | not noted | sm_80 |" in text
    assert "nothing yet" not in text


def test_a_launch_is_noted_by_its_narrowest_numbers(monkeypatch):
    monkeypatch.setattr(launched, "_counts", Counter())
    monkeypatch.setattr(launched, "_machine", "sm_90")
    launched._count("_a", ["*bf16", "*fp32", "*i64"])
    launched._count("_a", ["torch.float32", "torch.bfloat16"])
    launched._count("_a", ["*fp32", "tensordesc<fp16[64, 64]>"])
    launched._count("_a", ["torch.float16"])
    launched._count("_a", ["*i64", "*fp32"])
    found = {("_a", "sm_90", "bf16"): 2, ("_a", "sm_90", "fp16"): 2, ("_a", "sm_90", "fp32"): 1}
    assert launched._counts == found
