"""Which engine a call gets, the tile shapes it takes, and what the doctor says of both."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from truth import make_case

from fused_prefopt import devices, sequence_logps
from fused_prefopt.cli import main
from fused_prefopt.kernels.architectures import ARCHITECTURES, CANDIDATES, Block, architecture
from fused_prefopt.ops import engines, tuning
from fused_prefopt.ops.engines import (
    ENGINES,
    ROLES,
    choose_engine,
    load_engine,
    missing_triton,
    role_engine,
)
from fused_prefopt.ops.plan import PATHS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends the GPU has a compute capability, with Triton installed."""

    def pretend(major: int, minor: int) -> torch.device:
        shared = {"shared_memory_per_block_optin": 227 * 1024}
        found = SimpleNamespace(major=major, minor=minor, **shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        forget()
        return GPU

    def forget() -> None:
        for known in (devices.gpu_properties, engines._has_kernels):
            known.cache_clear()

    monkeypatch.setattr(engines, "MISSING_TRITON", None)
    yield pretend
    forget()


@pytest.fixture
def no_triton(monkeypatch):
    engines._warn_once.cache_clear()
    monkeypatch.setattr(engines, "MISSING_TRITON", "Triton is not installed")


def test_auto_is_torch_on_a_cpu_and_for_float64(gpu):
    assert choose_engine("auto", CPU, torch.float32) == "torch"
    assert choose_engine("auto", gpu(9, 0), torch.float64) == "torch"


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_auto_takes_the_table_of_the_architecture(gpu, entry, monkeypatch):
    place = gpu(*entry.capability)
    assert choose_engine("auto", place, torch.bfloat16) == "auto"
    monkeypatch.setattr(tuning, "tuning_of", lambda device: tuning.Tuning(entry))
    assert entry.fused and set(entry.fused) <= set(ROLES)
    for role, largest in entry.fused.items():
        for bent, size in enumerate(largest):
            # Up to this hidden size the logits' way through memory costs more.
            assert role_engine("auto", role, place, size, bool(bent)) == "triton"
            assert role_engine("auto", role, place, size + 1, bool(bent)) == "cublas"
    for role in {"weigh"} - set(entry.fused):
        assert role_engine("auto", role, place, 1, False) == "cublas"


@pytest.mark.parametrize("size", [1, 896, 4096])
@pytest.mark.parametrize("bent", [False, True])
def test_what_was_kept_is_read_by_the_engine_that_kept_it(size, bent, monkeypatch):
    monkeypatch.setattr(tuning, "tuning_of", lambda device: tuning.Tuning(ARCHITECTURES[0]))
    for name in ("auto", *ENGINES):
        keeps, reads = (role_engine(name, role, GPU, size, bent) for role in ("keep", "kept"))
        assert keeps == reads


def test_roles_that_one_engine_has_go_to_it():
    for name in ("auto", "cublas", "triton"):
        assert role_engine(name, "details", GPU, 4096, False) == "triton"
        assert role_engine(name, "entropy", GPU, 64, False) == "cublas"
    for role in ROLES:
        assert role_engine("torch", role, CPU, 64, True) == "torch"


@pytest.mark.parametrize("name", ENGINES)
def test_a_name_stands_for_one_engine(name):
    if name != "torch":
        pytest.importorskip("triton")
    assert load_engine(name).name == name
    named = [role for role in ROLES if role not in ("details", "entropy")]
    assert {role_engine(name, role, GPU, 4096, False) for role in named} == {name}


def test_auto_is_torch_on_a_gpu_older_than_the_table(gpu):
    assert choose_engine("auto", gpu(7, 5), torch.float16) == "torch"


def test_a_newer_gpu_takes_the_newest_known_architecture():
    assert architecture((12, 0)).name == "sm_100"
    assert architecture((8, 7)).name == "sm_86"
    with pytest.raises(ValueError, match="wanted at least sm_80"):
        architecture((7, 5))


@pytest.mark.parametrize("name", ["auto", "cublas", "triton"])
@pytest.mark.usefixtures("no_triton")
def test_without_triton_the_torch_engine_stands_in_with_one_warning(name):
    with pytest.warns(UserWarning, match="Triton is not installed; the torch engine stands in"):
        assert choose_engine(name, GPU, torch.bfloat16) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_engine(name, GPU, torch.bfloat16) == "torch"


@pytest.mark.usefixtures("no_triton")
def test_the_op_runs_without_triton():
    case = make_case()
    with pytest.warns(UserWarning, match="the torch engine stands in"):
        out = sequence_logps(case.hidden, case.head, case.labels, engine="triton")
    assert out.plan.engine == "torch"
    assert torch.equal(out.sums, sequence_logps(case.hidden, case.head, case.labels).sums)


@pytest.mark.parametrize(
    ("version", "finding"),
    [("3.4.0", None), ("3.9.0+git", None), ("10.0", None), ("3.3.1", "3.3.1 is too old")],
)
def test_versions_of_triton(monkeypatch, version, finding):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert finding is None if missing_triton() is None else finding in missing_triton()


def test_triton_that_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "not installed" in missing_triton()


def test_shapes_are_powers_of_two_that_fit_the_shared_memory():
    for entry in ARCHITECTURES:
        for itemsize in (2, 4):
            for block in (entry.block(itemsize, False), entry.block(itemsize, True)):
                for size in (block.rows, block.vocab, block.depth, block.warps):
                    assert size & (size - 1) == 0
                loads = (block.rows + block.vocab) * block.depth * itemsize
                assert loads * block.stages <= entry.shared


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_PREFOPT_CACHE", str(tmp_path))
    return tmp_path


def test_stored_shapes_come_back_and_add_up(cache):
    one, other = CANDIDATES[0], CANDIDATES[5]
    fold = tuning.key("fold", torch.bfloat16, False)
    tuning.store("gpu one", {fold: one})
    tuning.store("gpu two", {fold: other})
    tuning.store("gpu one", {"kept/float16/rich": other})
    assert tuning.load("gpu one") == {fold: one, "kept/float16/rich": other}
    assert tuning.load("gpu two") == {fold: other}
    assert tuning.load("gpu three") == {}
    assert [path.name for path in cache.iterdir()] == ["tile_shapes.json"]
    tuned = tuning.Tuning(ARCHITECTURES[0], tuning.load("gpu one"))
    assert tuned.block("fold", torch.bfloat16, False) == one
    assert tuned.block("fold", torch.bfloat16, True) == ARCHITECTURES[0].rich


AUTOTUNE = """
import itertools, json
from fused_prefopt.kernels.architectures import CANDIDATES
from fused_prefopt.ops import autotune, tuning

calls = itertools.count()
def timer(call):
    if next(calls) % 5 == 0:
        call()  # every kernel really runs
    return 1.0
best = {"fold": CANDIDATES[2], "kept": CANDIDATES[3], "gradient": CANDIDATES[4]}
def timer_of(run, blocks, timer):
    for block in blocks[:4]:
        yield block, timer(lambda: run(tuning._SMALL))
    yield best[run.__name__.replace("keep", "kept")], 0.5
autotune._times = timer_of
choices = autotune.autotune(48, 70, rows=9, device="cpu", timer=timer, softcap=30.0)
assert [choice.key for choice in choices] == [
    "fold/bfloat16/rich", "kept/bfloat16/rich", "gradient/bfloat16/rich"
], choices
assert [choice.milliseconds for choice in choices] == [500.0] * 3
stored = tuning.load("interpreter")
assert list(stored.values()) == list(best.values()) or set(stored.values()) == set(best.values())
print("stored", len(stored))
"""


def test_autotune_stores_the_fastest_shapes(cache):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AUTOTUNE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "stored 3"


def test_tuning_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--hidden-size", "64", "--vocab", "100"]) == 1
    assert "no GPU" in capsys.readouterr().out


def test_the_doctor_names_engines_and_checks_numbers(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"torch                  {torch.__version__}" in said
    assert "auto, bfloat16         torch\n" in said
    for path in PATHS:
        assert f"check torch, {path}" in said
    assert "check triton           not run" in said and "BAD" not in said


def test_the_doctor_fails_on_wrong_numbers(capsys, monkeypatch):
    from fused_prefopt import doctor

    def wrong(*arguments, **options):
        out = sequence_logps(*arguments, **options)
        return replace(out, sums=out.sums + 1e-3)

    monkeypatch.setattr(doctor, "sequence_logps", wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "BAD  check torch, evaluate" in capsys.readouterr().out


def test_a_block_is_hashable_and_shows_its_numbers():
    assert len({*CANDIDATES}) == len(CANDIDATES)
    assert "rows=64" in repr(Block(64, 128, 64, 8, 4, 3))
