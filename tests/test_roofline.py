"""The predictions, against numbers worked out by hand, and the page that shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("psutil")

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.kernel_pages import (  # noqa: E402
    check_page,
    measurement,
    page_text,
    prediction_table,
    usage_table,
    write_page,
)
from benchmarks.kernel_results import KERNELS, load_kernels  # noqa: E402
from benchmarks.machines import MACHINES, Machine  # noqa: E402
from benchmarks.roofline import (  # noqa: E402
    ENGINES,
    PATHS,
    TILE_CASES,
    FusedTile,
    bare_matmul,
    fused_tiles,
    library,
    multiply,
    occupancy,
    predict,
    slabs,
    steps,
    waves,
)
from benchmarks.shapes import HEADS, Shape  # noqa: E402

# 4 processors of 0.25 TFLOP/s; the library reaches half of that, a fused kernel a quarter.
TOY = Machine("toy", "toy", "sm_80", 1e12, 0.5, 0.25, 1e9, 4, 164 * 1024)
FAST_MEMORY = replace(TOY, bandwidth=1e15)
# 256 labelled rows, V 512, D 64: one slab, 2 × 2 tiles of 128 × 256.
SHAPE = Shape("toy", 1, 512, 64, 512)
TILES = dict.fromkeys(TILE_CASES, FusedTile(rows=128, vocab=256, group=8, resident=1))
ROW = {
    "case": "fold logits",
    "kernel": "_fold_logits_kernel",
    "dtype": "bf16",
    "configuration": "HAS_BIAS=False HAS_CAP=True ROWS=128 VOCAB=64 GROUP=4",
    "status": "ok",
    "warps": 8,
    "stages": 3,
    "registers": 128,
    "stack": 0,
    "spills": 0,
    "shared": 64 * 1024,
    "matrix": {"HMMA": 64},
    "copies": {},
}


def seconds(machine: Machine, path: str, engine: str) -> float:
    return predict(machine, SHAPE, path, engine, TILES).ms / 1e3


def test_a_started_wave_is_a_whole_one() -> None:
    assert [waves(tiles, 132) for tiles in (1, 132, 133, 1024)] == [1, 1, 2, 8]
    assert list(slabs(10, 4)) == [4, 4, 2]


@pytest.mark.parametrize(
    "change, programs",
    [
        ({}, 2),  # 65536 / (8 warps · 32 threads · 128 registers), and 164 / 65 of shared memory
        ({"registers": 129}, 1),
        ({"registers": 32, "shared": 0}, 8),  # 2048 threads / 256
        ({"registers": 32, "shared": 163 * 1024}, 1),
        ({"registers": 200, "warps": 4, "shared": 0}, 2),
    ],
)
def test_occupancy(change: dict[str, int], programs: int) -> None:
    assert occupancy({**ROW, **change}, TOY) == programs


def test_a_matmul_takes_whole_waves_of_whole_tiles() -> None:
    # 3 × 2 tiles on 4 slots: 2 waves of 4 tiles, each 2 · 128 · 128 · 100 FLOPs.
    step = multiply(TOY, "x", (300, 200, 100), (128, 128), share=0.5, resident=1, traffic=1e6)
    assert step.arithmetic == pytest.approx(2 * 4 * 2 * 128 * 128 * 100 / 0.5e12)
    assert step.memory == pytest.approx(1e-3)
    assert step.seconds == step.memory
    # On 8 slots: 1 wave, which takes as long as those two.
    twice = multiply(TOY, "x", (300, 200, 100), (128, 128), share=0.5, resident=2, traffic=0)
    assert twice.seconds == pytest.approx(step.arithmetic)


def test_the_library_takes_its_better_tile() -> None:
    # D 896 is 3.5 tiles of 256 but 7 of 128.
    step = library(FAST_MEMORY, "x", (128, 896, 64), 0)
    assert step.arithmetic == pytest.approx(2 * 8 * 128 * 128 * 2 * 64 / 1e12)


def test_evaluate_is_a_matmul_and_a_pass_over_its_logits() -> None:
    # Operands 2 · (256 + 512) · 64 bytes, logits 4 · 256 · 512: the memory binds, and reads once.
    assert seconds(TOY, "evaluate", "cublas") == pytest.approx((98_304 + 524_288 + 524_288) / 1e9)
    assert bare_matmul(TOY, SHAPE) == pytest.approx((98_304 + 262_144) / 1e9)
    found = predict(TOY, SHAPE, "evaluate", "cublas", {})
    assert found.in_p == pytest.approx(1_146_880 / 360_448)
    assert (found.bound, found.memory_share) == ("memory", 1.0)


def test_evaluate_without_logits_in_memory() -> None:
    # Operands once, as there is one group; two parts of 8 bytes a row, written and merged.
    slow = replace(TOY, peak=1e18)
    partials = 8 * 256 * 2
    assert seconds(slow, "evaluate", "triton") == pytest.approx((98_304 + 2 * partials) / 1e9)
    # Groups of one tile: the second row tile reads the weight again.
    tiles = {**TILES, "fold": replace(TILES["fold"], group=1)}
    found = predict(slow, SHAPE, "evaluate", "triton", tiles)
    assert found.ms == pytest.approx((98_304 + 2 * 512 * 64 + 2 * partials) / 1e6)
    # Two programs share a processor: 2 × 2 tiles then fill half of the one wave, which is as long.
    tiles = {**TILES, "fold": replace(TILES["fold"], resident=2)}
    once = predict(FAST_MEMORY, SHAPE, "evaluate", "triton", TILES).ms
    assert predict(FAST_MEMORY, SHAPE, "evaluate", "triton", tiles).ms == pytest.approx(2 * once)


def test_matmuls_alone_are_the_designs_costs() -> None:
    # Free memory and the same rates: 1, 2, 3 and 4 matmuls.
    machine = replace(FAST_MEMORY, fused=0.5)
    shape = Shape("even", 1, 1024, 512, 4096)
    for engine in ENGINES:
        costs = [predict(machine, shape, path, engine, TILES).in_p for path in PATHS]
        assert costs == pytest.approx([1, 2, 3, 4], rel=1e-3)


def test_passes_of_each_path_in_bytes() -> None:
    entries = 256 * 512

    def passes(path: str, engine: str) -> list[tuple[str, float]]:
        found = steps(TOY, SHAPE, path, engine, TILES)
        return [(step.name, step.memory * 1e9) for step in found if step.arithmetic == 0]

    def named(*wanted: tuple[str, int]) -> list[tuple[str, object]]:
        return [(name, pytest.approx(size * entries)) for name, size in wanted]

    assert passes("evaluate", "cublas") == named(("fold", 4))
    assert passes("stash", "cublas") == named(("fold and keep", 6))
    assert passes("local", "cublas") == named(("fold and keep", 6), ("convert", 4))
    assert passes("recompute", "cublas") == named(("fold", 4), ("residual", 6))
    assert [name for name, _ in passes("recompute", "triton")] == ["merge partials"]
    assert passes("local", "triton")[1:] == named(("convert", 4))


def test_tiles_are_those_of_the_compiled_kernels() -> None:
    rows = [{**ROW, "case": case} for case in TILE_CASES.values()]
    wanted = dict.fromkeys(TILE_CASES, FusedTile(128, 64, 4, 2))
    assert fused_tiles({"sm_80": {"rows": rows}}, TOY) == wanted
    with pytest.raises(ValueError, match="sm_80: got no compiled kernel for recompute gradient"):
        fused_tiles({"sm_80": {"rows": rows[:2]}}, TOY)


def test_machines_are_within_their_datasheets() -> None:
    for machine in MACHINES:
        assert 0 < machine.fused < machine.library < 1
    h200 = MACHINES[1]
    assert h200.library * h200.peak == pytest.approx(788e12)


def test_dtypes_that_take_the_same_share_a_line() -> None:
    rows = [ROW, {**ROW, "dtype": "fp16"}, {**ROW, "dtype": "fp32", "registers": 99}]
    lines = usage_table(rows).splitlines()[2:]
    assert lines[0] == (
        "| fold logits | `_fold_logits_kernel` | bf16, fp16 | 8 warps, 3 stages; HAS_CAP ROWS=128"
        " VOCAB=64 GROUP=4"
        " | 128 | 0 | 0 | 64.0 | 64 HMMA |  |"
    )
    assert "| fp32 |" in lines[1] and len(lines) == 2
    failed = {**dict.fromkeys(ROW), **{name: ROW[name] for name in list(ROW)[:4]}}
    assert "| failed: no |" in usage_table([{**failed, "status": "failed: no"}])


def test_measurements_stand_beside_predictions() -> None:
    shape = HEADS["llama-3"]
    row = {
        "candidate": "ours: stash, triton",
        "shape": "llama-3",
        "labelled_rows": shape.labelled_rows,
        "dtype": "bf16",
        "status": "ok",
        "ms": 123.456,
        "in_p": 2.5,
    }
    results = {"head": {"section": "head", "rows": [row]}, "other": {"section": "sweep"}}
    assert measurement(results, shape, "stash", "triton") is row
    assert measurement(results, shape, "stash", "cublas") is None
    table = prediction_table(MACHINES[1], TILES, results)
    (line,) = [line for line in table.splitlines() if "123.46" in line]
    assert line.startswith("| llama-3 | stash | triton |") and line.endswith("| 123.46 | 2.50 |")
    assert "measured" not in prediction_table(MACHINES[1], TILES, {})


def test_the_page_is_what_the_results_say(tmp_path: Path) -> None:
    page, kernels = tmp_path / "kernels.md", tmp_path / "kernels"
    kernels.mkdir()
    for name, content in load_kernels(KERNELS).items():
        (kernels / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    arguments = ["report", "--check", "--page", str(page), "--kernels", str(kernels)]
    assert not check_page(page, kernels, tmp_path)
    write_page(page, kernels, tmp_path)
    assert check_page(page, kernels, tmp_path)
    assert page.read_text(encoding="utf-8").count("| llama-3 | evaluate | cublas |") == 2

    page.write_text(page.read_text(encoding="utf-8").replace("1.07", "1.01"), encoding="utf-8")
    assert not check_page(page, kernels, tmp_path)
    assert main(arguments) == 1
    write_page(page, kernels, tmp_path)

    content = json.loads((kernels / "sm_90.json").read_text(encoding="utf-8"))
    content["rows"][0]["registers"] += 1
    (kernels / "sm_90.json").write_text(json.dumps(content), encoding="utf-8")
    assert not check_page(page, kernels, tmp_path)
    assert page_text(kernels, tmp_path) != page.read_text(encoding="utf-8")
