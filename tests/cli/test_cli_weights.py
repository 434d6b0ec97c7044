"""A column of weights on the command line: trained with, judged with, refused."""

from __future__ import annotations

import json
import math

import pytest
from command_line_jobs import pairs, write_lines

pytest.importorskip("safetensors")
pytest.importorskip("datasets")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_weight_of_each_row_is_trained_and_judged_with(logged, tmp_path, loss):
    rows = [row | {"weight": 0.5} for row in pairs(8)]
    judged = [row | {"weight": float(index == 2)} for index, row in enumerate(pairs(4, seed=3))]
    files = {
        name: write_lines(tmp_path / f"{name}.jsonl", some)
        for name, some in (("dataset", rows), ("held_out", judged))
    }
    first = logged(loss=loss, **files)[0]
    # At the start the policy is its reference: a pair's loss is log 2, a completion's 1/2.
    assert first["loss"] == pytest.approx(0.5 * (math.log(2) if loss == "dpo" else 0.5), rel=1e-4)
    assert first["weights/mean"] == 0.5
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    # One pair alone counts.
    assert found["pairs"] == 4 and found["trained"]["accuracy"] in (0.0, 1.0)
    assert found["reference"]["accuracy_stderr"] == 0.0


@pytest.mark.parametrize(
    ("columns", "loss", "message"),
    [
        ({"weight": -1}, "dpo", "dataset: weight: got -1 in row 0 (counted from 0), wanted a numb"),
        ({"weight": 0}, "dpo", "dataset: got a 'weight' of 0 in every row, needs one above"),
        ({"weight": 1}, "dpo + 0.1 aot", "loss: got dpo + 0.1 aot, which sorts the pairs, with a"),
        (
            {"chosen_token_weights": [1.0]},
            "dpo",
            "dataset: chosen_token_weights: got some with texts in row 0",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(refused, tmp_path, columns, loss, message):
    file = write_lines(tmp_path / "rows.jsonl", [row | columns for row in pairs(2)])
    assert refused(dataset=file, loss=loss).startswith(message)
