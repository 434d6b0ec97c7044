"""The longest context whose head fits a GPU, by the memory model of `counts`.

One pair, half of the tokens labelled, bf16: weight, hidden states, their gradients and the extra
bytes. The backbone is left out: this is where the head stops being what ends the context.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.counts import count
from benchmarks.shapes import Shape

CAPACITIES = {"80 GB (A100)": 80 * 10**9, "141 GB (H200)": 141 * 10**9}
COMPARED = (
    "ours: stash",
    "ours: local",
    "ours: recompute",
    "TRL",
    "cut-cross-entropy",
    "Liger",
    "Liger: per token",
    "torch linear_cross_entropy",
    "eager, compiled",
    "eager, labelled rows",
    "eager",
)
_LARGEST = 2**28


def needed(name: str, shape: Shape) -> int:
    """Bytes of the weight, the hidden states, their gradients and a candidate's extra."""
    counts = count(name, shape, 2)
    if counts is None:
        raise ValueError(f"name: got {name!r}, whose memory is not modelled")
    weight, hidden = shape.vocab * shape.hidden_size, shape.rows * shape.hidden_size
    # A frozen head has no gradient.
    copies = 1 if name == "ours: stash" else 2
    return 2 * (copies * weight + 2 * hidden) + counts.extra


def longest(name: str, head: Shape, capacity: int) -> int:
    """The largest length T of one pair that fits, 0 where none does."""
    low, high = 0, _LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        shape = replace(head, sequences=2, length=middle, labelled=0.5)
        low, high = (middle, high) if needed(name, shape) <= capacity else (low, middle - 1)
    return low
