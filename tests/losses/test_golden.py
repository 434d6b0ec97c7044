"""The registered losses against float64 values of the formulas (tests/golden/losses.json)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fused_prefopt.losses import available_losses, check_needs, find
from fused_prefopt.types import LogpBatch, LossOutput

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["rows"]
FIELDS = tuple(field.name for field in dataclasses.fields(LogpBatch))
NOT_FLOATING = {"lengths": torch.int64, "groups": torch.int64, "desirable": torch.bool}
REGISTERED = available_losses()
COVERED = ROWS


def row_id(row: dict) -> str:
    options = ",".join(f"{name}={value}" for name, value in row["hyper"].items())
    return f"{row['loss']}[{options}]"


def run(row: dict, dtype: torch.dtype):
    """Feed a row's steps to one loss object; yield each step's result, gradient and values."""
    loss = find(row["loss"]).build(**row["hyper"])
    statistics = loss.statistics()
    for step in row["steps"]:
        fields = {
            name: torch.tensor(step[name], dtype=NOT_FLOATING.get(name, dtype))
            for name in FIELDS
            if name in step
        }
        fields["policy"].requires_grad_()
        batch = LogpBatch(**fields)
        check_needs(row["loss"], loss.needs, batch.given)
        summary = None if statistics is None else statistics(loss.observe(batch))
        result: LossOutput = loss(batch, summary)
        result.loss.backward()
        yield result, batch.policy.grad, step


def close(got: torch.Tensor, wanted: list | float, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        got.detach().double(), torch.tensor(wanted, dtype=torch.float64), rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("row", COVERED, ids=row_id)
def test_float64(row):
    for result, gradient, step in run(row, torch.float64):
        close(result.losses, step["losses"], 1e-9, 1e-12)
        close(result.loss, step["loss"], 1e-9, 1e-12)
        close(gradient, step["grad_policy"], 1e-9, 1e-12)
        if "target_margins" in step:
            close(result.target_margins, step["target_margins"], 1e-9, 1e-12)


@pytest.mark.parametrize("row", COVERED, ids=row_id)
def test_float32(row):
    for result, gradient, step in run(row, torch.float32):
        assert result.loss.dtype == gradient.dtype == torch.float32
        close(result.losses, step["losses"], 2e-5, 0)
        close(result.loss, step["loss"], 2e-5, 0)
        close(gradient, step["grad_policy"], 2e-5, 0)
        if "target_margins" in step:
            close(result.target_margins, step["target_margins"], 1e-5, 0)


def test_which_losses_have_golden_rows():
    covered = {row["loss"] for row in COVERED}
    assert covered >= {"dpo", "simpo", "alpha-dpo", "gamma-dpo", "gamma-simpo", "dro"}
    assert covered <= REGISTERED.keys() and len(ROWS) == 78
