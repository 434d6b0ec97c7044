"""Which tile shapes a GPU gets, by what it says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fused_prefopt import devices, doctor
from fused_prefopt.kernels.architectures import (
    AMD_ARCHITECTURES,
    ARCHITECTURES,
    Architecture,
    architecture,
)
from fused_prefopt.ops import engines, tuning

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
    assert architecture((12, 0)) == architecture((12, 0), shared=227 * KIB)
    with pytest.raises(ValueError, match=r"capability: got \(7, 5\), wanted at least sm_80"):
        architecture((7, 5))


@pytest.mark.parametrize("entry", (*ARCHITECTURES, *AMD_ARCHITECTURES), ids=lambda each: each.name)
def test_shapes_fit_their_architecture(entry: Architecture):
    for itemsize in (2, 4):
        for block in (entry.block(itemsize, False), entry.block(itemsize, True)):
            loads = (block.rows + block.vocab) * block.depth * itemsize
            assert loads * block.stages <= entry.shared
    for table in (ARCHITECTURES, AMD_ARCHITECTURES):
        capabilities = [each.capability for each in table]
        assert capabilities == sorted(capabilities)


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
