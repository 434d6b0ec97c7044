"""The replay: what is recorded, how it is played, and that ours keeps to its memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("trl", reason="the replay plays TRL's function beside ours")


from benchmarks import replay  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.candidates import DEFAULTS, HEAD, NOTHING, OF_TRL, TIGHT, TRAINS, Candidate, ours  # noqa: E402
from benchmarks.compare import floor_ms, goals_of  # noqa: E402
from benchmarks.device import (  # noqa: E402
    GAP,
    LIBRARY_CALL,
    MACHINES,
    TRITON_LAUNCH,
    WIDE,
    Event,
    event_seconds,
    matmul_seconds,
    play,
    traffic_of,
)
from benchmarks.kernel_page import replay_sections  # noqa: E402
from benchmarks.pictures import draw_replay  # noqa: E402
from benchmarks.recording import Recorder, host_seconds, record, spread_over  # noqa: E402
from benchmarks.replay import ReplayCase, cases, recorded, replayed, unit_seconds  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.shapes import HEADS, Problem, Shape  # noqa: E402
from fused_prefopt import sequence_kl, token_policy  # noqa: E402

A100, H200 = MACHINES
SMALL = Shape("llama-3", 4, 512, 1024, 32_000)
MIB = 2**20


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def matmul(m: int, n: int, k: int, **options) -> Event:
    return Event("mm", [(1, 2 * m * k), (2, 2 * n * k)], [(3, 2 * m * n)], (m, n, k), **options)


@pytest.mark.parametrize(
    ("machine", "size", "tile", "flops"),
    [
        # 64 x 27 tiles of 128 x 256 on 108 processors: 16 waves, full.
        (A100, (8192, 6912, 4096), None, 16 * 108 * WIDE / 0.8),
        # 32 x 33 tiles of 256 x 128 on 132: 8 waves; the other way round it would be nine.
        (H200, (8192, 4224, 4096), None, 8 * 132 * WIDE / 0.8),
        # A single row takes a whole wave of the smallest tile.
        (H200, (1, 1, 64), None, 132 * 128 * 128 / 0.9 / 0.8),
        # A fused one takes its own tile at its own rate.
        (A100, (8192, 151_936, 896), (128, 256), 352 * 108 * WIDE / 0.66),
    ],
)
def test_a_matmul_takes_whole_waves(machine, size, tile, flops):
    seconds = matmul_seconds(machine, matmul(*size, tile=tile))
    assert seconds == pytest.approx(2 * size[2] * flops / machine.peak)


def test_a_tile_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match=r"got a tile \(64, 64\), no rate"):
        matmul_seconds(A100, matmul(64, 64, 64, tile=(64, 64)))


def test_passes_take_their_bytes_and_half_of_what_stays_in_the_cache():
    size = A100.cached
    passes = [Event("a", [], [(1, size)]), Event("b", [(1, size)], []), Event("c", [(1, size)], [])]
    times = [event_seconds(A100, passes, place) * A100.bandwidth / size for place in range(3)]
    # Only what the very next launch reads.
    assert times == pytest.approx([0.5, 0.5, 1.0])
    larger = [replace(event, reads=[(1, size + 1)] * len(event.reads)) for event in passes]
    assert event_seconds(A100, larger, 1) == pytest.approx((size + 1) / A100.bandwidth)


def test_the_part_of_a_matmuls_output_that_is_not_hidden_counts_twice_where_it_accumulates():
    once, twice = matmul(512, 512, 4096), matmul(512, 512, 4096, accumulates=True)
    added = event_seconds(H200, [twice], 0) - event_seconds(H200, [once], 0)
    assert added == pytest.approx(0.3 * 2 * 512 * 512 / H200.bandwidth)


def test_the_gpu_waits_for_a_slow_host_and_the_host_for_what_it_asks():
    passes = [Event("a", [(1, 1_800_000)], []), Event("b", [(2, 1_800_000)], [], triton=True)]
    alone = play(A100, passes)
    assert alone.seconds == pytest.approx(2e-6 + GAP) and alone.exposed == 0
    assert (alone.launches, alone.moved) == (2, 3_600_000)
    slow = play(A100, passes, [1e-3, 2e-3])
    start = 1e-3 + LIBRARY_CALL
    assert slow.seconds == pytest.approx(start + 2e-3 + TRITON_LAUNCH + 1e-6)
    assert slow.exposed == pytest.approx(start + 2e-3 + TRITON_LAUNCH - 1e-6 - GAP)
    # A wait lets the host go on only when the GPU is done.
    waiting = play(A100, [replace(passes[0], waits=True), passes[1]], [0.0, 1e-5])
    assert waiting.seconds == pytest.approx(LIBRARY_CALL + 1e-6 + 1e-5 + TRITON_LAUNCH + 1e-6)


def test_what_lives_is_counted_and_views_are_not():
    given = meta(1000, 16)
    recorder = Recorder(labelled=10)
    with recorder:
        first = given + given  # 32 000 bytes
        view = first[10:]
        second = torch.zeros_like(view)  # 31 680 more
        del first, view
        third = torch.zeros(1000, 16, dtype=torch.bfloat16, device="meta")
    assert recorder.found.peak == 32_000 + 31_680
    assert len(second) + len(third) == 1990
    assert [event.name for event in recorder.found.events] == ["add", "zeros_like", "zeros"]
    assert recorder.found.events[0].reads[0][1] == 32_000


def test_matmuls_and_masks_are_known():
    hidden, weight, mask = meta(64, 32), meta(96, 32), meta(64, dtype=torch.bool)

    def step() -> torch.Tensor:
        rows = hidden[mask]
        torch.mm(rows, weight.t(), out=meta(10, 96))
        return torch.addmm(meta(10, 96), rows, weight.t())

    gather, into, plain = record(step, 10, A100).events
    assert (gather.waits, into.waits) == (True, False)
    assert into.size == plain.size == (10, 96, 32)
    assert (into.anchor, plain.anchor) == (True, False)
    assert (into.accumulates, plain.accumulates) == (False, True)


def test_a_kernel_that_is_not_known_is_an_error():
    with pytest.raises(KeyError, match="_new_kernel: its traffic is not known"):
        traffic_of("_new_kernel", None, None)


def test_the_host_is_measured_between_the_anchors_of_the_recording():
    case = ReplayCase(DEFAULTS[HEAD], SMALL)
    events = recorded(case, H200).events
    anchors = [event.name for event in events if event.anchor]
    row = replayed(case, H200, unit_seconds(H200, SMALL))
    assert row["host_ms"] > row["exposed_ms"] > 0
    assert row["launches"] == len(events) > len(anchors)
    with pytest.raises(ValueError, match="the host launched 0 times, the recording"):
        host_seconds(lambda: None, H200, SMALL.hidden_size, anchors)
    spread = spread_over(events, [1.0] * len(anchors))
    assert sum(spread) == len(anchors) and len(spread) == len(events)
    # Before the first of what comes between two anchors.
    assert spread[0] == 1.0


TIGHT_RECOMPUTE = Candidate("tight", partial(ours, "recompute", workspace_mb=64), HEAD, ours=True)


@pytest.mark.parametrize(
    ("candidate", "count"),
    [
        *((DEFAULTS[trains], count) for trains, count in ((NOTHING, 1), ("hidden", 2), (HEAD, 3))),
        (TIGHT_RECOMPUTE, 4),
        *((OF_TRL[trains], count) for trains, count in ((NOTHING, 1), ("hidden", 3), (HEAD, 4))),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_step_is_made_of_the_matmuls_of_its_path(candidate, count):
    shape = replace(SMALL, sequences=8)
    events = recorded(ReplayCase(candidate, shape), A100).events
    multiplied = sum(m * n * k for m, n, k in (e.size for e in events if e.size))
    assert multiplied == count * shape.labelled_rows * shape.hidden_size * shape.vocab


def exact_kl(shape: Shape) -> Candidate:
    other = meta(shape.sequences, shape.length, shape.hidden_size)
    reference = meta(shape.vocab, shape.hidden_size)

    def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"num_labels": shape.labelled_rows, "workspace_mb": TIGHT, "engine": "cublas"}
        kl = sequence_kl(p.hidden, p.weight, other, reference, p.labels, **options).kl
        return kl, kl.sum()

    return Candidate("exact KL", run)


def entropies(shape: Shape) -> Candidate:
    def run(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"num_labels": shape.labelled_rows, "workspace_mb": TIGHT}
        out = token_policy(p.hidden, p.weight, p.labels, **options)
        return out.logps, out.logps.sum() + out.entropies.sum()

    return Candidate("entropies", run)


def on_path(path: str, engine: str, _: Shape) -> Candidate:
    run = partial(ours, path, engine=engine, workspace_mb=TIGHT)
    return Candidate("tight", run, TRAINS.get(path, HEAD), ours=True)


LLAMA = [HEADS["llama-3"]]
# The other paths on the automatic engine are among the goals below.
TIGHT_STEPS = {
    "auto, auto": (partial(on_path, "auto", "auto"), HEADS.values(), MACHINES),
    **{
        f"{path}, {engine}": (partial(on_path, path, engine), HEADS.values(), MACHINES)
        for path in ("evaluate", "stash", "recompute", "auto")
        for engine in ("cublas", "triton")
    },
    "exact KL": (exact_kl, LLAMA, [H200]),
    "entropies": (entropies, LLAMA, [H200]),
}


@pytest.mark.parametrize("rows", [8192, 65_536])
@pytest.mark.parametrize("name", TIGHT_STEPS)
def test_the_workspace_holds_whatever_the_context(rows, name):
    made, heads, machines = TIGHT_STEPS[name]
    for shape in heads:
        given = replace(shape, sequences=shape.sequences * rows // shape.labelled_rows)
        candidate = made(given)
        sums = 0 if candidate.trains == NOTHING else 4 * rows * shape.hidden_size
        # In bf16, of the hidden states and of the head.
        trained = {NOTHING: 0, HEAD: given.rows + given.vocab}.get(candidate.trains, given.rows)
        gradients = 2 * trained * given.hidden_size
        for machine in machines:
            peak = recorded(ReplayCase(candidate, given), machine).peak
            assert peak <= TIGHT * MIB + sums + gradients, (machine.name, shape.name, peak / MIB)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Of every case, the host left out: it is measured."""
    return [
        replayed(replace(case, host=False), machine, unit_seconds(machine, HEADS[case.shape.name]))
        | {"exposed_ms": 0.0, "host_ms": 0.0}
        for machine in MACHINES
        for case in cases()
    ]


def test_no_goal_is_missed_by_the_gpu_itself(rows):
    missed = {goal.text: goal.value for goal in goals_of(rows) if not goal.holds}
    # Each by half a percent: the launches beside a single product's, and the rows' own copy.
    most = {
        "H200, llama-3, no gradient: P of the GPU's own time, at most 1.12": 1.1265,
        "A100-80GB, qwen2.5-0.5b, no gradient: of TRL's time, at most 1": 1.003,
    }
    assert missed.keys() <= most.keys()
    assert all(value <= most[text] for text, value in missed.items()), missed


def test_the_floor_of_fp32_logits():
    # 8192 x 128256 logits of 4 bytes, once each way, 0.3 of the way in hidden by the matmul.
    logits = 8192 * 128_256
    seconds = 2 * logits * 4096 / (0.8 * 989e12) + 1.3 * 4 * logits / 4.3e12
    assert floor_ms(H200, HEADS["llama-3"]) == pytest.approx(1e3 * seconds)
    # A small head's logits are never in memory.
    seconds = 2 * 8192 * 151_936 * 896 / (0.62 * 989e12)
    assert floor_ms(H200, HEADS["qwen2.5-0.5b"]) == pytest.approx(1e3 * seconds)


def test_goals_fail_where_ours_is_slower_or_larger(rows):
    name = DEFAULTS[HEAD].name
    worse = [
        row | {"ms": 10 * row["ms"], "extra_bytes": 10 * row["extra_bytes"]}
        if row["candidate"] == name and row["gpu"] == "H200" and row["shape"] == "llama-3"
        else row
        for row in rows
    ]
    missed = {goal.text for goal in goals_of(worse) if not goal.holds}
    missed -= {goal.text for goal in goals_of(rows) if not goal.holds}
    assert {text.partition(" at most")[0] for text in missed} >= {
        "H200, llama-3, head trains: of TRL's time,",
        "H200, llama-3, head trains: MiB more than TRL,",
        "H200, llama-3, head trains: ms,",
        "geometric mean of TRL's time,",
    }


def test_the_command_fails_where_a_goal_is_missed(rows, tmp_path, monkeypatch, capsys):
    # Half of each time: no goal is missed; as it is predicted, two are, by half a percent.
    faster = [row | {"ms": row["ms"] / 2} if "ours" in row["candidate"] else row for row in rows]
    for given, status in ((faster, 0), (rows, 1)):
        monkeypatch.setattr(
            replay, "run_replay", lambda results, _, g=given: results.rows.extend(g)
        )
        assert main(["replay", "--results", str(tmp_path), "--check"]) == status
        assert ("MISSED" in capsys.readouterr().out) == bool(status)
        assert main(["replay", "--results", str(tmp_path)]) == 0
        capsys.readouterr()


def test_predictions_stand_beside_measurements(rows, tmp_path):
    Results(tmp_path / "replay" / "replay.json", "replay", rows).save()
    text = "\n\n".join(replay_sections(tmp_path / "replay", {}))
    assert "No GPU has run these kernels yet" in text and "measured ms" not in text
    row = next(row for row in rows if row["candidate"] == DEFAULTS[HEAD].name)
    names = ("candidate", "shape", "sequences", "length", "labelled_rows", "dtype")
    measured = {name: row[name] for name in names} | {"ms": 1234.5, "status": "ok"}
    grid = {"a100": {"grid": {"section": "grid", "rows": [measured]}}, "h200": {}}
    text = "\n\n".join(replay_sections(tmp_path / "replay", grid))
    assert text.count("1234.50") == 1 and "Measured times stand beside them" in text
    assert replay_sections(tmp_path / "nothing", {}) == []
    draw_replay(rows, tmp_path / "replay.png")
    assert (tmp_path / "replay.png").stat().st_size > 10_000
