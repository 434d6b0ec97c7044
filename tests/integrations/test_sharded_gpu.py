"""On two GPUs: FSDP and DeepSpeed under trainers with NCCL, offloading and bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import Case, on_two_processes, trained
from trainers import assert_bit_equal

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

OF_FSDP = ("fsdp1", "fsdp2", "fsdp2, offloaded", "fsdp2, its checkpointing")
OF_DEEPSPEED = ("zero2", "zero2, offloaded", "zero3")
TRAININGS = (("full", "model"), ("full", "cache"), ("head", "adapter"))


def cases_of(engines: tuple[str, ...]) -> list[Case]:
    return [
        Case(engine, "transformers", *each, half=half, device="cuda")
        for engine in engines
        for each in TRAININGS
        for half in (False, True)
    ]


@pytest.fixture(scope="module", params=["FSDP", "DeepSpeed"])
def runs(request, tmp_path_factory) -> Any:
    """Cases, a folder, and what each rank made of them: trained through, and resumed."""
    if request.param == "DeepSpeed":
        pytest.importorskip("deepspeed")
    cases = cases_of(OF_FSDP if request.param == "FSDP" else OF_DEEPSPEED)
    folder: Path = tmp_path_factory.mktemp(request.param)
    through = on_two_processes(cases, folder)
    return cases, through, on_two_processes(cases, folder, resume=True)


def test_two_gpus_train_as_one_does(runs, tmp_path):
    cases, through, _ = runs
    for case in cases:
        wanted = trained(case, tmp_path / str(case))
        # bf16 has 8 bits, of which sums in another order move the last ones.
        logged = 0.03 if case.half else 1e-4
        for found in through(case):
            losses = [
                [row["loss"] for row in run["log"] if "loss" in row] for run in (wanted, found)
            ]
            assert losses[1] == pytest.approx(losses[0], rel=logged), case
            for name, value in wanted["weights"].items():
                # Adam's steps are 0.01 each; in fp32 100 times as uncertain as the gradients.
                bound = 0.02 if case.half else 1e-4
                distance = (found["weights"][name] - value).abs().max()
                assert distance <= bound, (case, name)


def test_a_resumed_training_is_bit_equal(runs):
    cases, through, resumed = runs
    for case in cases:
        for one, other in zip(through(case), resumed(case), strict=True):
            for part in ("here", "weights", "statistics"):
                assert_bit_equal(one[part], other[part], f"{case}/{part}")
            assert other["ahead"] == 0
