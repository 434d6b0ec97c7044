"""Short-lived child processes, which import nothing anew, and are not waited for for ever."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# What the server has in memory from which children are forked, with what these import.
_PRELOADED = ["tiny_models", "trainers", "fused_prefopt.integrations.transformers", "trl"]


def children(work: Callable[..., None], given: Sequence[tuple[Any, ...]]) -> list[Any]:
    """One process for each tuple of arguments, not yet started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return [context.Process(target=work, args=each, daemon=True) for each in given]


def exit_codes(processes: Sequence[Any], deadline: float) -> list[int]:
    """How they end; those that have not after `deadline` seconds fail the test."""
    before = os.environ.get("PYTHONPATH")
    # The server is started by the first child, and knows of no path but this.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        for each in processes:
            each.start()
        for each in processes:
            each.join(deadline)
        waiting = [number for number, each in enumerate(processes) if each.is_alive()]
    finally:
        for each in processes:
            each.kill()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    assert not waiting, f"{waiting} of the processes hang"
    return [each.exitcode for each in processes]


def join_group(rank: int, world: int, folder: Path, name: str = "init") -> None:
    """Make this process a rank of a gloo group that meets at a file."""
    torch.set_num_threads(1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": 0}
    os.environ |= {key: str(value) for key, value in env.items()} | {"MASTER_ADDR": "localhost"}
    given = {"rank": rank, "world_size": world}
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", **given)
