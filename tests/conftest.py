"""What all tests share."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
from importlib.metadata import PackageNotFoundError, version

import pytest
from interpreter import mend_older_interpreters
from packaging.version import Version

from fused_prefopt import ops
from fused_prefopt.ops import cutting, plan
from fused_prefopt.ops.engines import missing_triton


def forget_plans() -> None:
    """What has been planned for a shape is not planned again, though a test may have changed it."""
    for known in (*vars(cutting.GpuPass).values(), *vars(plan).values()):
        if hasattr(known, "cache_clear"):
            known.cache_clear()


def is_older(package: str, than: str) -> bool:
    """Whether an installed package is of an earlier release."""
    try:
        return Version(version(package)) < Version(than)
    except PackageNotFoundError:
        return False


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreted kernels run where the interpreter was on before Triton was imported."""
    left = [item for item in items if item.get_closest_marker("interpreted")]
    if INTERPRETED:
        missing = missing_triton()
        for item in left if missing else ():
            item.add_marker(pytest.mark.skip(reason=missing))
    elif left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """Leave what imports have made out of collections: every `Trainer.train` collects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter's last collection see it again."""
    gc.unfreeze()


def pytest_report_header() -> str:
    if INTERPRETED:
        return "Triton's interpreter is on"
    return "Triton's interpreter is off: tests marked `interpreted` need TRITON_INTERPRET=1"


if INTERPRETED and is_older("triton", than="3.7"):
    mend_older_interpreters()
if is_older("torch", than="2.10"):
    # Later ones take ops whose sizes depend on values into a whole graph unasked.
    os.environ.setdefault("TORCHDYNAMO_CAPTURE_DYNAMIC_OUTPUT_SHAPE_OPS", "1")


@pytest.fixture
def fresh_plans():
    """Nothing is remembered from before the test, nor after it."""
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def tiny_tiles(monkeypatch, fresh_plans):
    """Let tiles shrink to 3 × 3, so that small cases meet many slabs and many row slices."""
    monkeypatch.setattr(cutting, "_SMALLEST_TILE", 3)
    # Of the engines that are planned for a GPU.
    monkeypatch.setattr(cutting, "_TILE", 3)


@pytest.fixture
def as_on_a_gpu(monkeypatch, fresh_plans):
    """Operands in the dtype computed in, library products of them, and kept values in place."""
    from fused_prefopt.ops.cublas_engine import CublasEngine
    from fused_prefopt.ops.precision import HeadMath
    from fused_prefopt.ops.torch_engine import product as library_product

    def product(left, right, out, *, alpha=1.0, accumulate=False):
        assert left.dtype == right.dtype
        total = alpha * (left.double() @ right.double())
        return out.copy_(out.double() + total if accumulate else total)

    for found in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        module = importlib.import_module(found.name)
        # The torch engine, which defines it, keeps its own.
        used = getattr(module, "product", None) is library_product
        if used and found.name != library_product.__module__:
            monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(HeadMath, "operand", lambda math, device: math.dtype)

    def in_place(math, device):
        return math.kept == math.dtype

    monkeypatch.setattr(CublasEngine, "in_place", staticmethod(in_place))
