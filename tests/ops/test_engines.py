"""Which engine a call gets, the tile shapes it takes, and what the doctor says of both."""

from __future__ import annotations

import importlib.metadata
import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from truth import make_case

from fused_prefopt import devices, sequence_logps
from fused_prefopt.cli import doctor
from fused_prefopt.cli.main import main
from fused_prefopt.kernels.architectures import ARCHITECTURES, CANDIDATES
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
KIB = 1024
# Capability, KiB of shared memory for a program → architecture, tensor descriptors.
NVIDIA = {
    "sm_80": ((8, 0), 163, "sm_80", False),
    "sm_86": ((8, 6), 99, "sm_86", False),
    "sm_87": ((8, 7), 163, "sm_86", False),
    "sm_89": ((8, 9), 99, "sm_86", False),
    "sm_90": ((9, 0), 227, "sm_90", True),
    "sm_100": ((10, 0), 227, "sm_100", True),
    "sm_103": ((10, 3), 227, "sm_100", True),
    "sm_110": ((11, 0), 227, "sm_100", False),
    "sm_120": ((12, 0), 99, "sm_86", False),
    "sm_121": ((12, 1), 99, "sm_86", False),
    "unknown": ((14, 2), 300, "sm_100", False),
    "unknown and small": ((14, 2), 100, "sm_86", False),
}
AMD = {
    "gfx90a": ((9, 0), 64),
    "gfx942": ((9, 4), 64),
    "gfx950": ((9, 5), 160),
    "gfx1100": ((11, 0), 64),
}


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends there is a GPU with some properties, with Triton installed."""

    def pretend(capability, shared, *, hip=False, **more):
        major, minor = capability
        # HIP has no other limit that a program could opt in to.
        name = "shared_memory_per_block" if hip else "shared_memory_per_block_optin"
        known = {"total_memory": 80 << 30, "multi_processor_count": 100, "name": "a GPU"}
        found = SimpleNamespace(major=major, minor=minor, **{name: shared}, **known, **more)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
        forget()
        return torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(engines, "MISSING_TRITON", None)
    monkeypatch.setattr(doctor, "MISSING_TRITON", None)
    yield pretend
    forget()


def forget():
    for known in (devices.gpu_properties, tuning._tuning_of_gpu, engines._has_kernels):
        known.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    engines._warn_once.cache_clear()
    monkeypatch.setattr(engines, "MISSING_TRITON", "Triton is not installed")


def test_auto_is_torch_on_a_cpu_and_for_float64(gpu):
    assert choose_engine("auto", CPU, torch.float32) == "torch"
    assert choose_engine("auto", gpu((9, 0), 227 * KIB), torch.float64) == "torch"


@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_auto_takes_the_table_of_the_architecture(gpu, entry, monkeypatch):
    place = gpu(entry.capability, entry.shared)
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


@pytest.mark.parametrize("name", NVIDIA)
def test_nvidia(gpu, name):
    capability, shared, wanted, descriptors = NVIDIA[name]
    device = gpu(capability, shared * KIB)
    found = tuning.tuning_of(device)
    assert (found.architecture.name, found.descriptors) == (wanted, descriptors)
    assert found.architecture.shared <= shared * KIB
    assert engines.choose_engine("auto", device, torch.bfloat16) == "auto"
    assert (
        f"sm_{capability[0]}{capability[1]}, 80 GiB, tile shapes of {wanted}"
        in doctor._describe(device)
    )


@pytest.mark.parametrize("name", AMD)
def test_amd(gpu, name):
    capability, shared = AMD[name]
    device = gpu(capability, shared * KIB, hip=True, gcnArchName=f"{name}:sramecc+:xnack-")
    found = tuning.tuning_of(device)
    assert (found.architecture.name, found.descriptors) == ("gfx90a", False)
    assert found.architecture.shared == 64 * KIB
    assert engines.choose_engine("auto", device, torch.bfloat16) == "auto"
    assert f"a GPU, {name}, 80 GiB, tile shapes of gfx90a" in doctor._describe(device)


@pytest.mark.parametrize(
    ("capability", "shared", "hip"), [((7, 5), 64, False), ((8, 0), 48, False), ((8, 6), 64, True)]
)
def test_a_gpu_without_shapes_takes_the_torch_engine(gpu, capability, shared, hip):
    device = gpu(capability, shared * KIB, hip=hip)
    assert engines.choose_engine("auto", device, torch.bfloat16) == "torch"
    assert "no tile shapes (" in doctor._describe(device)
    with pytest.raises(ValueError, match="capability: got|shared: got"):
        tuning.tuning_of(device)


def test_shared_memory_that_is_not_known_is_no_limit(gpu):
    device = gpu((9, 4), 64, hip=True)
    del devices.gpu_properties(0).shared_memory_per_block
    assert tuning.tuning_of(device).architecture.name == "gfx90a"


def test_a_gpu_is_asked_once(gpu, monkeypatch):
    device, asked = gpu((9, 0), 227 * KIB), []
    properties = torch.cuda.get_device_properties
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: asked.append(index) or properties(index)
    )
    for _ in range(3):
        assert engines.processors(device) == 100
        assert engines.device_memory(device) == 80 << 30
        assert engines.role_engine("auto", "fold", device, 4096, False) == "cublas"
    assert asked == [0]


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
    named = [role for role in ROLES if role not in ("details", "entropy", "kl")]
    assert {role_engine(name, role, GPU, 4096, False) for role in named} == {name}


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


def test_the_triton_engine_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make_case()
    with pytest.raises(ValueError, match="engine: 'triton' takes CPU tensors under"):
        sequence_logps(case.hidden, case.head, case.labels, engine="triton")


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


@pytest.mark.interpreted
def test_autotune_stores_the_fastest_shapes(cache, monkeypatch):
    calls = itertools.count()
    best = {"fold": CANDIDATES[2], "kept": CANDIDATES[3], "gradient": CANDIDATES[4]}

    def timer(call):
        if next(calls) % 5 == 0:
            call()  # every kernel really runs
        return 1.0

    def times(run, blocks, timer):
        for block in blocks[:4]:
            yield block, timer(lambda: run(tuning._SMALL))
        yield best[run.__name__.replace("keep", "kept")], 0.5

    monkeypatch.setattr(tuning, "_times", times)
    choices = tuning.autotune(48, 70, rows=9, device="cpu", timer=timer, softcap=30.0)
    assert [choice.key for choice in choices] == [f"{name}/bfloat16/rich" for name in best]
    assert [choice.milliseconds for choice in choices] == [500.0] * 3
    stored = tuning.load("interpreter")
    assert len(stored) == 3 and set(stored.values()) == set(best.values())


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
    def wrong(*arguments, **options):
        out = sequence_logps(*arguments, **options)
        return replace(out, sums=out.sums + 1e-3)

    monkeypatch.setattr(doctor, "sequence_logps", wrong)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "BAD  check torch, evaluate" in capsys.readouterr().out
