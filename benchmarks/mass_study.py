"""What a bounded-mass backward saves and costs, on rows that a trained language model gives."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.results import RESULTS, Row, origin
from benchmarks.timing import rounds
from benchmarks.trained_rows import TrainedRows, corpus, new_model, rows_of, train
from fused_prefopt import LMHead, token_logps
from fused_prefopt.ops import dropped_mass

MASSES = RESULTS / "masses"
DROPS = (1e-4, 3e-4, 1e-3, 4e-3, 1e-2, 3e-2, 1e-1)
PARTS = (128, 512, 2048)
# cut-cross-entropy's default for bf16 is 2^-12.
FILTERS = (2.0**-14, 2.0**-12, 2.0**-10, 2.0**-8)
ORDERS = ("tokenizer", "frequency")
_TILE = 128
ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# ε and path; the exact gradient on another path is how far rounding alone moves a curve.
_CURVES = {
    "0": (0.0, "auto"),
    "0, another path": (0.0, "recompute"),
    **{f"{drop:g}": (drop, "auto") for drop in (3e-4, 1e-3, 4e-3, 1e-2, 1e-1)},
}


def run_study(
    folder: Path = MASSES,
    *,
    vocab: int = 16_384,
    seconds: float = 240.0,
    count: int = 4096,
    curve_steps: int = 60,
    timed_rounds: int = 5,
    say: Callable[[str], None] = print,
) -> None:
    """Train a model, then measure shares, errors, times and curves; a quarter of an hour.

    Args:
        folder: where `cpu.json` goes.
        vocab: of the tokenizer.
        seconds: of training.
        count: rows of each text.
        curve_steps: steps of the training runs that are compared.
        timed_rounds: of the timings.
        say: gets a line of progress now and then.
    """
    text = corpus(vocab)
    model = new_model(text.vocab)
    losses = train(model, text, steps=100_000, seconds=seconds, say=say)
    rows = rows_of(model, text, count)
    orders = dict(zip(ORDERS, (rows, rows.by_frequency()), strict=True))
    content: dict[str, Any] = {
        "section": "masses",
        **origin(),
        "vocab": text.vocab,
        "hidden_size": rows.weight.shape[1],
        "training_steps": len(losses),
        "texts": {name: _about(rows, name) for name in rows.hidden},
        "rows": [],
        "times": [],
        "curves": {},
    }

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / "cpu.tmp"
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(folder / "cpu.json")

    for order, ordered in orders.items():
        for name in ordered.hidden:
            for row in study_errors(ordered, name):
                content["rows"].append({"order": order, "text": name, **row})
            say(f"errors: {order}, {name}")
            save()
            content["times"] += [
                {"order": order, "text": name, **row}
                for row in study_times(ordered, name, timed_rounds)
            ]
            say(f"times: {order}, {name}")
            save()
    del model
    for name, (drop_mass, path) in _CURVES.items():
        losses = train(
            new_model(text.vocab),
            text,
            steps=curve_steps,
            drop_mass=drop_mass,
            path=path,
            say=lambda _: None,
        )
        content["curves"][name] = [round(loss, 6) for loss in losses]
        say(f"curve: {name}: {losses[-1]:.4f}")
        save()


def study_errors(rows: TrainedRows, text: str) -> Iterator[Row]:
    """Share of (row, part) kept and gradient errors, of ours and of a filter by tiles.

    The gradient is that of the sum of the log-probs, from the whole matrix of logits, in float64.
    """
    hidden, targets, weight = rows.hidden[text].double(), rows.targets[text], rows.weight.double()
    exact = (hidden @ weight.t()).softmax(1)
    exact[torch.arange(len(targets)), targets] -= 1
    wanted = exact @ weight, exact.t() @ hidden

    def errors(gradient: Tensor) -> Row:
        names, found = ("hidden_error", "weight_error"), (gradient @ weight, gradient.t() @ hidden)
        relative = [
            float((ours - truth).norm() / truth.norm())
            for ours, truth in zip(found, wanted, strict=True)
        ]
        off = float((gradient - exact).abs().sum(1).mean())
        return {**dict(zip(names, relative, strict=True)), "mean_l1": off}

    for name, dtype in ROUNDED.items():
        rounded = errors(exact.to(dtype).double())
        yield {"method": f"{name} rounding", "part": 1, "bound": 0.0, "kept": 1.0, **rounded}
    for part in PARTS:
        for drop in DROPS:
            kept, gradient = dropped(exact, targets, part, drop)
            yield {
                "method": "drop_mass",
                "part": part,
                "bound": drop,
                "kept": kept,
                **errors(gradient),
            }
    for grouped in (False, True):
        order = targets.argsort(stable=True) if grouped else torch.arange(len(targets))
        for bound in FILTERS:
            kept, gradient = filtered(exact[order], bound)
            back = torch.empty_like(gradient)
            back[order] = gradient
            method = "filter, rows by target" if grouped else "filter"
            yield {"method": method, "part": _TILE, "bound": bound, "kept": kept, **errors(back)}


def dropped(exact: Tensor, targets: Tensor, part: int, drop_mass: float) -> tuple[float, Tensor]:
    """Share kept, and the gradient of the logits as the op leaves it.

    Args:
        exact: (n, V) softmax − one-hot.
        targets: (n,).
        part: entries that are kept or left out together.
        drop_mass: ε.
    """
    index = torch.arange(len(targets))
    probabilities = exact.clone()
    probabilities[index, targets] += 1
    padded = functional.pad(probabilities, (0, -exact.shape[1] % part))
    shares = padded.view(len(targets), -1, part).sum(2).t()
    with mock.patch.object(dropped_mass, "PART", part):
        logsumexps = shares.new_zeros(len(targets))
        parts = dropped_mass.choose_parts(shares.log(), logsumexps, targets, drop_mass)
    entries = parts.kept.t().repeat_interleave(part, 1)[:, : exact.shape[1]]
    probabilities.mul_(entries).div_(parts.kept_mass.unsqueeze(1))
    probabilities[index, targets] -= 1
    return sum(parts.counts) / parts.kept.numel(), probabilities


def filtered(exact: Tensor, bound: float) -> tuple[float, Tensor]:
    """The same of a filter by tiles, as cut-cross-entropy's: a tile of 128 rows × 128 entries whose
    gradients are all below the bound is left out, and nothing is renormalised.

    Args:
        exact: (n, V) softmax − one-hot.
        bound: of the filter.
    """
    n, vocab = exact.shape
    padded = functional.pad(exact, (0, -vocab % _TILE, 0, -n % _TILE))
    tiles = padded.view(padded.shape[0] // _TILE, _TILE, padded.shape[1] // _TILE, _TILE)
    kept = (tiles.abs() >= bound).any(3, keepdim=True).any(1, keepdim=True)
    return float(kept.float().mean()), (tiles * kept).view_as(padded)[:n, :vocab]


def study_times(rows: TrainedRows, text: str, count: int) -> Iterator[Row]:
    """Forward and backward of the op in P, exact and with each ε, on both paths."""
    hidden = rows.hidden[text].clone().requires_grad_()
    weight = rows.weight.clone().requires_grad_()
    targets = rows.targets[text].unsqueeze(0)

    def step(path: str, drop_mass: float) -> None:
        hidden.grad = weight.grad = None
        token_logps(
            hidden.unsqueeze(0),
            LMHead(weight),
            targets,
            shift=False,
            path=path,
            drop_mass=drop_mass,
            workspace_mb=1024,
        ).sum().backward()

    steps = {
        (path, drop): partial(step, path, drop)
        for path in ("recompute", "local")
        for drop in (0.0, *DROPS)
    }
    for run in steps.values():
        run()
    output = torch.empty(hidden.shape[0], weight.shape[0])
    unit = partial(torch.mm, hidden.detach(), weight.detach().t(), out=output)
    named = {f"{path} {drop}": run for (path, drop), run in steps.items()}
    *_, timings = rounds(named, unit, count)
    for path, drop in steps:
        timing = timings[f"{path} {drop}"]
        yield {
            "path": path,
            "drop_mass": drop,
            "in_p": round(timing.in_p, 3),
            "ms": round(timing.median_ms, 2),
        }
    gc.collect()


def _about(rows: TrainedRows, text: str) -> Row:
    logps = (rows.hidden[text] @ rows.weight.t()).log_softmax(1)
    picked = logps.gather(1, rows.targets[text].unsqueeze(1))
    return {
        "rows": len(rows.targets[text]),
        "nats": round(float(-picked.mean()), 3),
        "entropy": round(float(-(logps.exp() * logps).sum(1).mean()), 3),
    }
