"""Child processes, which import nothing anew: importing takes longer than most tests.

They fork from a server that has imported everything. `forked` gives what each rank returns;
`children` are for ranks that die, or that others wait for in vain.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What the server has in memory; a name that there is none of is left out.
_PRELOADED = [
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "fused_prefopt.integrations.transformers",
    "fused_prefopt.integrations.trl",
    "peft",
    "deepspeed",
    "tiny_models",
    "trainers",
]


def forked(work: Callable[[int], Any], world: int, folder: Path) -> list[Any]:
    """What each of `world` gloo processes returns.

    Args:
        work: of a module; takes the rank, within a process group of all.
        world: how many there are.
        folder: for what they leave.
    """
    start(partial(_run, work=work, world=world, folder=str(folder)), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start(work: Callable[..., None], world: int, *given: Any) -> None:
    """Run processes to their end; where one fails, its error is raised.

    Args:
        work: of a module; takes the process's number and what is given.
        world: how many there are.
    """
    # What the server imports may have looked for a GPU, which its children then cannot use.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    with _server():
        mp.start_processes(_begun, args=(work, *given), nprocs=world, start_method=method)


def _begun(number: int, work: Callable[..., None], *given: Any) -> None:
    # What imports have made stays out of collections: every `Trainer.train` collects.
    gc.freeze()
    work(number, *given)


def _run(rank: int, work: Callable[[int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = {"init_method": f"file://{folder}/init", "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **init)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def children(work: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> list[Any]:
    """One process for each tuple of arguments, a number the first, not yet started."""
    context = multiprocessing.get_context("forkserver")
    every = ((number, work, *more) for number, *more in given)
    return [context.Process(target=_begun, args=each, daemon=True) for each in every]


def exit_codes(processes: Sequence[Any], deadline: float) -> list[int]:
    """How they end; those that have not after `deadline` seconds fail the test."""
    try:
        with _server():
            for each in processes:
                each.start()
        for each in processes:
            each.join(deadline)
        waiting = [number for number, each in enumerate(processes) if each.is_alive()]
    finally:
        for each in processes:
            each.kill()
    assert not waiting, f"{waiting} of the processes hang"
    return [each.exitcode for each in processes]


@contextmanager
def _server() -> Iterator[None]:
    """Where a child is started, the first of which starts the server."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    before = os.environ.get("PYTHONPATH")
    # It knows of no other path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def join_group(rank: int, world: int, folder: Path, name: str = "init") -> None:
    """Make this process a rank of a gloo group that meets at a file."""
    torch.set_num_threads(1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 0}
    os.environ |= {key: str(value) for key, value in env.items()} | {"MASTER_ADDR": "localhost"}
    given = {"rank": rank, "world_size": world}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", **given)
