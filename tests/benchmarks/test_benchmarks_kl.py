"""The benchmark of `sequence_kl`: its candidates agree with float64, its rows are complete."""

from __future__ import annotations

import pytest
import torch

from benchmarks import kl_rows
from benchmarks.results import load
from benchmarks.shapes import TINY


@pytest.mark.parametrize("name", kl_rows.CANDIDATES)
def test_candidates_agree_with_float64(name):
    pair = kl_rows.make_pair(TINY)
    truth = kl_rows._truth(pair)
    found = kl_rows._errors(kl_rows.CANDIDATES[name], pair, truth)
    assert found["status"] == "ok"
    assert (truth[0] > 0.01).all()
    assert found["kl_error"] <= 1e-5
    assert found["dhidden_error"] <= 1e-5 and found["dweight_error"] <= 1e-5


def test_a_candidate_that_is_wrong_shows_it():
    pair = kl_rows.make_pair(TINY)
    truth = kl_rows._truth(pair)

    def wrong(pair: kl_rows.Pair) -> tuple[torch.Tensor, torch.Tensor]:
        kls, logps = kl_rows.eager(pair)
        return 1.01 * kls, logps

    found = kl_rows._errors(wrong, pair, truth)
    assert found["kl_error"] > 1e-4 and found["dweight_error"] > 1e-4


def test_every_candidate_gets_a_complete_row(tmp_path, monkeypatch):
    monkeypatch.setattr(kl_rows, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(kl_rows, "in_child", lambda function, *arguments: 12345)
    kl_rows.run_kl(tmp_path, lambda text: None, shape=TINY, count=3)
    rows = {row["candidate"]: row for row in load(tmp_path)["kl"]["rows"]}
    assert rows.keys() == kl_rows.CANDIDATES.keys()
    for row in rows.values():
        assert row["status"] == "ok" and row["extra_bytes"] == 12345
        assert row["rounds"] == row["forward_rounds"] == 3
        assert row["in_p"] > 0 and row["forward_in_p"] > 0
