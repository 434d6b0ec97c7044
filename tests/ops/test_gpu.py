"""On a GPU: parity of all engines with float64, bit-equal runs, no waits, bounded memory.

Of one head and of two. It is one file of more than 450 lines because a machine with a GPU runs it
alone, with the tests of no other part.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from divergences import Two, computed_kl, make_two, near, ours, true_kl, weights_of
from loss_cases import random_batch
from rounding import bound_of, cores_of_this_gpu, gradient_bound
from tiny_models import VOCAB, pair_features, point_features, tiny_llama
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

from fused_prefopt import (
    LMHead,
    LogpBatch,
    PreferenceLoss,
    available_losses,
    sequence_kl,
    sequence_logps,
)
from fused_prefopt import token_statistics as statistics_of
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.models.batch import collated_rows
from fused_prefopt.ops import vocab_shard
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
TOLERANCE = {torch.float32: (1e-5, 3e-6), torch.float16: (1e-5, 1e-3), torch.bfloat16: (1e-5, 4e-3)}
# `auto` takes another engine for each part of a pass, by the hidden size.
CHOICES = (*ENGINES, "auto")
# What the statistics of a row and its place in the batch take.
ROW_BYTES = 256


def on_device(case: Case) -> Case:
    bias = None if case.bias is None else case.bias.to(DEVICE)
    hidden, weight, labels = (t.to(DEVICE) for t in (case.hidden, case.weight, case.labels))
    return replace(case, hidden=hidden, weight=weight, bias=bias, labels=labels)


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Extra:
    """Bytes that a block has taken at most beyond what was there before.

    Attributes:
        bytes: of the block that has ended.
    """

    bytes = 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        self.bytes = torch.cuda.max_memory_allocated() - before


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
    assert largest_error(got.tokens, truth.tokens) <= bound_of(case, tight, cores_of_this_gpu())
    if path != "evaluate":
        tolerance = TOLERANCE[case.hidden.dtype][1]
        assert_gradients(got, truth, gradient_bound(case, tolerance, cores_of_this_gpu()))


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
    with no_waits():
        plan, _ = planned(case, path, engine, **options)
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
    extra = Extra()
    with extra.measured():
        plan, kept = planned(llama, path, engine, **options)
    sums = 0 if plan.path == "evaluate" else 4 * rows * llama.hidden.shape[-1]
    allowed = plan.workspace + sums + sum(t.nbytes for t in kept) + ROW_BYTES * rows
    assert extra.bytes <= allowed, f"{(extra.bytes - allowed) / MIB:.1f} MiB beyond"
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


def both_on_device(two: Two) -> Two:
    return Two(*(on_device(case) for case in two))


# Sums of up to 13 tokens, absolute in nats.
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_divergences_match_float64(engine, transform, dtype):
    two = make_two(5, 14, 64, 1031, transform=transform, other="bias", dtype=dtype)
    two, gradients = both_on_device(two), TOLERANCE[dtype][1]
    weights = weights_of(two).to(DEVICE)
    got, truth = computed_kl(two, weights=weights, engine=engine), true_kl(two, weights=weights)
    assert largest_error(got.sums, truth.sums) <= 6e-5
    assert_gradients(got, truth, gradients)


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_divergences_of_deep_heads_match_float64(engine, dtype):
    two = both_on_device(near(make_two(1, 9, 4096, 301, dtype=dtype), 0.1))
    cores = cores_of_this_gpu()
    weights = weights_of(two).to(DEVICE)
    got, truth = computed_kl(two, weights=weights, engine=engine), true_kl(two, weights=weights)
    # Σ_v q_v (log q_v − log p_v) moves by what both log-probs are off, and by the error of each q_v
    # times how far its term lies from their sum: less than twice the divergence in all.
    tokens = two.policy.labels.shape[1] + truth.sums.max().item()
    assert largest_error(got.sums, truth.sums) <= 2 * tokens * bound_of(two.policy, cores=cores)
    assert_gradients(got, truth, gradient_bound(two.policy, TOLERANCE[dtype][1], cores))


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_divergences_of_two_runs_are_bit_equal_and_do_not_wait(engine, dtype):
    two = both_on_device(make_two(4, 33, 64, 1031, transform="all", dtype=dtype))
    count = int((two.policy.labels[:, 1:] != -100).sum())

    def run() -> list[torch.Tensor]:
        case = leaves_of(two.policy, (True, True, True))
        out = ours(two._replace(policy=case), engine=engine, num_labels=count)
        loss = (out.kl - out.policy).sum()
        return [out.kl.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight, case.bias))]

    first = run()
    with no_waits():
        second = run()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("workspace_mb", [128, 256])
def test_memory_of_divergences_stays_within_the_workspace(engine, workspace_mb):
    rows, vocab, size = 8192, 65_536, 256
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).bfloat16()

    hidden, weight = draw(1, rows + 1, size).requires_grad_(), draw(vocab, size).requires_grad_()
    others = draw(1, rows + 1, size), draw(vocab, size)
    labels = torch.randint(vocab, (1, rows + 1), generator=generator, device=DEVICE)

    def run() -> list[torch.Tensor]:
        options = {"engine": engine, "workspace_mb": workspace_mb, "num_labels": rows}
        out = sequence_kl(hidden, weight, *others, labels, **options)
        return list(torch.autograd.grad((out.kl + out.policy).sum(), (hidden, weight)))

    # The library's own workspace, which it allocates once, is not the op's.
    run()
    extra = Extra()
    with extra.measured():
        kept = run()
    gradients = sum(gradient.nbytes for gradient in kept)
    allowed = workspace_mb * MIB + 4 * rows * size + gradients + ROW_BYTES * rows
    assert extra.bytes <= allowed, f"{(extra.bytes - allowed) / MIB:.1f} MiB beyond"


PAIRS = {
    "padded": PairCollator(0),
    "packed": PairCollator(0, padding_free=True),
    "shared prompts": PairCollator(0, shared_prompt=True),
}


def step(loss_fn, collator, features):
    """Hidden states of a batch, and a function that goes from them to their gradient."""
    model = tiny_llama().cuda()
    batch = collator(features)
    batch = {
        name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()
    }
    rows = collated_rows(model, batch, prompt=not loss_fn.loss.pairwise)
    hidden = rows.hidden.detach().requires_grad_()
    weight = model.lm_head.weight
    sequences = rows.layout.get("num_sequences", len(features) * (1 + loss_fn.loss.pairwise))
    known = {
        "reference": torch.linspace(-9, -3, sequences, device="cuda"),
        "prompt_reference": torch.linspace(-9, -3, sequences, device="cuda"),
        "rewards": torch.linspace(-1, 1, sequences, device="cuda"),
    }
    given = {name: value for name, value in known.items() if name in loss_fn.loss.needs}
    if rows.prompt_labels is not None:
        given |= {"prompt_labels": rows.prompt_labels, "num_prompt_labels": rows.num_prompt_labels}

    def run():
        loss_fn(hidden, weight, rows.labels, **rows.layout, **given).loss.backward()

    return run


def assert_no_wait(run):
    run()  # compiles
    with no_waits():
        run()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("name", ["dpo", "alpha-dpo", "gamma-dpo", "simpo"])
def test_no_waits_on_pairs(name, layout, engine):
    loss_fn = PreferenceLoss(name, engine=engine).cuda()
    assert_no_wait(step(loss_fn, PAIRS[layout], pair_features(6)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padding_free", [False, True])
def test_no_waits_on_points(engine, padding_free):
    loss_fn = PreferenceLoss("dro", engine=engine).cuda()
    collator = PointCollator(0, padding_free=padding_free)
    assert_no_wait(step(loss_fn, collator, point_features(6)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", ["evaluate", "stash", "local", "recompute"])
def test_a_head_on_the_second_gpu(path, engine):
    case = make_case(4, 11, 16, VOCAB)
    found = []
    for device in ("cuda:0", "cuda:1"):
        hidden, weight = case.hidden.to(device), case.weight.to(device)
        hidden.requires_grad_(path != "evaluate")
        weight.requires_grad_(path in ("local", "recompute"))
        labels = case.labels.to(device)
        assert torch.cuda.current_device() == 0
        out = sequence_logps(hidden, weight, labels, path=path, engine=engine)
        if path != "evaluate":
            out.sums.sum().backward()
        assert torch.cuda.current_device() == 0
        grads = [each.grad for each in (hidden, weight) if each.grad is not None]
        found.append([each.detach().cpu() for each in (out.sums, *grads)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def spread_steps(device: torch.device, rows: slice, **shared) -> dict:
    """Values and gradients of the rows of a head on every path and engine, and of two heads.

    None waits for the device.
    """
    two, found = make_two(4, 11, 16, VOCAB), {}
    hidden, others, labels = (
        each.to(device) for each in (two.policy.hidden, two.reference.hidden, two.policy.labels)
    )
    ref_head = LMHead(two.reference.weight[rows].to(device), **shared)
    own, options = two.policy.weight[rows].to(device), {"num_labels": labelled(two.policy)}

    def step(path: str, **options) -> list[torch.Tensor]:
        leaf, weight = hidden.clone().requires_grad_(), own.clone().requires_grad_(path != "stash")
        head = LMHead(weight, **shared)
        if path == "kl":
            out = sequence_kl(leaf, head, others, ref_head, labels, **options)
            value = out.kl + out.policy
        else:
            value = sequence_logps(leaf, head, labels, path=path, **options).sums
        value.square().sum().backward()
        return [value.detach(), leaf.grad, *([] if weight.grad is None else [weight.grad])]

    for path, engine in product(("stash", "local", "recompute", "kl"), ENGINES):
        step(path, engine=engine, **options)  # compiles
        with no_waits():
            result = step(path, engine=engine, **options)
        found[path, engine] = [each.cpu() for each in result]
    return found


# Rows of a head by rank, for each number of GPUs; of two the second has the first of them.
GPU_ROWS = {1: [slice(None)], 2: [slice(VOCAB // 3, None), slice(VOCAB // 3)]}


def _hold_rows(rank: int, backend: str, folder: str, world: int) -> None:
    """One of the ranks, each with a GPU and rows of a head."""
    device = torch.device(DEVICE, rank)
    if backend == "nccl":
        torch.cuda.set_device(device)
    init = f"file://{folder}/init"
    dist.init_process_group(backend, init_method=init, rank=rank, world_size=world)
    vocab_shard._LEAST_BYTES = 64  # several parts of a sum at a time
    rows = GPU_ROWS[world][rank]
    shared = {"group": dist.group.WORLD, "first_row": rows.start or 0}
    torch.save(spread_steps(device, rows, **shared), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_head_whose_rows_gpus_hold(tmp_path):
    """On one GPU by a group of one: its collectives, their streams and the waits are NCCL's too."""
    world = min(2, torch.cuda.device_count())
    mp.spawn(_hold_rows, args=("nccl", str(tmp_path), world), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in reversed(range(world))]
    for key, whole in spread_steps(torch.device(DEVICE, 0), slice(None)).items():
        parts = [found[key] for found in ranks]
        for own in parts:
            assert all(torch.equal(*both) for both in zip(own[:2], parts[0][:2], strict=True))
        of_rows = zip(*(own[2:] for own in parts), strict=True)
        found = parts[0][:2] + [torch.cat(each) for each in of_rows]
        for got, wanted in zip(found, whole, strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm(), key


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
