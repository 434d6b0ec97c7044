"""Processes that fork from one that has imported everything: importing takes longer than tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What is imported before the fork; a name that there is none of is left out.
_IMPORTED = [
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "fused_prefopt.integrations.transformers",
    "fused_prefopt.integrations.trl",
    "peft",
    "deepspeed",
]


def forked(work: Callable[[int], Any], world: int, folder: Path) -> list[Any]:
    """What each of `world` gloo processes returns.

    Args:
        work: of a module; takes the rank, within a process group of all.
        world: how many there are.
        folder: for what they leave.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    run = partial(_run, work=work, world=world, folder=str(folder))
    mp.start_processes(run, nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, work: Callable[[int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = {"init_method": f"file://{folder}/init", "timeout": timedelta(minutes=2)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **init)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
