"""What the figures must show, each claim with its limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.results import Row

# Time of our paths in P, fp32.
_MOST_P = {
    "ours: evaluate": 1.25,
    "ours: stash": 2.6,
    "ours: local": 3.7,
    "ours: half kept": 4.1,
    "ours: recompute": 4.6,
}
# Dtype, peer, and how many times faster `local` must be.
_FASTER = (("fp32", "TRL", 2.5), ("fp32", "Liger", 3.0), ("bf16", "TRL", 4.0))
# Extra memory of `local`, as a share of the peer's, fp32.
_LESS_MEMORY = {"eager": 0.3, "TRL": 1.0}


@dataclass(frozen=True)
class Claim:
    """One statement with its figure; `value` is None where a row gives none.

    Attributes:
        text: what is stated, its limit included.
        value: what was measured.
        holds: whether it is within the limit.
    """

    text: str
    value: float | None
    holds: bool

    def __str__(self) -> str:
        value = "no figure" if self.value is None else f"{self.value:.2f}"
        return f"{'holds ' if self.holds else 'MISSED'}  {self.text}: {value}"


def claims_of(rows: Mapping[str, Mapping[str, Row]]) -> list[Claim]:
    """Check every claim.

    Args:
        rows: dtype → candidate → row of the section `head`.
    """
    claims = [
        _most(f"fp32, {name}: time <= {limit} P", _figure(rows["fp32"], name, "in_p"), limit)
        for name, limit in _MOST_P.items()
    ]
    for dtype, peer, limit in _FASTER:
        times = _ratio(rows[dtype], peer, "ours: local", "in_p")
        text = f"{dtype}, ours: local: {limit} times as fast as {peer}"
        claims.append(Claim(text, times, times is not None and times >= limit))
    for peer, limit in _LESS_MEMORY.items():
        share = _ratio(rows["fp32"], "ours: local", peer, "extra_bytes")
        claims.append(_most(f"fp32, ours: local: memory <= {limit} of {peer}'s", share, limit))
    return claims


def _most(text: str, value: float | None, limit: float) -> Claim:
    return Claim(text, value, value is not None and value <= limit)


def _figure(rows: Mapping[str, Row], name: str, field: str) -> float | None:
    return rows[name][field] if name in rows else None


def _ratio(rows: Mapping[str, Row], above: str, below: str, field: str) -> float | None:
    numerator, denominator = _figure(rows, above, field), _figure(rows, below, field)
    if numerator is None or denominator is None:
        return None
    return numerator / denominator
