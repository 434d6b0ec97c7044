"""Bytes that real code gives to its collectives."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Within the block, bytes that this rank gives to each kind of collective are added up.

    Attributes:
        given: name of the operator without underscores at its ends → bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            # What gathers and scatters is given its output first.
            given = args[1] if "gather" in name or "scatter" in name else args[0]
            sizes = [each.nbytes for each in tree_leaves(given) if isinstance(each, Tensor)]
            self.given[name.removeprefix("c10d::").strip("_")] += sum(sizes)
        return func(*args, **(kwargs or {}))
