"""Calls of what the kernel hub's package exports, on our package or on one that was loaded.

Imports torch alone; as a program, `python hub_calls.py VARIANT ENGINE FILE THREADS` loads a build
variant where `fused_prefopt` cannot be imported, and saves what the calls gave.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

S, T, D, V = 4, 11, 16, 67


def metadata_of(variant: Path) -> dict[str, Any]:
    """The metadata of a build variant."""
    return json.loads((variant / "metadata.json").read_text(encoding="utf-8"))


def load(variant: Path) -> ModuleType:
    """The package of a build variant, under its metadata's id, as the hub's loader does it."""
    name = metadata_of(variant)["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs() -> dict[str, Tensor]:
    """Hidden states and heads of a policy and a reference, and labels, a third of them -100."""
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    labels = torch.randint(V, (S, T), generator=generator)
    return {
        "hidden": normal(S, T, D),
        "weight": normal(V, D) / 2,
        "bias": normal(V),
        "ref_hidden": normal(S, T, D),
        "ref_weight": normal(V, D) / 2,
        "labels": labels.masked_fill(torch.rand((S, T), generator=generator) < 0.3, -100),
        "weights": torch.rand((S, T), generator=generator),
    }


def _sequence_logps(of: Any, given: dict[str, Tensor], head: Any, **options: Any) -> dict[str, Any]:
    return vars(of.sequence_logps(given["hidden"], head, given["labels"], **options))


def _weighted(of: Any, given: dict[str, Tensor], head: Any, **options: Any) -> dict[str, Any]:
    return _sequence_logps(of, given, head, token_weights=given["weights"], **options)


def _sequence_kl(of: Any, given: dict[str, Tensor], head: Any, **options: Any) -> dict[str, Any]:
    policy, reference = (given["hidden"], head), (given["ref_hidden"], given["ref_weight"])
    return vars(of.sequence_kl(*policy, *reference, given["labels"], perturbation=0.1, **options))


def _token_logps(of: Any, given: dict[str, Tensor], head: Any, **options: Any) -> dict[str, Any]:
    return {"logps": of.token_logps(given["hidden"], head, given["labels"], **options)}


def _token_policy(of: Any, given: dict[str, Tensor], head: Any, **options: Any) -> dict[str, Any]:
    return vars(of.token_policy(given["hidden"], head, given["labels"], **options))


def _token_statistics(
    of: Any, given: dict[str, Tensor], head: Any, **options: Any
) -> dict[str, Any]:
    return vars(of.token_statistics(given["hidden"], head, given["labels"], **options))


# Name of the function (a second call of it has a suffix) → the call.
CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    "sequence_logps": _sequence_logps,
    "sequence_logps, weighted": _weighted,
    "sequence_kl": _sequence_kl,
    "token_logps": _token_logps,
    "token_policy": _token_policy,
    "token_statistics": _token_statistics,
}


def results(of: Any, call: str, engine: str) -> dict[str, Tensor]:
    """Every tensor that a call returns, and the gradients of all that have one.

    Args:
        of: the package that is called.
        call: one of `CALLS`.
        engine: of the op.
    """
    given = inputs()
    leaves = {name: given[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    head = of.LMHead(given["weight"], given["bias"], softcap=8.0, temperature=0.7)
    found = CALLS[call](of, given, head, engine=engine)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    sums = [value.pow(2).sum() for value in tensors.values() if value.requires_grad]
    if sums:
        gradients = torch.autograd.grad(torch.stack(sums).sum(), list(leaves.values()))
        tensors |= {f"d {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in tensors.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same tensors, to the bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


class _Refused:
    """A finder in front of all others that knows of no `fused_prefopt`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "fused_prefopt":
            raise ImportError(f"{name} is refused")


if __name__ == "__main__":
    sys.meta_path.insert(0, _Refused())
    torch.set_num_threads(int(sys.argv[4]))
    kernel = load(Path(sys.argv[1]))
    torch.save({call: results(kernel, call, sys.argv[2]) for call in CALLS}, sys.argv[3])
    assert not [name for name in sys.modules if name.partition(".")[0] == "fused_prefopt"]
