"""How a pass over a head is cut for a GPU: within its budget, in whole slabs, and it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fused_prefopt.ops.cutting import GpuPass, TileCost, Tiles, TileShape, about, aligned

MIB = 2**20
ANY = TileShape(1 << 30, 1 << 30)
# Costs of the engines' roles with bf16 operands, and of fp32's and fused kernels'.
COSTS = {
    "fold": TileCost(4.0, 2, 0, ANY),
    "fold, fp32 weight": TileCost(4.0, 2, 2, ANY),
    "fold, fused": TileCost(8 / 128, 2, 0, ANY, smallest=128),
    "fold, fused wide": TileCost(8 / 256, 2, 2, ANY, smallest=256),
    "weigh": TileCost(4.0, 2, 0, ANY, slab=2.0),
    "weigh, fused": TileCost(8 / 128, 2, 0, ANY, smallest=128, slab=2.0),
    "rebuild": TileCost(4.0, 2, 0, ANY, slab=2.0, sliced=4, sums_rows=True),
    "rebuild, fp32 weight": TileCost(4.0, 2, 6, ANY, slab=2.25, sums_rows=True),
    "rebuild, fp32": TileCost(0.0, 4, 0, ANY, slab=4.0, sums_rows=True),
    "rebuild, fused": TileCost(0.0, 2, 0, ANY, smallest=128, slab=2.0, sliced=4, sums_rows=True),
    "kept": TileCost(0.0, 2, 0, ANY, sliced=4, sums_rows=True),
}
PROCESSORS = [1, 108, 132]


def the_pass(name: str, **changes) -> GpuPass:
    """Of a cost by its name; all rows are multiplied unless `changes` says otherwise."""
    cost = COSTS[name]
    given = {
        "rows": 8192,
        "vocab": 128_256,
        "hidden_size": 4096,
        "budget": 512 * MIB,
        "cost": cost,
        "processors": 132,
        "cuts_rows": name.startswith(("fold", "weigh")),
    } | changes
    return GpuPass(**{"multiplied": given["rows"]} | given)


def taken(wanted: GpuPass, tiles: Tiles) -> float:
    """Bytes of all buffers of a tile, and of the rows where they are gathered once."""
    cost, size = wanted.cost, wanted.hidden_size
    hidden = cost.hidden * size * (wanted.rows if tiles.gathered else tiles.rows)
    weight = cost.weight + (cost.sliced if tiles.rows < wanted.rows else 0)
    logits = cost.logit * tiles.multiplied * tiles.products
    return hidden + weight * size * tiles.vocab + logits + cost.slab * tiles.rows * tiles.vocab


def smallest(wanted: GpuPass) -> Tiles:
    """What a pass is cut into at last."""
    least = max(128, wanted.cost.smallest)
    rows = min(wanted.rows, least)
    width = min(wanted.vocab, least)
    return Tiles(rows, width, width, min(rows, wanted.multiplied), gathered=False)


passes = st.builds(
    the_pass,
    st.sampled_from(sorted(COSTS)),
    rows=st.integers(1, 70_000),
    vocab=st.integers(1, 300_000),
    hidden_size=st.integers(1, 8192),
    budget=st.integers(MIB, 4 * 2**30),
    processors=st.sampled_from(PROCESSORS),
    cuts_rows=st.booleans(),
)


def check(wanted: GpuPass) -> Tiles:
    """The tiles of a pass; their buffers fit wherever the smallest tile's do."""
    tiles = wanted.tiles()
    step = max(64 if wanted.processors == 1 else 128, wanted.cost.smallest)
    assert 1 <= tiles.rows <= wanted.rows and 1 <= tiles.vocab <= wanted.vocab
    assert 1 <= tiles.products <= tiles.vocab
    assert tiles.multiplied == min(tiles.rows, wanted.multiplied)
    assert tiles.rows == wanted.rows or tiles.rows % 128 == 0
    for width in (tiles.vocab, tiles.products):
        assert width == wanted.vocab or width % step == 0
    assert tiles.vocab == wanted.vocab or tiles.vocab % tiles.products == 0
    if wanted.budget >= taken(wanted, smallest(wanted)):
        # The budget is counted in floating point.
        assert taken(wanted, tiles) <= wanted.budget * (1 + 1e-9) + 1
    return tiles


@settings(max_examples=1500, deadline=None)
@given(passes, st.sampled_from([1.0, 0.6, 0.01, 0.0]))
# Rows that are gathered once leave too little for the smallest tile.
@example(the_pass("rebuild, fp32 weight", rows=258, vocab=128, hidden_size=737, budget=MIB), 1.0)
def test_tiles_fit_the_budget_wherever_the_smallest_does(wanted, share):
    # In a backward what was kept is multiplied no more.
    if wanted.cost.sums_rows:
        wanted = replace(wanted, multiplied=int(wanted.rows * share))
    check(wanted)


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("vocab", [1, 64, 100, 128, 129, 300, 2048, 32_000, 151_936, 300_000])
def test_every_corner_ends_and_fits(name, vocab, processors):
    for rows in (1, 127, 128, 129, 4096, 8192, 70_000):
        for hidden_size in (1, 896, 8192):
            for budget in (1, 64, 1024, 4096):
                changes = {"rows": rows, "hidden_size": hidden_size, "budget": budget * MIB}
                check(the_pass(name, vocab=vocab, processors=processors, **changes))


@pytest.mark.parametrize("name", COSTS)
def test_a_budget_that_is_too_small_gives_the_smallest_tile(name):
    wanted = the_pass(name, budget=1)
    tiles = wanted.tiles()
    least = smallest(wanted)
    assert (tiles.rows, tiles.vocab, tiles.gathered) == (least.rows, least.vocab, False)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("processors", PROCESSORS)
def test_room_for_everything_is_one_tile(name, processors):
    wanted = the_pass(name, rows=500, vocab=3000, hidden_size=64, processors=processors)
    assert check(wanted).vocab == 3000 and check(wanted).rows == 500


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("name", [name for name in COSTS if name.startswith("fold")])
@pytest.mark.parametrize(("rows", "hidden_size"), [(8192, 4096), (8192, 896), (1000, 2304)])
def test_more_budget_never_gives_narrower_slabs_of_as_many_rows(
    name, processors, rows, hidden_size
):
    widest: dict[tuple[int, bool], int] = {}
    for megabytes in range(16, 1400, 7):
        changes = {"rows": rows, "hidden_size": hidden_size, "budget": megabytes * MIB}
        tiles = check(the_pass(name, processors=processors, **changes))
        key = tiles.rows, tiles.gathered
        assert tiles.vocab >= widest.get(key, 0), (megabytes, tiles)
        widest[key] = tiles.vocab


@pytest.mark.parametrize("name", COSTS)
def test_more_budget_never_gives_a_slower_pass_by_much(name):
    # Cuts are searched among a few candidates: a better one may be missed, but not a good one.
    times = []
    for megabytes in range(64, 2048, 41):
        wanted = the_pass(name, budget=megabytes * MIB)
        times.append(wanted._time(wanted.tiles()))
    for earlier, later in zip(times, times[1:], strict=False):
        assert later <= 1.05 * earlier


def test_the_waves_of_a_gpu():
    wanted = the_pass("fold", processors=132)
    # 132 tiles of 128 × 256 are one wave, one more are two.
    assert wanted._waves(128 * 132, 256) == 1
    assert wanted._waves(128 * 132, 512) == wanted._waves(256 * 132, 256) == 2
    # Half as large tiles take 1 / 1.8 of the time: three waves of those.
    assert wanted._waves(128 * 132 + 1, 256) == 3 / 1.8
    assert wanted._waves(128 * 132, 128) == 1 / 1.8


@pytest.mark.parametrize("name", ["fold", "rebuild", "weigh"])
def test_slabs_fill_whole_waves(name):
    wanted = the_pass(name, budget=256 * MIB)
    tiles = wanted.tiles()
    width, rows = tiles.products, tiles.multiplied
    filled = -(-width // 128) * -(-rows // 256) / (132 * wanted._waves(width, rows))
    assert filled > 0.9


def test_calls_of_about_as_many_rows_share_a_plan():
    for rows in (0, 1, 255, 256, 257, 8191, 8192):
        assert rows <= about(rows) < rows + 256 and about(about(rows)) == about(rows)
    assert len({about(rows) for rows in range(7937, 8193)}) == 1


def test_aligned_rows():
    assert [aligned(size) for size in (1, 16, 17, 128_256)] == [16, 16, 32, 128_256]
