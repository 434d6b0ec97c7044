"""A head whose rows are spread over processes against the whole head on one.

Everything in one set of four processes, and so in one file of more than 450 lines: most of the time
is theirs to start. The interpreter's kernels have two of their own, in their own run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import start
from spread_heads import (
    VOCAB,
    WHOLE,
    Parts,
    Spread,
    case_of,
    of_divergence,
    of_log_probs,
    of_loss,
    of_replicated,
    of_spread_tokens,
    of_sums,
    of_tokens,
    recorded,
    two_of,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from truth import SMALLEST, TRAINING_PATHS

import fused_prefopt as fp
from fused_prefopt.ops import cutting, gradients, torch_engine, vocab_shard
from fused_prefopt.ops.cublas_engine import CublasEngine

pytestmark = pytest.mark.slow

KINDS = ("dtensor", "group")
Case = tuple[Callable[..., dict[str, Tensor]], Any]
LOG_PROBS = list(product(("plain", "all"), (False, True), TRAINING_PATHS))
CASES: list[Case] = [
    *((of_log_probs, case) for case in LOG_PROBS),
    (of_log_probs, ("all", True, "stash", SMALLEST)),
    (of_log_probs, ("padded", True, "recompute", SMALLEST)),
    (of_sums, (0.0, False)),
    (of_replicated, ()),
    (of_tokens, ("plain", False)),
    (of_tokens, ("plain", True, SMALLEST)),
    (of_tokens, ("padded", False, SMALLEST)),
    (of_tokens, ("all", True)),
    (of_divergence, ("plain", "plain", False, None)),
    (of_divergence, ("all", "plain", True, None, SMALLEST)),
    (of_divergence, ("plain", "softcap", False, 0.3)),
    (of_divergence, ("padded", "bias", False, 0.3, SMALLEST)),
    (of_loss, ("tdpo1",)),
    (of_loss, ("epsilon-dpo",)),
    (of_loss, ("dpo", True)),
]
SINGLE: list[Case] = [
    *((of_log_probs, case) for case in LOG_PROBS if case[0] == "all"),
    (of_tokens, ("all", True)),
    (of_divergence, ("all", "softcap", False, 0.3)),
]
DROPPING: Case = (of_sums, (0.2,))
# Paths of calls that ranks cut differently, in workspaces of their own.
CUTS = ("stash", "recompute", "auto")
# Vocabulary × tokens, 2 × 2 ranks.
BOTH: list[Case] = [(of_spread_tokens, (name,)) for name in ("epsilon-dpo", "tdpo2", "simpo")]
# Paths whose last slab adds rows of hidden in each of the ways that there are.
OVERLAPPING: list[Case] = [
    (of_log_probs, ("all", True, "recompute", SMALLEST)),
    (of_log_probs, ("plain", False, "local")),
    (of_divergence, ("plain", "plain", False, None, SMALLEST)),
    DROPPING,
]


def without_overlap(values: Tensor, group: Any = None, async_op: bool = False) -> None:
    """`dist.all_reduce` of a backend that is done when it returns."""
    dist.distributed_c10d.all_reduce(values, group=group)


def overlapping(spread: Spread) -> dict[str, Any]:
    """What many small parts give with overlap and without, and what happens in which order."""
    found: dict[str, Any] = {}
    with mock.patch.object(vocab_shard, "_LEAST_BYTES", 64):
        found["overlap"] = [compute(spread, *case) for compute, case in OVERLAPPING]
        with mock.patch.object(dist, "all_reduce", without_overlap):
            found["none"] = [compute(spread, *case) for compute, case in OVERLAPPING]
        for name, place in (("events", 0), ("events of one slice", 1)):
            compute, case = OVERLAPPING[place]
            with recorded() as calls:

                def noted(*operands: Tensor, calls: Any = calls, **options: Any) -> Tensor:
                    calls.append(("weight", 0))
                    return torch_engine.product(*operands, **options)

                with mock.patch.object(gradients, "product", noted):
                    compute(spread, *case)
            found[name] = [name for name, _ in calls]
    return found


def exchanged(spread: Spread) -> dict[str, list[tuple[str, int]]]:
    """Collectives of a forward and of its backward, by what is computed."""
    spread, found = replace(spread, dtype=torch.float32), {}
    policy, reference = two_of("plain", "plain", spread.dtype)
    head = Parts.of(spread, policy, True).head
    others = reference.hidden, Parts.of(spread, reference, False, trains=False).head
    hidden, labels = policy.hidden.clone().requires_grad_(), policy.labels
    runs = {
        "logps": lambda: fp.sequence_logps(hidden, head, labels).sums,
        "local": lambda: fp.sequence_logps(hidden, head, labels, path="local").sums,
        "tokens": lambda: fp.token_policy(hidden, head, labels).entropies,
        "kl": lambda: fp.sequence_kl(hidden, head, *others, labels).kl,
        "mixtures": lambda: fp.sequence_kl(hidden, head, *others, labels, perturbation=0.1).kl,
    }
    for name, run in runs.items():
        with recorded() as found[name]:
            value = run()
        with recorded() as found[f"{name}, backward"]:
            value.sum().backward()
    return found


def compiled(spread: Spread) -> list[tuple[Tensor, Tensor]]:
    """Eager and compiled results and gradients of a policy beside its reference.

    Both calls run without the compiler, which may not move their collectives; whole graphs are
    refused.
    """
    policy, reference = two_of("all", "bias")
    parts = Parts.of(spread, policy, False)
    ref_weight = Parts.of(spread, replace(reference, bias=None), False, trains=False).tensors
    options = {k: v for k, v in policy.options.items() if k == "valid_vocab"}

    def run(hidden: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        head = spread.head(tensors, **policy.options)
        other = spread.head(ref_weight, **options)
        out = fp.sequence_kl(hidden, head, reference.hidden, other, policy.labels)
        statistics = fp.token_statistics(hidden, head, policy.labels)
        sums = fp.sequence_logps(hidden, head, policy.labels).sums
        return out.kl + sums + statistics.collisions.sum(1)

    found = []
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(run, backend="aot_eager", fullgraph=True)(policy.hidden, parts.tensors)
    for call in (run, torch.compile(run, backend="aot_eager")):
        hidden = policy.hidden.clone().requires_grad_()
        value = call(hidden, parts.tensors)
        value.sum().backward()
        found.append((value.detach(), hidden.grad))
    return found


def refusals(rank: int, mesh: DeviceMesh, alone: dist.ProcessGroup) -> dict[str, str]:
    """Messages of calls that one rank or all get wrong; each must raise on all of them."""
    case, spread = case_of("plain"), Spread("group", mesh)
    hidden, labels, (first, rows) = case.hidden, case.labels, spread.rows

    def message(head: Any, labels: Tensor = labels, ref_head: Any = None, **options: Any) -> str:
        try:
            if ref_head is None:
                fp.sequence_logps(hidden, head, labels, **options)
            else:
                fp.sequence_kl(hidden, head, hidden, ref_head, labels)
        except ValueError as error:
            return str(error)
        return ""

    sharded = distribute_tensor(case.weight, mesh, [Shard(0)])
    parts = distribute_tensor(hidden, mesh, [Shard(2)])
    own, group = case.weight[first : first + rows], spread.group
    # Of three ranks the first row of the last is 12, and its rows end the vocabulary.
    moved, cut = first + (first == 12), rows - (first == 12)
    shared = {"group": group, "first_row": first}
    head = fp.LMHead(own, **shared)
    outside = labels.masked_fill(labels >= 0, VOCAB)
    another = labels.masked_fill(labels >= 0, rank)
    # Other rows on two ranks of the three, and the same on the third.
    sizes = {12: (11, 20), 8: (8, 3), 0: (0, 8)}[first]
    beside = fp.LMHead(torch.ones(sizes[1], 12).double(), group=group, first_row=sizes[0])
    trained = fp.LMHead(own.clone().requires_grad_(), **shared)
    return {
        "columns": message(fp.LMHead(distribute_tensor(case.weight, mesh, [Shard(1)]))),
        "parts of hidden": _refused(lambda: fp.sequence_logps(parts, sharded, labels)),
        "whole bias": message(fp.LMHead(sharded, torch.zeros(VOCAB))),
        "another batch": message(fp.LMHead(sharded), another),
        "another batch, group": message(head, another),
        "padding alone": message(fp.LMHead(sharded, valid_vocab=3)),
        "padding alone, group": message(fp.LMHead(own, **shared, valid_vocab=12)),
        "gap": message(fp.LMHead(own, group=group, first_row=moved)),
        "overlap": message(fp.LMHead(own, group=group, first_row=2 * first - moved)),
        "late start": message(fp.LMHead(own, group=group, first_row=first + 1)),
        "too many": message(fp.LMHead(own, **shared, valid_vocab=VOCAB + 1)),
        "differing": message(fp.LMHead(own, **shared, valid_vocab=VOCAB - rank)),
        "outside": message(head, outside),
        "outside, padded": message(fp.LMHead(own, **shared, valid_vocab=30), outside - 1),
        "whole reference": message(head, ref_head=case.weight),
        "whole policy": message(case.weight, ref_head=head),
        "alone": message(head, ref_head=fp.LMHead(case.weight, group=alone, first_row=0)),
        "other rows": message(head, ref_head=beside),
        "other size": message(head, ref_head=fp.LMHead(own[:cut], **shared)),
        "alike": message(fp.LMHead(own, **shared), ref_head=fp.LMHead(own, **shared)),
        "no room": message(trained, path="local", workspace_mb=6 / 1024),
        "statistics": _refused(lambda: fp.PreferenceLoss("gamma-simpo")(hidden, head, labels)),
        "member": _refused_head(own, group=dist.GroupMember.NON_GROUP_MEMBER, first_row=0),
        "no first row": _refused_head(own, group=group),
        "negative": _refused_head(own, group=group, first_row=-1),
        "both": _refused_head(sharded, group=group, first_row=0),
        "no vocabulary": _refused(lambda: head.vocab),
        "logits": _refused(lambda: head.logits(hidden)),
    }


def _refused_head(*tensors: Tensor, **options: Any) -> str:
    return _refused(lambda: fp.LMHead(*tensors, **options))


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def _join(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    cutting._SMALLEST_TILE = 3
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)


def _work(rank: int, folder: str) -> None:
    _join(rank, folder, 4)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tokens", "vocab"))
    meshes = {2: pairs["vocab"], 3: DeviceMesh("cpu", [0, 1, 2])}
    alone = [dist.new_group([each]) for each in range(4)][rank]
    found: dict[Any, Any] = {}
    for world, mesh in meshes.items():
        for kind in KINDS if rank < world else ():
            spread = Spread(kind, mesh, alone)
            single = replace(spread, dtype=torch.float32)
            for place, (compute, case) in enumerate(CASES):
                found[world, kind, place] = compute(spread, *case)
            for place, (compute, case) in enumerate(SINGLE):
                found[world, kind, "single", place] = compute(single, *case)
    if rank < 3:
        spread = Spread("group", meshes[3], alone)
        found |= overlapping(spread)
        found["exchanged"] = exchanged(spread)
        workspace_mb = (SMALLEST, None, 0.01)[rank]
        found["cuts"] = [of_log_probs(spread, "all", True, path, workspace_mb) for path in CUTS]
        found["refusals"] = refusals(rank, meshes[3], alone)
        case = case_of("plain")
        replicated = distribute_tensor(case.weight, meshes[3], [Replicate()])
        found["replicated"] = fp.sequence_logps(case.hidden, replicated, case.labels).sums
    for kind, place in product(KINDS, range(len(BOTH))):
        spread, (compute, case) = Spread(kind, pairs["vocab"], alone), BOTH[place]
        found["both", kind, place] = compute(spread, *case, pairs["tokens"].get_group())
    if rank < 2:
        for kind in KINDS:
            found["compiled", kind] = compiled(Spread(kind, meshes[2], alone))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    start(_work, 4, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def assert_equal_to(
    whole: dict[str, Tensor], ranks: list[dict[str, Tensor]], tolerance: float
) -> None:
    """All ranks have the same bits, which are the whole head's but for rounding."""
    for results in ranks:
        assert results.keys() == whole.keys()
        for name, value in whole.items():
            distance = (results[name].double() - value.double()).norm()
            assert distance <= tolerance * value.double().norm(), name
            assert torch.equal(results[name], ranks[0][name]), name


@pytest.mark.parametrize("place", range(len(CASES)))
def test_spread_heads_equal_the_whole_one(ranks, place):
    compute, case = CASES[place]
    whole = compute(WHOLE, *case)
    for world, kind in product((2, 3), KINDS):
        assert_equal_to(whole, [each[world, kind, place] for each in ranks[:world]], 1e-12)


@pytest.mark.parametrize("place", range(len(SINGLE)))
def test_in_single_precision(ranks, place):
    compute, case = SINGLE[place]
    whole = compute(replace(WHOLE, dtype=torch.float32), *case)
    for world, kind in product((2, 3), KINDS):
        found = [each[world, kind, "single", place] for each in ranks[:world]]
        assert_equal_to(whole, found, 2e-6)


@pytest.mark.parametrize("path", CUTS)
def test_ranks_may_cut_their_rows_differently(ranks, path):
    whole = of_log_probs(WHOLE, "all", True, path)
    assert_equal_to(whole, [each["cuts"][CUTS.index(path)] for each in ranks[:3]], 1e-12)


def test_the_first_of_the_largest_logits_is_the_most_likely_token(ranks):
    whole = of_tokens(WHOLE, "plain", False)["statistics/correct"]
    assert whole.any() and not whole.all()
    # The same rows on every rank: of equal logits the first one's index counts.
    statistics, count = vocab_shard.RowStatistics, torch.ones(3)
    first = statistics(torch.tensor([2.0, 5.0, 1.0]), count, count)
    best = torch.tensor([1, 4, 2], dtype=torch.int32)
    details = vocab_shard.Details(count, count, count, best)

    def every(shard: Any, *own: Tensor) -> tuple[Tensor, ...]:
        # Of three ranks, whose first rows are 20, 0 and 10; the last has another largest logit.
        places = torch.tensor([[21, 24, 22], [1, 4, 2], [11, 14, 12]], dtype=torch.int32)
        maxima = torch.stack([own[0], own[0], own[0] + torch.tensor([1.0, 0.0, -1.0])])
        others = [torch.stack([each] * 3) for each in own[1:-1]]
        assert own[-1].view(torch.int32).tolist() == places[0].tolist()
        return maxima, *others, places.view(torch.float32)

    with mock.patch.object(vocab_shard.VocabShard, "_every", every):
        _, merged = vocab_shard.VocabShard("ranks", 20).merge(first, details)
    assert merged.best.tolist() == [11, 4, 2]


def test_a_replicated_head_is_a_whole_one(ranks):
    case = case_of("plain")
    whole = fp.sequence_logps(case.hidden, case.head, case.labels).sums
    for results in ranks[:3]:
        assert torch.equal(results["replicated"], whole)


def test_dropped_mass_is_bounded_and_the_same_on_all_ranks(ranks):
    exact, (compute, case) = of_sums(WHOLE), DROPPING
    found = [results["overlap"][OVERLAPPING.index(DROPPING)] for results in ranks[:3]]
    assert_equal_to(found[0], found, 0.0)
    assert torch.allclose(found[0]["sums"], exact["sums"], rtol=1e-12)
    distance = (found[0]["hidden"] - exact["hidden"]).norm(dim=-1)
    assert compute is of_sums and distance.any()
    assert (distance <= 2 * case[0] * case_of("plain").weight.norm(dim=1).max()).all()


def test_the_sum_of_backward_runs_beside_the_last_slab_and_changes_no_bit(ranks):
    for results in ranks[:3]:
        for place, (compute, case) in enumerate(OVERLAPPING):
            with_overlap, without = results["overlap"][place], results["none"][place]
            assert with_overlap.keys() == without.keys()
            for name, value in with_overlap.items():
                assert torch.equal(value, without[name]), (name, case)
            assert_equal_to(with_overlap, [ranks[0]["overlap"][place]], 0.0)
            if OVERLAPPING[place] is not DROPPING:
                assert_equal_to(compute(WHOLE, *case), [with_overlap], 1e-12)
        for name, products in (("events", 4), ("events of one slice", 1)):
            events = results[name]
            assert events.count("all_reduce") == events.count("wait") == 4
            first, last = events.index("all_reduce"), events.index("wait")
            assert events[first:last].count("weight") >= products
            assert "weight" not in events[last:]


def test_a_few_numbers_a_row_are_exchanged(ranks):
    case = case_of("plain")
    rows = int((case.labels[:, 1:] != -100).sum())
    numbers = {"logps": 3, "local": 3, "tokens": 7, "kl": 7, "mixtures": 13}
    for results in ranks[:3]:
        found = results["exchanged"]
        for name, count in numbers.items():
            alike = [("all_gather", 8)] if name in ("local", "kl", "mixtures") else []
            gathered = ("all_gather", 4 * count * rows)
            assert found[name] == [("all_gather", 40), *alike, gathered]
            summed = ("all_reduce", 4 * rows * (12 + 3))
            assert found[f"{name}, backward"] == [summed, ("wait", 0)]


@pytest.mark.parametrize("place", range(len(BOTH)))
def test_heads_and_sequences_that_are_both_spread(ranks, place):
    compute, case = BOTH[place]
    for kind in KINDS:
        assert_equal_to(compute(WHOLE, *case), [each["both", kind, place] for each in ranks], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_calls_equal_eager_ones(ranks, kind):
    for results in ranks[:2]:
        eager, compiled = results["compiled", kind]
        for one, other in zip(eager, compiled, strict=True):
            assert torch.equal(one, other)


MESSAGES = {
    "columns": "wanted Shard(0) on one mesh dimension",
    "parts of hidden": "hidden: got placements (Shard(dim=2),), wanted Replicate()",
    "whole bias": "bias: wanted a DTensor",
    "another batch": "ranks take the same batch",
    "another batch, group": "ranks take the same batch",
    "padding alone": "leave a rank",
    "padding alone, group": "weight: 12 rows leave a rank without any but padding",
    "gap": "first_row: got [8, 12), [13, 32), [0, 8) of the ranks, which overlap or leave a gap",
    "overlap": "first_row: got [8, 12), [11, 30), [0, 8) of the ranks, which overlap",
    "late start": "first_row: got [9, 13), [13, 32), [1, 9) of the ranks, which overlap",
    "too many": "valid_vocab: got 32, wanted at most as many as [8, 12), [12, 31), [0, 8)",
    "differing": "valid_vocab: got 31, 30, 29 on the ranks, wanted one number",
    "outside": "labels: got a label outside [0, 31): 31",
    "outside, padded": "labels: got a label outside [0, 30): 30",
    "whole reference": "ref_head: got one that is whole, wanted it to be spread over ranks [0, 1",
    "whole policy": "ref_head: got one that is spread over ranks [0, 1, 2], wanted it to be whole",
    "alone": "ref_head: got one that is spread over ranks [",
    "other rows": "wanted every rank to hold the same rows of both",
    "other size": "wanted every rank to hold the same rows of both",
    "alike": "",
    "no room": "path: 'local' does not fit workspace_mb",
    "statistics": "process_group: got 3 ranks of this rank's head's group in it",
    "member": "group: got -100, wanted a ProcessGroup of this rank",
    "no first row": "first_row: got None with a group",
    "negative": "first_row: got -1, wanted an integer >= 0",
    "both": "group: got one with a DTensor",
    "no vocabulary": "rows of a head that a group shares, wanted `valid_vocab`",
    "logits": "rows of a head that a group shares, wanted a whole head",
}


def test_what_would_be_wrong_is_refused_on_every_rank(ranks):
    for results in ranks[:3]:
        found = results["refusals"]
        assert found.keys() == MESSAGES.keys()
        for name, wanted in MESSAGES.items():
            assert (wanted in found[name]) if wanted else not found[name], (name, found[name])


def test_rows_without_ranks_that_share_them_are_refused():
    with pytest.raises(ValueError, match="first_row: got 3 without a group"):
        fp.LMHead(torch.ones(4, 2), first_row=3)


KERNEL_CASES: list[tuple[str, Case]] = [
    ("triton", (of_log_probs, ("all", True, "recompute"))),
    ("triton", (of_log_probs, ("plain", False, "local"))),
    ("triton", (of_tokens, ("all", False))),
    ("cublas", (of_log_probs, ("plain", False, "local"))),
    ("cublas", (of_log_probs, ("all", True, "local"))),
    ("cublas", (of_log_probs, ("all", True, "stash"))),
    ("cublas", (of_tokens, ("plain", True))),
    ("cublas", (of_divergence, ("all", "softcap", False, 0.3))),
]


def _work_of_kernels(rank: int, folder: str) -> None:
    _join(rank, folder, 2)
    # As on a GPU, where what is kept becomes the gradient.
    CublasEngine.in_place = staticmethod(lambda math, device: math.kept == math.dtype)
    spread = Spread("group", init_device_mesh("cpu", (2,)), None, torch.float32)
    found = [compute(replace(spread, engine=name), *case) for name, (compute, case) in KERNEL_CASES]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.interpreted
def test_kernels_on_spread_heads_equal_the_torch_engine_on_the_whole_one(tmp_path):
    start(_work_of_kernels, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for place, (_, (compute, case)) in enumerate(KERNEL_CASES):
        whole = compute(replace(WHOLE, dtype=torch.float32, engine="torch"), *case)
        assert_equal_to(whole, [found[place] for found in ranks], 2e-5)
