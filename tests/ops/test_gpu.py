"""On a GPU: parity of all engines with float64, bit-equal runs, no waits, bounded memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loss_cases import random_batch
from rounding import bound_of, gradient_bound
from truth import (
    TRANSFORMS,
    Case,
    assert_gradients,
    computed,
    largest_error,
    leaves_of,
    make_case,
    needs_of,
    true_result,
)

from fused_prefopt import LogpBatch, PreferenceLoss, available_losses, sequence_logps
from fused_prefopt import token_statistics as statistics_of
from fused_prefopt.ops.engines import ENGINES
from fused_prefopt.ops.plan import PATHS, Plan, default_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICE = "cuda"
MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
# Log-probs absolute in nats, gradients relative (Frobenius), against float64; deeper sums get more
# (see `rounding`).
TOLERANCE = {
    torch.float32: (1e-5, 3e-6),
    torch.float16: (1e-5, 1e-3),
    torch.bfloat16: (1e-5, 4e-3),
}
# `auto` takes another engine for each part of a pass, by the hidden size.
CHOICES = (*ENGINES, "auto")
# What the statistics of a row and its place in the batch take.
ROW_BYTES = 256


def on_device(case: Case) -> Case:
    bias = None if case.bias is None else case.bias.to(DEVICE)
    hidden, weight, labels = (t.to(DEVICE) for t in (case.hidden, case.weight, case.labels))
    return replace(case, hidden=hidden, weight=weight, bias=bias, labels=labels)


def labelled(case: Case) -> int:
    """n, rows that predict a label."""
    return int((case.labels[:, 1:] != -100).sum())


def planned(case: Case, path: str, engine: str, **options) -> tuple[Plan, list[torch.Tensor]]:
    """The plan; sums, and gradients of what the path trains."""
    case = leaves_of(case, needs_of(path))
    out = sequence_logps(case.hidden, case.head, case.labels, path=path, engine=engine, **options)
    leaves = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
    leaves = [t for t in leaves if t.requires_grad]
    loss = out.sums.square().sum()
    grads = torch.autograd.grad(loss, leaves) if leaves else ()
    return out.plan, [out.sums.detach(), *grads]


def gradients(case: Case, path: str, engine: str, **options) -> list[torch.Tensor]:
    """Sums, and gradients of what the path trains."""
    return planned(case, path, engine, **options)[1]


def assert_right(case: Case, path: str, engine: str, tight: float = 1e-5, **options) -> None:
    """Log-probs and gradients are within the bounds of the case's dtype and depth."""
    needs = needs_of(path)
    needs = (*needs[:2], needs[2] and case.bias is not None)
    truth = true_result(case, needs=needs)
    got = computed(case, needs=needs, path=path, engine=engine, **options)
    assert largest_error(got.tokens, truth.tokens) <= bound_of(case, tight)
    if path != "evaluate":
        tolerance = TOLERANCE[case.hidden.dtype][1]
        assert_gradients(got, truth, gradient_bound(case, tolerance))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_small_heads_match_float64(engine, path, transform, dtype):
    case = on_device(make_case(3, 37, 48, 301, dtype=dtype, largest=20.0, **TRANSFORMS[transform]))
    # Unless TF32 is asked for, fp32 products are exact to fp32.
    assert_right(case, path, engine, TOLERANCE[dtype][0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(1, 2, 1, 1), (5, 7, 11, 257), (2, 300, 130, 1031)])
def test_ragged_heads_match_float64(engine, path, size):
    assert_right(on_device(make_case(*size, dtype=torch.bfloat16)), path, engine)


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_deep_heads_match_float64(engine, path, dtype):
    assert_right(on_device(make_case(1, 9, 4096, 301, dtype=dtype)), path, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
def test_a_large_head_in_tight_tiles(engine, path):
    case = on_device(make_case(4, 512, 1024, 32_003, dtype=torch.bfloat16, softcap=30.0, padding=3))
    workspace = {"workspace_mb": 512 if path == "local" else 16}
    assert_right(case, path, engine, 2e-5, **workspace)


# D: where `auto` has one engine for everything, and where it has two.
@pytest.mark.parametrize("hidden_size", [256, 1280])
@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_some_rows_are_kept(engine, dtype, hidden_size):
    case = on_device(make_case(4, 257, hidden_size, 5003, dtype=dtype, largest=20.0))
    some = {"workspace_mb": 6 + labelled(case) * hidden_size * dtype.itemsize / MIB}
    plan, first = planned(case, "auto", engine, **some)
    assert plan.path == "recompute" and 0 < plan.kept_rows < plan.rows == labelled(case)
    assert_right(case, "auto", engine, **some)
    for one, other in zip(first, gradients(case, "auto", engine, **some), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_runs_are_bit_equal(engine, path, dtype):
    case = on_device(make_case(4, 257, 256, 5003, dtype=dtype))
    first = gradients(case, path, engine)
    for _ in range(3):
        for one, other in zip(first, gradients(case, path, engine), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize(("path", "workspace_mb"), [*((path, None) for path in PATHS), ("auto", 6)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_no_waits_once_the_labels_are_counted(engine, path, workspace_mb, dtype):
    case = on_device(make_case(4, 257, 64, 5003, dtype=dtype))
    options = {"num_labels": labelled(case), "workspace_mb": workspace_mb}
    gradients(case, path, engine, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan, _ = planned(case, path, engine, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert plan.path == ("recompute" if path == "auto" else path)
    assert path != "auto" or 0 < plan.kept_rows < plan.rows


@pytest.mark.parametrize("engine", ["cublas", "triton"])
def test_offsets_beyond_31_bits(engine):
    rows, vocab = 65_536, 33_000
    torch.manual_seed(0)
    hidden = torch.randn(1, rows + 1, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, 64, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.randint(vocab, (1, rows + 1), device=DEVICE)
    case = Case(hidden, weight, None, labels)
    wide = gradients(case, "local", engine, workspace_mb=8192)
    tight = gradients(case, "recompute", engine)
    torch.testing.assert_close(wide[0], tight[0], rtol=1e-6, atol=0)
    for one, other in zip(wide[1:], tight[1:], strict=True):
        assert (one.double() - other.double()).norm() <= 4e-3 * other.double().norm()


@pytest.fixture(scope="module")
def llama() -> Iterator[Case]:
    """8192 labelled rows before Llama-3's head."""
    hidden = torch.randn(4, 4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(128_256, 4096, device=DEVICE, dtype=torch.bfloat16) / 64
    labels = torch.randint(128_256, (4, 4096), device=DEVICE)
    labels[:, :2048] = -100
    yield Case(hidden, weight, None, labels)


@pytest.mark.parametrize("engine", ["cublas", "triton", "auto"])
@pytest.mark.parametrize(
    ("path", "workspace_mb"),
    [
        ("evaluate", 256),
        ("stash", 256),
        ("recompute", 256),
        ("local", 2304),
        ("auto", 1024),  # keeps some rows
        *((path, None) for path in ("evaluate", "stash", "auto")),
    ],
)
def test_extra_memory_of_a_llama_3_head(llama, engine, path, workspace_mb):
    rows = labelled(llama)
    assert rows == 8192
    options = {"workspace_mb": workspace_mb, "num_labels": rows}
    # The library's own workspace, which it allocates once, is not the op's.
    planned(llama, path, engine, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan, kept = planned(llama, path, engine, **options)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    sums = 0 if plan.path == "evaluate" else 4 * rows * llama.hidden.shape[-1]
    allowed = plan.workspace + sums + sum(t.nbytes for t in kept) + ROW_BYTES * rows
    assert extra <= allowed, f"{(extra - allowed) / MIB:.1f} MiB beyond"
    if workspace_mb is not None:
        assert plan.workspace == workspace_mb * MIB
    if (path, workspace_mb) == ("auto", 1024):
        assert 0 < plan.kept_rows < rows


def test_the_default_workspace_follows_the_device(llama):
    total = torch.cuda.get_device_properties(0).total_memory
    rows, weight = labelled(llama), tuple(llama.weight.shape)
    for path in ("evaluate", "stash", "auto"):
        plan, _ = planned(llama, path, "auto")
        assert plan.workspace == default_workspace(total, rows, weight, 2, path == "auto")
        assert 256 * MIB < plan.workspace <= max(256 * MIB, total // 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_statistics(dtype):
    case = on_device(make_case(3, 40, 64, 1003, dtype=dtype, softcap=30.0, bias=True))
    ours = statistics_of(case.hidden, case.head, case.labels, engine="triton")
    wanted = statistics_of(case.double().hidden, case.double().head, case.labels)
    for name in ("logps", "entropies", "collisions", "mean_logits"):
        got, truth = getattr(ours, name).double(), getattr(wanted, name)
        torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    assert (ours.correct == wanted.correct).double().mean() >= 0.999  # ties may fall either way


@pytest.mark.parametrize("name", sorted(available_losses()))
def test_loss_kernels_equal_the_torch_losses(name):
    torch_loss = PreferenceLoss(name, engine="torch").to(DEVICE)
    ours = PreferenceLoss(name, engine="triton").to(DEVICE)
    for seed in range(3):
        batch = random_batch(64, seed, torch.float32)
        fields = {key: getattr(batch, key).detach().to(DEVICE) for key in batch.given}
        results = []
        for loss_fn, dtype in ((torch_loss, torch.float64), (ours, torch.float32)):
            wide = {
                key: value.to(dtype) if value.is_floating_point() else value
                for key, value in fields.items()
            }
            policy = wide.pop("policy").requires_grad_()
            out = loss_fn.from_logps(LogpBatch(policy, **wide))
            (slopes,) = torch.autograd.grad(out.loss, policy)
            results.append((out.losses.detach(), out.loss.detach(), slopes, out.metrics))
        (losses, loss, slopes, metrics), ours_now = results
        for truth, got in zip((losses, loss, slopes), ours_now, strict=False):
            scale = max(1e-3, truth.abs().max().item())
            assert (got.double() - truth).abs().max() <= 2e-6 * scale
        for key, value in metrics.items():
            assert abs(ours_now[3][key].item() - value.item()) <= 2e-6 * max(1, abs(value.item()))


SANITIZED = """
import torch, fused_prefopt as fp
hidden = torch.randn(2, 19, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(199, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
labels = torch.randint(199, (2, 19), device="cuda")
for engine in ("cublas", "triton"):
    for path in ("local", "recompute"):
        fp.sequence_logps(hidden, weight, labels, path=path, engine=engine).sums.sum().backward()
    frozen = weight.detach()
    fp.sequence_logps(hidden, frozen, labels, path="stash", engine=engine).sums.sum().backward()
fp.PreferenceLoss("gamma-simpo", engine="triton").cuda()(hidden, weight, labels).loss.backward()
torch.cuda.synchronize()
print("done")
"""


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The tool; the kernels are on disk, which take long to compile under it."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    subprocess.run([sys.executable, "-c", SANITIZED], cwd=ROOT, check=True, timeout=150)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool, sanitizer):
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # Each tensor an allocation of its own: within the allocator's blocks no access is out of them.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
