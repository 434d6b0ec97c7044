"""On a GPU: parity of all engines with float64, bit-equal runs, no waits, bounded memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loss_cases import random_batch
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
from fused_prefopt.ops.plan import PATHS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
DEVICE = "cuda"
MIB = 2**20
# Log-probs absolute in nats, gradients relative (Frobenius), against float64.
TOLERANCE = {
    torch.float32: (1e-5, 3e-6),
    torch.float16: (1e-5, 1e-3),
    torch.bfloat16: (1e-5, 4e-3),
}


def on_device(case: Case) -> Case:
    bias = None if case.bias is None else case.bias.to(DEVICE)
    hidden, weight, labels = (t.to(DEVICE) for t in (case.hidden, case.weight, case.labels))
    return replace(case, hidden=hidden, weight=weight, bias=bias, labels=labels)


def gradients(case: Case, path: str, engine: str, **options) -> list[torch.Tensor]:
    """Sums, and gradients of what the path trains."""
    case = leaves_of(case, needs_of(path))
    out = sequence_logps(
        case.hidden, case.head, case.labels, path=path, engine=engine, **options
    ).sums
    leaves = [t for t in (case.hidden, case.weight, case.bias) if t is not None]
    leaves = [t for t in leaves if t.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), leaves) if leaves else ())]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_small_heads_match_float64(engine, path, transform, dtype):
    case = on_device(make_case(3, 37, 48, 301, dtype=dtype, largest=20.0, **TRANSFORMS[transform]))
    needs = needs_of(path)
    truth = true_result(case, needs=needs)
    # Unless TF32 is asked for, fp32 products are exact to fp32.
    got = computed(case, needs=needs, path=path, engine=engine)
    values, tolerance = TOLERANCE[dtype]
    assert largest_error(got.tokens, truth.tokens) <= values
    if path != "evaluate":
        assert_gradients(got, truth, tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(1, 2, 1, 1), (5, 7, 11, 257), (2, 300, 130, 1031)])
def test_ragged_heads_match_float64(engine, path, size):
    case = on_device(make_case(*size, dtype=torch.bfloat16))
    needs = (*needs_of(path)[:2], False)
    truth = true_result(case, needs=needs)
    got = computed(case, needs=needs, path=path, engine=engine)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    if path != "evaluate":
        assert_gradients(got, truth, 4e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", PATHS)
def test_a_large_head_in_tight_tiles(engine, path):
    case = on_device(make_case(4, 512, 1024, 32_003, dtype=torch.bfloat16, softcap=30.0, padding=3))
    needs = (*needs_of(path)[:2], False)
    truth = true_result(case, needs=needs)
    workspace = {"workspace_mb": 512 if path == "local" else 16}
    got = computed(case, needs=needs, path=path, engine=engine, **workspace)
    assert largest_error(got.tokens, truth.tokens) <= 2e-5
    if path != "evaluate":
        assert_gradients(got, truth, 4e-3)


@pytest.mark.parametrize("engine", ["cublas", "triton"])
@pytest.mark.parametrize("path", ["stash", "local", "recompute"])
def test_runs_are_bit_equal(engine, path):
    case = on_device(make_case(4, 257, 256, 5003, dtype=torch.bfloat16))
    first = gradients(case, path, engine)
    for _ in range(3):
        for one, other in zip(first, gradients(case, path, engine), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", ["stash", "local", "recompute"])
def test_no_waits_once_the_labels_are_counted(engine, path):
    case = on_device(make_case(4, 65, 64, 1003, dtype=torch.bfloat16))
    count = int((case.labels[:, 1:] != -100).sum())
    gradients(case, path, engine, num_labels=count)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case, path, engine, num_labels=count)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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


@pytest.mark.parametrize("engine", ["cublas", "triton"])
@pytest.mark.parametrize("path", ["evaluate", "stash", "recompute"])
def test_extra_memory_of_a_llama_3_head(engine, path):
    hidden = torch.randn(4, 4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(128_256, 4096, device=DEVICE, dtype=torch.bfloat16) / 64
    labels = torch.randint(128_256, (4, 4096), device=DEVICE)
    labels[:, :2048] = -100
    case = Case(hidden, weight, None, labels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = gradients(case, path, engine)
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in kept)
    assert extra <= 320 * MIB, f"{extra / MIB:.0f} MiB"


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
hidden = torch.randn(2, 35, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(391, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
labels = torch.randint(391, (2, 35), device="cuda")
for engine in ("cublas", "triton"):
    for path in ("local", "recompute"):
        fp.sequence_logps(hidden, weight, labels, path=path, engine=engine).sums.sum().backward()
    frozen = weight.detach()
    fp.sequence_logps(hidden, frozen, labels, path="stash", engine=engine).sums.sum().backward()
loss_fn = fp.PreferenceLoss("gamma-simpo", engine="triton").cuda()
for _ in range(2):
    loss_fn(hidden, weight, labels).loss.backward()
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
