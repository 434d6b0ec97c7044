"""Kernels are launched on the GPU that holds their tensors, whichever is the current one."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from loss_cases import random_batch

triton = pytest.importorskip("triton")

from fused_prefopt import devices, loss_kernel  # noqa: E402
from fused_prefopt.losses import find  # noqa: E402
from fused_prefopt.ops import autograd, inputs, kl, logps, precision, tuning  # noqa: E402
from fused_prefopt.ops.head_rows import Spec  # noqa: E402
from fused_prefopt.statistics import MarginQueue  # noqa: E402
from fused_prefopt.types import LogpBatch  # noqa: E402

# Tensors without values stand for a GPU's.
GPU = torch.device("meta")
MATH = precision.HeadMath(None, 1.0, 1.0, torch.float32)


@pytest.fixture
def launches(monkeypatch):
    """(kernel, the current device, the devices of its tensors) of each launch; none is run."""
    found, stack = [], [None]

    @contextmanager
    def current(device):
        stack.append(device)
        yield
        stack.pop()

    def run(kernel, *args, grid, warmup, **kwargs):
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        found.append((kernel.__name__, stack[-1], {each.device for each in tensors}))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    for module in (tuning, loss_kernel, precision):
        monkeypatch.setattr(module, "current", current)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    for name in ("pair_loss_op", "point_loss_op"):
        monkeypatch.setattr(loss_kernel, name, getattr(loss_kernel, name)._init_fn)
    monkeypatch.setattr(inputs, "_check", lambda *_: None)
    monkeypatch.setattr(inputs, "_compute_dtype", lambda hidden: hidden.dtype)
    monkeypatch.setattr(inputs, "require", lambda *_: None)
    monkeypatch.setattr(inputs, "choose_engine", lambda name, *_: name)
    for module in (autograd, kl, logps):
        monkeypatch.setattr(module, "labelled_rows", lambda targets, *_: targets.new_empty(16))
    yield found
    assert stack == [None]


def on_its_device(found, *kernels):
    assert {name for name, _, _ in found} >= set(kernels)
    assert all(current == GPU and places == {GPU} for _, current, places in found)


def head(low_rank=False):
    """Tensors of a head and of its rows, as the bodies of the ops take them."""
    hidden, weight = torch.empty(24, 32, device=GPU), torch.empty(500, 32, device=GPU)
    low = (torch.empty(24, 2, device=GPU), torch.empty(500, 2, device=GPU)) if low_rank else ()
    ids = torch.empty(24, dtype=torch.int64, device=GPU)
    return (hidden, weight, torch.empty(500, device=GPU), *(low or (None, None))), (ids, ids)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("engine", ["cublas", "triton"])
@pytest.mark.parametrize("path", ["evaluate", "stash", "local", "recompute"])
def test_log_probs_and_their_gradients(launches, path, engine, low_rank):
    tensors, rows = head(low_rank)
    kept = 16 if path == "local" else 0
    spec = Spec(4, 16, -100, 500, 1 << 24, MATH, path, engine, kept_rows=kept).packed()
    logps, sums, _, entropies, *saved = autograd.head_logps._init_fn(*tensors, *rows, *spec)
    on_its_device(launches, "_sequence_sums_kernel")
    assert len(launches) > 1
    if path == "evaluate":
        return
    launches.clear()
    wanted = (True, path != "stash", path != "stash", low_rank, low_rank and path != "stash")
    autograd.head_logps_backward._init_fn(
        *tensors, *rows, logps, entropies, *saved, None, sums, None, *spec, wanted
    )
    on_its_device(launches, "_spread_rows_kernel")


def test_divergences_and_their_gradients(launches):
    tensors, rows = head()
    spec = Spec(4, 16, -100, 500, 1 << 24, MATH, "recompute", "cublas", reference=MATH).packed()
    out = kl.head_kl._init_fn(*tensors, *tensors, *rows, *spec)
    on_its_device(launches, "_fold_kl_rows_kernel", "_sequence_sums_kernel")
    launches.clear()
    kls, policy, _, _, _, *saved = out
    wanted = (True, True, True, False, False)
    kl.head_kl_backward._init_fn(*tensors, *tensors, *rows, *saved, kls, policy, *spec, wanted)
    on_its_device(launches, "_kl_gradient_kernel")


def test_statistics_of_tokens(launches):
    (hidden, weight, *_), (labels, _) = head()
    options = {"num_labels": 20, "engine": "triton"}
    logps.token_statistics(hidden.view(4, 6, 32), weight, labels.view(4, 6), **options)
    on_its_device(launches, "_fold_logits_kernel", "_merge_partials_kernel")


@pytest.mark.parametrize("name", ["dpo", "alpha-dpo", "gamma-dpo", "dro"])
def test_losses(launches, name):
    loss = find(name).build()
    statistics = loss.statistics()
    fields = {
        key: torch.empty(value.shape, dtype=value.dtype, device=GPU)
        for key, value in vars(random_batch(dtype=torch.float32)).items()
        if value is not None
    }
    if statistics is not None:
        statistics = statistics.to(GPU)
    if isinstance(statistics, MarginQueue):
        statistics.order = lambda _: torch.empty(2048, dtype=torch.int64, device=GPU)
    assert loss_kernel.launch_loss(loss, statistics, LogpBatch(**fields)) is not None
    assert len(launches) == 1
    on_its_device(launches)


def test_the_search_for_tile_shapes(launches):
    def timer(run):
        run()
        return 1.0

    choices = tuning.autotune(32, 500, rows=64, device=GPU, timer=timer, save=False)
    assert len(choices) == 3
    on_its_device(launches, "_fold_logits_kernel", "_recompute_gradient_kernel")


def test_the_current_device_is_the_tensors_own(monkeypatch):
    entered = []

    @contextmanager
    def device(wanted):
        entered.append(wanted)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    for kind in (torch.device("cpu"), torch.device("meta"), second):
        with devices.current(kind):
            assert entered == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with devices.current(torch.device("cpu")):
        assert entered == []
    with devices.current(second):
        assert entered == [second]
    entered.clear()
    with precision.fixed_precision(SimpleNamespace(device=second), torch.float32):
        assert entered == [second]
