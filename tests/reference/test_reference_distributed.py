"""Two processes that share the reference pass, and what they leave for one to continue."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import start
from test_reference_cache import COUNT, Killed, run
from tiny_models import pair_features, point_features, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fused_prefopt.data import PointCollator
from fused_prefopt.reference_cache import model_fingerprint

pytestmark = pytest.mark.slow


def sharded(*units):
    model, mesh = tiny_llama(), init_device_mesh("cpu", (2,))
    for name in units:
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def raised(call) -> tuple[type, str]:
    try:
        call()
    except (ValueError, Killed) as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    path = Path(folder)
    found = {
        "pairs": run(cache_dir=path / "pairs"),
        "pairs again": run(cache_dir=path / "pairs"),
        "points": run(None, point_features(COUNT), PointCollator(0)),
        "sharded, head of its own": run(sharded("model.layers.0", "lm_head")),
        "sharded, head in the root": run(sharded()),
        "sharded fingerprint": model_fingerprint(sharded("lm_head")),
        "other data": raised(lambda: run(None, pair_features(COUNT, seed=rank))),
        "one has another model's": raised(lambda: run(cache_file=path / f"own-{rank}")),
        "killed": raised(lambda: run(cache_file=path / "killed", save_every=1, stop_at=3)),
    }
    torch.save(found, path / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        _work_until_killed(path / "alone")


def _work_until_killed(cache_dir: Path) -> None:
    model, seen = tiny_llama(), []

    def kill(*_):
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.register_forward_hook(kill)
    run(model, cache_dir=cache_dir, save_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run(tiny_llama(1), cache_file=path / "own-1")
    with pytest.raises(mp.ProcessExitedException) as end:
        start(_work, 2, str(path))
    assert end.value.signal_name == "SIGKILL"
    return path


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_share_the_batches_and_have_the_result_of_one_process(ranks, folder):
    pairs, points = run()[0], run(None, point_features(COUNT), PointCollator(0))[0]
    for found in ranks:
        # Seven batches; the one that fills up is computed by both.
        assert found["pairs"] == (pairs, 4)
        assert found["points"] == (points, 4)
        assert found["pairs again"] == (pairs, 0)
    assert len(list((folder / "pairs").iterdir())) == 1
    assert run(cache_dir=folder / "pairs") == (pairs, 0)


@pytest.mark.parametrize("head", ["of its own", "in the root"])
def test_a_sharded_model_is_gathered(ranks, head):
    for found in ranks:
        assert found[f"sharded, head {head}"] == (run()[0], 4)
        assert found["sharded fingerprint"] == model_fingerprint(tiny_llama())


def test_ranks_refuse_together(ranks):
    for found in ranks:
        assert found["other data"][1].startswith("features: got different ones on the ranks")
        assert "own-1: got log-probs of another model" in found["one has another model's"][1]


def test_one_process_continues_what_two_began(ranks, folder):
    assert all(found["killed"][0] is Killed for found in ranks)
    assert run(cache_file=folder / "killed") == (run()[0], 3)


def test_a_killed_process_is_continued_where_it_ended(folder):
    assert len(list((folder / "alone").iterdir())) == 4
    assert run(cache_dir=folder / "alone", save_every=1) == (run()[0], 3)
