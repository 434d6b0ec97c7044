"""The study of bounded-mass backwards: its emulations, its rows and its page."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import fused_prefopt as fp
from benchmarks.__main__ import main
from benchmarks.mass_page import check_mass_page, mass_text, write_mass_page
from benchmarks.mass_study import DROPS, PARTS, Study, TrainedRows, dropped, filtered, run_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masses")
    study = Study(vocab=400, seconds=0.2, count=60, curve_steps=2, rounds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.__main__.run_study", partial(run_study, study=study))
        # Nothing is large enough here for garbage to matter.
        patch.setattr("benchmarks.measuring.gc.collect", lambda: 0)
        assert main(["masses", "--results", str(folder)]) == 0
    return folder


def test_the_gradient_that_is_studied_is_the_ops():
    torch.manual_seed(0)
    logits = 3 * torch.randn(40, 1100)
    targets = torch.randint(1100, (40,))
    exact = logits.softmax(1)
    exact[torch.arange(40), targets] -= 1
    kept, gradient = dropped(exact, targets, 512, 0.3)
    assert 0.3 < kept < 1
    hidden = logits.unsqueeze(0).requires_grad_()
    weight = torch.eye(1100)
    logps = fp.token_logps(
        hidden, weight, targets.unsqueeze(0), shift=False, path="recompute", drop_mass=0.3
    )
    logps.sum().backward()
    torch.testing.assert_close(-hidden.grad[0], gradient, rtol=1e-4, atol=1e-6)


def test_the_filter_drops_whole_tiles_below_its_bound():
    gradient = torch.full((130, 260), 1e-3)
    gradient[129, 3] = 0.5
    kept, left = filtered(gradient, 0.01)
    assert kept == pytest.approx(1 / 6)
    assert torch.equal(left[128:, :128], gradient[128:, :128])
    assert not left[:128].any() and not left[:, 128:].any()


def test_ordering_by_frequency_moves_weights_and_targets_together():
    weight, targets = torch.randn(5, 2), torch.tensor([4, 0, 2])
    rows = TrainedRows(
        {"seen": torch.randn(3, 2)}, {"seen": targets}, weight, torch.tensor([1, 9, 3, 0, 5])
    )
    ordered = rows.by_frequency()
    assert ordered.counts.tolist() == [9, 5, 3, 1, 0]
    assert torch.equal(ordered.weight[ordered.targets["seen"]], weight[targets])


def test_every_row_is_there_and_the_page_shows_them(folder, tmp_path):
    content = json.loads((folder / "cpu.json").read_text())
    ours = [row for row in content["rows"] if row["method"] == "drop_mass"]
    assert len(ours) == 4 * len(PARTS) * len(DROPS)
    assert all(row["mean_l1"] <= 2 * row["bound"] * (1 + 1e-3) + 1e-6 for row in ours)
    assert len(content["times"]) == 4 * 2 * (1 + len(DROPS))
    page = tmp_path / "drop_mass.md"
    assert not check_mass_page(page, folder)
    write_mass_page(page, folder)
    assert check_mass_page(page, folder) and page.with_name("drop_mass.png").is_file()
    assert mass_text(content).count("| recompute | frequency | held-out |") == 1
    page.write_text(page.read_text().replace("0.", "1.", 1))
    assert not check_mass_page(page, folder)


def test_without_results_there_is_no_page(tmp_path):
    page = tmp_path / "drop_mass.md"
    write_mass_page(page, tmp_path)
    assert not page.exists() and check_mass_page(page, tmp_path)
