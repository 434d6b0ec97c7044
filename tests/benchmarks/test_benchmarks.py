"""The benchmark suite on tiny shapes: values and bookkeeping, never times."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("psutil")

from benchmarks import accuracy, memory, suite, tables  # noqa: E402
from benchmarks.claims import claims_of  # noqa: E402
from benchmarks.objectives import OBJECTIVES, dpo  # noqa: E402
from benchmarks.peers import (  # noqa: E402
    CANDIDATES,
    HEAD,
    NOTHING,
    ON_ONE_SHAPE,
    OTHER_LOSSES,
    Candidate,
)
from benchmarks.report import END, START, check_report, filled, write_report  # noqa: E402
from benchmarks.results import NO_TIME, Results, check, load  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    DTYPES,
    HEADS,
    IGNORE_INDEX,
    LAPTOP,
    TINY,
    Shape,
    bare_matmul,
    make_problem,
)
from benchmarks.timing import Timing, rounds  # noqa: E402

CAPPED = replace(TINY, name="capped", softcap=5.0)


def unable(problem: object) -> tuple[torch.Tensor, torch.Tensor]:
    raise ModuleNotFoundError("No module named 'absent'", name="absent")


def halved(problem) -> tuple[torch.Tensor, torch.Tensor]:
    sums, loss = CANDIDATES["eager"].forward(problem)
    return sums, loss / 2


@pytest.mark.parametrize("shape", [LAPTOP, TINY, *HEADS.values()], ids=lambda shape: shape.name)
def test_shape_counts_its_labelled_rows(shape: Shape) -> None:
    problem = make_problem(replace(shape, hidden_size=2, vocab=50), torch.float32)
    assert int((problem.targets != IGNORE_INDEX).sum()) == shape.labelled_rows


def test_the_laptop_shape_is_the_one_of_the_claims() -> None:
    assert (LAPTOP.rows, LAPTOP.labelled_rows) == (4096, 2048)
    assert (LAPTOP.vocab, LAPTOP.hidden_size) == (32_000, 512)


@pytest.mark.parametrize("shape", [TINY, CAPPED], ids=lambda shape: shape.name)
def test_truth_is_eager_float64(shape: Shape) -> None:
    problem = make_problem(shape, torch.float64)
    truth = accuracy.truth_of(problem)
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    logits = hidden @ weight.t()
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), problem.targets.flatten(), reduction="none"
    )
    sums = -losses.view(problem.targets.shape).sum(1)
    dpo(sums).backward()
    torch.testing.assert_close(truth.sums, sums.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(truth.dhidden, hidden.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(truth.dweight, weight.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [TINY, CAPPED], ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name not in OTHER_LOSSES])
def test_candidate_is_right_or_says_why_not(name: str, shape: Shape, dtype: str) -> None:
    candidate = CANDIDATES[name]
    problem = make_problem(shape, DTYPES[dtype])
    found = accuracy.assess(candidate, problem, accuracy.truth_of(problem))
    if found.status != "ok":
        assert not candidate.ours
        assert found.status.startswith(("wrong: ", "unavailable: ", "failed: "))
        return
    assert found.logp_error is not None and found.logp_error < (1e-4 if dtype == "fp32" else 1)
    assert (found.dhidden_error is None) == (candidate.trains == NOTHING)
    assert (found.dweight_error is None) == (candidate.trains != HEAD)
    for error in (found.dhidden_error, found.dweight_error):
        assert error is None or error < (1e-5 if dtype == "fp32" else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_peer_with_another_loss_is_right(name: str, dtype: str) -> None:
    pytest.importorskip("liger_kernel")
    problem = make_problem(TINY, DTYPES[dtype])
    truth = accuracy.truth_of(problem, CANDIDATES[name].objective)
    with torch.compiler.set_stance("force_eager"):
        found = accuracy.assess(CANDIDATES[name], problem, truth)
    assert found.status == "ok"
    assert found.dweight_error is not None and found.dweight_error < 5e-2


def test_a_peer_with_the_wrong_loss_is_named() -> None:
    problem = make_problem(TINY, torch.float32)
    found = accuracy.assess(CANDIDATES["eager"], problem, accuracy.truth_of(problem, "simpo"))
    assert found.status.startswith("wrong: hidden's gradient off by")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_those_of_the_papers(name: str) -> None:
    sums = torch.tensor([-6.0, -2.0], dtype=torch.float64)
    lengths = torch.tensor([3, 4])

    def logistic(x: float) -> float:
        return math.log1p(math.exp(-x))

    odds = [mean - math.log1p(-math.exp(mean)) for mean in (-2.0, -0.5)]
    wanted = {
        "dpo": logistic(0.02 * -4),
        "simpo": logistic(2.0 * -1.5 - 0.5),
        "cpo": logistic(0.02 * -4) + 2.0,
        "orpo": 0.02 * logistic(odds[0] - odds[1]) + 2.0,
        "kto": 1 - (1 / (1 + math.exp(0.012)) + 1 / (1 + math.exp(-0.004))) / 2,
    }
    assert OBJECTIVES[name](sums, lengths).item() == pytest.approx(wanted[name], rel=1e-12)


def test_wrong_and_missing_peers_are_named() -> None:
    problem = make_problem(TINY, torch.float32)
    truth = accuracy.truth_of(problem)
    wrong = accuracy.assess(Candidate("halved", halved), problem, truth)
    assert (
        wrong.status == "wrong: hidden's gradient off by 5.0e-01, weight's gradient off by 5.0e-01"
    )
    missing = accuracy.assess(Candidate("absent", unable), problem, truth)
    assert missing == accuracy.Accuracy(None, None, None, "unavailable: needs absent")


def test_a_nan_is_wrong() -> None:
    problem = make_problem(TINY, torch.float32)
    truth = accuracy.truth_of(problem)
    problem.weight[3] = math.nan
    assert accuracy.assess(CANDIDATES["eager"], problem, truth).status.startswith(
        "wrong: log-probs"
    )


def test_failure_is_one_line_without_paths() -> None:
    text = accuracy.failure(RuntimeError("no compiler at /some/place\nsecond line"))
    assert text == "failed: RuntimeError: no compiler at"


def test_bare_matmul_covers_the_vocabulary_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.LARGEST_OUTPUT", 40 * TINY.labelled_rows * 4)
    problem = make_problem(TINY, torch.float32)
    unit = bare_matmul(problem)
    unit()
    hidden, pairs = unit.args  # type: ignore[attr-defined]
    assert [output.shape[1] for _, output in pairs] == [40, 40, 17]
    assert pairs[0][1] is pairs[1][1]
    torch.testing.assert_close(pairs[2][1], hidden @ problem.weight[80:].t())


def test_rounds_pair_each_step_with_the_unit_before_it() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    yielded = list(rounds(steps, lambda: calls.append("P"), 2))
    assert calls == ["P", *"PaPbPaPb"]
    assert [len(timed["a"].ms) for timed in yielded] == [1, 2]


def test_rounds_stop_in_time_but_not_before_the_fewest() -> None:
    assert len(list(rounds({"a": int}, int, 50, seconds=0.0))) == 3


def test_the_slower_half_is_spared_after_the_fewest_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.timing.gc.collect", lambda: 0)
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])

    def taking(seconds: float) -> None:
        now[0] += seconds

    steps = {name: partial(taking, ms) for name, ms in {"a": 1.0, "b": 5.0, "c": 9.0}.items()}
    *_, timed = rounds(steps, partial(taking, 0.5), 6, spare_slow=True)
    assert {name: len(timing.ms) for name, timing in timed.items()} == {"a": 6, "b": 6, "c": 3}
    assert {name: timing.in_p for name, timing in timed.items()} == {"a": 2.0, "b": 10.0, "c": 18.0}


def test_what_no_time_is_left_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "keep_freed_memory", lambda: None)
    now = [0.0]

    def say(text: str) -> None:
        now[0] += 1.0

    results = Results(tmp_path / "head-fp32.json", "head")
    # The truth is announced, then each candidate's verdict.
    suite.measure_head(TINY, "fp32", results, 1, say, seconds=4.0, clock=lambda: now[0])
    rows = {row["candidate"]: row for row in load(tmp_path)["head-fp32"]["rows"]}
    statuses = [rows[name]["status"] for name in ON_ONE_SHAPE]
    assert statuses == ["ok"] * 3 + [NO_TIME] * (len(rows) - 3)
    assert {row["rounds"] for row in rows.values()} == {0}
    assert rows[ON_ONE_SHAPE[0]]["memory_status"] == NO_TIME


def test_in_p_is_the_median_of_ratios() -> None:
    assert Timing((2.0, 9.0, 40.0), (1.0, 3.0, 10.0)).in_p == 3.0


@pytest.mark.slow
def test_memory_of_a_child_follows_the_live_tensors() -> None:
    shape = Shape("memory", 4, 128, 32, 20_000)
    logits = 4 * shape.rows * shape.vocab
    eager = memory.peak_memory(CANDIDATES["eager"], shape, "fp32")
    ours = memory.peak_memory(CANDIDATES["ours: recompute"], shape, "fp32")
    assert (eager.status, ours.status) == ("ok", "ok")
    assert eager.gradients == ours.gradients == 4 * 32 * (shape.rows + shape.vocab)
    assert eager.extra is not None and 1.9 * logits < eager.extra < 5 * logits
    assert ours.extra is not None and ours.extra < 0.5 * logits


def test_memory_is_skipped_where_it_cannot_fit() -> None:
    shape = replace(TINY, vocab=10**13)
    assert memory.peak_memory(CANDIDATES["eager"], shape, "fp32").status.startswith("skipped: ")


@pytest.fixture(scope="module")
def suite_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the suite writes on tiny shapes, without child processes."""
    folder = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.timing.gc.collect", lambda: 0)
        patch.setattr(suite, "LAPTOP", TINY)
        patch.setattr(suite, "SWEEP_VOCAB", (replace(TINY, name="vocab-97"),))
        patch.setattr(suite, "SWEEP_LENGTH", (replace(TINY, name="length-12"),))
        patch.setattr(suite, "peak_memory", lambda *_: memory.Memory(3 * 2**20, 2**20, "ok"))
        quick = [name for name in ON_ONE_SHAPE if not CANDIDATES[name].compiles]
        patch.setattr(suite, "ON_ONE_SHAPE", quick)
        suite.run_cpu(folder, count=2, say=lambda text: None, isolate=False)
    return folder


@pytest.fixture
def measured(suite_results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(suite_results, tmp_path / "results"))


def test_suite_writes_every_row(measured: Path) -> None:
    results = load(measured)
    assert results.keys() == {"head-fp32", "head-bf16", "sweep"}
    for name in ("head-fp32", "head-bf16"):
        rows = {row["candidate"]: row for row in results[name]["rows"]}
        assert rows["ours: local"]["rounds"] == 2
        assert rows["ours: local"]["in_p"] > 0
        assert rows["ours: stash"]["dweight_error"] is None
        assert rows["eager"]["extra_bytes"] == 3 * 2**20
    assert len(results["sweep"]["rows"]) == 2 * 4


def test_results_are_checked(measured: Path) -> None:
    content = json.loads((measured / "sweep.json").read_text())
    content["rows"][0]["status"] = None
    with pytest.raises(ValueError, match="status: got None"):
        check(content)
    del content["rows"][0]["status"]
    with pytest.raises(ValueError, match="status: missing"):
        check(content)
    del content["machine"]
    with pytest.raises(ValueError, match="machine: missing"):
        check(content)


def test_put_replaces_the_same_row(measured: Path, tmp_path: Path) -> None:
    row = load(measured)["sweep"]["rows"][0]
    results = Results(tmp_path / "sweep.json", "sweep")
    results.put(row)
    results.put({**row, "extra_bytes": 7})
    assert [row["extra_bytes"] for row in load(tmp_path)["sweep"]["rows"]] == [7]


def test_report_round_trip(measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{START}\nold\n{END}\n\nAfter.\n", encoding="utf-8")
    assert not check_report(readme, measured)
    write_report(readme, measured)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n") and text.endswith(f"{END}\n\nAfter.\n")
    assert "| ours: local | hidden, head |" in text and "(results/sweep.png)" in text
    assert check_report(readme, measured)

    path = measured / "head-fp32.json"
    content = json.loads(path.read_text())
    content["rows"][0]["ms"] = 123456.0
    path.write_text(json.dumps(content))
    assert not check_report(readme, measured)


def test_report_needs_its_markers() -> None:
    with pytest.raises(ValueError, match="wanted the markers"):
        filled("# Title\n", {}, "results")


def test_table_names_who_has_no_figures(measured: Path) -> None:
    row = load(measured)["head-fp32"]["rows"][-1]
    table = tables.head_table([{**row, "status": "unavailable: needs trl"}])
    assert (
        table.splitlines()[2] == "| eager | hidden, head | unavailable: needs trl |  |  |  |  |  |"
    )


def test_claims_compare_with_their_limits() -> None:
    def rows(ours: float, peer: float) -> dict[str, dict[str, object]]:
        return {
            name: {"in_p": ours if CANDIDATES[name].ours else peer, "extra_bytes": None}
            for name in ON_ONE_SHAPE
        }

    claims = claims_of({"fp32": rows(2.0, 6.0), "bf16": rows(2.0, 6.0)})
    assert {str(claim).split(":")[0]: claim.value for claim in claims[:2]} == {
        "MISSED  fp32, ours": 2.0,
        "holds   fp32, ours": 2.0,
    }
    faster = [claim for claim in claims if "as fast as" in claim.text]
    assert [claim.holds for claim in faster] == [True, True, False]
    assert [claim.holds for claim in claims if "memory" in claim.text] == [False, False]
