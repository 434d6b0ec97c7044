"""A cache on a disk that several jobs share, of one process or of more, some of them killed."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import children, exit_codes, join_group
from test_reference_cache import COUNT, Killed, edited, run
from tiny_models import tiny_llama

from fused_prefopt import reference
from fused_prefopt.reference_cache import ReferenceCache

DEADLINE = 90
# World of each job that begins at once, and the passes after which a rank of it is killed: jobs of
# the second round meet what those of the first have left.
ROUNDS = [
    [(1, None), (2, 2), (3, 1)],
    [(2, None), (3, 2), (1, 4), (3, None)],
]


def job(rank: int, world: int, name: str, folder: str, kill_at: int | None) -> None:
    """One rank; the last of a job is the one that is killed."""
    path = Path(folder)
    join_group(rank, world, path, f"{name}.init")
    model, passes = tiny_llama(), []

    def count(*_: Any) -> None:
        passes.append(1)
        if len(passes) == kill_at and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.register_forward_hook(count)
    rows, _ = run(model, cache_dir=path / "cache", save_every=1)
    torch.save(rows, path / f"{name}-{rank}.pt")
    os._exit(0)


def own_disks(rank: int, name: str, folder: str, swapped: bool) -> None:
    """A rank whose disk no other sees; after a swap it has that of the other."""
    path = Path(folder)
    join_group(rank, 2, path, f"{name}.init")
    disk = path / f"disk-{1 - rank if swapped else rank}"
    try:
        # Each rank fails, when it has kept two of its batches.
        found = run(cache_dir=disk, save_every=1, stop_at=3 if name == "first" else None)
    except Killed:
        found = None
    torch.save(found, path / f"{name}-{rank}.pt")
    os._exit(0)


@pytest.mark.slow
def test_jobs_of_any_world_share_a_cache_and_have_what_one_process_has(tmp_path):
    wanted = run()[0]
    for number, jobs in enumerate(ROUNDS):
        ranks = [
            (rank, world, f"{number}-{place}", str(tmp_path), kill_at)
            for place, (world, kill_at) in enumerate(jobs)
            for rank in range(world)
        ]
        codes = exit_codes(children(job, ranks), DEADLINE)
        for (rank, _, name, _, kill_at), code in zip(ranks, codes, strict=True):
            path = tmp_path / f"{name}-{rank}.pt"
            assert code == 0 or kill_at is not None, name
            if code == 0:
                assert torch.load(path) == wanted
    # One is enough to finish the file, and then nothing is left to compute.
    assert run(cache_dir=tmp_path / "cache", save_every=1) == (wanted, 0)
    assert [path.suffix for path in (tmp_path / "cache").glob("*.logps")] == [".logps"]


@pytest.mark.slow
def test_ranks_on_disks_of_their_own_are_continued_whoever_has_which(tmp_path):
    def pair(name: str, swapped: bool) -> list[Any]:
        given = [(rank, name, str(tmp_path), swapped) for rank in range(2)]
        assert exit_codes(children(own_disks, given), DEADLINE) == [0, 0]
        return [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2)]

    assert pair("first", False) == [None, None]
    wanted = run()[0]
    # Seven batches, four of which are there.
    assert [found[0] for found in pair("second", True)] == [wanted, wanted]
    assert [found for found in pair("third", False)] == [(wanted, 0), (wanted, 0)]
    parts = [path.name for path in tmp_path.glob("disk-*/*") if ".part-" in path.name]
    assert not parts


def test_a_file_that_another_machine_replaces_is_read_anew(tmp_path, monkeypatch):
    file, read, calls = tmp_path / "x.logps", Path.read_bytes, []
    wanted = run(cache_file=file)[0]

    def stale(path: Path) -> bytes:
        calls.append(path)
        if len(calls) % 3:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert run(cache_file=file) == (wanted, 0)

    def always(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    # One that is always another's is none.
    monkeypatch.setattr(Path, "read_bytes", always)
    assert len(reference._load(ReferenceCache(file, None), COUNT).columns) == 0


def test_another_models_cache_that_appears_meanwhile_is_told(tmp_path, monkeypatch):
    file, fill = tmp_path / "x.logps", reference._fill

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(reference, "_fill", fill)
        run(edited(), cache_file=file)
        return fill(*given)

    monkeypatch.setattr(reference, "_fill", meanwhile)
    with pytest.raises(ValueError, match="got log-probs of another model"):
        run(cache_file=file)


def test_jobs_do_not_write_over_each_others_parts(tmp_path, monkeypatch):
    file = tmp_path / "x.logps"
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_finish", lambda *_, **__: None)
        for share in ([0, 1, 6], [0, 3, 6]):
            patch.setattr(reference, "_share", lambda *_, share=share: share)
            run(cache_file=file, save_every=9)
    assert len(list(tmp_path.iterdir())) == 2
    assert run(cache_file=file) == (run()[0], 3)
