"""What a GPU would not forgive, and what it would forgive but answer differently each time."""

from __future__ import annotations

from dataclasses import dataclass, field


class Fault(Exception):
    """What a GPU would not forgive, or what it would answer with garbage."""


@dataclass
class Findings:
    """What is worth a look though the programs went on.

    Attributes:
        races: two threads touch a byte, one of them writing, and nothing orders them.
        unwritten: reads of shared bytes that nothing had been written to.
    """

    races: set[str] = field(default_factory=set)
    unwritten: set[str] = field(default_factory=set)
