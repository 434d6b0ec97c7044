"""This machine: what it offers, what the op would do on it, and whether its numbers are right."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import torch

from fused_prefopt.devices import gpu_index, gpu_properties
from fused_prefopt.ops import sequence_logps
from fused_prefopt.ops.engines import ENGINES, MISSING_TRITON, choose_engine, role_engine
from fused_prefopt.ops.plan import PATHS

# Of fp32 log-probs with logits up to 30, in nats; of fp32 gradients, relative.
_LOGPS, _GRADIENTS = 2e-5, 1e-5
_ROLES, _SIZES = ("fold", "keep", "rebuild"), (896, 2048, 4096)
_OPTIONAL = ("transformers", "accelerate", "datasets", "peft", "trl", "matplotlib")


def examine(device: str | None = None) -> Iterator[tuple[str, str, bool]]:
    """Findings in reading order: (what, finding, whether it is well).

    Args:
        device: of the op; the GPU if there is one, by default.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", True
    yield "torch", torch.__version__, True
    wanted = place.type == "cuda"
    yield "triton", MISSING_TRITON or _version("triton"), MISSING_TRITON is None or not wanted
    yield "with", ", ".join(map(_found, _OPTIONAL)), True
    yield "device", _describe(place), True
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        yield f"auto, {_short(dtype)}", _choices(choose_engine("auto", place, dtype), place), True
    yield "why", _why(place), True
    for engine in ENGINES:
        yield from _self_check(engine, place)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _found(package: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return f"{package} {_version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _describe(place: torch.device) -> str:
    if place.type != "cuda":
        return f"{place.type}, {torch.get_num_threads()} threads"
    found = gpu_properties(gpu_index(place))
    gigabytes = found.total_memory / 2**30
    # AMD's, "gfx942:sramecc+:xnack-", is no capability of CUDA's.
    kind = getattr(found, "gcnArchName", "") or f"sm_{found.major}{found.minor}"
    return f"{found.name}, {kind.partition(':')[0]}, {gigabytes:.0f} GiB, {_shapes(found)}"


def _shapes(gpu: Any) -> str:
    if MISSING_TRITON is not None:
        return "no tile shapes"
    from fused_prefopt.ops.tuning import architecture_of

    try:
        return f"tile shapes of {architecture_of(gpu).name}"
    except ValueError as error:
        return f"no tile shapes ({error})"


def _choices(engine: str, place: torch.device) -> str:
    """Which engine a forward, kept and rebuilt probabilities get, by hidden size."""
    if engine != "auto":
        return engine
    sizes = {size: [role_engine(engine, r, place, size, False) for r in _ROLES] for size in _SIZES}
    return "; ".join(f"D {size}: {', '.join(names)}" for size, names in sizes.items())


def _why(place: torch.device) -> str:
    if place.type != "cuda":
        return "Triton kernels need a GPU (or TRITON_INTERPRET=1 and an engine that is asked for)"
    if MISSING_TRITON is not None:
        return MISSING_TRITON
    return f"the faster engine for {', '.join(_ROLES)} (kernels/architectures.py)"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _self_check(engine: str, place: torch.device) -> Iterator[tuple[str, str, bool]]:
    """Log-probs and gradients of a small fp32 head against eager float64, on every path."""
    try:
        chosen = choose_engine(engine, place, torch.float32)
    except ValueError as error:
        yield f"check {engine}", f"not run: {error}", True
        return
    if chosen != engine:
        yield f"check {engine}", f"not run: the {chosen} engine stands in for it", True
        return
    for path in PATHS:
        values, gradients = _errors(engine, path, place)
        well = values <= _LOGPS and gradients <= _GRADIENTS
        finding = f"log-probs within {values:.1e} nat, gradients {gradients:.1e}"
        yield f"check {engine}, {path}", finding, well


def _errors(engine: str, path: str, place: torch.device) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 32, generator=generator).to(place)
    weight = (torch.randn(101, 32, generator=generator) * 1.5).to(place)
    labels = torch.randint(0, 101, (3, 11), generator=generator).to(place)
    trained = {"evaluate": (), "stash": (hidden,)}.get(path, (hidden, weight))
    for tensor in trained:
        tensor.requires_grad_()
    out = sequence_logps(hidden, weight, labels, path=path, engine=engine)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    logps = (exact_hidden[:, :-1] @ exact_weight.t()).log_softmax(-1)
    truth = logps.gather(2, labels[:, 1:, None]).sum((1, 2))
    values = (out.sums.double() - truth).abs().max().item()
    if not trained:
        return values, 0.0
    out.sums.sum().backward()
    truth.sum().backward()
    pairs = zip((hidden, weight), (exact_hidden, exact_weight), strict=True)
    errors = [
        ((ours.grad - exact.grad).norm() / exact.grad.norm()).item()
        for ours, exact in pairs
        if ours.grad is not None and exact.grad is not None
    ]
    return values, max(errors)
