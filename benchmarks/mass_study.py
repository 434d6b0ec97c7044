"""A study of bounded-mass backwards: savings and costs on rows of a trained language model.

A small Llama is trained on the embedded text with a large vocabulary; its rows come from text that
it has not seen, and from text that it has seen often, whose distributions are sharper.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measuring import Rounds
from benchmarks.results import RESULTS, Row, origin
from fused_prefopt import LMHead, sequence_logps, token_logps
from fused_prefopt.data import load_documents, paragraphs, split_documents, train_tokenizer
from fused_prefopt.ops import dropped_mass

_LENGTH, _SEQUENCES, _RATE = 128, 16, 1.5e-3


@dataclass(frozen=True)
class TrainedRows:
    """Rows before a trained head.

    Attributes:
        hidden: text → (n, D) fp32.
        targets: text → (n,) int64.
        weight: (V, D) fp32, in the tokenizer's order.
        counts: (V,) how often each token stands in the training text.
    """

    hidden: dict[str, Tensor]
    targets: dict[str, Tensor]
    weight: Tensor
    counts: Tensor

    def by_frequency(self) -> TrainedRows:
        """The same with the vocabulary in the order of falling counts."""
        order = self.counts.argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        targets = {text: place[value] for text, value in self.targets.items()}
        return TrainedRows(self.hidden, targets, self.weight[order], self.counts[order])


@dataclass(frozen=True)
class Corpus:
    """Token ids of the embedded text, in one row each: to train on, and held out."""

    training: Tensor
    held_out: Tensor
    vocab: int

    def batch(self, generator: torch.Generator) -> Tensor:
        """(S, T) random windows of the training text."""
        starts = torch.randint(len(self.training) - _LENGTH, (_SEQUENCES,), generator=generator)
        return torch.stack([self.training[start : start + _LENGTH] for start in starts.tolist()])


def corpus(vocab: int) -> Corpus:
    """The embedded text under a byte-level BPE tokenizer of about `vocab` entries."""
    training, held_out = split_documents(load_documents(), seed=0)
    texts = [
        [t for document in part for t in paragraphs(document)] for part in (training, held_out)
    ]
    tokenizer = train_tokenizer(texts[0], vocab_size=vocab)
    end = tokenizer.eos_token_id
    ids = [[i for text in part for i in (*tokenizer(text)["input_ids"], end)] for part in texts]
    return Corpus(torch.tensor(ids[0]), torch.tensor(ids[1]), len(tokenizer))


def new_model(vocab: int, hidden_size: int = 256) -> Any:
    """A small Llama with its own head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=_LENGTH,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        steps: at most.
        seconds: nothing is begun after them.
        drop_mass, path: of the op.
    """

    steps: int
    seconds: float = float("inf")
    drop_mass: float = 0.0
    path: str = "auto"


def train(
    model: Any, text: Corpus, training: Training, say: Callable[[str], None] = print
) -> list[float]:
    """Next-token training; returns the loss of every step, in nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    generator, losses, end = (
        torch.Generator().manual_seed(1),
        [],
        time.monotonic() + training.seconds,
    )
    options: Any = {"drop_mass": training.drop_mass, "path": training.path}
    for step in range(training.steps):
        if time.monotonic() > end:
            break
        ids = text.batch(generator)
        hidden = model.model(ids).last_hidden_state
        out = sequence_logps(hidden, LMHead.of(model), ids, **options)
        loss = -out.sums.sum() / out.lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            say(f"language model: step {step}: {losses[-1]:.3f} nats a token")
    return losses


@torch.no_grad()
def rows_of(model: Any, text: Corpus, count: int) -> TrainedRows:
    """`count` rows of held-out text and of training text, or as many as there are."""
    hidden, targets = {}, {}
    for name, ids in (("held-out", text.held_out), ("seen", text.training)):
        windows = -(-count // (_LENGTH - 1))
        ids = ids[: _LENGTH * min(windows, len(ids) // _LENGTH)].view(-1, _LENGTH)
        states = model.model(ids).last_hidden_state[:, :-1]
        hidden[name] = states.reshape(-1, states.shape[-1])[:count].clone()
        targets[name] = ids[:, 1:].reshape(-1)[:count].clone()
    counts = torch.bincount(text.training, minlength=text.vocab)
    return TrainedRows(hidden, targets, LMHead.of(model).weight.detach().clone(), counts)


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


@dataclass(frozen=True)
class Study:
    """How large the study is.

    Attributes:
        vocab: of the tokenizer.
        seconds: of training.
        count: rows of each text.
        curve_steps: steps of the training runs that are compared.
        rounds: of the timings.
    """

    vocab: int = 16_384
    seconds: float = 240.0
    count: int = 4096
    curve_steps: int = 60
    rounds: int = 5


def run_study(
    folder: Path = MASSES, study: Study | None = None, say: Callable[[str], None] = print
) -> None:
    """Train a model, then measure shares, errors, times and curves; a quarter of an hour.

    Args:
        folder: where `cpu.json` goes.
        study: how large it is, by default as the page shows it.
        say: gets a line of progress now and then.
    """
    study = study or Study()
    text = corpus(study.vocab)
    model = new_model(text.vocab)
    losses = train(model, text, Training(100_000, study.seconds), say)
    rows = rows_of(model, text, study.count)
    del model
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

    def done(what: str) -> None:
        _save(content, folder)
        say(what)

    for order, ordered in zip(ORDERS, (rows, rows.by_frequency()), strict=True):
        for name in ordered.hidden:
            about = {"order": order, "text": name}
            content["rows"] += [about | row for row in study_errors(ordered, name)]
            done(f"errors: {order}, {name}")
            content["times"] += [about | row for row in study_times(ordered, name, study.rounds)]
            done(f"times: {order}, {name}")
    for name, (drop_mass, path) in _CURVES.items():
        training = Training(study.curve_steps, drop_mass=drop_mass, path=path)
        losses = train(new_model(text.vocab), text, training, lambda _: None)
        content["curves"][name] = [round(loss, 6) for loss in losses]
        done(f"curve: {name}: {losses[-1]:.4f}")


def _save(content: Mapping[str, Any], folder: Path) -> None:
    """A reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "cpu.tmp"
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(folder / "cpu.json")


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
    *_, timings = Rounds(count).time(named, unit)
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
