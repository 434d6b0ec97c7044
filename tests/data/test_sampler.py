"""GroupBatchSampler: whole groups, every row once, another order each epoch."""

import pytest

from fused_prefopt.data.collators import GroupBatchSampler

GROUPS = [7, 7, 3, 3, 3, 9, 7, 1]


def test_groups_stay_whole_and_fill_batches_in_order():
    sampler = GroupBatchSampler(GROUPS, batch_size=4, shuffle=False)
    assert list(sampler) == [[0, 1, 6], [2, 3, 4, 5], [7]]
    assert len(sampler) == 3


def test_a_group_larger_than_a_batch_is_cut():
    sampler = GroupBatchSampler(GROUPS, batch_size=2, shuffle=False)
    assert list(sampler) == [[0, 1], [6], [2, 3], [4, 5], [7]]


def test_epochs_differ_and_repeat():
    groups = [i // 4 for i in range(80)]
    sampler = GroupBatchSampler(groups, batch_size=8, seed=5)
    first = list(sampler)
    assert first == list(sampler) == list(GroupBatchSampler(groups, 8, seed=5))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    for batches in (first, second):
        assert sorted(row for batch in batches for row in batch) == list(range(80))
        assert all(len({groups[row] for row in batch}) == 2 for batch in batches)


@pytest.mark.parametrize("groups", [GROUPS * 3, [i // 2 for i in range(24)]])
def test_accelerate_deals_every_row(groups):
    data_loader = pytest.importorskip("accelerate.data_loader")
    groups = [group + 100 * (row // len(GROUPS)) for row, group in enumerate(groups)]
    seen = set()
    for rank in range(2):
        sampler = GroupBatchSampler(groups, batch_size=4)
        shard = data_loader.BatchSamplerShard(
            sampler,
            num_processes=2,
            process_index=rank,
            even_batches=sampler.batch_size is not None,
        )
        seen |= {row for batch in shard for row in batch}
    assert seen == set(range(24))


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size: got 0, wanted at least 1"):
        GroupBatchSampler(GROUPS, batch_size=0)
