"""What all tests share."""

from __future__ import annotations

import gc
import os
from importlib.metadata import PackageNotFoundError, version

import pytest
from interpreter import mend_older_interpreters
from machines import (
    INTERPRETED,
    Machine,
    compute_as_a_gpu,
    executing,
    forget_plans,
    machines_of,
)
from packaging.version import Version

from fused_prefopt.ops import cutting
from fused_prefopt.ops.engines import missing_triton


def is_older(package: str, than: str) -> bool:
    """Whether an installed package is of an earlier release."""
    try:
        return Version(version(package)) < Version(than)
    except PackageNotFoundError:
        return False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Compiled kernels are executed on every machine that is asked for."""
    marker = metafunc.definition.get_closest_marker("executed")
    if marker is not None and not INTERPRETED:
        metafunc.parametrize("machine", machines_of(marker), indirect=True, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Kernels need Triton; interpreted ones run where that was said before it was imported."""
    kernels = [item for item in items if is_run_by_kernels(item)]
    missing = missing_triton()
    for item in kernels if missing else ():
        item.add_marker(pytest.mark.skip(reason=missing))
    if INTERPRETED:
        return
    gone = {item for item in kernels if item.get_closest_marker("executed") is None}
    if gone:
        config.hook.pytest_deselected(items=list(gone))
        items[:] = [item for item in items if item not in gone]


def is_run_by_kernels(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) is not None for name in ("interpreted", "executed"))


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
    return "Triton's interpreter is off: tests marked `executed` run what it compiles, emulated"


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
    compute_as_a_gpu(monkeypatch)


@pytest.fixture(autouse=True)
def machine(request):
    """What runs a test's kernels, or None: Triton's interpreter does, or there are none."""
    marker = request.node.get_closest_marker("executed")
    if marker is None or INTERPRETED:
        yield None
        return
    chosen = getattr(request, "param", Machine("sm_80"))
    with executing(chosen):
        yield chosen
