"""The planner: which path, which tiles, and that the memory stays within the workspace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from truth import TRAINING_PATHS, leaves_of, make_case, needs_of
from waits import LargestTensor

from fused_prefopt import Plan, release_workspace, sequence_logps
from fused_prefopt.ops.cutting import TileCost, TileShape, tile_shape
from fused_prefopt.ops.dropped_mass import PART
from fused_prefopt.ops.head_rows import HeadRows, HeadTensors, Spec
from fused_prefopt.ops.plan import (
    COST_IN_P,
    PATHS,
    Demand,
    default_workspace,
    kept_bytes,
    make_plan,
    room_of,
    statistics_bytes,
)
from fused_prefopt.ops.precision import HeadMath

MIB = 2**20
# A batch whose logits (about 600 labelled rows x 2000 entries, 4.6 MiB) dwarf everything else.
BATCH = {"sequences": 4, "length": 250, "hidden_size": 48, "vocab": 2000}


PREFERRED = TileShape(1024, 2048)
COST = TileCost(logit=4, hidden=4, weight=4, preferred=PREFERRED)


def planned(**changes) -> Plan:
    given = {
        "path": "auto",
        "rows": 1000,
        "vocab": 1024,
        "workspace": 8 * MIB,
        "head_trains": True,
        "hidden_trains": True,
    }
    itemsize = changes.pop("itemsize", 4)
    given |= changes
    room = room_of(given["rows"], given["vocab"], 16, itemsize, COST, gpu=False)
    return make_plan(Demand(**given), lambda path, kept: "torch", lambda: room)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"head_trains": False, "hidden_trains": False}, "evaluate"),
        ({"head_trains": False}, "stash"),
        ({}, "local"),
        ({"hidden_trains": False}, "local"),
        ({"rows": 3000}, "recompute"),
        ({"workspace": 4 * MIB}, "recompute"),
        ({"itemsize": 8}, "recompute"),
        ({"path": "recompute"}, "recompute"),
        ({"path": "recompute", "head_trains": False}, "recompute"),
        ({"path": "local", "head_trains": False}, "local"),
        ({"path": "evaluate"}, "evaluate"),
        ({"path": "stash", "head_trains": False, "hidden_trains": False}, "evaluate"),
    ],
)
def test_the_path(changes, path):
    plan = planned(**changes)
    assert plan.path == path
    assert plan.workspace == changes.get("workspace", 8 * MIB)
    assert plan.engine == "torch"
    assert plan.reason


def test_local_needs_room_for_a_tile_beside_what_it_keeps():
    tile = COST.total(256, 256, 16)
    rows = (8 * MIB - tile) // (1024 * 4)
    assert planned(rows=rows).path == "local"
    assert planned(rows=rows + 1).path == "recompute"


def test_costs_rise_from_path_to_path():
    assert [COST_IN_P[path] for path in PATHS] == [1, 2, 3, 4]
    assert planned().cost == 3
    assert planned(path="recompute").cost == 4


def test_rows_are_kept_as_far_as_the_workspace_goes():
    kept = [planned(rows=rows).kept_rows for rows in (1000, 2100, 3000, 20_000, 40_000)]
    # All; then what a tile leaves, in steps of 128; none where too few would remain.
    assert kept[0] == 1000 and 0 < kept[1] < 2100 and kept[1] % 128 == 0
    assert kept[2] == kept[1] and kept[3:] == [0, 0]
    plans = [planned(rows=rows) for rows in (1000, 2100, 3000, 40_000)]
    assert [plan.path for plan in plans] == ["local", *["recompute"] * 3]
    assert [plan.cost for plan in plans] == [4 - plan.kept_rows / plan.rows for plan in plans]
    costs = [plan.cost for plan in plans]
    assert costs == sorted(costs) and costs[-1] == 4
    # Whoever asks for `recompute` keeps nothing; rows in any order are all kept or none.
    assert planned(rows=2100, path="recompute").kept_rows == 0
    assert planned(rows=2100, drop_mass=0.1).kept_rows == 0
    assert planned(rows=1000, drop_mass=0.1).kept_rows == 1000


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 10**5),
    vocab=st.integers(1, 300_000),
    hidden_size=st.integers(1, 8192),
    workspace=st.integers(1, 2**33),
    itemsize=st.sampled_from([2, 4, 8]),
    gpu=st.booleans(),
)
def test_kept_rows_fit_and_leave_room(rows, vocab, hidden_size, workspace, itemsize, gpu):
    cost = replace(COST, slab=float(itemsize)) if gpu else COST
    room = room_of(rows, vocab, hidden_size, itemsize, cost, gpu=gpu)
    assert room.row >= kept_bytes(1, vocab, itemsize)
    assert room.fixed >= (statistics_bytes(rows) if gpu else 0)
    kept = room.kept(rows, workspace)
    assert 0 <= kept <= rows
    if kept == rows:
        assert rows * room.row + room.fixed + room.least <= workspace
    elif kept:
        assert kept % 128 == 0 and 16 * kept >= rows
        # What tiles want, or half of what there is.
        left = workspace - room.fixed - kept * room.row
        assert left >= min(room.wanted, (workspace - room.fixed) // 2)
    assert kept <= room.kept(rows, workspace + 2**20)


GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "rows", "trains", "wanted"),
    [
        # A CPU; then what is gathered, or an fp32 sum of the head's gradient, on top; then a share.
        (None, 10**6, True, 256 * MIB),
        (80 * GIB, 1024, False, 256 * MIB + 1024 * 64 * 2),
        (80 * GIB, 1024, True, 256 * MIB + 4 * 10_000 * 64),
        (80 * GIB, 2**20, True, 256 * MIB + 2**20 * 64 * 2),
        (80 * GIB, 10**8, False, 80 * GIB // 32),
        (4 * GIB, 10**8, True, 256 * MIB),
    ],
)
def test_the_default_workspace(memory, rows, trains, wanted):
    assert default_workspace(memory, rows, (10_000, 64), 2, trains) == wanted


def test_the_plan_is_visible():
    case = make_case()
    weight = case.weight

    def path_of(**options):
        return sequence_logps(case.hidden, weight, case.labels, **options).plan.path

    assert path_of() == "evaluate"
    case.hidden.requires_grad_()
    assert path_of() == "stash"
    weight.requires_grad_()
    assert path_of() == "local"
    assert path_of(workspace_mb=0.001) == "recompute"
    assert path_of(path="recompute") == "recompute"
    with torch.no_grad():
        assert path_of() == "evaluate"


def test_only_labelled_rows_count():
    case = make_case(4, 50, 8, 64)
    labels = torch.full_like(case.labels, -100)
    labels[:, 10:12] = 5
    weight = case.weight.requires_grad_()
    # For 8 rows and a tile of them, not for 9.
    megabytes = 4 * (8 * 64 + 8 * 64 + 8 * 8) / MIB
    out = sequence_logps(case.hidden, weight, labels, workspace_mb=megabytes)
    assert out.plan.path == "local"
    labels[0, 20] = 5
    out = sequence_logps(case.hidden, weight, labels, workspace_mb=megabytes)
    assert out.plan.path == "recompute"


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 10**6),
    vocab=st.integers(1, 300_000),
    hidden_size=st.integers(1, 16_384),
    budget=st.integers(1, 2**33),
    cost=st.builds(
        TileCost,
        st.floats(0.01, 24),
        st.integers(0, 16),
        st.integers(0, 12),
        st.sampled_from([PREFERRED, TileShape(8192, 16384), TileShape(1 << 30, 1 << 30)]),
        st.sampled_from([1, 64, 256]),
    ),
)
def test_tiles_fit_the_budget_or_are_the_smallest(rows, vocab, hidden_size, budget, cost):
    tile = tile_shape(rows, vocab, hidden_size, budget, cost)
    assert 1 <= tile.rows <= max(rows, 1) and 1 <= tile.vocab <= vocab
    buffers = (
        cost.logit * tile.rows * tile.vocab
        + cost.hidden * tile.rows * hidden_size
        + cost.weight * tile.vocab * hidden_size
    )
    assert buffers <= budget + 1 or max(tile.rows, tile.vocab) <= max(64, cost.smallest)
    width = tile.vocab
    assert width == vocab or width & (width - 1) == 0


def test_a_larger_budget_never_gives_a_smaller_tile():
    cost = replace(COST, preferred=TileShape(8192, 16384))
    sizes = [tile_shape(9000, 128256, 4096, 2**n, cost) for n in range(16, 36)]
    areas = [tile.rows * tile.vocab for tile in sizes]
    assert areas == sorted(areas)
    assert areas[-1] == 8192 * 16384


@pytest.mark.parametrize("path", ["evaluate", "stash", "recompute"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_tensor_has_tokens_times_vocabulary_entries(path, softcap):
    case = leaves_of(make_case(**BATCH, bias=True, softcap=softcap), needs_of(path))
    with LargestTensor() as largest:
        out = sequence_logps(case.hidden, case.head, case.labels, path=path, workspace_mb=0.5)
        if path != "evaluate":
            out.sums.sum().backward()
    unavoidable = max(case.hidden.numel(), case.weight.numel())
    assert largest.entries <= unavoidable < int(out.lengths.sum()) * case.vocab / 10


def peak_of(function) -> int:
    """Peak of the CPU bytes that `function` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(
    ("path", "workspace_mb"),
    [
        ("evaluate", 0.5),
        ("stash", 0.5),
        ("recompute", 0.5),
        ("recompute", 3),
        ("local", 5.5),
        ("local", 7),
        ("auto", 3),
    ],
)
def test_peak_memory_is_statistics_gradients_and_the_workspace(path, workspace_mb, softcap, dtype):
    check_peaks(path, workspace_mb, dtype, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("path", "workspace_mb"), [("local", 8), ("recompute", 1)])
def test_peak_memory_of_a_backward_that_drops_mass(path, workspace_mb, dtype):
    check_peaks(path, workspace_mb, dtype, drop_mass=0.1)


def check_peaks(path, workspace_mb, dtype, *, softcap=None, drop_mass=0.0):
    """Of the forward and of the backward."""
    case = make_case(**BATCH, bias=True, softcap=softcap, dtype=dtype)
    case = leaves_of(case, needs_of(path))
    made = []

    def forward():
        options = {"path": path, "workspace_mb": workspace_mb, "drop_mass": drop_mass}
        made.append(sequence_logps(case.hidden, case.head, case.labels, **options))

    release_workspace()
    forward_peak = peak_of(forward)
    (out,) = made
    rows, workspace = int(out.lengths.sum()), workspace_mb * MIB
    statistics = 32 * 8 * case.labels.numel()  # a generous count of (n,) vectors
    if drop_mass:
        statistics += 32 * rows * -(-case.vocab // PART)  # of the parts' masses, and of their sort
    hidden_sums = 4 * rows * case.hidden.shape[-1]
    kept = dtype.itemsize * out.plan.kept_rows * case.vocab
    if path == "auto":
        assert 0 < out.plan.kept_rows < rows or dtype == torch.bfloat16
    stash = hidden_sums if path == "stash" else 0
    assert kept <= forward_peak <= workspace + statistics + stash
    if path == "evaluate":
        return
    backward_peak = peak_of(out.sums.sum().backward)
    trained = [t for t in (case.hidden, case.weight, case.bias) if t.requires_grad]
    gradients = sum(t.nbytes for t in trained)
    rounding = hidden_sums // 2 if dtype == torch.bfloat16 else 0
    allowed = workspace - kept + statistics + gradients + hidden_sums + rounding
    assert backward_peak <= allowed


def test_peak_memory_does_not_grow_with_the_vocabulary():
    def peak(vocab):
        case = make_case(**BATCH | {"vocab": vocab})
        case = replace(case, hidden=case.hidden.requires_grad_())
        return peak_of(
            lambda: (
                sequence_logps(case.hidden, case.head, case.labels, workspace_mb=0.5)
                .sums.sum()
                .backward()
            )
        )

    assert peak(4000) <= 1.05 * peak(2000)


def test_every_path_is_tested():
    assert set(PATHS) == {"evaluate", *TRAINING_PATHS}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("engine", ["torch", "cublas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drop_mass", [0.0, 1e-3])
def test_local_meets_the_tiles_of_its_forward_again(device, engine, dtype, drop_mass):
    # Its maxima are one for each of the forward's tiles.
    math = HeadMath(None, 1.0, 1.0, dtype)
    vocab, hidden_size, workspace = 32_000, 256, 64 * 2**20
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device=device)
    for rows in range(64, workspace // (vocab * math.kept.itemsize), 61):
        index = torch.empty(rows, dtype=torch.int64, device=device)
        tensors = HeadTensors(torch.empty(rows, hidden_size, dtype=dtype, device=device), weight)
        spec = Spec(
            *(1, rows, -100, vocab, workspace, math, "local", engine, rows), drop_mass=drop_mass
        )
        passes = [HeadRows(tensors, index, index, spec, backward) for backward in (False, True)]
        assert passes[0].kept_width == passes[1].kept_width, rows
        if engine == "torch":
            # It takes one maximum a tile.
            assert passes[0].tiles == passes[1].tiles, rows
