"""The shapes that are measured, and the problem that stands for one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Random logits with this standard deviation, and targets this far above them, have the range and
# the log-probs (about -2 nats a token) of a trained model.
_SPREAD = 3.0
_LIFT = 14.0
# The (rows, vocabulary) output of the bare matmul is cut into slabs of at most this many bytes.
LARGEST_OUTPUT = 2**31


@dataclass(frozen=True)
class Shape:
    """Size of a batch and of its head.

    Attributes:
        name: what results are filed under.
        sequences: S; the first half is chosen, the second half rejected.
        length: T, tokens of a sequence.
        hidden_size: D.
        vocab: V.
        labelled: share of the tokens that carry a label, at the end of each sequence.
        softcap: of the head, or None.
    """

    name: str
    sequences: int
    length: int
    hidden_size: int
    vocab: int
    labelled: float = 0.5
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """All hidden rows, S * T."""
        return self.sequences * self.length

    @property
    def labelled_rows(self) -> int:
        """Rows that predict a label; the first token of a sequence is predicted by none."""
        return self.sequences * min(round(self.length * self.labelled), self.length - 1)

    @property
    def fields(self) -> dict[str, str | int]:
        """Its fields of a row of results."""
        return {
            "shape": self.name,
            "sequences": self.sequences,
            "length": self.length,
            "labelled_rows": self.labelled_rows,
            "hidden_size": self.hidden_size,
            "vocab": self.vocab,
        }


LAPTOP = Shape("laptop", 8, 512, 512, 32_000)
TINY = Shape("tiny", 4, 12, 16, 97)
HEADS = {
    "llama-3": Shape("llama-3", 8, 2048, 4096, 128_256),
    "gemma-2": Shape("gemma-2", 8, 2048, 2304, 256_000, softcap=30.0),
    "qwen2.5-0.5b": Shape("qwen2.5-0.5b", 8, 2048, 896, 151_936),
}

_SWEEP = Shape("sweep", 2, 512, 256, 32_000)
SWEEP_VOCAB = tuple(
    replace(_SWEEP, name=f"vocab-{vocab}", vocab=vocab)
    for vocab in (8_000, 16_000, 32_000, 64_000, 128_000, 256_000)
)
SWEEP_LENGTH = tuple(
    replace(_SWEEP, name=f"length-{length}", length=length)
    for length in (512, 1024, 2048, 4096, 8192)
)


@dataclass(frozen=True)
class Problem:
    """One batch: hidden (S, T, D), weight (V, D), labels (S, T); gradients land in `.grad`."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def targets(self) -> Tensor:
        """(S, T) the token that each row predicts, `IGNORE_INDEX` where there is none."""
        return functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX)

    @property
    def lengths(self) -> Tensor:
        """(S,) labelled tokens of each sequence."""
        return (self.targets != IGNORE_INDEX).sum(1)

    def require_no_softcap(self) -> None:
        """For candidates that have none.

        Raises:
            NotImplementedError: the head has a softcap.
        """
        if self.shape.softcap is not None:
            raise NotImplementedError("has no softcap")

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that exist now."""
        leaves = (self.hidden.grad, self.weight.grad)
        return sum(grad.nbytes for grad in leaves if grad is not None)

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None


def make_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Problem:
    """A random batch whose targets are likely, as a trained model's are."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    weight = normal(shape.vocab, shape.hidden_size).mul_(_SPREAD * shape.hidden_size**-0.5)
    hidden = normal(shape.sequences, shape.length, shape.hidden_size)
    labels = torch.randint(
        shape.vocab, (shape.sequences, shape.length), generator=generator, device=device
    )
    hidden[:, :-1].add_(weight[labels[:, 1:]], alpha=_LIFT / _SPREAD**2)
    labels[:, : shape.length - round(shape.length * shape.labelled)] = IGNORE_INDEX
    return Problem(shape, hidden, weight, labels)


def bare_matmul(problem: Problem) -> Callable[[], None]:
    """The step that takes 1 P: the labelled rows times the weight, into an existing output."""
    hidden = problem.hidden.detach()[problem.targets != IGNORE_INDEX]
    weight = problem.weight.detach()
    width = max(1, LARGEST_OUTPUT // max(1, hidden.shape[0] * hidden.element_size()))
    slabs = weight.split(width)
    outputs = [hidden.new_empty(hidden.shape[0], size) for size in {len(slab) for slab in slabs}]
    by_width = {output.shape[1]: output for output in outputs}
    pairs = [(slab.t(), by_width[len(slab)]) for slab in slabs]
    return partial(_matmuls, hidden, pairs)


def _matmuls(hidden: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for slab, output in pairs:
        torch.mm(hidden, slab, out=output)
