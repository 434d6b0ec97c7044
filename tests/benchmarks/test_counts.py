"""What is counted of a candidate's design, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.candidates import CANDIDATES
from benchmarks.counts import WORKSPACE, count
from benchmarks.shapes import HEADS, Shape

SMALL = Shape("small", 2, 100, 8, 1000)  # 100 labelled rows, 200 in all


def test_counts_are_those_worked_out_by_hand() -> None:
    eager = count("eager", SMALL, 2)
    assert eager is not None
    assert eager.flops == 3 * 2 * 200 * 1000 * 8
    assert eager.moved == 3 * 2 * (200 * 8 + 1000 * 8) + 200 * 1000 * (2 * 5 + 4 * 8)
    assert eager.extra == 12 * 200 * 1000
    local = count("ours: local, cublas", SMALL, 2)
    assert local is not None
    assert local.flops == 3 * 2 * 100 * 1000 * 8
    assert local.extra == WORKSPACE + 4 * 100 * 8 + 2 * 100 * 1000
    assert local.intensity == local.flops / local.moved
    trl = count("TRL", replace(SMALL, vocab=100_000), 2)
    assert trl is not None
    assert trl.extra == 2 * 100 * 32_768 + 4 * 100_000 * 8 + 4 * 100 * 8
    assert count("nobody", SMALL, 2) is None
    assert count("Liger: kto", SMALL, 2) == count("Liger", SMALL, 2)


def test_counts_of_torchs_function_follow_its_chunks() -> None:
    options = pytest.importorskip("torch.nn.modules.linear_cross_entropy_options")
    for shape in (SMALL, *HEADS.values()):
        found = count("torch linear_cross_entropy", shape, 2)
        rows = shape.labelled_rows
        chosen = options.LinearCrossEntropyOptions()._adjust(
            rows, shape.hidden_size, shape.vocab, torch.bfloat16, torch.device("cuda")
        )
        hidden = 4 * rows * shape.hidden_size
        assert found is not None
        assert found.extra == 6 * chosen.batch_chunk_size * shape.vocab + hidden
        assert found.flops == 4 * 2 * rows * shape.vocab * shape.hidden_size
    small = count("torch linear_cross_entropy", SMALL, 2)
    assert small is not None
    assert small.moved == 4 * 2 * (100 * 8 + 1000 * 8) + 100 * 1000 * (2 * 3 + 4 * 17)


def test_counts_of_the_compiled_eager_loss() -> None:
    found = count("eager, compiled", SMALL, 2)
    assert found is not None
    assert found.flops == 3 * 2 * 200 * 1000 * 8
    assert found.moved == 3 * 2 * (200 * 8 + 1000 * 8) + 200 * 1000 * (2 * 7 + 4 * 3)
    assert found.extra == 6 * 200 * 1000


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_is_counted_but_those_that_keep_what_fits(name: str) -> None:
    assert (count(name, SMALL, 2) is None) == (name in ("ours: auto", "ours: half kept"))
