"""The loop whose ranks share sequences, against one process with all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import shared_sequences
import torch
from processes import forked

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach

STEPS = 3


def _work(rank: int) -> list[float]:
    return shared_sequences.train(STEPS, torch.device("cpu"), torch.float64)


def whole() -> list[float]:
    """The losses of one process, its batches those of both halves of the ranks."""
    model = shared_sequences.untrained("sdpa").double()
    attach(model, fp.PreferenceLoss("gamma-simpo"))
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(STEPS):
        rows = [row for half in range(2) for row in shared_sequences.pairs(2 * step + half)]
        batch: dict[str, Any] = PairCollator(0)(rows)
        loss = model(**batch)["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_the_losses_are_those_of_one_process(tmp_path):
    for losses in forked(_work, 4, tmp_path):
        assert losses == pytest.approx(whole(), rel=1e-9)
