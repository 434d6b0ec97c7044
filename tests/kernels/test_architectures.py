"""Tile shapes of architectures: they fit, and the newest that is not newer is taken."""

from __future__ import annotations

import pytest

from fused_prefopt.kernels.architectures import (
    AMD_ARCHITECTURES,
    ARCHITECTURES,
    CANDIDATES,
    Architecture,
    Block,
    architecture,
)


@pytest.mark.parametrize("entry", (*ARCHITECTURES, *AMD_ARCHITECTURES), ids=lambda each: each.name)
def test_shapes_are_powers_of_two_that_fit_the_shared_memory(entry: Architecture):
    for itemsize in (2, 4):
        for block in (entry.block(itemsize, False), entry.block(itemsize, True)):
            for size in (block.rows, block.vocab, block.depth, block.warps):
                assert size & (size - 1) == 0
            loads = (block.rows + block.vocab) * block.depth * itemsize
            assert loads * block.stages <= entry.shared


@pytest.mark.parametrize("table", [ARCHITECTURES, AMD_ARCHITECTURES], ids=["NVIDIA", "AMD"])
def test_later_ones_are_newer(table: tuple[Architecture, ...]):
    capabilities = [each.capability for each in table]
    assert capabilities == sorted(capabilities)


def test_a_newer_gpu_takes_the_newest_known_architecture():
    assert architecture((12, 0)).name == "sm_100"
    assert architecture((12, 0)) == architecture((12, 0), shared=227 * 1024)
    assert architecture((8, 7)).name == "sm_86"
    with pytest.raises(ValueError, match=r"capability: got \(7, 5\), wanted at least sm_80"):
        architecture((7, 5))


def test_a_block_is_hashable_and_shows_its_numbers():
    assert len({*CANDIDATES}) == len(CANDIDATES)
    assert "rows=64" in repr(Block(64, 128, 64, 8, 4, 3))
