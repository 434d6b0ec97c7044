"""Which kernels a run of the tests launched, in which dtypes and on what: a plugin, `-p launched`.

At its end each process that ran tests adds a line of JSON to the file that `LAUNCHED` names.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import Any

import pytest

INTERPRETER = "interpreter"
_counts: Counter[tuple[str, str, str]] = Counter()
# What runs the test of now.
_machine = INTERPRETER


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _machine
    params = getattr(getattr(item, "callspec", None), "params", {})
    _machine = str(params.get("machine", INTERPRETER))


def pytest_collection_finish() -> None:
    """Once all that launches has been imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _record_interpreted()
    else:
        _record_executed()


def _record_interpreted() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [getattr(each, "base", each) for each in (*args, *kwargs.values())]
        _count(self.fn.__name__, [str(getattr(each, "dtype", "")) for each in given])
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted


def _record_executed() -> None:
    from emulator import launches

    compiled = launches.compiled

    def counted(launch: Any, target: str) -> Any:
        _count(launch.name, [kind for kind in launch.signature.values() if kind[:1] in "*t"])
        return compiled(launch, target)

    launches.compiled = counted


def _count(kernel: str, kinds: list[str]) -> None:
    """A launch by the narrowest type of its numbers."""
    names = {"bf16": r"bf(loat)?16", "fp16": r"(?<!b)(fp|float)16", "fp32": r"(fp|float)32"}
    text = " ".join(kinds)
    dtype = next((name for name, pattern in names.items() if re.search(pattern, text)), "fp32")
    _counts[kernel, _machine, dtype] += 1


def pytest_sessionfinish() -> None:
    if _counts:
        rows = [[*key, count] for key, count in _counts.items()]
        with open(os.environ["LAUNCHED"], "a", encoding="utf-8") as file:
            file.write(json.dumps(rows) + "\n")
