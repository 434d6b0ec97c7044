"""Compiled kernels give the same bits in any order of their programs and warps."""

from __future__ import annotations

import hashlib

import pytest
import torch
from emulated_kernels import SUBJECTS
from emulator import emulated, launches
from machines import EVERYTHING

_SOME = ("_fold_rows_kernel", "_recompute_gradient_kernel", "_sequence_sums_kernel")
ORDERS = ("up", "down", "random", None) if EVERYTHING else ("down", "random")


def bits_of(
    subject: str, order: str | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A digest of each tensor after each launch of a subject."""
    found, execute = [], launches._launch

    def recorded(text, arguments, *rest):
        report = execute(text, arguments, *rest)
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                raw = tensor.detach().clone().contiguous().view(-1).view(torch.uint8)
                found.append(f"{report.name} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}")
        return report

    with monkeypatch.context() as patch:
        patch.setattr(launches, "_launch", recorded)
        # New memory is NaN, not whatever was there.
        torch.use_deterministic_algorithms(True)
        try:
            with emulated(order=order, seed=seed):
                SUBJECTS[subject]()
        finally:
            torch.use_deterministic_algorithms(False)
    return found


@pytest.mark.parametrize("subject", SUBJECTS if EVERYTHING else _SOME)
def test_any_order_gives_the_same_bits(subject, monkeypatch):
    wanted = bits_of(subject, None, 0, monkeypatch)
    assert wanted
    for seed, order in enumerate(ORDERS, 1):
        assert bits_of(subject, order, seed, monkeypatch) == wanted, order
