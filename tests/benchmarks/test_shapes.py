"""The shapes that are measured and the problems that stand for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import HEADS, IGNORE_INDEX, LAPTOP, TINY, Shape, bare_matmul, make_problem


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [LAPTOP, TINY, *HEADS.values()], ids=lambda shape: shape.name)
def test_a_shape_counts_its_labelled_rows(shape: Shape, share: float) -> None:
    given = replace(shape, hidden_size=2, vocab=50, labelled=share)
    problem = make_problem(given, torch.float32)
    assert int((problem.targets != IGNORE_INDEX).sum()) == given.labelled_rows
    assert int(problem.lengths.sum()) == given.labelled_rows


def test_the_laptop_shape_is_the_one_of_the_claims() -> None:
    assert (LAPTOP.rows, LAPTOP.labelled_rows) == (4096, 2048)
    assert (LAPTOP.vocab, LAPTOP.hidden_size) == (32_000, 512)


def test_the_bare_matmul_covers_the_vocabulary_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.shapes.LARGEST_OUTPUT", 40 * TINY.labelled_rows * 4)
    problem = make_problem(TINY, torch.float32)
    unit = bare_matmul(problem)
    unit()
    hidden, pairs = unit.args  # type: ignore[attr-defined]
    assert [output.shape[1] for _, output in pairs] == [40, 40, 17]
    assert pairs[0][1] is pairs[1][1]
    torch.testing.assert_close(pairs[2][1], hidden @ problem.weight[80:].t())
