"""FSDP and DeepSpeed under trainers on two processes, against one process with the whole batch.

FSDP's usual cases run everywhere; the others, and DeepSpeed's, where DeepSpeed is installed
(`make distributed`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_runs import BATCH, ITS_ADAM, STEPS, Case, on_two_processes, saved, trained

pytest.importorskip("peft")
pytestmark = pytest.mark.slow

# engine, trainer, what is tuned, reference
USUAL = [
    Case("fsdp1, units by size", "attached", "full", "model"),
    Case("fsdp2", "transformers", "head", "adapter"),
]
USUAL_OF_TRL = [Case("fsdp2", "dpo", "full", "cache")]
FULL = (("transformers", "full", "cache"), ("dpo", "full", "model"))
ADAPTED = (
    ("transformers", "lora", "cache"),
    ("attached", "head", "model"),
    ("dpo", "head", "adapter"),
)
FURTHER = [
    *(Case("zero3, loaded so", *each) for each in FULL),
    Case("zero3, loaded so", "attached", "full", "model"),
    *(
        Case(engine, *each)
        for engine in ("fsdp1", "fsdp2", "zero2", "zero3")
        for each in (*FULL, *ADAPTED)
    ),
    Case("fsdp1, flat parameters", "transformers", "lora", "cache"),
    *(Case(engine, "kto", "full", "model") for engine in ("fsdp1", "fsdp2", "zero2")),
    Case("zero3", "kto", "head", "adapter"),
    *(
        Case(engine, "transformers", "full", "model")
        for engine in (
            "fsdp1, flat parameters",
            "fsdp1, its checkpointing",
            "fsdp2, tied",
            "fsdp2, its checkpointing",
            "zero2, tied",
            "zero2, offloaded",
            ITS_ADAM,
            "zero3, tied",
        )
    ),
    *(
        Case(engine, "transformers", "head", "adapter", checkpoints=True)
        for engine in ("fsdp2, sharded checkpoints", "zero3")
    ),
    *(Case(f"fsdp{v}", "transformers", "full", "model", spoilt=(3,)) for v in (1, 2)),
]
CASES = USUAL + USUAL_OF_TRL * (importlib.util.find_spec("trl") is not None)
if importlib.util.find_spec("deepspeed") is not None:
    CASES += [case for case in FURTHER if case not in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder) -> Any:
    return on_two_processes(CASES, folder)


@pytest.fixture(scope="module")
def resumed(folder, ranks) -> Any:
    return on_two_processes(CASES, folder, resume=True)


@each_case
def test_two_processes_train_as_one_does(ranks, tmp_path, case):
    wanted = trained(case, tmp_path)
    exact = case.dtype == torch.float64
    # Rewards are β = 10 times a mean log-prob of about -4: their differences are of 40's last bits.
    logged = {"rel": 1e-6, "abs": 1e-7 if exact else 4e-5, "nan_ok": True}
    for found in ranks(case):
        assert found["is parted"] or case.engine.startswith("zero2")
        assert len(found["log"]) == len(wanted["log"]) >= STEPS + 2
        for one, other in zip(wanted["log"], found["log"], strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert other[name] == pytest.approx(value, **logged), name
        assert found["weights"].keys() == wanted["weights"].keys()
        for name, value in wanted["weights"].items():
            # Adam's step is at most 100 times as uncertain as the gradient, times 0.01.
            bound = 1e-12 if exact else 2e-6
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=bound)
        for name, value in wanted["statistics"].items():
            rounding = 1e-9 if exact else 1e-5
            torch.testing.assert_close(
                found["statistics"][name], value, rtol=rounding, atol=rounding / 10
            )


@each_case
def test_a_resumed_training_is_bit_equal(ranks, resumed, case):
    """But for DeepSpeed's Adam, whose bias correction is then another rounding of the same."""
    bound = 2e-6 if case.engine == ITS_ADAM else 0.0
    for through, again in zip(ranks(case), resumed(case), strict=True):
        for part in ("here", "weights", "statistics"):
            options = {"rtol": bound, "atol": bound, "equal_nan": True, "msg": part}
            torch.testing.assert_close(again[part], through[part], **options)
        # Of a resumed training the mean loss is one over the steps since, and TRL's count of
        # tokens too.
        for one, other in zip(through["log"][:-1], again["log"][:-1], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - {"num_tokens", "eval_num_tokens"}:
                wanted = pytest.approx(one[name], rel=20 * bound, abs=20 * bound, nan_ok=True)
                assert other[name] == wanted, name


@each_case
def test_references_are_computed_once(ranks, resumed, case):
    rows, evaluated = 16, 8
    batches = (rows + evaluated) // BATCH
    at_every_step = 2 * STEPS + 2 * evaluated // BATCH
    for run, again in zip(ranks(case), resumed(case), strict=True):
        if case.reference == "cache":
            # An evaluation of the policy is without a gradient too.
            assert (run["ahead"], run["in training"]) == (batches, 2 * evaluated // BATCH)
            assert again["ahead"] == 0
        else:
            assert run["ahead"] == 0
            assert run["in training"] >= at_every_step


@each_case
def test_what_is_saved_is_what_was_trained(ranks, resumed, folder, case):
    if "sharded checkpoints" in case.engine:
        pytest.skip("a model is put together of its shards by accelerate's merge_fsdp_weights")
    (found, _), model = resumed(case), saved(case, folder)
    assert model.keys() <= found["weights"].keys()
    for name, value in model.items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=0, msg=name)
