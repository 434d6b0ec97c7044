"""The papers' claims as experiments: all of them on a tiny setting, and their statistics."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import claims
import numpy as np
import pytest
from paper_claims import alpha_dpo, dro, gamma_po, newer, runs
from paper_claims.findings import Interval, above, below, fit_logistic, interval, one_of, together
from paper_claims.runs import Results, load_results
from paper_claims.trainings import FLIP_RATES, Settings, with_flips

TINY = (
    "--seeds 2 --workers 1 --steps 2 --pretraining-steps 1 --pairs 16 --held-out 8 --hidden-size 16"
).split()
VERDICTS = {"yes", "undecided", "no"}
TRAININGS = list(dict.fromkeys(w for each in claims.EXPERIMENTS for w in each.trainings))


def run(folder: Path, *arguments: str) -> tuple[Path, Path]:
    results, page = folder / "results" / "cpu.json", folder / "claims.md"
    paths = ["--work", folder / "work", "--results", results, "--page", page]
    claims.main([*map(str, paths), *arguments])
    return results, page


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("claims")
    run(folder, *TINY)
    return folder


def made_up(value_of, trainings, seeds=(0, 1, 2)) -> Results:
    """Results whose metrics are known, a little different for each seed."""
    found = {
        (what, seed): {
            name: value + 1e-3 * math.sin(seed) for name, value in value_of(what).items()
        }
        for what in trainings
        for seed in seeds
    }
    return Results(Settings(), seeds, found)


def verdicts_of(experiment, value_of) -> list[str]:
    found = made_up(value_of, experiment.trainings)
    return [finding.agrees for finding in experiment.findings(found)]


@pytest.mark.slow
def test_every_experiment_has_findings_a_table_and_a_picture(output):
    results = load_results(output / "results" / "cpu.json")
    assert (results.seeds, results.trainings) == ((0, 1), TRAININGS)
    assert results.settings == replace(
        Settings(), steps=2, pretraining_steps=1, pairs=16, held_out=8, hidden_size=16
    )
    text = (output / "claims.md").read_text(encoding="utf-8")
    for experiment in claims.EXPERIMENTS:
        assert (output / "claims" / f"{experiment.name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"](claims/{experiment.name}.png)" in text
        for finding in experiment.findings(results):
            assert finding.agrees in VERDICTS
            assert "nan" not in finding.here
            cells = (finding.claim, finding.paper, finding.here, finding.agrees, finding.rule)
            assert f"| {' | '.join(cells)} |" in text
        for what in experiment.trainings:
            row = interval(results.values(what, "accuracy")).show()
            assert f"| {what} | {row} |" in text or "accuracy" not in experiment.metrics
    assert "nan" not in text
    assert not list((output / "work").iterdir())


@pytest.mark.slow
def test_the_page_is_made_of_the_results_alone(output, monkeypatch):
    def forbidden(*arguments):
        raise AssertionError("something was trained")

    monkeypatch.setattr(claims, "run_all", forbidden)
    before = (output / "claims.md").read_bytes()
    (output / "claims.md").unlink()
    run(output, "--report")
    assert (output / "claims.md").read_bytes() == before


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_comes_out_equal(output, tmp_path, monkeypatch):
    done = []

    def interrupted(settings, task, what, seed):
        if done:
            raise KeyboardInterrupt
        done.append((what, seed))
        return execute(settings, task, what, seed)

    def counted(settings, task, what, seed):
        done.append((what, seed))
        return execute(settings, task, what, seed)

    whole, execute = load_results(output / "results" / "cpu.json"), runs.execute
    few = [TRAININGS[0], dro.DPO]
    arguments = (whole.settings, few, whole.seeds[:1], tmp_path, 1)
    monkeypatch.setattr(runs, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(*arguments)
    monkeypatch.setattr(runs, "execute", counted)
    runs.run_all(*arguments).save(tmp_path / "again.json")
    assert len(done) == len(set(done)) == 2
    again = load_results(tmp_path / "again.json")
    for key, result in again.found.items():
        assert {**result, "cpu_seconds": 0} == {**whole.found[key], "cpu_seconds": 0}


def test_one_seed_has_no_interval(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--seeds", "1")
    assert not list(tmp_path.iterdir())


def test_the_published_page_is_made_of_the_published_results():
    if not claims.RESULTS.exists():
        pytest.skip("nothing is published yet: `make claims` does it")
    results = load_results(claims.RESULTS)
    assert results.trainings == TRAININGS
    assert results.settings == Settings()
    assert len(results.seeds) >= 3
    shown = claims.PAGE.read_text(encoding="utf-8")
    assert shown == claims.page_text(results, claims.EXPERIMENTS, "claims")
    pictures = {path.name for path in claims.PAGE.with_suffix("").iterdir()}
    assert pictures == {f"{experiment.name}.png" for experiment in claims.EXPERIMENTS}


def test_results_are_read_as_they_were_written(tmp_path):
    def numbers(what):
        return {"accuracy": 0.123456789, "cpu_seconds": 2.0}

    written = made_up(numbers, TRAININGS)
    written.save(tmp_path / "results.json")
    read = load_results(tmp_path / "results.json")
    assert (read.settings, read.seeds, read.versions) == (Settings(), (0, 1, 2), written.versions)
    assert list(read.found) == list(written.found)
    assert read.found[TRAININGS[0], 0] == {"accuracy": 0.123457, "cpu_seconds": 2.0}


def test_the_page_counts_the_verdicts():
    def numbers(what):
        names = ("accuracy", "shift_chosen", "shift_rejected", "gap")
        counts = {"pairs": 1234, "held_out": 56}
        return {**dict.fromkeys(names, 0.0), **counts, "reference_accuracy": 0.5, "cpu_seconds": 1}

    experiment = dro.DISPLACEMENT
    results = made_up(numbers, experiment.trainings)
    text = claims.page_text(results, [experiment, experiment], "claims")
    agrees = [finding.agrees for finding in experiment.findings(results)]
    counts = [2 * agrees.count(verdict) for verdict in ("yes", "undecided", "no")]
    wanted = "**Agrees? yes {}, undecided {}, no {}.**".format(*counts)
    assert wanted in text
    assert len(re.findall(r"\| (yes|undecided|no) \|", text)) == sum(counts)
    reference = interval(results.values(dro.DPO, "reference_accuracy")).show()
    assert f"the reference itself has {reference}." in text
    assert "out of 1234, with" in text and "judged on 56 pairs" in text


def test_flips_exchange_whole_sides_and_more_at_a_higher_rate():
    pairs = [
        {
            "prompt_ids": [0],
            "chosen_ids": [1, i],
            "rejected_ids": [2, i],
            "ref_chosen_logps": -1.0 - i,
            "ref_rejected_logps": -100.0 - i,
        }
        for i in range(20)
    ]
    sets = []
    for rate in FLIP_RATES:
        flipped = with_flips(pairs, rate, seed=3)
        places = {i for i, pair in enumerate(flipped) if pair["chosen_ids"][0] == 2}
        for i, pair in enumerate(flipped):
            assert pair["prompt_ids"] == [0]
            assert (pair["ref_chosen_logps"] < -50) == (i in places)
            assert {pair["chosen_ids"][0], pair["rejected_ids"][0]} == {1, 2}
            assert pair["ref_chosen_logps"] + pair["ref_rejected_logps"] == -101 - 2 * i
        sets.append(places)
    assert [len(places) for places in sets] == [0, 2, 4]
    assert sets[1] < sets[2]


def test_the_interval_of_known_numbers():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-5)
    assert found.show(2) == "3.00 [1.04, 4.96]"
    assert Interval(-0.0001, -0.02, 0.01).show(1, 100, " %") == "0.0 [−2.0, 1.0] %"
    with pytest.raises(ValueError, match="got 1, needs at least 2"):
        interval([1.0])


def test_the_intervals_of_one_of_several_are_wider():
    values = [1.0, 2.0, 4.0, 5.0, 8.0]
    (found,), (four, *_) = one_of([values]), one_of([values] * 4)
    assert found == interval(values)
    assert (four.high - four.mean) / (found.high - found.mean) == pytest.approx(
        4.3147 / 2.7764, abs=1e-3
    )


def test_verdicts():
    found = Interval(1.0, 0.5, 1.5)
    assert [above(found, limit) for limit in (0.0, 1.0, 2.0)] == ["yes", "undecided", "no"]
    assert [below(found, limit) for limit in (0.0, 1.0, 2.0)] == ["no", "undecided", "yes"]
    assert together(["yes", "yes"]) == "yes"
    assert together(["yes", "undecided"]) == "undecided"
    assert together(["yes", "undecided", "no"]) == "no"


def test_a_logistic_curve_is_found_again():
    x = np.linspace(-6, 8, 60)
    y = 1.5 + 0.8 / (1 + np.exp((1.2 - x) / 0.7))
    found = fit_logistic(x.tolist(), y.tolist())
    wanted = (1.5, 0.8, 1.2, 0.7)
    assert (found.floor, found.height, found.centre, found.width) == pytest.approx(wanted, abs=1e-4)
    assert found.r_squared == pytest.approx(1, abs=1e-8)
    assert found(x) == pytest.approx(y, abs=1e-4)


def test_dros_rules_on_its_own_optimum_and_against_it():
    def optimum(what):
        beta, log_z0 = (dict(what.hyperparameters)[name] for name in ("beta", "log_z0"))
        chosen, rejected = 1 / beta - log_z0, 0.4 / beta - log_z0
        middle = (chosen + rejected) / 2
        return {"shift_chosen": chosen, "shift_mean": middle, "gap": chosen - rejected}

    def against(what):
        found = optimum(what)
        return {name: -value for name, value in found.items()} | {"gap": 0.5 * -found["shift_mean"]}

    assert verdicts_of(dro.DIRECT_REWARD, optimum) == ["yes", "yes", "yes", "yes"]
    assert verdicts_of(dro.DIRECT_REWARD, against) == ["no", "no", "no", "no"]


def test_displacements_rules():
    shifts = dict(zip(dro.TRAININGS, (-5.0, -8.0, 4.0, 3.0, -9.0), strict=True))
    assert verdicts_of(dro.DISPLACEMENT, lambda what: {"shift_chosen": shifts[what]}) == ["yes"] * 6
    assert verdicts_of(dro.DISPLACEMENT, lambda what: {"shift_chosen": -shifts[what]}) == ["no"] * 6


def test_label_noises_rules_rank_against_the_best_other_method():
    gains = {"simpo": 0.0, "robust-simpo": 0.02, "beta-simpo": 0.01, "gamma-simpo": 0.015}

    def accuracy(what):
        return {"accuracy": 0.8 + gains[what.loss] - what.flip_rate}

    one_rate = ["yes", "yes", "yes", "no"]
    assert verdicts_of(gamma_po.LABEL_NOISE, accuracy) == ["yes", *one_rate, *one_rate]
    found = made_up(accuracy, gamma_po.LABEL_NOISE.trainings)
    first = gamma_po.LABEL_NOISE.findings(found)[4]
    assert first.here == "−0.5 [−0.5, −0.5] points against robust SimPO, the best other"


def test_divergences_rules_allow_five_percent():
    def growing(by):
        def metrics(what):
            alpha = dict(what.hyperparameters).get("alpha", 0.0)
            kl = 1 + by * alpha
            return {"kl_chosen": kl, "kl_rejected": 2 * kl, "accuracy": 0.8 - alpha}

        return metrics

    assert verdicts_of(alpha_dpo.DIVERGENCE, growing(0.2)) == ["yes", "yes", "no"]
    assert verdicts_of(alpha_dpo.DIVERGENCE, growing(0.5)) == ["no", "no", "no"]


def test_new_losses_rules_ask_each_comparison_at_every_share():
    gains = {"simpo": 0.0, "dpo": 0.01, "simper": 0.02, "repo": 0.005, "focal-po": 0.0}

    def accuracy(what):
        return {"accuracy": 0.8 + gains.get(what.loss, 0.5) - what.flip_rate}

    assert verdicts_of(newer.NEW_LOSSES, accuracy) == ["yes", "yes", "yes", "no", "no"] * 3
    found = newer.NEW_LOSSES.findings(made_up(accuracy, newer.NEW_LOSSES.trainings))
    assert found[-1].claim == "FocalPO is above DPO with 20 % wrong labels"
    assert found[-1].here == "−1.0 [−1.0, −1.0] points of accuracy"
    shared = {gamma_po.method(gamma_po.BASE, 0.1), gamma_po.method(gamma_po.OURS, 0.2), dro.DPO}
    assert shared < set(newer.NEW_LOSSES.trainings) and len(newer.NEW_LOSSES.trainings) == 21
