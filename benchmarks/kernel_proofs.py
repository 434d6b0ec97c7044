"""The part of docs/kernels.md that says what is proven of each kernel, and how."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, Row
from benchmarks.tables import table

PROOFS = RESULTS / "proofs" / "proofs.json"
# Whose code is executed, by the beginning of a machine's name.
_EXECUTED = ("sm_80", "sm_90")
_INTERPRETER = "interpreter"
_LOCK_STEP = "lock step"
_TEXT = """\
## What is proven, and how

Four proofs, each of which sees what the others do not:

- **Interpreted**: Triton's interpreter runs the kernels' Python on CPU tensors, in fp16 and fp32:
  wrong formulas, masks, offsets. It multiplies no bf16 tiles and knows no warps. `make test` leaves
  out those tests of the op and the losses that it executes; `make emulate` does not.
- **Compiled and executed**: the code that Triton makes for an A100 (sm_80) or an H100 (sm_90) is
  run by `tests/support/emulator` on CPU tensors, from the real launchers: the same tests against
  float64. `make test` does so in bf16, `make emulate` in every dtype, with warps in lock step and
  one after the other in several orders; and once more what `make test` does, compiled by the
  Tritons of [compatibility.md](compatibility.md). It sees what a compiler or a launcher gets wrong,
  and a *fault* where a GPU might not: an access out of bounds or misaligned, a barrier that not all
  threads reach, a read of shared memory that nothing has written or that an asynchronous copy has
  not brought yet, a write to what such a copy still reads, two warps at one byte without a barrier
  between them. An instruction that it does not know is an error, never a guess.
- **Compiled and read**: every kernel as it is launched on Llama-3's head, down to the GPU's machine
  code: spills, stack, registers and shared memory (below), for AMD, too.
- **Measured** on a GPU: {measured}

The emulator is tested in `tests/emulator`: each instruction against the PTX ISA, and mistakes
planted in compiled kernels, such as a barrier left out, a wait, a mask, another type of product.
Each has to be noticed, or shown to change nothing; `make emulate` plants them all.

Executed code ends at PTX: what ptxas makes of it is read, but not executed. The order of memory is
modelled no finer than barriers, waits and fences, and time not at all. A tensor core's sum is exact
and rounded once, or cut off as is published of an A100 and an H100
(`tests/support/emulator/cut_off.py`): by that model the bounds of the tests on a GPU grow with the
hidden size (`tests/support/rounding.py`).

Found so: Triton 3.4 and 3.6 compile 16-bit folds that load their tiles by `cp.async`, without
tensor descriptors, for an H100 with no `fence.proxy.async` before `wgmma`, which the PTX ISA asks
for; 3.9 emits it. It was read in the PTX, not seen to go wrong on a GPU.

{origin}

{proofs}

**To read a fault**: it names the kernel, the instruction and the line of the Python that it was
compiled from, `[fold_rows.py:76:5]`. **To run one test**:

```bash
.venv/bin/python -m pytest tests/kernels/test_fold_rows.py -m executed -k NAME  # as make test
EMULATE=gpus .venv/bin/python -m pytest tests/kernels/test_fold_rows.py -m executed -k NAME  # both
EMULATE=all .venv/bin/python -m pytest tests/kernels/test_fold_rows.py -m executed -k NAME
```

**To add an instruction** (`NotImplementedError` names it, and the line that needs it): a line of
the table in `tests/support/emulator/instructions.py`, its pattern, types and function, and a case
against the PTX ISA beside the others in `tests/emulator/`."""


def proofs_section(path: Path, usage: Mapping[str, Any], measured: bool) -> str:
    """What each proof sees, and which kernels have which.

    Args:
        path: of the results of `make emulate`.
        usage: target → content of the compiled kernels' results.
        measured: whether there are results of a GPU.
    """
    said = "the tables of time beside the predictions." if measured else "nothing yet."
    origin, rows = "`make emulate` has not been run: which kernels it launched is not known.", []
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["rows"]
        passed = "; ".join(f"{part}: {count} passed" for part, count in content["passed"].items())
        how = (
            "`make emulate`"
            if content["everything"]
            else "`make emulate ARGS=--quick`: bf16, lock step"
        )
        origin = (
            f"Which kernels were launched, noted by the tests ({passed}) of {how} at "
            f"{content['commit']}, {content['date']}, Triton {content['triton']}. Orders of warps "
            "in brackets."
        )
    return _TEXT.format(measured=said, origin=origin, proofs=_proofs_table(rows, usage))


def _proofs_table(rows: Sequence[Row], usage: Mapping[str, Any]) -> str:
    compiled = {row["kernel"] for content in usage.values() for row in content["rows"]}
    lines = []
    for kernel in sorted(compiled | {row["kernel"] for row in rows}):
        own = [row for row in rows if row["kernel"] == kernel]
        line = [f"`{kernel}`", _dtypes(row for row in own if row["machine"] == _INTERPRETER)]
        line += [_executed(own, target) for target in _EXECUTED]
        line.append(", ".join(t for t, content in usage.items() if _compiles(content, kernel)))
        lines.append([cell or ("no" if rows else "not noted") for cell in line])
    header = ("kernel", "interpreted", *(f"executed, {name}" for name in _EXECUTED))
    return table((*header, "compiled and read"), lines, left=5)


def _executed(rows: Sequence[Row], target: str) -> str:
    """Dtypes, and the orders of warps."""
    own = [row for row in rows if row["machine"].startswith(target)]
    orders = {row["machine"].removeprefix(target).removeprefix("-") for row in own}
    names = [order or _LOCK_STEP for order in sorted(orders)]
    return f"{_dtypes(own)} ({', '.join(names)})" if own else ""


def _dtypes(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row["dtype"] for row in rows}))


def _compiles(content: Mapping[str, Any], kernel: str) -> bool:
    """Whether all cases of a kernel were compiled for a target."""
    statuses = [row["status"] for row in content["rows"] if row["kernel"] == kernel]
    return bool(statuses) and all(status == "ok" for status in statuses)
