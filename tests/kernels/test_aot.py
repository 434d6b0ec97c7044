"""The kernels compiled for GPUs that are not there: what is recorded, read, gated and reported."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from benchmarks import kernel_gate  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.kernel_cases import (
    CASES,  # noqa: E402
    TARGETS,
    Case,
    Setting,
)
from benchmarks.kernel_gate import (  # noqa: E402
    changes,
    content,
    faults,
    launches,
    recording,
    rows_of,
    run_gate,
    save_kernels,
)
from benchmarks.results import load_kernels

SM_80, SM_90 = TARGETS["sm_80"], TARGETS["sm_90"]
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ONLY_FP32 = ("fp32",)


@triton.jit
def _copy_kernel(source, out, bias, size, factor, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    values = tl.load(source + lanes, mask=lanes < size, other=0.0) * factor
    if HAS_BIAS:
        values += tl.load(bias)
    tl.store(out + lanes, values, mask=lanes < size)


@triton.jit
def _matmul_kernel(
    left, right, out, depth, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr
):
    row, column = tl.arange(0, 128), tl.arange(0, WIDE)
    sums = tl.zeros((128, WIDE), tl.float32)
    for start in range(0, depth, DEPTH):
        entries = start + tl.arange(0, DEPTH)
        if DESCRIPTORS:
            a, b = left.load([0, start]), right.load([0, start])
        else:
            a = tl.load(left + row[:, None] * depth + entries[None, :])
            b = tl.load(right + column[:, None] * depth + entries[None, :])
        sums = tl.dot(a, b.T, sums)
    tl.store(out + row[:, None] * WIDE + column[None, :], sums)


@triton.jit
def _refused_kernel(out):
    tl.static_assert(False, "never compiles")


def copy(size: int, *, offset: int = 0, bias: torch.Tensor | None = None, warps: int = 4) -> None:
    storage = torch.empty(64 + offset, dtype=torch.float32, device="meta")
    out = torch.empty(64, dtype=torch.bfloat16, device="meta")
    _copy_kernel[(1,)](
        storage[offset:],
        out,
        bias,
        size,
        2.0,
        bias is not None,
        64,
        num_warps=warps,
        enable_fp_fusion=True,
    )


def matmul(
    s: Setting, *, wide: int = 128, depth: int = 64, warps: int = 8, stages: int = 3
) -> None:
    left, right = s.new(128, 4096), s.new(wide, 4096)
    descriptors = s.architecture.descriptors
    if descriptors:
        left = TensorDescriptor.from_tensor(left, [128, depth])
        right = TensorDescriptor.from_tensor(right, [wide, depth])
    _matmul_kernel[(1,)](
        left,
        right,
        s.floats(128, wide),
        4096,
        descriptors,
        wide,
        depth,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


def recorded(size: int, **options) -> object:
    with recording(SM_80.gpu) as found:
        copy(size, **options)
    return found[0]


def test_a_launch_is_specialised_as_triton_does() -> None:
    launch = recorded(48, warps=2)
    assert launch.name == "_copy_kernel"
    types = ["*fp32", "*bf16", "constexpr", "i32", "fp32", "constexpr", "constexpr"]
    assert list(launch.signature.values()) == types
    assert launch.constants == {(2,): None, (5,): False, (6,): 64}
    aligned = {place for place, known in launch.attributes.items() if known}
    assert aligned == {(0,), (1,), (3,)}
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (2, 3)
    assert launch.configuration == "HAS_BIAS=False BLOCK=64"


def test_what_a_launch_knows_of_its_arguments_changes_it() -> None:
    assert recorded(1).constants[(3,)] == 1
    assert not recorded(7).attributes.get((3,))
    assert recorded(2**40).signature["size"] == "i64"
    assert not recorded(48, offset=1).attributes.get((0,))
    bias = torch.empty(1, dtype=torch.float16, device="meta")
    assert recorded(48, bias=bias).signature["bias"] == "*fp16"


def test_descriptors_are_recorded_with_their_tiles() -> None:
    (launch,) = launches(Case(matmul), "bf16", SM_90)
    assert launch.signature["left"] == "tensordesc<bf16[128, 64]>"
    assert "DESCRIPTORS=True" in launch.configuration


def test_equal_launches_are_recorded_once() -> None:
    with recording(SM_80.gpu) as found:
        for size in (48, 64, 49):
            copy(size)
    assert len(found) == 2


def test_recording_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(driver))
    with pytest.raises(ZeroDivisionError), recording(SM_80.gpu):
        raise ZeroDivisionError
    assert vars(driver) == before
    assert knobs.runtime.jit_cache_hook is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recording(SM_80.gpu):
        pass


@pytest.mark.parametrize(
    "name, matrix, copies",
    [("sm_80", "HMMA", "LDGSTS"), ("sm_90", "HGMMA", "UTMALDG"), ("gfx942", "v_mfma", None)],
)
def test_machine_code_is_read(name: str, matrix: str, copies: str | None) -> None:
    target = TARGETS[name]
    (row,) = rows_of("matmul", Case(matmul), "bf16", target)
    assert row["status"] == "ok"
    assert list(row["matrix"]) == [matrix] and row["matrix"][matrix] > 0
    assert copies is None or (list(row["copies"]) == [copies] and row["copies"][copies] > 0)
    # 128 × 128 fp32 accumulators over 8 warps, of 32 threads or of 64.
    threads = 8 * target.gpu.warp_size
    assert 128 * 128 / threads < row["registers"] <= 255
    # At least two stages of two operands are in shared memory or on their way there.
    assert row["shared"] >= 2 * 2 * 128 * 64 * 2 / (2 if name == "gfx942" else 1)
    assert not faults(content(target, [row]))


def test_a_spill_fails_the_gate() -> None:
    # 128 × 256 accumulators over one warp: 1024 registers a thread.
    case = Case(lambda s: matmul(s, wide=256, warps=1, depth=16, stages=2), ONLY_FP32)
    found = content(SM_80, rows_of("spilling", case, "bf16", SM_80))
    (row,) = found["rows"]
    assert row["spills"] > 0 and row["stack"] > 0
    assert faults(found) == [
        f"sm_80, spilling in bf16 (_matmul_kernel): {row['spills']} spill instructions",
        f"sm_80, spilling in bf16 (_matmul_kernel): {row['stack']} bytes of stack",
    ]
    assert not faults({**found, "gated": False})
    assert not faults({**found, "rows": [{**row, "default": False}]})


def test_too_much_shared_memory_fails_the_gate() -> None:
    case = Case(lambda s: matmul(s, stages=8))
    found = content(SM_80, rows_of("large", case, "bf16", SM_80))
    (row,) = found["rows"]
    assert row["shared"] > SM_80.architecture.shared
    (fault,) = faults(found)
    assert fault.endswith(f"{row['shared']} bytes of shared memory, {163 * 1024} at most")


def test_a_kernel_that_does_not_compile_fails_the_gate() -> None:
    case = Case(lambda s: _refused_kernel[(1,)](s.floats(1), enable_fp_fusion=True))
    found = content(SM_80, rows_of("refused", case, "fp32", SM_80))
    (fault,) = faults(found)
    assert "failed: " in fault and "never compiles" in fault
    assert "/" not in fault


def kernels_in_source() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in KERNELS.glob("*.py")]
    return {
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("_")
        and node.name.endswith("_kernel")
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_has_a_case(name: str) -> None:
    launched = {
        launch.name
        for case in CASES.values()
        for launch in launches(case, case.dtypes[0], TARGETS[name])
    }
    assert launched == kernels_in_source()


def test_committed_results_are_those_of_the_cases_and_pass() -> None:
    contents = load_kernels()
    assert contents.keys() == TARGETS.keys()
    wanted = {(name, dtype) for name, case in CASES.items() for dtype in case.dtypes}
    for found in contents.values():
        assert {(row["case"], row["dtype"]) for row in found["rows"]} == wanted
        assert not faults(found)
        assert "/" not in json.dumps(found)


def test_changes_are_named_one_by_one() -> None:
    row = rows_of("copy", Case(lambda s: copy(48), ONLY_FP32), "fp32", SM_80)[0]
    before = content(SM_80, [row, {**row, "case": "old"}])
    after = content(SM_80, [{**row, "registers": 99}, {**row, "case": "young"}])
    assert list(changes(before, before)) == []
    assert list(changes(before, after)) == [
        f"sm_80, copy in fp32 (_copy_kernel): registers {row['registers']} before, 99 now",
        "sm_80, old in fp32 (_copy_kernel): no longer compiled",
        "sm_80, young in fp32 (_copy_kernel): new",
    ]


def test_the_gate_writes_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows_of("copy", Case(lambda s: copy(48), ONLY_FP32), "fp32", SM_80)[0]
    contents = {"sm_80": content(SM_80, [row])}
    monkeypatch.setattr(kernel_gate, "compile_all", lambda: contents)
    said: list[str] = []
    assert run_gate(tmp_path, write=False, say=said.append) == 0
    assert said[-1] == "sm_80: 1 of 1 kernels compile (gated)"
    assert not list(tmp_path.iterdir())

    assert main(["kernels", "--kernels", str(tmp_path)]) == 0
    assert load_kernels(tmp_path) == contents
    first = (tmp_path / "sm_80.json").read_bytes()
    save_kernels(contents, tmp_path)
    assert (tmp_path / "sm_80.json").read_bytes() == first

    row["spills"] = 3
    assert main(["kernels", "--check", "--kernels", str(tmp_path)]) == 1
    assert (tmp_path / "sm_80.json").read_bytes() == first


def test_workers_compile_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    name = min(CASES, key=lambda name: "rescale" not in name)
    monkeypatch.setattr(kernel_gate, "CASES", {name: replace(CASES[name], dtypes=ONLY_FP32)})
    found = kernel_gate.compile_all(["sm_80"], workers=1)
    assert [row["case"] for row in found["sm_80"]["rows"]] == [name]
    assert found["sm_80"]["triton"] == triton.__version__
