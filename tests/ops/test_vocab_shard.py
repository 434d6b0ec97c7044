"""A head whose rows are spread over processes against the whole head on one, in float64.

Everything in one set of four processes: most of the time is theirs to start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from spread_heads import (
    ROWS,
    VOCAB,
    WHOLE,
    Spread,
    case_of,
    of_divergence,
    of_log_probs,
    of_loss,
    of_tokens,
    recorded,
    two_of,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from truth import SMALLEST, TRAINING_PATHS

import fused_prefopt as fp
from fused_prefopt.ops import cutting, gradients, vocab_shard

pytestmark = pytest.mark.slow

KINDS = ("dtensor", "group")
LOW_RANK = (False, True)
Case = tuple[Callable[..., dict[str, torch.Tensor]], tuple[Any, ...]]
LOG_PROBS: list[Case] = [
    (of_log_probs, case) for case in product(("plain", "all"), LOW_RANK, TRAINING_PATHS)
]
SINGLE: list[Case] = [
    (of_log_probs, (*case, torch.float32)) for case in product(("all",), LOW_RANK, TRAINING_PATHS)
]
TOKENS: list[Case] = [
    (of_tokens, (transform, low_rank, workspace_mb))
    for transform, low_rank, workspace_mb in (
        ("plain", False, None),
        ("plain", True, SMALLEST),
        ("padded", False, SMALLEST),
        ("all", True, None),
    )
]
DIVERGENCES: list[Case] = [
    (of_divergence, case)
    for case in (
        ("plain", "plain", False, None, None),
        ("all", "plain", True, None, SMALLEST),
        ("plain", "softcap", False, 0.3, None),
        ("padded", "bias", False, 0.3, SMALLEST),
    )
]
LOSSES: list[Case] = [
    (of_loss, ("tdpo1",)),
    (of_loss, ("epsilon-dpo",)),
    (of_loss, ("dpo + 0.5 tdpo1",)),
]
CASES = LOG_PROBS + SINGLE + TOKENS + DIVERGENCES + LOSSES


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    cutting._SMALLEST_TILE = 3
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=4)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "vocab"))
    meshes = {2: pairs["vocab"], 3: DeviceMesh("cpu", [0, 1, 2])}
    alone = [dist.new_group([each]) for each in range(4)][rank]
    found = {}
    for world, mesh in meshes.items():
        if rank >= world:
            continue
        for kind in KINDS:
            spread = Spread(kind, mesh, alone)
            for place, (compute, case) in enumerate(CASES):
                found[world, kind, place] = compute(spread, *case)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, args=(str(folder),), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("place", range(len(CASES)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3])
def test_spread_heads_equal_the_whole_one(ranks, world, kind, place):
    compute, case = CASES[place]
    whole = compute(WHOLE, *case)
    tolerance = 2e-6 if torch.float32 in case else 1e-12
    for results in ranks[:world]:
        got = results[world, kind, place]
        assert got.keys() == whole.keys()
        for name, value in whole.items():
            distance = (got[name].double() - value.double()).norm()
            assert distance <= tolerance * value.double().norm(), name
            assert torch.equal(got[name], ranks[0][world, kind, place][name]), name
