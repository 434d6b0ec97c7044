"""A head sharded over its rows on several processes against the whole head on one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from truth import TRAINING_PATHS, TRANSFORMS, make_case

import fused_prefopt as fp

LOW_RANK = (False, True)
# Not a multiple of the ranks: the last one holds fewer rows.
VOCAB = 31


def case_of(transform: str):
    return make_case(4, 9, 12, VOCAB, **TRANSFORMS[transform])


def tensors_of(transform: str, low_rank: bool) -> dict[str, Tensor]:
    case = case_of(transform)
    found = {"weight": case.weight}
    if case.bias is not None:
        found["bias"] = case.bias
    if low_rank:
        generator = torch.Generator().manual_seed(1)
        found["a"] = torch.randn(3, 12, generator=generator)
        found["b"] = torch.randn(VOCAB, 3, generator=generator) / 3
    return found


def step(transform: str, low_rank: bool, path: str, mesh=None) -> dict[str, Tensor]:
    """Sums and all gradients, of the whole head or of one sharded over a mesh."""
    case = case_of(transform)
    tensors = tensors_of(transform, low_rank)
    if mesh is not None:
        placed = {name: [Replicate()] if name == "a" else [Shard(0)] for name in tensors}
        tensors = {k: distribute_tensor(v, mesh, placed[k]) for k, v in tensors.items()}
    for name, value in tensors.items():
        value.requires_grad_(path != "stash" or name == "a")
    hidden = case.hidden.clone().requires_grad_()
    terms = (fp.LowRank(tensors["a"], tensors["b"], 0.5),) if low_rank else ()
    head = fp.LMHead(tensors["weight"], tensors.get("bias"), **case.options, low_rank=terms)
    out = fp.PreferenceLoss("simpo", path=path)(hidden, head, case.labels)
    out.loss.backward()
    sums = fp.sequence_logps(hidden.detach(), head, case.labels).sums
    found = {"loss": out.loss.detach(), "sums": sums.detach(), "hidden": hidden.grad}
    for name, value in tensors.items():
        if value.grad is not None:
            found[name] = value.grad
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()}


CASES = [
    (transform, low_rank, path)
    for transform in ("plain", "all")
    for low_rank in LOW_RANK
    for path in TRAINING_PATHS
]


def _refusals(rank: int, mesh) -> dict[str, str]:
    case = case_of("plain")

    def message(head, labels=case.labels) -> str:
        try:
            fp.sequence_logps(case.hidden, head, labels)
        except ValueError as error:
            return str(error)
        return ""

    rows = distribute_tensor(case.weight, mesh, [Shard(0)])
    columns = distribute_tensor(case.weight, mesh, [Shard(1)])
    bias = torch.zeros(VOCAB)
    labels = case.labels.masked_fill(case.labels >= 0, rank)
    return {
        "columns": message(fp.LMHead(columns)),
        "whole bias": message(fp.LMHead(rows, bias)),
        "another batch": message(fp.LMHead(rows), labels),
        "padding alone": message(fp.LMHead(rows, valid_vocab=3)),
    }


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    results = {case: step(*case, mesh) for case in CASES}
    results["replicated"] = fp.sequence_logps(
        case_of("plain").hidden,
        fp.LMHead(distribute_tensor(case_of("plain").weight, mesh, [Replicate()])),
        case_of("plain").labels,
    ).sums
    torch.save((results, _refusals(rank, mesh)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[tuple[dict, dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.slow
def test_shards_equal_the_whole_head(ranks):
    for case in CASES:
        whole = step(*case)
        for results, _ in ranks:
            assert results[case].keys() == whole.keys()
            for name, value in whole.items():
                distance = (results[case][name] - value).norm()
                assert distance <= 2e-6 * value.norm(), (case, name)


@pytest.mark.slow
def test_all_ranks_have_the_same_bits(ranks):
    for case in CASES:
        for results, _ in ranks[1:]:
            for name in ("loss", "sums", "hidden"):
                assert torch.equal(results[case][name], ranks[0][0][case][name])


@pytest.mark.slow
def test_a_replicated_head_is_a_whole_one(ranks):
    case = case_of("plain")
    whole = fp.sequence_logps(case.hidden, case.head, case.labels).sums
    for results, _ in ranks:
        assert torch.equal(results["replicated"], whole)


@pytest.mark.slow
def test_what_would_be_wrong_is_refused(ranks):
    for _, messages in ranks:
        assert "wanted Shard(0) on one mesh dimension" in messages["columns"]
        assert messages["whole bias"].startswith("bias: wanted a DTensor")
        assert "ranks take the same batch" in messages["another batch"]
        assert "leave a rank" in messages["padding alone"]
