"""Ranks with different numbers of pairs, or none: two processes are one with all of them, or raise.

All of it in one pair of processes, and so in one file: most of the time is theirs to start.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from processes import children, exit_codes, join_group
from tiny_models import list_features, pair_features, point_features, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from trainers import (
    OF_TRL,
    arguments,
    assert_bit_equal,
    build,
    history,
    in_order,
    pairs,
    points,
)

import fused_prefopt as fp
from fused_prefopt.data import ListCollator, PairCollator, PointCollator
from fused_prefopt.integrations import uneven_ranks
from fused_prefopt.integrations.transformers import (
    PreferenceTrainer,
    attach,
    past_wrappers,
    preference_outputs,
)
from fused_prefopt.reference import add_reference_logps

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

RATE, DEADLINE = 0.5, 300
# Of batches of three: two groups, one, three, two.
GROUPS = [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7]
KINDS: dict[str, tuple[Callable[..., list[dict]], Any]] = {
    "pairs": (pair_features, PairCollator(0)),
    "packed": (pair_features, PairCollator(0, padding_free=True)),
    "lists": (list_features, ListCollator(0)),
    "points": (point_features, PointCollator(0)),
}


def model() -> nn.Module:
    return tiny_llama().double()


def rows(kind: str, count: int) -> list[dict]:
    """Rows with the log-probs of another model."""
    make, collator = KINDS[kind]
    found = make(count)
    if kind == "points":
        found = [row | {"group": group} for row, group in zip(found, GROUPS, strict=False)]
    return add_reference_logps(tiny_llama(7), found, collator, progress=False)


# Loss, kind of rows, their number, rows of each batch on two ranks, batches of a step; and what
# rows each step is a mean over.
WHOLE = [[*range(8)], [*range(8, 14)]]
DEALT = {
    "a smaller last batch": ("dpo", "pairs", 14, 4, 1, WHOLE),
    "one, packed": ("dpo", "packed", 14, 4, 1, WHOLE),
    "one, weighted": ("dpo", "pairs", 14, 4, 1, WHOLE),
    "one of lists": ("dpo", "lists", 14, 4, 1, WHOLE),
    "one that remembers": ("gamma-simpo", "pairs", 14, 4, 1, WHOLE),
    "one of a sum over tokens": ("dpo + 0.5 sft", "pairs", 14, 4, 1, WHOLE),
    "accumulated": ("dpo", "pairs", 14, 4, 2, [[*range(14)]]),
    "groups": ("dro", "points", 12, 3, 2, [[*range(12)]]),
}
# The same of streams of two shards, (rows of each): each rank reads its own. Older versions of
# accelerate let each rank read all, and take as many rows of it as any other.
SHARDED = "n_shards" in inspect.getsource(prepare_data_loader)
STREAMED = {
    "unlike shards": ("dpo", "pairs", (6, 2), 2, 1, [[0, 1, 6, 7], [2, 3], [4, 5]]),
    "unlike, packed": ("dpo", "packed", (6, 2), 2, 1, [[0, 1, 6, 7], [2, 3], [4, 5]]),
    "unlike, remembering": ("gamma-simpo", "pairs", (6, 2), 2, 1, [[0, 1, 6, 7], [2, 3], [4, 5]]),
    "unlike, spanning": ("cpo", "pairs", (2, 4), 2, 1, [[0, 1, 2, 3], [4, 5]]),
    "unlike, accumulated": ("dpo", "pairs", (1, 8), 2, 2, [[*range(5)], [*range(5, 9)]]),
    "unlike, lists": ("dpo", "lists", (5, 2), 2, 1, [[0, 1, 5, 6], [2, 3], [4]]),
    "unlike, an empty one": ("dpo", "pairs", (3, 0), 2, 1, [[0, 1], [2]]),
}
CASES = DEALT | (STREAMED if SHARDED else {})
OPTIONS: dict[str, dict[str, Any]] = {"gamma-simpo": {"queue_size": 64, "sample_size": 64}}


def loss_of(name: str, **more: Any) -> fp.PreferenceLoss:
    return fp.PreferenceLoss(name, **OPTIONS.get(name, {}), **more)


def rows_of(case: str) -> list[dict]:
    _, kind, count, *_ = CASES[case]
    found = rows(kind, count if isinstance(count, int) else sum(count))
    if "weighted" in case:
        found = [row | {"weight": float(1 + i % 3)} for i, row in enumerate(found)]
    return found


def stream(found: list[dict], sizes: tuple[int, ...]) -> Any:
    shards, start = [], 0
    for size in sizes:
        shards.append((start, start + size))
        start += size

    def read(parts: list[tuple[int, int]]) -> Any:
        for first, end in parts:
            yield from found[first:end]

    return datasets.IterableDataset.from_generator(read, gen_kwargs={"parts": shards})


def trainer(folder: Path, data: Any, name: str, kind: str, **options: Any) -> Any:
    settings = {"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "num_train_epochs": 1}
    run = PreferenceTrainer(
        model(),
        arguments(folder, **{"max_steps": -1} | settings | options),
        KINDS[kind][1],
        data,
        loss_fn=loss_of(name),
    )
    run._get_train_sampler = lambda *_: SequentialSampler(data)
    return run


UNEVEN = {"accelerator_config": {"even_batches": False}}


def trained(case: str, folder: Path) -> dict[str, Any]:
    name, kind, count, size, batches, steps = CASES[case]
    data, found = rows_of(case), UNEVEN
    if case in STREAMED:
        data, found = stream(data, count), {"max_steps": len(steps)}
    run = trainer(
        folder,
        data,
        name,
        kind,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=batches,
        **found,
    )
    run.train()
    logged = {each: history(run, each) for each in ("loss", "rewards/accuracies", "rewards/mean")}
    return {"weights": dict(run.model.state_dict()), "logged": logged}


def trained_by_trl(kind: str, folder: Path, size: int, **options: Any) -> dict[str, Any]:
    """14 rows in order; two ranks have 4 and 2 of them in their last batch."""
    data = pairs(14) if kind == "dpo" else points(14, label=[True, False] * 7)
    run = build(
        kind,
        folder,
        data,
        model=model(),
        reference=tiny_llama(5).double(),
        loss="dpo" if kind == "dpo" else "apo-zero-unpaired",
        per_device_train_batch_size=size,
        **{"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0, "max_steps": 2} | options,
    )
    in_order(run).train()
    return {"weights": dict(run.model.state_dict()), "loss": history(run, "loss")}


def precomputed(kind: str, folder: Path) -> dict[str, Any]:
    """What TRL computes ahead, of a data set in memory, whose cache no two processes share."""
    data = pairs(10) if kind == "dpo" else points(10, label=[True, False] * 5)
    run = build(kind, folder, data, reference=tiny_llama(5), precompute_ref_log_probs=True)
    return {name: list(run.train_dataset[name]) for name in run.train_dataset.column_names}


def continued(folder: Path) -> dict[str, Any]:
    """Three steps, and the last of them anew: in it, and before, the second rank has no rows."""
    runs = {}
    for name, start in (("whole", None), ("rest", str(folder / "checkpoint-2"))):
        data = stream(rows("pairs", 8), (6, 2))
        options = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        run = trainer(folder, data, "gamma-simpo", "pairs", max_steps=3, **options)
        run.train(resume_from_checkpoint=start)
        runs[name] = run.model.state_dict() | run.attachment.loss_fn.state_dict()
    return runs


def with_kl(folder: Path, sizes: tuple[int, ...] = (8,)) -> dict[str, Any]:
    """KTO of a stream, whose `kl` is of all ranks' completions."""
    data = stream(list(points(8)), sizes)
    given = {"model": model(), "reference": tiny_llama(6).double(), "max_steps": 2}
    given |= {"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0}
    run = build("kto", folder, data, **given)
    run.train()
    names = ("loss", "kl", "rewards/chosen", "rewards/rejected")
    logged = {name: history(run, name) for name in names}
    return {"weights": dict(run.model.state_dict()), "logged": logged}


def exchanges(folder: Path) -> int:
    """How often the ranks meet in three epochs of one step."""
    seen, of_step = [], uneven_ranks._Exchange.of_step

    def counted(*given: Any) -> Any:
        seen.append(1)
        return of_step(*given)

    uneven_ranks._Exchange.of_step = counted
    data = stream(rows("pairs", 4), (2, 2))
    trainer(folder, data, "dpo", "pairs", max_steps=3, per_device_train_batch_size=2).train()
    uneven_ranks._Exchange.of_step = of_step
    return len(seen)


def alone(case: str) -> dict[str, Any]:
    """One process that takes each step of one batch."""
    name, kind, *_, steps = CASES[case]
    return stepped(name, kind, rows_of(case), steps)


def stepped(name: str, kind: str, data: list[dict], steps: list[list[int]]) -> dict[str, Any]:
    policy, loss_fn = model(), loss_of(name)
    logged: dict[str, list[float]] = {"loss": [], "rewards/accuracies": [], "rewards/mean": []}
    for step in steps:
        batch = KINDS[kind][1]([data[row] for row in step])
        policy.zero_grad()
        output = preference_outputs(policy, loss_fn, batch)
        output.loss.backward()
        with torch.no_grad():
            for value in policy.parameters():
                value -= RATE * value.grad
        logged["loss"].append(output.loss.item())
        for each in logged.keys() & output.metrics.keys():
            logged[each].append(output.metrics[each].item())
    return {"weights": policy.state_dict(), "logged": logged}


def ddp(policy: nn.Module) -> nn.Module:
    return DistributedDataParallel(policy)


def fsdp(policy: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for unit in ("model.layers.0", "lm_head"):
        fully_shard(policy.get_submodule(unit), mesh=mesh)
    return fully_shard(policy, mesh=mesh)


# A loop of one's own: rows of the first rank, of the second, and what all of them are.
LOOPS = {
    "3 and 1": ("pairs", 3),
    "3 and none": ("pairs", 4),
    "lists": ("lists", 3),
    "groups": ("points", 3),
}
WRAPS = {"ddp": ddp, "fsdp": fsdp}


def loop(case: str, wrap: Callable[[nn.Module], nn.Module] | None, rank: int) -> dict[str, Any]:
    """The gradients of one step, in one process without `wrap`."""
    kind, first = LOOPS[case]
    data, policy = rows(kind, 4), model()
    loss_fn = loss_of("dro" if kind == "points" else "dpo", uneven_ranks=wrap is not None)
    attach(policy, loss_fn)
    batch = dict(KINDS[kind][1](data))
    if wrap is not None:
        own = [data[:first], data[first:]][rank]
        batch = KINDS[kind][1](own) if own else KINDS[kind][1](data[:2]) | {"spent": True}
    wrapped = policy if wrap is None else wrap(policy)
    loss = wrapped(**past_wrappers(batch))["loss"]
    loss.backward()
    gradients = {
        name: value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
        for name, value in policy.named_parameters()
    }
    return {"loss": loss.detach(), "gradients": gradients}


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def resumed(loss_fn: fp.PreferenceLoss) -> None:
    """A step where one rank alone goes on from a saved state."""
    batch = fp.LogpBatch(torch.zeros(4), torch.ones(4, dtype=torch.int64))
    if dist.get_rank() == 1:
        before = fp.PreferenceLoss("gamma-simpo", queue_size=8)
        before.statistics.sees_all_ranks = True
        before.from_logps(batch)
        loss_fn.load_state_dict(before.state_dict())
    loss_fn.from_logps(batch)


def joined() -> None:
    policy = model()
    attach(policy, loss_of("gamma-simpo"))
    wrapped = ddp(policy)
    with wrapped.join():
        wrapped(**PairCollator(0)(pair_features(2)))


def refusals(folder: Path) -> dict[str, str]:
    """What every rank says, within its first exchange."""
    data = rows("pairs", 12)
    given = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}

    def run(data: Any, **options: Any) -> Any:
        return trainer(folder, data, "dpo", "pairs", **given | options)

    twice = run(data)
    twice.attachment.loss_fn.uneven_ranks = True
    own = fp.LogpBatch(torch.zeros(2), torch.ones(2, dtype=torch.int64))
    if dist.get_rank() == 1:
        own = fp.LogpBatch(own.policy, own.lengths, weights=torch.ones(2))
    streamed = {"evaluated stream": lambda: run(data).evaluate(stream(data, (8, 4)))}
    return {name: refused(call) for name, call in streamed.items() if SHARDED} | {
        "lengths": refused(run(data, **UNEVEN).train),
        "evaluated": refused(lambda: run(data, **UNEVEN).evaluate(data)),
        "twice": refused(twice.train),
        "queues": refused(lambda: resumed(fp.PreferenceLoss("gamma-simpo", queue_size=8))),
        "join": refused(joined),
        "fields": refused(lambda: fp.PreferenceLoss("cpo").from_logps(own)),
    }


def work(rank: int, folder: str) -> None:
    path = Path(folder)
    join_group(rank, 2, path)
    found: dict[str, Any] = {case: trained(case, path / f"run-{rank}") for case in CASES}
    if importlib.util.find_spec("trl"):
        for kind in OF_TRL:
            found[kind] = trained_by_trl(kind, path / f"run-{rank}", 4, **UNEVEN)
            found[f"{kind}, ahead"] = precomputed(kind, path / f"run-{rank}")
        if SHARDED:
            found["kl"] = with_kl(path / f"run-{rank}", (8, 0))
    if SHARDED:
        found["continued"] = continued(path / "continued")
        found["exchanges"] = exchanges(path / f"run-{rank}")
    for case in LOOPS:
        for name, wrap in WRAPS.items():
            found[f"{case}, {name}"] = loop(case, wrap, rank)
    found["refusals"] = refusals(path / f"run-{rank}")
    torch.save(found, path / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("ranks")
    assert exit_codes(children(work, [(0, str(path)), (1, str(path))]), DEADLINE) == [0, 0]
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def close(got: Any, wanted: Any, where: str = "") -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11, msg=where or None)


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_uneven_ranks_is_that_of_one_process(case, ranks):
    wanted = alone(case)
    for found in (each[case] for each in ranks):
        for name, value in wanted["weights"].items():
            close(found["weights"][name], value, name)
        for name, values in wanted["logged"].items():
            if name != "loss" and CASES[case][4] > 1:
                continue  # As TRL logs them: a mean over the batches.
            # transformers rounds the loss that it logs.
            assert found["logged"][name] == pytest.approx(values, abs=2e-4), name


def test_an_accumulated_step_of_one_process_is_that_of_one_batch(tmp_path):
    data, sizes = rows("pairs", 6), {"per_device_train_batch_size": 4}
    run = trainer(tmp_path, data, "dpo", "pairs", gradient_accumulation_steps=2, **sizes)
    run.train()
    wanted = stepped("dpo", "pairs", data, [[*range(6)]])
    for name, value in wanted["weights"].items():
        close(run.model.state_dict()[name], value, name)
    assert history(run, "loss") == pytest.approx(wanted["logged"]["loss"], abs=2e-4)


@pytest.mark.parametrize("kind", OF_TRL)
def test_so_it_is_in_trainers_on_top_of_trls(kind, ranks, tmp_path):
    pytest.importorskip("trl")
    wanted = trained_by_trl(kind, tmp_path, 8)
    for found in (each[kind] for each in ranks):
        for name, value in wanted["weights"].items():
            close(found["weights"][name], value, name)
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-4)


@pytest.mark.parametrize("kind", OF_TRL)
def test_ranks_without_a_shared_disk_have_what_trl_computes_ahead(kind, ranks, tmp_path):
    pytest.importorskip("trl")
    wanted, (first, second) = (
        precomputed(kind, tmp_path),
        [each[f"{kind}, ahead"] for each in ranks],
    )
    assert first == second and first.keys() == wanted.keys()
    names = [name for name in wanted if name.startswith("ref_")]
    assert names
    for name in names:
        assert first[name] == pytest.approx(wanted[name], rel=1e-5)


@pytest.mark.skipif(not SHARDED, reason="this accelerate deals streams evenly")
def test_a_rank_whose_data_have_ended_goes_on_where_training_is_resumed(ranks):
    for found in (each["continued"] for each in ranks):
        assert_bit_equal(found["rest"], found["whole"])


@pytest.mark.skipif(not SHARDED, reason="this accelerate deals streams evenly")
def test_a_rank_without_rows_has_no_part_in_ktos_kl(ranks, tmp_path):
    pytest.importorskip("trl")
    wanted = with_kl(tmp_path)
    # In the second step a rank without rows has the first one's batch, of another `kl`.
    assert all(value > 0 for value in wanted["logged"]["kl"])
    for found in (each["kl"] for each in ranks):
        for name, value in wanted["weights"].items():
            close(found["weights"][name], value, name)
        for name, values in wanted["logged"].items():
            assert found["logged"][name] == pytest.approx(values, abs=2e-4), name


@pytest.mark.skipif(not SHARDED, reason="this accelerate deals streams evenly")
def test_ranks_do_not_meet_again_in_an_epoch_that_has_ended(ranks):
    # A step and the end of each epoch, but for the last one's.
    assert [each["exchanges"] for each in ranks] == [5, 5]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", LOOPS)
def test_a_loop_of_ones_own_is_exact_where_it_says_that_ranks_differ(case, wrap, ranks):
    wanted, found = loop(case, None, 0), [each[f"{case}, {wrap}"] for each in ranks]
    close(sum(each["loss"] for each in found) / 2, wanted["loss"])
    for each in found:
        for name, value in wanted["gradients"].items():
            close(each["gradients"][name], value, name)


REFUSALS = {
    "lengths": r"^train_dataset: got different numbers of batches \(2 on rank 0, 1 on rank 1\)",
    "evaluated": r"^eval_dataset: got different numbers of batches .*'even_batches': True",
    "evaluated stream": "^eval_dataset: got no more batches on rank 1 while there are some on rank",
    "twice": "^uneven_ranks: got True in a trainer",
    "queues": "^ranks: got reward margins and draws of the queue in state .* on rank 0, reward mar",
    "join": "^join: got DDP's `join` .* with gamma-simpo",
    "fields": "^ranks: got pairs with policy, lengths in torch.float64 on rank 0, pairs .*weights",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_exact_is_refused_by_all_ranks_at_once(name, ranks):
    if name == "evaluated stream" and not SHARDED:
        pytest.skip("this accelerate deals streams evenly")
    for found in ranks:
        assert re.search(REFUSALS[name], found["refusals"][name]), found["refusals"][name]
